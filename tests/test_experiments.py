"""The experiments: interrupted and resumed to the same numbers, claims from rows by hand, what diverges is recorded."""

import dataclasses
import math
from pathlib import Path

import pytest
import trees
from PIL import Image
from results import numbers, table
from threads import one_thread  # noqa: F401

from gpkernels.training import Learner, from_preset

ROOT = Path(__file__).parent.parent
SMALL = ["--data", "lfw-mini", "--metrics", "swd", "--seeds", "2", "--epochs", "2", "--width", "2", "--batch", "64"]
SMALL += ["--samples", "100", "--jobs", "1", "--device", "cpu"]


def small_epochs(monkeypatch):
    """400 images an epoch: 6.25 steps."""
    monkeypatch.setattr("gpkernels.training.data.lfw._PASSES", 4)


def test_poster_goes_on_to_the_same_numbers(module, tmp_path, counted_steps, monkeypatch, capsys):
    poster = module("poster")
    small_epochs(monkeypatch)
    monkeypatch.setattr(poster, "draw", lambda *args: None)

    def run(name):
        poster.main([*SMALL, "--runs", str(tmp_path / name), "--out", str(tmp_path / name / "results")])
        return table(tmp_path / name / "results.csv")

    whole = run("whole")
    steps = counted_steps["steps"]
    assert steps == 2 * 2 * 13
    assert [(row["model"], row["seed"], row["epoch"]) for row in whole] == [
        (model, seed, epoch) for seed in "01" for model in ("LS-GAN", "LS-GAN-PG") for epoch in "012"
    ]
    assert len({row["swd"] for row in whole if row["epoch"] == "2"}) == 4  # models and seeds differ
    assert whole[0]["swd"] == whole[3]["swd"]  # models begin alike
    assert all(float(row["swd"]) > 0 for row in whole)
    output = capsys.readouterr().out
    assert "differ in: preset ls-gan / ls-gan-pg-cost-model; penalty none / ls_gan_pg\n" in output
    assert "swd              both learn" in output

    run("whole")
    assert counted_steps["steps"] == steps  # nothing is trained twice
    assert capsys.readouterr().out.count("finished before") == 4

    counted_steps.update(steps=0, limit=13 + 7 + 3)  # one run, an epoch of the next and half of another
    with pytest.raises(KeyboardInterrupt):
        run("interrupted")
    (folder,) = (tmp_path / "interrupted").glob("lfw-mini-*")
    assert [len(table(folder / f"{model}-seed0" / "rows.csv")) for model in ("ls-gan", "ls-gan-pg")] == [3, 2]
    counted_steps.update(steps=0, limit=math.inf)
    assert numbers(run("interrupted"), "seconds") == numbers(whole, "seconds")
    assert counted_steps["steps"] == steps - 13 - 7


def test_poster_at_its_own_size(module):
    """The penalty is the only difference, and the rest is that of the poster's preset; folders never mix."""
    poster = module("poster")
    full = ["--data", "celeba:faces", "--full", "--seeds", "1"]
    plain, penalised = poster.runs(poster.parse(full), ["swd"])
    wanted = from_preset("ls-gan-pg-cost-model", {"data": "celeba:faces", "image_size": 64, "ema": 0.0})
    assert penalised.config == wanted
    assert plain.config == dataclasses.replace(wanted, preset="ls-gan", penalty="none")
    assert penalised.metrics(5) == ["swd"]
    others = [
        poster.runs(poster.parse([*full, *more]), ["swd"])[0] for more in ([], ["--width", "8"], ["--batch", "8"])
    ]
    assert len({run.folder.parent for run in others}) == 3
    small, *_ = poster.runs(poster.parse(["--data", "lfw-mini"]), ["swd", "kid_effnetlite0"])
    assert [len(small.metrics(epoch)) for epoch in (0, 5, 11, 23, 24)] == [2, 1, 2, 1, 2]


def test_poster_at_its_own_size_on_celeba(module, tmp_path, capsys):
    """From photographs to the picture, with nothing but the nets, the batch and the epochs made small."""
    poster, root = module("poster"), trees.celeba(tmp_path, 330)
    small = ["--width", "2", "--batch", "22", "--samples", "100", "--epochs", "2", "--seeds", "1", "--metrics", "swd"]
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out/results"), "--jobs", "1"]
    poster.main(["--data", f"celeba:{root}", "--full", *small, *where, "--device", "cpu"])
    rows = table(tmp_path / "out/results.csv")
    assert [(row["model"], row["epoch"], row["step"]) for row in rows[:-1]] == [
        (model, str(epoch), str(5 * epoch)) for model in ("LS-GAN", "LS-GAN-PG") for epoch in range(3)
    ]
    assert rows[-1]["model"] == "real images"  # what a perfect model would get, far below noise
    assert float(rows[-1]["swd"]) < min(float(row["swd"]) for row in rows[:-1])
    assert {(row["image_size"], row["measured_on"], row["n_swd"]) for row in rows} == {("64", "held-out", "100")}
    with Image.open(tmp_path / "out/results.png") as picture:
        assert picture.width > 1000
    (grid,) = (tmp_path / "runs").glob("*/ls-gan-pg-seed0/samples/epoch_0002.png")
    with Image.open(grid) as picture:
        assert picture.size == (10 * 64, 64)
        assert picture.mode == "RGB"
    assert "LS-GAN-PG best/initial" in capsys.readouterr().out


