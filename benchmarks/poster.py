"""`python -m benchmarks.poster`: the claims of the LS-GAN poster, put to the test.

LS-GAN and LS-GAN-PG train side by side, several seeds each: preset ls-gan-pg-cost-model with and without its penalty,
all else equal (of preset ls-gan, the learning rate and the distribution of z give way), no averaging of the generator.
After every epoch samples are measured against real images that were held out, where the data has such. The claims:

    both learn            each run's best metric is below half of what it was at initialisation
    fewer epochs, own     LS-GAN-PG comes within 10 % of its own best sooner than LS-GAN of its, with most seeds
    fewer epochs, common  the same for within 10 % of the worse one of the two bests of a seed
    levels off            from epoch 11 of 24 to the end LS-GAN-PG falls by less than 10 % of its fall until then
    declines slightly     it ends worse than it was around epoch 11, by less than half

where "around" and "ends" are means over three epochs, and the last two want most seeds. By default everything is small:
grey 32x32 images, narrow nets, an epoch of 4096 images, and with that the batches and the learning rate of preset
ls-gan-pg-mini. `--data celeba:PATH --full` is the poster's own size. Stopped and started again, it goes on where it
was: finished epochs are rows in runs/, and the trainer has a checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import experiments
from benchmarks.claims import OF, PENALISED, PLAIN, TURN, claims, curves
from benchmarks.experiments import Judge, Row, number
from benchmarks.machine import machine
from gpkernels.training import TrainConfig, Trainer, checkpoint, disk, from_preset, pictures
from gpkernels.training.data import ImageSet

SHOWN_EPOCHS = (1, 4, 6)
COLUMNS = 10


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the experiment is; `kid_epochs` None measures KID after every epoch, as it does the others."""

    settings: dict[str, Any]
    samples: dict[str, int]
    kid_epochs: tuple[int, ...] | None = None


SMALL = Scale(
    {"image_size": 32, "ngf": 16, "ndf": 16, "max_images": 4096, "batch_size": 16, "lr": 5e-4, "flip": False},
    {"swd": 2000, "kid_effnetlite0": 500},
    (0, 1, 2, 4, 6, 8, 11, 14, 17, 20, 24),
)
FULL = Scale({"image_size": 64}, {"swd": 10000, "kid_effnetlite0": 10000})


@dataclasses.dataclass(frozen=True)
class Run:
    """One model with one seed, in a folder of its own."""

    model: str
    config: TrainConfig
    folder: Path
    samples: dict[str, int]
    kid_epochs: tuple[int, ...] | None

    def metrics(self, epoch: int) -> list[str]:
        skipped = self.kid_epochs is not None and epoch not in (*self.kid_epochs, self.config.epochs)
        return [name for name in self.samples if name == "swd" or not skipped]

    @property
    def images(self) -> ImageSet:
        return experiments.load(dataclasses.replace(self.config, seed=0, preset="ls-gan-pg", penalty="none"))

    @property
    def rows(self) -> list[Row]:
        return experiments.read(self.folder / "rows.csv")

    @property
    def finished(self) -> bool:
        rows = self.rows
        return bool(rows) and (rows[-1]["epoch"] == str(self.config.epochs) or rows[-1]["status"] != "trained")

    def picture(self, epoch: int) -> Path:
        return self.folder / "samples" / f"epoch_{epoch:04d}.png"


_judges: dict[str, Judge] = {}


def judge(run: Run) -> Judge:
    key = f"{run.config.data} {run.config.image_size} {run.config.max_images} {run.samples}"
    if key not in _judges:
        device = "cuda" if torch.cuda.is_available() and run.config.device != "cpu" else "cpu"
        _judges[key] = Judge(run.images, run.samples, device)
    return _judges[key]


