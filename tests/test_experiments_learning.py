"""The experiments on learning: presets before and after, and what images without a label add, step by step by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import trees
from results import numbers, table
from threads import one_thread  # noqa: F401

from gpkernels.training import ImageSet, Learner, data, from_preset
from gpkernels.training.models import ClassifierCritic


def test_presets_before_and_after(module, tmp_path, counted_steps, monkeypatch, capsys):
    """A row each, kept from run to run; what diverges is recorded, and other settings are another folder."""
    presets, root = module("presets"), trees.fashion(tmp_path / "clothes", 128, 120)
    step = Learner.train_step

    def diverging(self):
        terms = step(self)
        return {**terms, "gap": terms["gap"] * math.nan} if self.config.preset == "gan" else terms

    monkeypatch.setattr(Learner, "train_step", diverging)
    options = ["--data", f"fashion-mnist:{root}", "--width", "2", "--samples", "100", "--metrics", "swd"]
    options += ["--jobs", "1", "--device", "cpu", "--runs", str(tmp_path / "runs"), "--presets", "cls-gan,gan,wgan"]
    presets.main([*options, "--out", str(tmp_path / "results.csv")])
    rows = {row["preset"]: row for row in table(tmp_path / "results.csv")}
    assert list(rows) == ["cls-gan", "gan", "wgan"]
    assert [row["status"] for row in rows.values()] == ["trained", "diverged: gap is nan at step 1", "trained"]
    assert [row["steps"] for row in rows.values()] == ["2", "1", "1"]  # batches of 64, of which wgan takes 5 a step
    assert 0 < float(rows["cls-gan"]["classification_error"]) <= 1
    assert rows["wgan"]["classification_error"] == rows["gan"]["swd_after"] == ""
    assert float(rows["wgan"]["swd_after"]) > 0
    assert rows["wgan"]["measured_on"] == "held-out"
    before = f"{float(rows['wgan']['swd_before']):.3f}, {float(rows['wgan']['swd_after']):.3f}"
    assert f"| wgan | 1 | {before} |" in capsys.readouterr().out
    counted_steps["steps"] = 0
    presets.main(options)
    assert counted_steps["steps"] == 0
    presets.main([*options[:-1], "wgan", "--seed", "1"])
    assert counted_steps["steps"] == 1


def test_presets_by_hand(module):
    """What falls, by how much, and what does not, a diverged one included."""
    presets = module("presets")
    numbers = {"ls-gan": (0.8, 0.2, 0.3, 0.2), "wgan": (0.8, 0.5, 0.3, 0.4), "r1": (0.8, "", 0.3, "")}
    names = ("swd_before", "swd_after", "kid_before", "kid_after")
    rows = [
        {"preset": name, "steps": "9", "status": "trained", **dict(zip(names, map(str, values), strict=True))}
        for name, values in numbers.items()
    ]
    rows[2]["status"] = "diverged: gap is nan at step 9"
    for row, wrong in zip(rows, ("0.125", "", ""), strict=True):
        row["classification_error"] = wrong
    assert presets.reading(rows) == (
        "swd falls with 2 of 3 presets, below half with 1, not with r1. "
        "kid falls with 1 of 3 presets, below half with 0, not with wgan, r1."
    )
    assert presets.reading(rows[:1]) == (
        "swd falls with 1 of 1 presets, below half with 1. kid falls with 1 of 1 presets, below half with 0."
    )
    assert presets.table(rows).splitlines()[2:] == [
        "| ls-gan | 9 | 0.800, 0.200 | 0.300, 0.200 | 12.5% |",
        "| wgan | 9 | 0.800, 0.500 | 0.300, 0.400 | - |",
        "| r1 | 9 | diverged: gap is nan at step 9 | diverged: gap is nan at step 9 | - |",
    ]


def test_labels_table_by_hand(module):
    labels = module("labels")
    rows = [
        {"model": model, "seed": seed, "lr": lr, "confidence": sure, "step": "100", "validation_error": "0.2"}
        | {"test_error": test}
        for model, seed, lr, sure, test in (
            ("labels alone", "0", "0.001", "", "0.3"),
            ("labels alone", "1", "0.003", "", "0.2"),
            ("self-training", "0", "0.001", "0.8", "0.25"),
            ("self-training", "0", "0.003", "0.8", ""),
            ("self-training", "1", "0.001", "0.8", "0.26"),
            ("cls-gan-semi", "0", "0.001", "0.95", "0.1"),
            ("cls-gan-semi", "1", "0.001", "0.95", "0.1"),
        )
    ]
    rows[4]["step"] = "400"
    assert labels.table(rows).splitlines()[2:] == [
        "| labels alone | 1 x 0.001, 1 x 0.003 | 100 to 100 | 20.0% | 25.0%, 20.0% to 30.0% | - |",
        "| self-training | 2 x 0.001/0.8 | 100 to 400 | 20.0% | 25.5%, 25.0% to 26.0% | 1 of 2 |",
        "| cls-gan-semi | 2 x 0.001/0.95 | 100 to 100 | 20.0% | 10.0%, 10.0% to 10.0% | 2 of 2 |",
    ]


def label_options(root, folder, *more):
    options = [
        "--data",
        f"fashion-mnist:{root}",
        "--labels",
        "20",
        "--validation",
        "30",
        "--steps",
        "3",
        "--seeds",
        "2",
    ]
    return [*options, "--width", "2", "--batch", "8", "--jobs", "1", "--runs", str(folder / "runs"), *more]


def test_labels_chooses_by_validation_and_tests_once(module, tmp_path, counted_steps, capsys):
    labels, root = module("labels"), trees.fashion(tmp_path / "clothes", 160, 40)
    options = label_options(root, tmp_path, "--out", str(tmp_path / "results.csv"))
    labels.main(options)
    rows, models = table(tmp_path / "results.csv"), ("labels alone", "self-training", "cls-gan-semi")
    assert [(row["model"], row["seed"], row["step"]) for row in rows] == [
        (model, seed, step) for seed in "01" for model in models for step in "123" * 2
    ]
    tried = {(row["model"], row["lr"], row["confidence"]) for row in rows}
    assert tried == {("labels alone", lr, "") for lr in ("0.0003", "0.001")} | {
        (model, "0.001", sure) for model in models[1:] for sure in ("0.8", "0.95")
    }
    for model in models:
        for seed in "01":
            of = [row for row in rows if (row["model"], row["seed"]) == (model, seed)]
            (chosen,) = (row for row in of if row["test_error"])
            errors = [float(row["validation_error"]) for row in of]
            assert of.index(chosen) == errors.index(min(errors))
    tested = [float(row["test_error"]) for row in rows if row["test_error"] and row["model"] == "self-training"]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| self-training |"))
    assert f"| {sum(tested) / 2:.1%}, {min(tested):.1%} to {max(tested):.1%} |" in line

    steps = counted_steps["steps"]
    next((tmp_path / "runs").glob("*/labels-alone-seed1.csv")).unlink()
    labels.main(options)  # trains nothing but what is missing
    assert counted_steps["steps"] == steps == 2 * 2 * 3
    assert numbers(table(tmp_path / "results.csv"), "seconds") == numbers(rows, "seconds")


def of_classes(y, held_out=None):
    pixels = torch.randint(0, 256, (len(y), 1, 32, 32), dtype=torch.uint8)
    return ImageSet.from_arrays(pixels, y, list("abcdefghij"), held_out)


def test_labels_measures_the_chosen_critic_on_the_images_held_out(module, monkeypatch):
    """With steps that do nothing but turn the critic's answer, whatever the image, from class to class."""
    labels = module("labels")
    config = from_preset("cls-gan-semi", {"labels": 20, "steps": 10, "ndf": 2})
    classes = torch.arange(10)
    images = of_classes(classes.repeat(16), of_classes(classes.repeat_interleave(classes + 1)))
    monkeypatch.setattr(labels.experiments, "load", lambda base: images)

    def answer(learner):
        torch.nn.init.constant_(learner.critic.head.weight, learner.step)
        learner.step += 1

    def guess(critic, x):
        return -(torch.arange(10) - critic.head.weight.flatten()[0].detach()).abs().expand(len(x), 10)

    monkeypatch.setattr(ClassifierCritic, "guess", guess)
    monkeypatch.setattr(labels, "STEPS", {"labels alone": answer})
    rows = labels.train(labels.Task("labels alone", config, config, 30))
    part = labels.split(images, 30)
    wrong, wrong_test = ([float(np.mean(found.held_out().labels != y)) for y in range(10)] for found in (part, images))
    best = wrong.index(min(wrong))
    assert best != 9  # where both the last step and the choice by test images are
    assert [row["validation_error"] for row in rows] == 2 * wrong
    assert [(row["step"], row["test_error"]) for row in rows if row["test_error"]] == [(best + 1, wrong_test[best])]


