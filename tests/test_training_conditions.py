"""Conditions: what a label does in generators and critics, by hand; penalties with labels against autograd."""

import copy

import numpy as np
import plain
import pytest
import torch
from plain import float64_on_one_thread  # noqa: F401
from scipy.special import logsumexp
from torch import nn

import gpkernels as gp
from gpkernels.training import TrainConfig, models
from gpkernels.training.config import CONDITIONS, CRITIC_NORMS, CRITICS, GENERATORS
from gpkernels.training.models import conditional

CLASSES = 5


def build(size=32, channels=2, classes=CLASSES, **settings):
    torch.manual_seed(7)
    return models.build(TrainConfig(**{"nz": 6, "ngf": 2, "ndf": 2, **settings}), channels, size, classes)


def labels_for(net, count=4):
    return (torch.arange(count) * 3 % CLASSES,) if net.classes else ()


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("condition", CONDITIONS[1:])
def test_generators_use_the_label(name, condition):
    generator, _ = build(generator=name, condition=condition)
    for module in generator.modules():
        if isinstance(module, conditional.ConditionalBatchNorm2d):  # at first all classes have the gain 1 and bias 0
            nn.init.normal_(module.gain)
            nn.init.normal_(module.bias)
    generator.eval()  # else samples meet in BatchNorm
    z, y = torch.randn(3, 6), torch.tensor([0, 1, 2])
    first, second = generator(z, y), generator(z, torch.tensor([0, 3, 2]))
    differs = (first - second).abs().amax((1, 2, 3))
    assert differs[1] > 1e-6
    assert differs[0] == differs[2] == 0


def test_one_hot_after_z():
    """The label's input of the first layer is the column after those of z."""
    generator, _ = build(condition="concat")
    unconditional, _ = build(condition="none", nz=6 + CLASSES)
    unconditional.load_state_dict(generator.state_dict())
    z = torch.randn(2, 6)
    wanted = unconditional(torch.cat([z, torch.tensor([[0.0, 0, 0, 1, 0], [1, 0, 0, 0, 0]])], 1))
    torch.testing.assert_close(generator(z, torch.tensor([3, 0])), wanted, rtol=0, atol=0)


def test_class_conditional_batch_norm_by_hand():
    layer = conditional.ConditionalBatchNorm2d(3, 2)
    h, y = torch.randn(4, 2, 3, 3), torch.tensor([2, 0, 2, 1])
    plainly = nn.BatchNorm2d(2, affine=False)(h)
    torch.testing.assert_close(layer(h, y), plainly)
    nn.init.normal_(layer.gain)
    nn.init.normal_(layer.bias)
    got = layer(h, y)
    for sample, label in enumerate(y.tolist()):
        for channel in range(2):
            wanted = layer.gain[label, channel] * plainly[sample, channel] + layer.bias[label, channel]
            torch.testing.assert_close(got[sample, channel], wanted)


def test_concatenated_maps_by_hand():
    _, critic = build(condition="concat")
    unconditional, x = build(condition="none", channels=2 + CLASSES)[1], torch.randn(2, 2, 32, 32)
    unconditional.load_state_dict(critic.state_dict())
    maps = torch.zeros(2, CLASSES, 32, 32)
    maps[0, 4] = maps[1, 1] = 1
    wanted = unconditional(torch.cat([x, maps], 1))
    torch.testing.assert_close(critic(x, torch.tensor([4, 1])), wanted, rtol=0, atol=0)
    critic.body.register_forward_pre_hook(lambda module, inputs: layouts.append(inputs[0].stride(1) == 1))
    layouts = []
    for layout in (torch.contiguous_format, torch.channels_last):
        critic(x.contiguous(memory_format=layout), torch.tensor([4, 1]))
    assert layouts == [False, True]


@pytest.mark.parametrize("name", CRITICS)
def test_projection_by_hand(name):
    """score(x, y) - score(x) = sum(embed(y) * features), features being what the head takes."""
    _, critic = build(critic=name, condition="projection")
    seen = []
    critic.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().numpy()))
    x, y = torch.randn(4, 2, 32, 32), torch.tensor([3, 0, 3, 1])
    scores = critic(x, y).detach().numpy()
    features, table = seen[0].reshape(4, -1), critic.embedding.weight.detach().numpy()
    head = critic.head.weight.detach().numpy().reshape(-1)
    bias = 0 if critic.head.bias is None else critic.head.bias.item()
    for sample, label in enumerate(y.tolist()):
        wanted = np.sum(head * features[sample]) + bias + np.sum(table[label] * features[sample])
        assert scores[sample] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", CRITICS)
def test_classifier_critics_by_hand(name):
    _, critic = build(critic=name, condition="classes")
    x, y = torch.randn(4, 2, 32, 32), torch.tensor([3, 0, 3, 1])
    logits = critic.logits(x).detach().numpy()
    wanted = logsumexp(logits, 1) - logits[np.arange(4), y]
    assert critic(x, y).detach().numpy() == pytest.approx(wanted, rel=1e-9)
    before = copy.deepcopy(critic.state_dict())
    predicted = critic.guess(x).argmax(1)
    assert critic.training
    assert all(torch.equal(value, before[key]) for key, value in critic.state_dict().items())
    critic.eval()
    every = torch.stack([critic(x, torch.full((4,), label)) for label in range(CLASSES)])
    assert torch.equal(predicted, every.argmin(0))


