"""What a run tells: numbers of the log by hand, curves, progress, and callbacks closed whatever happens."""

import math
import re

import pytest
import torch
from small_runs import StopAfter, log_lines, told
from threads import one_thread  # noqa: F401

from gpkernels.training import Callback, Report, checkpoint
from gpkernels.training.callbacks import Sessions, sessions
from gpkernels.training.processes import Processes
from gpkernels.training.progress import Progress


def test_gradients_of_weights_are_those_of_the_losses(eight_faces, tmp_path):
    """The critic's after one step is that of its loss by autograd, the generator's that of L(G(z)) after the critic's
    update; both over all weights."""
    run = told(eight_faces, tmp_path, loss="wasserstein", penalty="none", lr=0.0)  # nothing moves
    draws = torch.Generator().manual_seed(1)
    real = eight_faces.batch(run.config, 0, draws)
    z = torch.randn(4, 8, generator=draws)
    critic_loss = run.critic(run.generator(z).detach()).mean() - run.critic(real).mean()
    losses = {"critic": critic_loss, "generator": -run.critic(run.generator(z)).mean()}
    wanted = {
        f"{name}_weight_grad": math.sqrt(
            sum(g.square().sum().item() for g in torch.autograd.grad(loss, list(getattr(run, name).parameters())))
        )
        for name, loss in losses.items()
    }
    run.train_step()
    assert run.weight_gradients() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("critic_norm", ["none", "batch"])
def test_gradient_norms_of_the_critic_are_those_of_each_image(eight_faces, tmp_path, critic_norm):
    """By float64 autograd, one image after another: in eval mode they do not meet. Nothing moves."""
    run = told(eight_faces, tmp_path, critic_norm=critic_norm, critic_steps=3)
    run.train_step()
    run.train_step()
    before = {name: value.clone() for name, value in run.critic.state_dict().items()}
    found = run.grad_norms()
    assert all(torch.equal(value, before[name]) for name, value in run.critic.state_dict().items())
    assert run.critic.training
    double = run.critic.double().eval()
    images = eight_faces.batch(run.config, 3, run._draws(1)).double()
    wanted = []
    for image in images:
        x = image[None].requires_grad_()
        wanted.append(torch.autograd.grad(double(x).sum(), x)[0].norm())
    torch.testing.assert_close(found.double(), torch.stack(wanted), rtol=1e-4, atol=0)


def test_gradient_norms_are_taken_for_the_log_alone(eight_faces, tmp_path, monkeypatch):
    run = told(eight_faces, tmp_path, steps=7, log_every=3)
    taken = []
    for name in ("grad_norms", "weight_gradients"):
        method = getattr(run, name)
        monkeypatch.setattr(run, name, lambda method=method: taken.append(run.step) or method())
    run.run()
    assert taken == [step for step in (1, 3, 6, 7) for _ in range(2)]
    for record in log_lines(tmp_path):
        assert 0 < record["grad_norm"] <= record["grad_norm_max"]
        assert record["critic_weight_grad"] > 0


class Events(Callback):
    def __init__(self):
        self.heard = []

    def on_start(self, trainer):
        self.heard.append("start")

    def on_log(self, trainer, record):
        self.heard.append(("log", trainer.step, "images_per_second" in record))

    def on_epoch(self, trainer, epoch):
        self.heard.append(("epoch", epoch))

    def on_checkpoint(self, trainer, path):
        self.heard.append("checkpoint")

    def on_end(self, trainer, finished):
        self.heard.append(("end", finished))

    def on_close(self, trainer):
        self.heard.append("close")


def test_events_in_their_order_and_timings_only_there(eight_faces, tmp_path):
    events = Events()
    told(eight_faces, tmp_path, events, steps=2).run()
    heard = [event for event in events.heard if event != "checkpoint"]
    assert heard == ["start", ("log", 1, True), ("log", 2, True), ("epoch", 1), ("end", True), "close"]
    assert "checkpoint" in events.heard
    assert all("images_per_second" not in record for record in log_lines(tmp_path))


def test_a_stop_of_another_process_ends_this_one_after_the_same_step(eight_faces, tmp_path):
    class Stopped(Processes):
        """One of several, of which another is to stop after two steps."""

        def any(self, flag):
            asked.append(flag)
            return len(asked) > 2

    asked = []
    run = told(eight_faces, tmp_path, steps=6)
    run.processes = Stopped(run.device)
    assert not run.run()
    assert (run.step, asked) == (2, [False] * 3)


def test_every_session_of_a_run_is_kept(eight_faces, tmp_path):
    told(eight_faces, tmp_path, Sessions(), steps=1).run()
    told(eight_faces, tmp_path, Sessions(), steps=3, resume=checkpoint.load(tmp_path)).run()
    found = [(session["from_step"], session["to_step"]) for session in sessions.read(tmp_path)]
    assert found == [(0, 1), (1, 3)]


def test_a_run_that_was_stopped_has_no_report(eight_faces, tmp_path):
    run = told(eight_faces, tmp_path, Report(), StopAfter(1))
    assert not run.run()
    assert not (tmp_path / "report.html").exists()


def test_only_what_is_penalised_has_a_penalty_in_its_log(eight_faces, tmp_path):
    assert "penalty" in told(eight_faces, tmp_path).train_step()
    assert "penalty" not in told(eight_faces, tmp_path, penalty="none").train_step()


def test_callbacks_are_closed_after_an_error(eight_faces, tmp_path):
    class Broken(Callback):
        def on_step(self, trainer, terms):
            raise KeyError("mine")

    events = Events()
    with pytest.raises(KeyError, match="mine"):
        told(eight_faces, tmp_path, events, Broken(), steps=2).run()
    assert events.heard[-1] == "close"
    assert ("end", True) not in events.heard


def test_progress_says_what_a_log_has(eight_faces, tmp_path, capsys):
    """Terms of an objective of one's own need not be the usual ones."""
    told(eight_faces, tmp_path, Progress(), steps=2).run()
    said = capsys.readouterr().out
    assert "ls-gan-pg on 8 images of 32x32 (faces), 2 steps of 4 on cpu" in said
    assert re.search(r"2/2  epoch 1  D \+0\.\d{4}  G [+-]0\.\d{4}  gap .*  \|grad\| .* \d+ img/s", said)
    progress = Progress()
    progress.on_start(told(eight_faces, tmp_path / "other", steps=2))
    progress.on_log(None, {"step": 2, "epoch": 1, "critic_loss": 0.5})
    progress.on_close(None)
    assert "2/2  epoch 1  D +0.5000" in capsys.readouterr().out


def test_curves_show_every_number_of_the_log_and_no_other(monkeypatch):
    import matplotlib.axes

    from gpkernels.training import pictures

    drawn = {}
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda axes, x, y, label, linewidth: drawn.update({label: (list(x), list(y))})
    )
    monkeypatch.setattr(matplotlib.axes.Axes, "legend", lambda axes: None)
    records = [{"step": s, "epoch": 1, "gap": s / 2, "mine": float(s)} for s in (1, 2)]
    content = pictures.curves([*records, {"step": 2, "epoch": 1, "classification_error": 0.5}])
    assert drawn == {"gap": ([1, 2], [0.5, 1.0]), "mine": ([1, 2], [1.0, 2.0]), "classification_error": ([2], [0.5])}
    assert content.startswith(b"\x89PNG")
