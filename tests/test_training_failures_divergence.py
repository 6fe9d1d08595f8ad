"""Numbers that are not finite: a run stops before it saves one, and says in which step and layer the first was."""

import dataclasses
import math

import pytest
import torch
from small_runs import SMALL, same
from threads import one_thread  # noqa: F401
from torch import nn

from gpkernels.errors import UserError
from gpkernels.training import TrainConfig, Trainer, checkpoint, data, log, models
from gpkernels.training.divergence import NotFinite, Watch, explain
from gpkernels.training.objective import CriticLoss


@pytest.fixture(scope="module")
def faces():
    return data.load(TrainConfig())


def trainer(faces, out, **settings):
    return Trainer(TrainConfig(**{**SMALL, "log_every": 5, "steps": 10, **settings}), faces, out)


def stopped(run):
    with pytest.raises(UserError) as error:
        run.run()
    return str(error.value)


class Breaks(nn.Module):
    """`broken(x)` in the step after `step`, else x."""

    def __init__(self, run, step, broken):
        super().__init__()
        self.now = lambda: run.step == step
        self.broken = broken

    def forward(self, x):
        return self.broken(x) if self.now() else x


class Mask(nn.Module):
    """Infinities, as attention masks are made of: no failure."""

    def forward(self, x):
        return torch.where(x < 0, -torch.inf, x)


class Unmask(nn.Module):
    def forward(self, x):
        return torch.where(x.isinf(), 0.0, x)


def test_the_step_and_the_layer_that_broke_are_told_and_what_they_were_given_is_kept(faces, tmp_path, capsys):
    """It broke in step 3; the log would have told of step 5. The layers after it give the same, and those of infinities
    are none of it."""
    run = trainer(faces, tmp_path)
    twin = trainer(faces, tmp_path / "twin")
    for each in (run, twin):
        each.critic.body.insert(1, Mask())
        each.critic.body.insert(2, Unmask())
    run.critic.body.insert(4, Breaks(run, 2, lambda x: x / (x - x)))
    place = tmp_path / "diverged.pt"
    assert stopped(run) == (
        "training diverged: critic_loss is nan at step 5; first, in step 3: the output of critic.body.4 (Breaks), from "
        f"finite input; what the nets were given in that step is in {place}; the checkpoint of step 0 is kept in "
        f"{tmp_path} (try a lower --lr)"
    )
    assert "steps 1 to 5 are repeated to find the layer" in capsys.readouterr().err
    kept = torch.load(place, weights_only=True)
    assert (kept["step"], kept["seed"]) == (3, 0)
    assert "critic.body.4" in kept["first"]
    twin.train_step()
    twin.train_step()
    draws = torch.Generator().manual_seed(3)
    real = faces.batch(run.config, 2, draws)
    z = models.draw_z(run.config, 4, draws)
    wanted = [("generator", [z]), ("critic", [real]), ("critic", [twin.generator(z).detach()])]
    same([given for given in kept["inputs"] if len(given[1][0])][:3], wanted)
    assert run.step == 0
    same(run.critic.state_dict(), checkpoint.load(tmp_path)["critic"])
    assert [record["step"] for record in log.read(tmp_path)] == [1]


def test_no_checkpoint_has_numbers_that_are_not_finite(faces, tmp_path):
    """Weights are looked at before they are saved, whatever is logged."""
    run = trainer(faces, tmp_path, checkpoint_minutes=0.0, log_every=10)
    run.critic.body.insert(1, Breaks(run, 2, lambda x: x / (x - x)))
    message = stopped(run)
    assert "is nan at step 3; first, in step 3: the output of critic.body.1 (Breaks), from finite input" in message
    assert "the checkpoint of step 2 is kept" in message
    assert [checkpoint.step_of(path) for path in checkpoint.held(tmp_path)] == [2, 1]
    assert all(value.isfinite().all() for value in checkpoint.load(tmp_path)["critic"].values())


class Infinite:
    """An objective whose loss of finite scores is not finite."""

    needs_real = False

    def __init__(self, objective):
        self.objective = objective

    def critic(self, *args):
        found = self.objective.critic(*args)
        return CriticLoss(found.loss / 0, found.terms)

    def generator(self, *args):
        return self.objective.generator(*args)


