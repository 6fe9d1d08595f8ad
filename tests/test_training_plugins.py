"""Nets, losses and data of a program's own in the trainer."""

import json
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from small_runs import stopped_after
from threads import one_thread  # noqa: F401
from torch import nn

import gpkernels as gp
from gpkernels import cli
from gpkernels.errors import UserError
from gpkernels.training import TrainConfig, Trainer, checkpoint, data
from gpkernels.training.objective import CriticLoss

SMALL = {"ngf": 4, "ndf": 4, "batch_size": 4, "nz": 8, "log_every": 1, "steps": 4}
SIZE = 12  # which no net of the package has


class MyGenerator(nn.Module):
    def __init__(self, nz=8, channels=1, size=SIZE, classes=0):
        super().__init__()
        self.shape = (channels, size, size)
        self.embed = nn.Embedding(classes, nz) if classes else None
        self.layers = nn.Sequential(
            nn.Linear(nz, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, channels * size * size), nn.Tanh()
        )

    def forward(self, z, y=None):
        if self.embed is not None:
            z = z * self.embed(y)
        return self.layers(z).view(-1, *self.shape)


class MyCritic(nn.Module):
    def __init__(self, channels=1, size=SIZE, classes=0):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 16), nn.Dropout(0.1), nn.SiLU())
        self.head = nn.Linear(16, classes or 1)

    def forward(self, x, y=None):
        scores = self.head(self.layers(x))
        return scores if y is None else scores.gather(1, y[:, None])


class MyObjective:
    """Least squares, with a term of its own."""

    needs_real = False

    def critic(self, real_scores, fake_scores, batch, fake):
        loss = (real_scores - 1).square().mean() + fake_scores.square().mean()
        return CriticLoss(loss, {"mine": loss.detach() * 2})

    def generator(self, fake_scores, real_scores):
        return (fake_scores - 1).square().mean()


