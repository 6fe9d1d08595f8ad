"""Of a training step, beside the losses: what a log calls the gap, which images it takes, clipping, latent vectors."""

import dataclasses

import pytest
import torch
from threads import one_thread  # noqa: F401

from gpkernels.training import Learner, TrainConfig, Trainer, data, from_preset, models
from gpkernels.training.draws import AROUND
from gpkernels.training.objective import Batch, Penalties, make_objective
from gpkernels.training.optimizers import clip_weights
from gpkernels.training.presets import describe
from gpkernels.training.processes import Processes


@pytest.mark.parametrize(("loss", "real", "fake"), [("hinge", 3.0, 1.0), ("ls-gan", 1.0, 3.0), ("gls-gan", 1.0, 3.0)])
def test_the_gap_is_positive_where_the_critic_tells_real_from_fake(loss, real, fake):
    images = torch.zeros(4, 1, 2, 2)
    objective = make_objective(TrainConfig(loss=loss))
    found = objective.critic(torch.full((4,), real), torch.full((4,), fake), Batch(images), images)
    assert found.terms["gap"] == 2
    assert (found.terms["score_real"], found.terms["score_fake"]) == (real, fake)


@pytest.mark.parametrize("critic_steps", [1, 3])
def test_every_update_of_the_critic_has_images_of_its_own(tmp_path, monkeypatch, critic_steps):
    config = TrainConfig(ngf=2, ndf=2, nz=4, batch_size=4, critic_steps=critic_steps)
    run = Trainer(config, data.load(config), tmp_path)
    numbers, plain = [], run.images.batch

    def batch(config, number, draws, shard):
        numbers.append(number)
        return plain(config, number, draws, shard)

    monkeypatch.setattr(run.images, "batch", batch)
    for _ in range(3):
        run.train_step()
    assert numbers == list(range(3 * critic_steps))


def test_weights_are_clipped_on_both_sides():
    weights = [torch.tensor([-3.0, -0.01, 0.0, 0.5]), torch.tensor([2.0], requires_grad=True)]
    clip_weights(weights, 0.1)
    wanted = [torch.tensor([-0.1, -0.01, 0.0, 0.1]), torch.tensor([0.1])]
    for weight, value in zip(weights, wanted, strict=True):
        assert torch.equal(weight.detach(), value)


@pytest.mark.parametrize(("z", "std"), [("normal", 1.0), ("uniform", 3**-0.5)])
def test_latent_vectors_have_mean_0_and_the_named_distribution(z, std):
    drawn = models.draw_z(TrainConfig(z=z, nz=50), 2000, torch.Generator().manual_seed(0))
    assert drawn.shape == (2000, 50)
    assert drawn.mean().item() == pytest.approx(0, abs=0.02)
    assert drawn.std().item() == pytest.approx(std, rel=0.02)
    assert (drawn.abs().max() <= 1) == (z == "uniform")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, ["pixel"]),
        ({"penalty": "coupled"}, ["sample"]),
        ({"penalty": "r1+r2"}, ["sample", "sample"]),
        ({"penalty": "coupled", "penalty_axes": "pixel"}, ["pixel"]),
        ({"penalty_axes": "sample"}, ["sample"]),
        ({"penalty": "none"}, []),
    ],
    ids=str,
)
def test_the_norm_runs_over_what_its_kind_is_published_with(settings, wanted):
    """Preset ls-gan-pg with another penalty gets that one's own norm, not pixels."""
    assert [penalty.axes for penalty in Penalties(from_preset("ls-gan-pg", settings)).each] == wanted


class Slope(torch.nn.Module):
    """Scores whose gradient in a 1x2x2 image has the norm 3."""

    def forward(self, x):
        return 1.5 * x.sum((1, 2, 3))


