"""Every penalty kind x form x loss, with and without spectral norm, takes a step; a cell of each loss by hand."""

import dataclasses

import critics
import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from threads import one_thread  # noqa: F401

from gpkernels.kinds import KINDS
from gpkernels.ops.grad_penalty.penalties import PENALTIES
from gpkernels.training import TrainConfig, Trainer, models
from gpkernels.training.config import LOSSES, PENALTY_KINDS
from gpkernels.training.data import ImageSet
from gpkernels.training.objective import Batch, Penalties, make_objective

TINY = {"ngf": 2, "ndf": 2, "nz": 3, "batch_size": 4, "image_size": 32, "flip": False, "device": "cpu"}
OF_LOSS = {"gls-gan": {"slope": -0.5}, "cls-gan": {"condition": "classes", "gamma": 0.5}}
USUAL = {kind: KINDS[kind.partition("+")[0]].form for kind in PENALTY_KINDS if kind != "none"}
CELLS = [
    ("none", None),
    *((kind, None if form == usual else form) for kind, usual in USUAL.items() for form in PENALTIES),
]
BELOW = ("one_sided", "one_sided_linear")


@pytest.fixture(scope="module")
def images():
    draws = np.random.default_rng(0)
    return ImageSet(
        "noise",
        draws.integers(0, 256, (8, 1, 32, 32), dtype=np.uint8),
        labels=np.arange(8) % 2,
        class_names=("even", "odd"),
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_every_penalty_takes_a_step(loss, images, tmp_path):
    """All start from the same nets. The penalty is positive, and a step moves both nets to finite weights."""
    for spectral_norm in (False, True):
        base = TrainConfig(**TINY, loss=loss, spectral_norm=spectral_norm, **OF_LOSS.get(loss, {}))
        trainer = Trainer(base, images, tmp_path)
        nets = [list(net.parameters()) for net in (trainer.generator, trainer.critic)]
        start = [[weight.detach().clone() for weight in net] for net in nets]
        for kind, form in CELLS:
            cell = f"{loss}, {kind} {form}, spectral norm {spectral_norm}"
            trainer.config = dataclasses.replace(base, penalty=kind, penalty_form=form)
            trainer.penalties = Penalties(trainer.config)
            with torch.no_grad():
                for net, weights in zip(nets, start, strict=True):
                    torch._foreach_copy_(net, weights)
            terms = trainer.train_step()
            assert torch.stack(list(terms.values())).isfinite().all(), cell
            # the gradient of an untrained critic is far below 1, from where one-sided forms take it
            assert ("penalty" in terms) == (kind != "none"), cell
            if kind != "none":
                assert (terms["penalty"].item() > 0) == (form not in BELOW), cell
            for net, weights in zip(nets, start, strict=True):
                moved = torch.stack(torch._foreach_norm(torch._foreach_sub(net, weights)))
                assert 0 < moved.sum().item() < torch.inf, cell


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def plus(y):
    return y.clamp_min(0)


def cost(margin, slope=0.0, gamma=0.0):
    def critic_loss(real, fake, delta):
        a = margin * delta + real - fake
        return torch.maximum(a, slope * a).mean() + gamma * real.mean()

    return critic_loss


sp = F.softplus
D_LOSS = {
    **dict.fromkeys(
        ("classic-minimax", "classic-non-saturating", "classic-linear"), lambda r, f, d: sp(-r).mean() + sp(f).mean()
    ),
    "wasserstein": lambda r, f, d: f.mean() - r.mean(),
    "least-squares": lambda r, f, d: ((r - 1) ** 2).mean() + (f**2).mean(),
    **dict.fromkeys(
        ("hinge", "hinge-non-saturating", "hinge-minimax"), lambda r, f, d: plus(1 - r).mean() + plus(1 + f).mean()
    ),
    "absolute": lambda r, f, d: (1 - r).abs().mean() + f.abs().mean(),
    "asymmetric": lambda r, f, d: r.abs().mean() + f.mean(),
    "relativistic-average": lambda r, f, d: sp(f.mean() - r).mean() + sp(f - r.mean()).mean(),
    "relativistic-average-hinge": lambda r, f, d: plus(1 - (r - f.mean())).mean() + plus(1 + (f - r.mean())).mean(),
    "relativistic-pairing": lambda r, f, d: sp(f - r).mean(),
    "ls-gan": cost(2e-4),
    "gls-gan": cost(2e-4, slope=-0.5),
    "cls-gan": cost(2e-4, gamma=0.5),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_cell_of_each_loss_is_plain_autograd(loss, in_float64):
    """The critic's loss, penalty and gradient; kinds and forms in turn over the losses."""
    index = list(LOSSES).index(loss)
    kind = ("r1", "r2", "ls_gan_pg")[index % 3]
    form = (*PENALTIES, None)[index % 7]
    settings = {"penalty": kind, "penalty_form": form, "penalty_axes": "sample", "penalty_target": 0.1}
    config = TrainConfig(**TINY, loss=loss, **settings, **OF_LOSS.get(loss, {}))
    _, critic = models.build(config, 1, 32, 2)
    for parameter in critic.parameters():
        parameter.data *= 10  # N(0, 0.02) would leave the gradient at 1e-6
    real, fake, y = torch.randn(4, 1, 32, 32), torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 1, 0])
    labels = (y,) if critic.classes else ()
    score_real, score_fake, penalty = Penalties(config)(critic, Batch(real, labels), fake, torch.Generator())
    got = make_objective(config).critic(score_real, score_fake, Batch(real, labels), fake).loss + penalty

    points = fake if kind == "r2" else real
    weight = 5 if form is None and KINDS[kind].form == "squared" else 10
    by_hand = oracles.gradient_penalty(lambda x: critic(x, *labels), points, form or KINDS[kind].form, 0.1)
    delta = (real - fake).abs().sum((1, 2, 3))
    wanted = D_LOSS[loss](critic(real, *labels), critic(fake, *labels), delta) + weight * by_hand
    assert by_hand.item() > 0
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    gradients = (critics.parameter_gradients(value, critic) for value in (got, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