def test_classifier_critic_is_exact_for_large_logits():
    torch.set_default_dtype(torch.float32)
    _, critic = build(condition="classes")
    table = torch.tensor([[1e4, -1e4, 0, 0, 0], [-1e4, -1e4, -1e4, -1e4, -1e4]], requires_grad=True)
    critic.logits = lambda x: table
    loss = critic(torch.zeros(2, 2, 32, 32), torch.tensor([1, 0]))
    assert loss.tolist() == pytest.approx([2e4, np.log(5)])
    (gradient,) = torch.autograd.grad(loss.sum(), table)
    assert gradient[0].tolist() == [1, -1, 0, 0, 0]
    assert gradient[1].tolist() == pytest.approx([-0.8, 0.2, 0.2, 0.2, 0.2])


CRITIC_CASES = [
    *(("dcgan", norm, 32) for norm in CRITIC_NORMS),
    ("cost-model", "none", 32),
    *(("resnet", norm, 32) for norm in CRITIC_NORMS),
    ("resnet", "none", 64),
    *(("resnet-wgan-gp", norm, 64) for norm in ("none", "layer")),
]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("name", "norm", "size"), CRITIC_CASES)
def test_penalties_equal_plain_autograd(name, norm, size, condition):
    _, critic = build(size, critic=name, critic_norm=norm, condition=condition)
    if name in ("dcgan", "cost-model"):  # N(0, 0.02) would leave the gradient at 1e-6
        for module in critic.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
    parameters = list(critic.parameters())
    real, fake, y = torch.randn(3, 2, size, size), torch.randn(3, 2, size, size), labels_for(critic, 3)
    keywords = {"y": y[0]} if y else {}
    eps = torch.rand(3)
    between = torch.lerp(fake, real, eps[:, None, None, None])

    _, wanted = plain.scores_and_penalty(critic, between, "two_sided", **keywords)
    got = gp.gradient_penalty(critic, real, fake, eps=eps, critic_args=y)
    plain.assert_close([got.detach()], [wanted.detach()], 1e-10)
    gradients = plain.gradients(wanted, parameters)
    assert max(g.norm() for g in gradients) > 1e-3
    plain.assert_close(plain.gradients(got, parameters), gradients, 1e-10)

    wanted = plain.loss(*plain.scores_and_penalty(critic, real, **keywords))
    got = plain.loss(*gp.score_and_penalty(critic, real, kind="r1", critic_args=y))
    plain.assert_close([got.detach()], [wanted.detach()], 1e-10)
    plain.assert_close(plain.gradients(got, parameters), plain.gradients(wanted, parameters), 1e-10)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", CRITICS)
def test_spectral_norm_of_every_critic(name, condition):
    """Every convolution, dense layer and embedding has norm 1 after some updates, and penalties still agree."""
    _, critic = build(critic=name, condition=condition, spectral_norm=True)
    handle = gp.spectral_norm_handle(critic)
    layers = [m for m in critic.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
    assert len(handle) == len(layers)
    assert ("embedding.weight" in handle) == (condition == "projection")
    handle.update(300)
    for layer in layers:
        assert torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item() == pytest.approx(1, rel=1e-2)
    real, y = torch.randn(3, 2, 32, 32), labels_for(critic, 3)
    parameters = list(critic.parameters())
    wanted = plain.loss(*plain.scores_and_penalty(critic, real, **({"y": y[0]} if y else {})))
    got = plain.loss(*gp.score_and_penalty(critic, real, kind="r1", critic_args=y))
    plain.assert_close(plain.gradients(got, parameters), plain.gradients(wanted, parameters), 1e-10)


def test_microbatches_split_the_labels():
    _, critic = build(critic="resnet", condition="projection")
    real, y = torch.randn(5, 2, 32, 32), torch.tensor([0, 4, 1, 1, 2])
    whole, split = (gp.gradient_penalty(critic, real, kind="r1", critic_args=(y,), microbatch=n) for n in (None, 2))
    torch.testing.assert_close(split, whole)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (None, TypeError, "y: wanted int64 labels, got NoneType"),
        (torch.zeros(3, dtype=torch.int32), TypeError, "y: wanted int64 labels, got torch.int32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"y: wanted labels of shape \(3,\), got \(2,\)"),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, r"y: wanted labels of shape \(3,\), got \(3, 1\)"),
    ],
)
@pytest.mark.parametrize("condition", CONDITIONS[1:])
def test_bad_labels_are_refused(condition, y, error, message):
    generator, critic = build(condition=condition)
    for run in (lambda: generator(torch.randn(3, 6), y), lambda: critic(torch.randn(3, 2, 32, 32), y)):
        with pytest.raises(error, match=message):
            run()


def test_labels_for_nets_without_a_condition_are_refused():
    generator, critic = build()
    for run in (lambda: generator(torch.randn(3, 6), torch.zeros(3)), lambda: critic(torch.randn(3, 2, 32, 32), 1)):
        with pytest.raises(ValueError, match="y: wanted None for a net without a condition"):
            run()