def test_labels_trains_on_nothing_to_choose_by(module):
    labels = module("labels")
    images = of_classes(torch.arange(160) // 16)
    part, again = labels.split(images, 30), labels.split(images, 30)
    held_out = part.held_out()
    assert (len(part.images), len(held_out.images)) == (130, 30)
    whole, *parts = (
        {image.tobytes(): y for image, y in zip(some.images, some.labels, strict=True)}
        for some in (images, part, held_out)
    )
    assert parts[0] | parts[1] == whole  # with the labels that they had
    assert sum(map(len, parts)) == len(whole) == 160  # and none in both
    assert set(held_out.labels) == set(range(10))
    assert (part.images == again.images).all()


def test_labels_wants_held_out_images_and_some_to_choose_by(module, tmp_path, capsys):
    labels, root = module("labels"), trees.fashion(tmp_path / "clothes", 160, 40)
    for options, text in (
        (["--data", "lfw-mini"], "--data: wanted data with labels and held-out images, got lfw-mini"),
        (["--data", f"fashion-mnist:{root}", "--validation", "160"], "--validation: wanted 1 to 159 images, got 160"),
    ):
        with pytest.raises(SystemExit):
            labels.main(options)
        assert text in capsys.readouterr().err


@pytest.mark.parametrize("model", ["labels alone", "self-training"])
def test_labels_steps_by_hand(module, tmp_path, model):
    """Both begin like cls-gan-semi and see its images; alone is cross-entropy on those with a label."""
    labels, root = module("labels"), trees.fashion(tmp_path / "clothes", 60, 40)
    settings = {"data": f"fashion-mnist:{root}", "labels": 20, "batch_size": 8, "ndf": 2, "unlabelled_weight": 0.7}
    config = from_preset("cls-gan-semi", settings)
    images = data.load(config)
    twin = Learner(config, images)
    real = images.batch(config, 0, torch.Generator())
    y = images.batch_labels(config, 0)[0]
    probability, guess = twin.critic.guess(real).softmax(1).max(1)
    sure = probability[1::2].median().item()
    run = Learner(dataclasses.replace(config, unlabelled_confidence=sure), images)
    labels.STEPS[model](run)
    losses = twin.critic(real[::2], y[::2])  # even places have a label, and L(x, y) is the cross-entropy
    loss = losses.mean()
    if model == "self-training":
        counts = probability[1::2] >= sure
        assert 0 < counts.sum() < 4
        losses = twin.critic(real, torch.stack([y[::2], guess[1::2]], 1).flatten())
        loss = (losses[::2].sum() + 0.7 * losses[1::2][counts].sum()) / 8
    gradients = torch.autograd.grad(loss, list(twin.critic.parameters()))
    for parameter, gradient in zip(run.critic.parameters(), gradients, strict=True):
        moment = run.optimizers["critic"].state[parameter]["exp_avg"]
        torch.testing.assert_close(moment, 0.5 * gradient, rtol=1e-4, atol=1e-7)