@pytest.fixture(scope="module")
def images():
    pixels = torch.randint(0, 256, (16, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = np.arange(16, dtype=np.int64) % 3
    return data.ImageSet("mine", pixels.numpy(), labels=labels, class_names=("a", "b", "c"))


def trainer(images, out, *, resume=None, callbacks=(), given=None, **changed):
    run = Trainer(TrainConfig(**{**SMALL, **changed}), images, out, resume=resume, **(given or {}))
    run.callbacks = callbacks
    return run


def mine(seed=0):
    torch.manual_seed(seed)
    return {"generator": MyGenerator(), "critic": MyCritic(), "objective": MyObjective()}


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_nets_and_loss_of_ones_own_train(images, tmp_path):
    """The modules themselves, with any penalty; the terms of the loss are in the log."""
    given = mine()
    before = {name: [p.clone() for p in given[name].parameters()] for name in ("generator", "critic")}
    run = trainer(images, tmp_path, given=given, penalty="coupled", penalty_axes="sample")
    assert run.run()
    assert (run.generator, run.critic) == (given["generator"], given["critic"])
    for name, old in before.items():
        assert not any(torch.equal(a, b) for a, b in zip(old, given[name].parameters(), strict=True))
    for record in log(tmp_path):
        assert record["mine"] == pytest.approx(2 * (record["critic_loss"] - record["penalty"]), rel=1e-4)
    assert run.sample(run.fixed_z).shape == (64, 1, SIZE, SIZE)


def test_a_resumed_run_of_ones_own_nets_ends_with_the_same_bits(images, tmp_path):
    """Dropout and all; fresh modules get the weights of the checkpoint."""
    trainer(images, tmp_path / "whole", given=mine()).run()
    stopped_after(trainer(images, tmp_path / "cut", given=mine()), 2).run()
    state = checkpoint.load(tmp_path / "cut")
    trainer(images, tmp_path / "cut", given=mine(seed=9), resume=state).run()
    assert (tmp_path / "cut/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()
    whole, cut = (checkpoint.load(tmp_path / name) for name in ("whole", "cut"))
    for net in ("generator", "ema", "critic"):
        assert all(torch.equal(value, cut[net][name]) for name, value in whole[net].items())


def test_a_checkpoint_of_ones_own_generator_wants_it_again(images, tmp_path, capsys):
    run = trainer(images, tmp_path, given=mine())
    run.run()
    name = f"{__name__}.MyGenerator"
    with pytest.raises(
        UserError, match=re.escape(f"the run's generator is {name} of its program: wanted it, got none")
    ):
        checkpoint.load_generator(tmp_path)
    loaded, config, step = checkpoint.load_generator(tmp_path, MyGenerator())
    assert (config, step) == (run.config, 4)
    assert torch.equal(loaded(run.fixed_z), run.ema(run.fixed_z))
    with pytest.raises(UserError, match="its generator is of another architecture"):
        checkpoint.load_generator(tmp_path, MyGenerator(size=8))
    for command in ("sample", "evaluate", "report"):
        assert cli.main([command, str(tmp_path)]) == 2
        errors = capsys.readouterr().err
        assert name in errors
        assert "the commands cannot; in Python, checkpoint.load_generator takes generator=" in errors
    trainer(data.load(TrainConfig()), tmp_path / "own").save()
    with pytest.raises(UserError, match="its generator is the one its config names: wanted none, got MyGenerator"):
        checkpoint.load_generator(tmp_path / "own", MyGenerator())


@pytest.mark.parametrize("left_out", ["generator", "critic", "objective"])
def test_a_run_is_resumed_with_what_it_was_started_with(images, tmp_path, left_out):
    pixels = data.ImageSet("32", np.zeros((8, 1, 32, 32), np.uint8))
    given = {"generator": MyGenerator(size=32), "critic": MyCritic(size=32), "objective": MyObjective()}
    run = trainer(pixels, tmp_path, given=given)
    run.train_step()
    run.save()
    state = checkpoint.load(tmp_path)
    rest = {name: what for name, what in given.items() if name != left_out}
    wanted = f"{left_out}: wanted {__name__}.My{left_out.title()}, which the run was started with, got none"
    with pytest.raises(UserError, match=re.escape(wanted)):
        trainer(pixels, tmp_path, given=rest, resume=state)


def test_something_of_ones_own_is_refused_where_the_run_had_none(tmp_path):
    faces = data.load(TrainConfig())
    run = trainer(faces, tmp_path)
    run.save()
    state = checkpoint.load(tmp_path)
    with pytest.raises(UserError, match=r"objective: wanted none: its config names it, got gpkernels\.losses"):
        trainer(faces, tmp_path, given={"objective": gp.losses.loss("hinge")}, resume=state)


@pytest.mark.parametrize(
    ("objective", "config"),
    [
        (gp.losses.loss("hinge"), {"loss": "hinge"}),
        (gp.losses.loss("relativistic-average"), {"loss": "relativistic-average"}),
        (gp.losses.compose("mine", "-(y - 1)^2", "-y^2", "(y - 1)^2"), {"loss": "least-squares"}),
        (gp.losses.LossSensitive(margin=0.01, gamma=0.5), {"margin": 0.01, "gamma": 0.5}),
    ],
)
def test_losses_of_the_package_given_as_objects_are_those_of_the_config(tmp_path, objective, config):
    faces = data.load(TrainConfig())
    by_name, by_object = (
        trainer(faces, tmp_path, **settings, given=given)
        for settings, given in ((config, {}), ({}, {"objective": objective}))
    )
    for _ in range(2):
        terms, wanted = by_object.train_step(), by_name.train_step()
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6)


def test_labels_reach_nets_of_ones_own(images, tmp_path):
    given = {"generator": MyGenerator(classes=3), "critic": MyCritic(classes=3)}
    run = trainer(images, tmp_path, given=given, condition="projection", loss="hinge")
    assert run.run()
    samples = run.sample(torch.ones(6, 8))
    torch.testing.assert_close(samples[:3], samples[3:])
    assert not torch.equal(samples[0], samples[1])


def test_spectral_norm_is_for_a_critic_of_ones_own_too(images, tmp_path):
    given = mine()
    run = trainer(images, tmp_path, given=given, spectral_norm=True, steps=30, log_every=30)
    run.run()
    weights = [m.weight for m in given["critic"].modules() if isinstance(m, nn.Linear)]
    assert [torch.linalg.matrix_norm(w, 2).item() for w in weights] == pytest.approx([1.0, 1.0], abs=0.05)


class Noisy(nn.Module):
    """Draws in eval mode too, as some generators do."""

    def forward(self, x):
        return x + torch.rand_like(x)


def test_the_dry_batch_changes_nothing(images, tmp_path):
    given = mine()
    given["critic"].layers.append(Noisy())
    given["critic"].layers[2].eval()  # one of the modes a module may have, inside of another
    before = {name: {k: v.clone() for k, v in given[name].state_dict().items()} for name in ("generator", "critic")}
    torch.manual_seed(SMALL.get("seed", 0))
    wanted = torch.rand(3)
    run = trainer(images, tmp_path, given=given)
    assert torch.equal(torch.rand(3), wanted)  # the trainer seeds, and nothing after that draws
    for name, state in before.items():
        assert all(torch.equal(value, state[key]) for key, value in given[name].state_dict().items())
    assert [m.training for m in run.critic.layers] == [True, True, False, True, True]
    assert all(m.training for m in run.generator.modules())


class Returns(nn.Module):
    """A net that returns the same, whatever it is called with."""

    def __init__(self, value):
        super().__init__()
        self.value, self.weight = value, nn.Parameter(torch.ones(1))

    def forward(self, *inputs):
        return self.value


class Another(MyObjective):
    def __init__(self, **found):
        self.found = found

    def critic(self, real_scores, fake_scores, batch, fake):
        return CriticLoss(self.found.get("loss", (fake_scores - real_scores).mean()), self.found.get("terms", {}))

    def generator(self, fake_scores, real_scores):
        return self.found.get("generator", -fake_scores.mean())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generator": lambda z: z}, "generator: wanted a torch.nn.Module, got function"),
        (
            {"generator": MyGenerator(nz=9)},
            r"generator: wanted one that takes tensors of shape \(4, 8\), got RuntimeError",
        ),
        (
            {"generator": MyGenerator(size=8)},
            r"images of shape \(B, 1, 12, 12\), got torch.float32 of shape \(4, 1, 8, 8\)",
        ),
        ({"generator": MyGenerator(channels=3)}, r"got torch.float32 of shape \(4, 3, 12, 12\) for a batch of 4"),
        ({"generator": Returns(torch.zeros(4, 1, 12, 12, 1))}, r"got torch.float32 of shape \(4, 1, 12, 12, 1\)"),
        ({"generator": Returns("no")}, "generator: wanted images as a torch.Tensor, got str"),
        ({"generator": Returns(torch.zeros(4, 1, 12, 12, dtype=torch.uint8))}, "wanted floating-point images of shape"),
        ({"generator": Returns(torch.full((4, 1, 12, 12), torch.nan))}, "generator: wanted finite images, got NaN"),
        (
            {"critic": MyCritic(size=8)},
            r"critic: wanted one that takes tensors of shape \(4, 1, 12, 12\), got RuntimeError",
        ),
        (
            {"critic": Returns(torch.zeros(3))},
            r"scores of shape \(B,\) or \(B, 1, ...\), got torch.float32 of shape \(3,\)",
        ),
        (
            {"critic": Returns(torch.zeros(()))},
            r"critic: wanted floating-point scores of shape .* got .* of shape \(\)",
        ),
        (
            {"critic": MyCritic(classes=2)},
            r"objective: wanted one for scores of shape \(4, 2\), got ValueError: real_loss",
        ),
        (
            {"objective": "hinge"},
            "objective: wanted a gp.losses.Loss, a gp.losses.LossSensitive or an object .*, got str",
        ),
        ({"objective": Another(loss=torch.zeros(4))}, r"wanted a scalar tensor as the critic's loss, got \(4,\)"),
        ({"objective": Another(generator=0.5)}, "wanted a scalar tensor as the generator's loss, got float"),
        ({"objective": Another(terms={"step": torch.zeros(())})}, "terms that are scalar tensors .*, got 'step'"),
        ({"objective": Another(terms={"a": torch.zeros(2)})}, "terms that are scalar tensors .*, got 'a'"),
    ],
)
def test_what_does_not_fit_is_named_before_training(images, tmp_path, given, message):
    objective = {} if "critic" in given else {"objective": gp.losses.loss("hinge")}
    with pytest.raises(UserError, match=message):
        trainer(images, tmp_path, given={"generator": MyGenerator(), "critic": MyCritic(), **objective, **given})
    assert not list(tmp_path.iterdir())


