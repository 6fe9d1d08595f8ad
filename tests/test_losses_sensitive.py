"""LS-GAN, GLS-GAN and CLS-GAN by hand, in numpy and scipy; what is constant in the backward; labels half known."""

import numpy as np
import pytest
import scipy.special
import torch
from threads import one_thread  # noqa: F401

from gpkernels import losses
from gpkernels.losses import LossSensitive, class_loss, presume_labels


def batch(dtype=torch.float64, size=6):
    draws = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(size, 3, 4, 4, generator=draws, dtype=torch.float64).to(dtype) for _ in range(2))
    real_losses, fake_losses = (torch.randn(size, generator=draws, dtype=torch.float64).to(dtype) for _ in range(2))
    return real_losses, fake_losses, real, fake


def by_hand(real_losses, fake_losses, real, fake, slope, margin, gamma, weights=1.0):
    real_losses, fake_losses, real, fake = (x.double().numpy() for x in (real_losses, fake_losses, real, fake))
    delta = margin * np.abs(real - fake).sum((1, 2, 3))
    a = delta + real_losses - fake_losses
    return np.mean(weights * (np.maximum(a, slope * a) + gamma * real_losses)), delta.mean()


@pytest.mark.parametrize("slope", [0.0, 1.0, -1.0, 0.5, -3.0])
@pytest.mark.parametrize(("margin", "gamma"), [(2e-4, 0.0), (0.02, 0.7)])
def test_terms_by_hand(slope, margin, gamma):
    given = batch()
    chosen = LossSensitive(slope=slope, margin=margin, gamma=gamma)
    terms = chosen.terms(*given)
    loss, delta = by_hand(*given, slope, margin, gamma)
    assert terms.loss.item() == pytest.approx(loss)
    assert terms.margin.item() == pytest.approx(delta)
    assert (terms.real.item(), terms.fake.item()) == pytest.approx((given[0].mean().item(), given[1].mean().item()))
    assert chosen.critic(*given).item() == terms.loss.item()
    assert chosen.generator(given[1]).item() == pytest.approx(given[1].mean().item())
    assert chosen.low_is_real


def test_published_defaults():
    assert LossSensitive() == LossSensitive(slope=0.0, margin=2e-4, gamma=0.0)


def test_slope_one_is_wasserstein_and_slope_minus_one_the_absolute_value():
    given = batch()
    wasserstein = losses.loss("wasserstein").critic(-given[0], -given[1])  # there, high is real
    assert LossSensitive(slope=1.0, margin=0.0).critic(*given).item() == pytest.approx(wasserstein.item())
    gap = (given[0] - given[1]).abs().mean()
    assert LossSensitive(slope=-1.0, margin=0.0).critic(*given).item() == pytest.approx(gap.item())


def test_the_margin_is_constant_in_the_backward():
    real_losses, fake_losses, real, fake = (x.requires_grad_() for x in batch())
    terms = LossSensitive(margin=0.1).terms(real_losses, fake_losses, real, fake)
    gradients = torch.autograd.grad(terms.loss, (real_losses, fake_losses, real, fake), allow_unused=True)
    assert gradients[2:] == (None, None)
    assert gradients[0].abs().sum() > 0
    assert not any(part.requires_grad for part in (terms.margin, terms.real, terms.fake))


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, -1.0])
def test_the_cost_at_zero_has_slope_one(slope):
    loss = torch.zeros(1, requires_grad=True)
    critic = LossSensitive(slope=slope).critic(loss, torch.zeros(1), torch.ones(1, 2), torch.ones(1, 2))
    assert torch.autograd.grad(critic, loss)[0].item() == 1