def train(run: Run) -> str:
    """Trains a run to its end or from its checkpoint on, a row an epoch. Returns what to say of it."""
    if run.finished:
        return f"{run.model} seed {run.config.seed}: finished before"
    state = checkpoint.load(run.folder) if checkpoint.held(run.folder) else None
    trainer = Trainer(run.config, run.images, run.folder, resume=state)
    rows: list[dict[str, Any]] = [row for row in run.rows if int(row["step"]) <= trainer.step]
    (run.folder / "samples").mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def add(epoch: int, status: str, losses: dict[str, float]) -> None:
        measured = {}
        if status == "trained":
            pictures.save_grid(run.picture(epoch), trainer.sample(trainer.fixed_z[:COLUMNS]), COLUMNS)
            measured = judge(run)(experiments.sampler(trainer), run.metrics(epoch))
        row = {"model": run.model, "seed": run.config.seed, "epoch": epoch, "step": trainer.step, "status": status}
        row |= {name: measured[name].value if name in measured else "" for name in run.samples}
        row |= {name: losses.get(name, "") for name in ("critic_loss", "generator_loss", "gap", "penalty")}
        rows.append({**row, "seconds": round(time.perf_counter() - started, 1)})
        experiments.write(run.folder / "rows.csv", rows)
        values = ", ".join(f"{name} {result.value:.4g}" for name, result in measured.items())
        print(f"{run.model} seed {run.config.seed} epoch {epoch}/{run.config.epochs}: {values or status}", flush=True)

    if not rows:
        add(0, "trained", {})
    while trainer.step < trainer.total_steps:
        terms = trainer.train_step()
        epoch = trainer.epochs_after(trainer.step)
        over = epoch > trainer.epochs_after(trainer.step - 1)
        if not over and trainer.step % run.config.log_every:
            continue
        if bad := experiments.not_finite(terms):
            add(epoch + (not over), f"diverged: {bad} at step {trainer.step}", {})
            break
        if over:
            add(epoch, "trained", {name: value.item() for name, value in terms.items()})
            trainer.save()
    return f"{run.model} seed {run.config.seed}: done"


def runs(options: argparse.Namespace, names: Sequence[str]) -> list[Run]:
    scale = FULL if options.full else SMALL
    given = {"max_images": options.images, "ngf": options.width, "ndf": options.width, "batch_size": options.batch}
    settings = {**scale.settings, **{name: value for name, value in given.items() if value is not None}}
    settings |= {"data": options.data, "epochs": options.epochs, "device": options.device, "ema": 0.0}
    samples = {name: options.samples or scale.samples[name] for name in names}
    base = from_preset("ls-gan-pg-cost-model", settings)
    key = experiments.digest({**base.to_dict(), "samples": samples, "kid_epochs": scale.kid_epochs})
    found = []
    for seed in range(options.seeds):
        penalised = dataclasses.replace(base, seed=seed)
        plain = dataclasses.replace(penalised, preset="ls-gan", penalty="none")
        for model, config in ((PLAIN, plain), (PENALISED, penalised)):
            folder = options.runs / f"{options.data.partition(':')[0]}-{key}" / f"{model.lower()}-seed{seed}"
            found.append(Run(model, config, folder, samples, scale.kid_epochs))
    return found


