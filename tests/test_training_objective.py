"""Of a training step, beside the losses: what a log calls the gap, which images it takes, clipping, latent vectors."""

import pytest
import torch
from threads import one_thread  # noqa: F401

from gpkernels.training import TrainConfig, Trainer, data, models
from gpkernels.training.objective import Batch, make_objective
from gpkernels.training.optimizers import clip_weights


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