def test_poster_records_what_diverges(module, tmp_path, monkeypatch):
    poster = module("poster")
    step = Learner.train_step

    def diverging(self):
        terms = step(self)
        bad = self.step == 10 and self.config.penalty == "none" and self.config.seed == 1
        return {**terms, "gap": terms["gap"] * math.nan} if bad else terms

    monkeypatch.setattr(Learner, "train_step", diverging)
    small_epochs(monkeypatch)
    poster.main([*SMALL, "--runs", str(tmp_path), "--out", str(tmp_path / "results")])
    of_run = [row for row in table(tmp_path / "results.csv") if (row["model"], row["seed"]) == ("LS-GAN", "1")]
    assert [row["status"] for row in of_run] == ["trained", "trained", "diverged: gap is nan at step 10"]
    assert of_run[-1]["swd"] == ""
    learn, *others = poster.claims(table(tmp_path / "results.csv"), "swd", 2)
    assert not learn.holds
    assert others[0].numbers.count(" and ") == 2  # the names, and the one seed with two whole runs
    with Image.open(tmp_path / "results.png") as picture:
        assert min(picture.size) > 500
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 20


def rows_of(curves):
    """{(model, seed): values from epoch 0 on} as rows."""
    return [
        {
            "model": model,
            "seed": str(seed),
            "epoch": str(epoch),
            "status": "trained",
            "swd": "" if v is None else str(v),
        }
        for (model, seed), values in curves.items()
        for epoch, v in enumerate(values)
    ]


def flat(first, *values, length=24):
    """A curve that keeps the last of `values`."""
    return [first, *values, *[values[-1]] * (length - len(values))]