def test_labels_for_some_want_a_critic_that_guesses(images, tmp_path):
    given = {"generator": MyGenerator(classes=3), "critic": MyCritic(classes=3)}
    with pytest.raises(
        UserError, match=r"critic: wanted a method guess\(x\) that gives logits, for --labels, got none"
    ):
        trainer(images, tmp_path, given=given, condition="classes", labels=3)


def test_a_data_set_of_torch_trains(tmp_path):
    pixels = torch.randint(0, 256, (8, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    run = trainer(torch.utils.data.TensorDataset(pixels, torch.arange(8) % 2), tmp_path, given=mine())
    assert run.run()
    assert np.array_equal(run.images.images, pixels.numpy())


NOTEBOOK = """
    import json
    from pathlib import Path
    import torch
    from torch import nn
    import gpkernels as gp
    from gpkernels.training import Callback, ImageSet, Report, Trackers, TrainConfig, Trainer, checkpoint, from_preset

    out = Path("runs/mine")
    images = ImageSet("squares", torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8).numpy())
    config = from_preset("wgan-gp", {"steps": 6, "batch_size": 4, "nz": 8, "log_every": 2, "critic_steps": 2})

    class Generator(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(8, 3 * 16 * 16), nn.Tanh(), nn.Unflatten(1, (3, 16, 16)))

    class Best(Callback):
        def __init__(self):
            self.gaps = []
        def on_log(self, trainer, record):
            self.gaps.append(record["gap"])
            if record["step"] >= 4:
                trainer.stop()

    best = Best()
    nets = {"generator": Generator(), "critic": nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1))}
    trainer = Trainer(config, images, out, **nets, callbacks=[best, Trackers("tensorboard"), Report()])
    assert not trainer.run() and trainer.step == 4
    trainer = Trainer(config, images, out, **nets, callbacks=[Report()], resume=checkpoint.load(out))
    assert trainer.run() and trainer.step == 6
    assert len(best.gaps) == 3
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").open()] == [1, 2, 4, 6]
    assert "Generator" in (out / "report.html").read_text()
    generator, config, step = checkpoint.load_generator(out, Generator())
    print(tuple(generator(torch.randn(2, config.nz)).shape))
"""


def test_as_in_a_notebook(tmp_path):
    """In a process of its own, as a user would write it."""
    (tmp_path / "notebook.py").write_text(textwrap.dedent(NOTEBOOK))
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(2, 3, 16, 16)\n"