def floor_rows(run: Run) -> list[dict[str, Any]]:
    """Training images measured as if they were samples: what a perfect model would get; [] where none are held out."""
    file = run.folder.parent / "real.csv"
    if rows := experiments.read(file):
        return list(rows)
    if judge(run).part == "training":
        return []
    order = torch.randperm(len(run.images.images), generator=torch.Generator().manual_seed(0))

    def draw(n: int) -> torch.Tensor:
        return torch.from_numpy(run.images.images)[order.repeat(-(-n // len(order)))[:n]]

    measured = judge(run)(draw, run.samples)
    blank = dict.fromkeys(run.rows[0], "")
    row = {**blank, "model": "real images", **{name: result.value for name, result in measured.items()}}
    experiments.write(file, [row])
    return [row]


def draw(path: Path, rows: Sequence[Row], tasks: Sequence[Run], title: str) -> None:
    """Curves with the range over the seeds, and both models' samples at epochs 1, 4, 6 and the best one of a seed."""
    from matplotlib.figure import Figure
    from PIL import Image

    names = list(tasks[0].samples)
    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    for axes, metric in zip(upper.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        for model, of_seed in curves(rows, metric).items():
            epochs = sorted({epoch for curve in of_seed.values() for epoch in curve.values})
            each = [[c.values[epoch] for c in of_seed.values() if epoch in c.values] for epoch in epochs]
            (line,) = axes.plot(epochs, [statistics.mean(values) for values in each], marker=".", label=model)
            axes.fill_between(epochs, list(map(min, each)), list(map(max, each)), alpha=0.2, color=line.get_color())
        for row in rows:
            if row["model"] == "real images":
                axes.axhline(number(row[metric]), color="black", linewidth=1, linestyle=":", label=row["model"])
        axes.axvline(tasks[0].config.epochs * TURN / OF, color="grey", linewidth=1, linestyle="--")
        axes.set_yscale("log" if min(number(row[metric] or "inf") for row in rows) > 0 else "linear")
        axes.set_title(f"{metric}: mean and range over the seeds ({len(tasks) // 2})")
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    first = [run for run in tasks if run.config.seed == 0]
    grid = lower.subplots(len(SHOWN_EPOCHS) + 1, len(first), squeeze=False)
    for column, run in enumerate(first):
        curve = curves(rows, names[0])[run.model][0]
        chosen = [*SHOWN_EPOCHS, curve.best_epoch if any(curve.values) else 0]
        for axes, epoch in zip(grid[:, column], chosen, strict=True):
            if run.picture(epoch).is_file():
                with Image.open(run.picture(epoch)) as picture:
                    axes.imshow(picture.convert("RGB"))
            best = " (best)" if axes is grid[-1, column] else ""
            axes.set_title(f"{run.model}, seed 0, epoch {epoch}{best}", fontsize=9)
            axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


def table(rows: Sequence[Row], names: Sequence[str], epochs: int) -> str:
    lines = []
    for metric in names:
        for claim in claims(rows, metric, epochs):
            lines.append(f"{metric:16} {claim.text:22} {'yes' if claim.holds else 'no':4} {claim.numbers}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.poster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", help="as of gpkernels train (default: fashion-mnist where it is found, else lfw-mini)"
    )
    parser.add_argument("--full", action="store_true", help="64x64, width 64, all images: with --data celeba:PATH")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, default=OF)
    parser.add_argument("--images", type=int, help="only the first this many: an epoch's length")
    parser.add_argument("--width", type=int, help="of both nets")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--samples", type=int, help="how many each measurement draws")
    parser.add_argument("--metrics", help="swd, or swd,kid_effnetlite0 (default: what is installed)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, help="processes (default: the cores; 1 on a GPU)")
    parser.add_argument("--runs", type=Path, default=Path("runs/poster"), help="where runs are kept, to go on with")
    parser.add_argument("--out", type=Path, help="results, without .csv and .png (default: in --runs)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.data = experiments.found_data(options.data)
    names = options.metrics.split(",") if options.metrics else experiments.found_metrics()
    tasks = runs(options, names)
    plain, penalised = (run.config.to_dict() for run in tasks[:2])
    differing = [f"{key} {value} / {penalised[key]}" for key, value in plain.items() if value != penalised[key]]
    images = tasks[0].images
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    jobs = options.jobs or (1 if on_gpu else min(len(tasks), experiments.cores()))
    print(f"{PLAIN} / {PENALISED} differ in: {'; '.join(differing)}")
    print(f"{images.name}: {len(images.images)} images, {len(tasks)} runs of {options.epochs} epochs, {jobs} at a time")
    for text in experiments.outcomes(train, tasks, jobs):
        print(text, flush=True)
    about = {"data": images.name, "measured_on": judge(tasks[0]).part}
    about |= {name: penalised[name] for name in ("image_size", "ngf", "batch_size", "max_images")}
    about |= {f"n_{name}": n for name, n in tasks[0].samples.items()} | machine(torch.device("cpu"))
    found = [*(row for run in tasks for row in run.rows), *floor_rows(tasks[0])]
    out = options.out or tasks[0].folder.parent / experiments.results_name("poster", images)
    csv_file, png_file = (out.with_name(out.name + ending) for ending in (".csv", ".png"))
    experiments.write(csv_file, [{**row, **about} for row in found])
    rows = experiments.read(csv_file)
    print(table(rows, names, options.epochs))
    size = about["image_size"]
    draw(png_file, rows, tasks, f"{images.name}, {size}x{size}, measured on {about['measured_on']} images")
    print(f"{csv_file}\n{png_file}")


if __name__ == "__main__":
    main()