@pytest.mark.parametrize("name", ["r1", "r2", "wgan-gp", "ls-gan-pg", "dragan"])
def test_presets_list_the_penalty_that_is_computed(name):
    """Form and factor, which `--penalty-form` leaves out, of the penalty."""
    config = from_preset(name, {"penalty_axes": "sample", "batch_size": 4})
    (line,) = (line for line in describe(name).splitlines() if "R(n)" in line)
    listed = line.partition("R(n) = ")[2].partition(",")[0]
    factor, _, form = listed.rpartition(" x ")
    alone = Processes(torch.device("cpu"))
    x, y = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    values = []
    for form_of in (None, form):
        config = dataclasses.replace(config, penalty_form=form_of)
        drawn = {kind: row.draw(config, x, torch.Generator(), alone) for kind, row in AROUND.items()}
        values.append(Penalties(config)(Slope(), Batch(x), y, drawn)[2].item())
    usual, plain = values
    assert usual == pytest.approx(float(factor or 1) * plain)
    assert plain == pytest.approx(10 * {"squared": 9, "two_sided": 4, "linear": 3}[form])


def test_a_penalty_as_published_code_has_it():
    """Dong and Yang's: weights between pairs for each element, a constant under the root."""
    settings = {"penalty_per_element": True, "penalty_norm_eps": 0.5, "penalty_weight": 2.0}
    config = TrainConfig(penalty="coupled", batch_size=4, **settings)
    critic, slope = torch.nn.Linear(6, 1).double(), torch.randn(6, dtype=torch.float64)
    critic.forward = lambda x: (x.flatten(1) ** 3 * slope).sum(1)
    real, fake = (torch.randn(4, 1, 2, 3, dtype=torch.float64) for _ in range(2))
    alone = Processes(torch.device("cpu"))
    eps = AROUND["coupled"].draw(config, real, torch.Generator().manual_seed(3), alone)
    assert eps.shape == real.shape
    assert 0 <= eps.min() < eps.max() < 1
    _, _, penalty = Penalties(config)(critic, Batch(real), fake, {"coupled": eps})
    x = (eps * real + (1 - eps) * fake).flatten(1)
    n = (0.5 + (3 * x**2 * slope).square().sum(1)).sqrt()
    assert penalty.item() == pytest.approx(2 * (n - 1).square().mean().item(), rel=1e-6)


def test_normal_noise_is_of_its_own_size():
    """Whatever the images' standard deviation; uniform noise is in units of that."""
    real = 100 * torch.randn(2, 3, 64, 64)
    alone = Processes(torch.device("cpu"))
    for noise, wanted in (("normal", 0.25), ("uniform", 0.25 * 100 / 3**0.5)):
        config = TrainConfig(penalty="local", penalty_noise=noise, penalty_scale=0.25, batch_size=2)
        drawn = AROUND["local"].draw(config, real, torch.Generator().manual_seed(3), alone)
        assert drawn.std().item() == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("loss", ["ls-gan", "relativistic-average"])
@pytest.mark.parametrize("penalty", ["none", "coupled", "r1", "r1+r2"])
def test_the_critic_keeps_the_statistics_of_real_images(penalty, loss):
    """It is in eval mode on real images that they are used: to guess labels and measure their error."""
    config = TrainConfig(ngf=2, ndf=2, nz=4, batch_size=4, critic="cost-model", penalty=penalty, loss=loss)
    images = data.load(config)
    run, twin = Learner(config, images), Learner(config, images)
    twin.critic(images.batch(config, 0, torch.Generator().manual_seed(1)))  # the draws of step 0
    run.train_step()
    kept, wanted = (dict(net.named_buffers()) for net in (run.critic, twin.critic))
    assert any(name.endswith("running_var") for name in kept)
    for name in kept:
        if "running" in name:
            torch.testing.assert_close(kept[name], wanted[name], rtol=1e-5, atol=1e-7)
    assert all(layer.momentum == 0.1 for layer in run.critic.modules() if hasattr(layer, "momentum"))