CLAIMS = {
    "as the poster": (
        {
            ("LS-GAN", 0): flat(1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2),
            ("LS-GAN-PG", 0): flat(1.0, 0.5, 0.22, *[0.2] * 10, 0.21),
        },
        ["yes", "yes", "yes", "yes", "yes"],
        ["LS-GAN best/initial 0.200 to 0.200", ": 6 and 2", ": 6 and 2", "0.2000 then 0.2100", "best epochs 3"],
    ),
    "nothing of it": (
        {
            ("LS-GAN", 0): flat(1.0, 0.3),
            ("LS-GAN-PG", 0): [1.0 - 0.02 * epoch for epoch in range(25)],
        },
        ["no", "no", "no", "no", "no"],
        ["LS-GAN-PG best/initial 0.520 to 0.520", ": 1 and 22", ": 1 and 22", "0.7800 then 0.5400", "best epochs 24"],
    ),
    "sooner, and worse": (  # its own best sooner, that of both never sooner
        {
            ("LS-GAN", 0): flat(1.0, 0.4, 0.3, 0.2, 0.1),
            ("LS-GAN-PG", 0): flat(1.0, 0.45, 0.4),
        },
        ["yes", "yes", "no", "yes", "no"],
        ["0.400", ": 4 and 2", ": 1 and 2", "0.4000 then 0.4000", "with 0 of 1"],
    ),
    "collapses": (  # which is not a slight decline
        {("LS-GAN", 0): flat(1.0, 0.2), ("LS-GAN-PG", 0): flat(1.0, *[0.2] * 15, 0.9)},
        ["yes", "no", "no", "yes", "no"],
        ["", ": 1 and 1", ": 1 and 1", "0.2000 then 0.9000", "with 0 of 1"],
    ),
    "most of three seeds": (
        {
            **{("LS-GAN", seed): flat(1.0, 0.3, 0.2) for seed in range(3)},
            **{("LS-GAN-PG", seed): flat(1.0, 0.2) for seed in range(2)},
            ("LS-GAN-PG", 2): flat(1.0, 0.5, 0.4, 0.3, 0.2),
        },
        ["yes", "yes", "yes", "yes", "no"],
        ["", ": 2 and 1, 2 and 1, 2 and 4", ": 2 and 1, 2 and 1, 2 and 4", "", ""],
    ),
    "measured now and then": (
        {
            ("LS-GAN", 0): [1.0, 0.5, None, None, 0.2, *[None] * 19, 0.2],
            ("LS-GAN-PG", 0): [1.0, None, 0.2, *[None] * 8, 0.19, *[None] * 12, 0.2],
        },
        ["yes", "yes", "yes", "yes", "yes"],
        ["", ": 4 and 2", ": 4 and 2", "0.1900 then 0.2000", "best epochs 11"],
    ),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_by_hand(module, name):
    curves, wanted, texts = CLAIMS[name]
    found = module("claims").claims(rows_of(curves), "swd", 24)
    assert [claim.text for claim in found] == [
        "both learn",
        "fewer epochs, own",
        "fewer epochs, common",
        "levels off",
        "declines slightly",
    ]
    assert ["yes" if claim.holds else "no" for claim in found] == wanted
    for claim, text in zip(found, texts, strict=True):
        assert text in claim.numbers


def grid_options(folder, *more):
    where = ["--runs", str(folder), "--out", str(folder / "results")]
    return ["--quick", "--steps", "4", "--width", "2", "--samples", "100", "--jobs", "1", *where, *more]


def test_grid_keeps_finished_cells(module, tmp_path, counted_steps, monkeypatch, capsys):
    grid = module("grid")
    monkeypatch.setattr(grid, "draw", lambda *args: None)
    probe = 6  # steps that the estimate takes

    grid.main(grid_options(tmp_path / "whole"))
    whole = table(tmp_path / "whole" / "results.csv")
    assert counted_steps["steps"] == 12 * 4 + probe
    assert len({(row["loss"], row["penalty"], row["form"], row["spectral_norm"]) for row in whole}) == 12
    assert len({row["swd"] for row in whole}) > 8  # at first a penalty of gradients of 1e-4 may change no bit
    assert len({row["swd_initial"] for row in whole}) == 1
    assert all(float(row["of_initial"]) == float(row["swd"]) / float(row["swd_initial"]) for row in whole)
    assert "12 to train, 1 at a time: about 0." in capsys.readouterr().out

    counted_steps.update(steps=0, limit=probe + 3 * 4 + 2)
    with pytest.raises(KeyboardInterrupt):
        grid.main(grid_options(tmp_path / "interrupted"))
    counted_steps.update(steps=0, limit=math.inf)
    grid.main(grid_options(tmp_path / "interrupted"))
    assert "12 cells, 3 finished before" in capsys.readouterr().out
    assert counted_steps["steps"] == probe + 9 * 4
    assert numbers(table(tmp_path / "interrupted" / "results.csv"), "seconds") == numbers(whole, "seconds")


def test_grid_records_what_diverges(module, tmp_path, monkeypatch, capsys):
    grid = module("grid")
    build = grid.Cell.config

    def config(cell, base):  # one cell with a learning rate that no critic survives
        made = build(cell, base)
        bad = cell.name == "wasserstein / none / no spectral norm"
        return grid.dataclasses.replace(made, lr=1e30) if bad else made

    monkeypatch.setattr(grid.Cell, "config", config)
    grid.main(grid_options(tmp_path, "--only", "wasserstein / none"))
    bad, good = table(tmp_path / "results.csv")
    assert bad["status"].startswith("diverged: ")
    assert bad["swd"] == bad["of_initial"] == ""
    assert good["status"] == "trained"
    assert float(good["swd"]) > 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("none ")] == ["1", "0"]
    with Image.open(tmp_path / "results.png") as picture:
        assert (255, 0, 0) in (colour for _, colour in picture.convert("RGB").getcolors(2**24))  # the cross


def test_grid_without_a_cell_says_so(module, tmp_path, capsys):
    with pytest.raises(SystemExit):
        module("grid").main(grid_options(tmp_path, "--only", "no such loss"))
    assert "wanted an expression that a cell's name matches, got 'no such loss'" in capsys.readouterr().err


def test_grid_is_every_kind_form_and_loss(module):
    grid = module("grid")
    names = [penalty.name for penalty in grid.PENALTIES_TRIED]
    assert len(set(names)) == len(names) == 1 + 6 * 6
    assert set(grid.REDUCED) < set(names)
    assert len(grid.REDUCED) == len(set(grid.REDUCED)) == 7
    settings = {penalty.name: penalty.settings for penalty in grid.PENALTIES_TRIED}
    assert settings["r1 squared"]["penalty_form"] is None
    assert settings["r1 linear"]["penalty_form"] == "linear"
    assert settings["ls_gan_pg linear"] == {"penalty": "ls_gan_pg", "penalty_form": None}


def test_workers_share_the_work(module):
    experiments = module("experiments")
    assert sorted(experiments.outcomes(abs, [-3, 2, -1], 2)) == [1, 2, 3]