def change_objective(run):
    run.objective = Infinite(run.objective)


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        (
            lambda run: run.critic.body.insert(1, Breaks(run, 2, lambda x: x + (0 * x).square().sum().sqrt())),
            {"penalty": "none"},
            "first, in step 3: the gradient of critic.body.0.weight, of 1 that are not finite the last, of a finite",
        ),
        (
            lambda run: run.critic.body.insert(1, Breaks(run, 2, lambda x: x + (0 * x).square().sum().sqrt())),
            {},
            "first, in step 3: penalty itself, nan of finite outputs",
        ),
        (change_objective, {}, "first, in step 1: critic_loss itself, "),
        (lambda run: None, {"penalty_weight": 1e39}, "first, in step 1: penalty itself, inf of finite outputs"),
        (
            lambda run: None,
            {"lr": 1e39, "critic_lr": 0.0},
            "first, in step 1: generator.layers.0.weight, moved by its optimizer with a finite gradient",
        ),
        (
            lambda run: run.generator.layers.append(Breaks(run, 2, torch.log)),
            {},
            "first, in step 3: the output of generator.layers.11 (Breaks), from finite input",
        ),
    ],
    ids=["gradient", "second gradient", "loss", "penalty", "weights", "generator"],
)
def test_what_broke_is_told_apart(faces, tmp_path, change, settings, told):
    run = trainer(faces, tmp_path, **settings)
    change(run)
    assert told in stopped(run)


def test_what_does_not_come_again_is_said_to_be_chance(faces, tmp_path):
    run = trainer(faces, tmp_path, log_every=1)
    broken = iter([False, False, True])
    run.critic.body.append(Breaks(run, 1, lambda x: x * torch.nan if next(broken, False) else x))
    assert "the same steps once more had finite terms, gradients and weights" in stopped(run)
    assert not (tmp_path / "diverged.pt").exists()


@pytest.mark.parametrize(
    "settings", [{}, {"penalty": "coupled", "critic_norm": "batch", "spectral_norm": True}], ids=str
)
def test_a_watched_step_has_the_same_bits(faces, tmp_path, settings):
    """The engine of second derivatives reroutes the calls between the hooks as it does without them."""
    run, watched = (trainer(faces, tmp_path, **settings) for _ in range(2))
    with Watch({"generator": watched.generator, "critic": watched.critic}, watched.optimizers) as watch:
        for _ in range(3):
            run.train_step()
            assert watch.step(watched.train_step) is None
    same(watched.state_dict(), run.state_dict())
    watched.train_step()
    assert watched.critic._forward_hooks == {}


@pytest.mark.parametrize("how", ["processes", "cuda_graph"])
def test_steps_that_one_process_alone_cannot_repeat_are_not(faces, tmp_path, capsys, how):
    """The main one of several would wait for others that have ended; a graph has no hooks."""
    run = trainer(faces, tmp_path, steps=3)
    run.save()
    for _ in range(3):
        run.train_step()
    before = {name: value.clone() for name, value in run.critic.state_dict().items()}
    if how == "processes":
        run.processes = dataclasses.replace(run.processes, count=2)
    else:
        run.config = dataclasses.replace(run.config, cuda_graph=True)
    assert explain(run, NotFinite("critic_loss", math.nan, 3)) == (
        f"training diverged: critic_loss is nan at step 3; the checkpoint of step 0 is kept in {tmp_path} (try a lower "
        "--lr); in one process and without --cuda-graph the layer it comes from is found"
    )
    assert capsys.readouterr().err == ""
    assert run.step == 3
    same(run.critic.state_dict(), before)


def test_nothing_is_repeated_where_the_checkpoint_is_of_the_step_that_failed(faces, tmp_path, capsys):
    run = trainer(faces, tmp_path)
    run.save()
    assert explain(run, NotFinite("gap", math.inf, 0)) == (
        f"training diverged: gap is inf at step 0; the checkpoint of step 0 is kept in {tmp_path} (try a lower --lr)"
    )
    assert capsys.readouterr().err == ""