@pytest.mark.parametrize("slope", [0.0, -1.0, 0.5])
def test_derivatives_of_both_orders(slope):
    real_losses, fake_losses, real, fake = batch()
    chosen, weights = LossSensitive(slope=slope, gamma=0.3), torch.rand(6, dtype=torch.float64)

    def both(real_losses, fake_losses):
        critic = chosen.critic(real_losses.sin(), fake_losses.sin(), real, fake, weights)
        return critic, chosen.generator(fake_losses.sin())

    given = real_losses.requires_grad_(), fake_losses.requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(both, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slope", [0.0, -1.0, 0.5])
def test_losses_of_ten_thousand(dtype, slope):
    _, _, real, fake = batch(dtype, size=4)
    real_losses = torch.tensor([1e4, -1e4, 1e4, -1e4]).to(dtype).requires_grad_()
    fake_losses = torch.tensor([-1e4, 1e4, 1e4, -1e4]).to(dtype).requires_grad_()
    critic = LossSensitive(slope=slope, gamma=0.5).critic(real_losses, fake_losses, real, fake)
    given = (x.detach() for x in (real_losses, fake_losses, real, fake))
    assert critic.dtype == torch.float32
    assert critic.item() == pytest.approx(by_hand(*given, slope, 2e-4, 0.5)[0], rel=1e-5)
    on_real, on_fake = torch.autograd.grad(critic, (real_losses, fake_losses))
    assert on_real.tolist() == [(1 + 0.5) / 4, (slope + 0.5) / 4, (1 + 0.5) / 4, (1 + 0.5) / 4]
    assert on_fake.tolist() == [-1 / 4, -slope / 4, -1 / 4, -1 / 4]


def test_half_precision_images_are_summed_in_float32():
    """64 x 64 differences of 1 and one of 4096: 12287 + 4096 has no float16 or bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        real = torch.ones(1, 3, 64, 64, dtype=dtype)
        real[0, 0, 0, 0] = 4096
        terms = LossSensitive(margin=1.0).terms(torch.zeros(1), torch.zeros(1), real, torch.zeros_like(real))
        assert terms.margin.item() == 3 * 64 * 64 - 1 + 4096


@pytest.mark.parametrize("shape", [(6, 1), (6, 1, 1, 1)])
def test_losses_of_every_shape(shape):
    real_losses, fake_losses, real, fake = batch()
    chosen = LossSensitive(margin=0.02, gamma=0.1)
    wanted = chosen.critic(real_losses, fake_losses, real, fake)
    assert chosen.critic(real_losses.view(shape), fake_losses.view(shape), real, fake) == wanted
    assert chosen.generator(fake_losses.view(shape)) == chosen.generator(fake_losses)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_class_loss_is_scipys(dtype, scale):
    draws = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(7, 5, generator=draws, dtype=torch.float64)).to(dtype).requires_grad_()
    y = torch.randint(5, (7,), generator=draws)
    got = class_loss(logits, y)
    assert got.shape == (7,)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = logits.detach().double().numpy()
    wanted = -scipy.special.log_softmax(exact, 1)[range(7), y]
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(got.sum(), logits)
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-6)
    slope = scipy.special.softmax(exact, 1) - np.eye(5)[y]
    np.testing.assert_allclose(gradient.double().numpy(), slope, rtol=tolerance, atol=1e-6)


def test_class_loss_at_ten_thousand_is_exact():
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4], [1e4, 1e4]])
    assert class_loss(logits, torch.tensor([0, 1, 0])).tolist() == pytest.approx([0, 2e4, np.log(2)], rel=1e-6)


def test_class_loss_has_derivatives_of_both_orders():
    logits, y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 1])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda logits: class_loss(logits, y), (logits,))


def test_unknown_labels_are_those_of_the_least_loss():
    logits = torch.randn(50, 4, requires_grad=True)
    y, known = torch.randint(4, (50,)), torch.rand(50) < 0.4
    labels, weights = presume_labels(logits, torch.where(known, y, -100), known, weight=0.3)
    for i in range(50):
        every = [class_loss(logits[i : i + 1], torch.tensor([k])).item() for k in range(4)]
        assert labels[i] == (y[i] if known[i] else every.index(min(every)))
        assert weights[i].item() == pytest.approx(1.0 if known[i] else 0.3)
    assert not labels.requires_grad
    assert not weights.requires_grad


def test_a_guess_without_confidence_does_not_count():
    logits = torch.tensor([[0.0, 0.0], [0.0, 2.0], [5.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    known = torch.tensor([False, False, False, True])
    y, weights = presume_labels(logits, torch.ones(4, dtype=torch.int64), known, weight=0.3, confidence=0.9)
    probability = scipy.special.softmax(logits.numpy(), 1).max(1)
    assert weights.tolist() == pytest.approx([0.3 * (p >= 0.9) for p in probability[:3]] + [1.0])
    assert weights.tolist() == pytest.approx([0, 0, 0.3, 1])
    assert y.tolist() == [0, 1, 0, 1]


def test_a_half_supervised_critic_step():
    """Known pairs count fully, the others by their weight, in the cost and in gamma's term."""
    _, _, real, fake = batch()
    real_logits, fake_logits = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    known = torch.tensor([True, False, False, True, False, True])
    y, weights = presume_labels(real_logits, torch.zeros(6, dtype=torch.int64), known, weight=0.25)
    parts = class_loss(real_logits, y), class_loss(fake_logits, y)
    got = LossSensitive(margin=8e-4, gamma=1.0).critic(*parts, real, fake, weights)
    wanted, _ = by_hand(*parts, real, fake, 0.0, 8e-4, 1.0, np.where(known, 1.0, 0.25))
    assert got.item() == pytest.approx(wanted)


LABELS = torch.zeros(6, dtype=torch.int64)
KNOWN = torch.ones(6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: LossSensitive(slope=1.5), ValueError, "slope: wanted a number <= 1, got 1.5"),
        (lambda b: LossSensitive(slope="0"), TypeError, "slope: wanted a number, got str"),
        (lambda b: LossSensitive(margin=-1.0), ValueError, "margin: wanted a finite number >= 0"),
        (lambda b: LossSensitive(gamma=float("nan")), ValueError, "gamma: wanted a finite number >= 0"),
        (lambda b: LossSensitive().critic(b[0], b[1], b[2], b[3][:4]), ValueError, "fake: wanted the shape of real"),
        (
            lambda b: LossSensitive().critic(b[0], b[1], b[2], b[3].float()),
            ValueError,
            "fake: wanted the dtype",
        ),
        (
            lambda b: LossSensitive().critic(b[0][:4], *b[1:]),
            ValueError,
            r"real_losses: .* \(6,\) .* got \(4,\)",
        ),
        (lambda b: LossSensitive().critic(b[0], b[2], *b[2:]), ValueError, "fake_losses: wanted one loss a sample"),
        (lambda b: LossSensitive().critic(*b, b[0][:2]), ValueError, "weights: wanted one loss a sample"),
        (lambda b: LossSensitive().generator(b[2]), ValueError, "fake_losses: wanted one loss a sample"),
        (lambda b: LossSensitive().generator(LABELS), TypeError, "fake_losses: wanted a floating-point tensor"),
        (lambda b: class_loss(b[0], LABELS), ValueError, r"logits: wanted shape \(B, classes\), got \(6,\)"),
        (lambda b: class_loss(b[2].flatten(1), LABELS - 1), ValueError, "y: wanted labels from 0 to 47"),
        (lambda b: class_loss(b[2].flatten(1), LABELS + 48), ValueError, "y: wanted labels from 0 to 47"),
        (lambda b: class_loss(b[2].flatten(1), LABELS[:2]), ValueError, r"y: wanted int64 labels of shape \(6,\)"),
        (lambda b: class_loss(b[2].flatten(1), LABELS.int()), ValueError, "y: wanted int64 labels"),
        (
            lambda b: presume_labels(b[2].flatten(1), LABELS, LABELS),
            ValueError,
            r"known: wanted .* \(6,\)",
        ),
        (lambda b: presume_labels(b[2].flatten(1), LABELS, KNOWN[:2]), ValueError, "known: wanted booleans"),
        (
            lambda b: presume_labels(b[2].flatten(1), LABELS, KNOWN, weight=-1),
            ValueError,
            "weight: wanted a finite number",
        ),
        (
            lambda b: presume_labels(b[2].flatten(1), LABELS, KNOWN, confidence=1.5),
            ValueError,
            "confidence: wanted a probability, got 1.5",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(batch())
