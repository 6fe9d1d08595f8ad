"""Generators and critics: sizes and blocks against the published ones and independent ones."""

import pytest
import torch
import zoo
from plain import float64_on_one_thread  # noqa: F401
from torch import nn

from gpkernels.errors import UserError
from gpkernels.training import TrainConfig, models
from gpkernels.training.config import CONDITIONS, CRITIC_NORMS, CRITICS, GENERATORS
from gpkernels.training.models import conditional, norms
from gpkernels.training.models.resnet import CriticBlock, GeneratorBlock

CLASSES = 5


def build(size=32, channels=2, classes=CLASSES, **settings):
    torch.manual_seed(7)
    return models.build(TrainConfig(**{"nz": 6, "ngf": 2, "ndf": 2, **settings}), channels, size, classes)


def labels_for(net, count=4):
    return (torch.arange(count) * 3 % CLASSES,) if net.classes else ()


def test_settings_and_tables_name_the_same():
    assert tuple(models.GENERATOR_LAYERS) == GENERATORS
    assert tuple(models.CRITIC_PARTS) == CRITICS
    assert tuple(norms.CRITIC_NORMS) == CRITIC_NORMS
    assert tuple(conditional.CONDITIONS) == CONDITIONS


@pytest.mark.parametrize(
    ("critic", "size", "pixels", "scores"),
    [
        ("dcgan", 32, [0.0369312, 0.0125939], [3.144883e-06, -1.120855e-05]),
        ("dcgan", 64, [-0.0393789, 0.0091815], [2.433100e-06, -8.149917e-06]),
        ("cost-model", 32, [0.0369312, 0.0125939], [0.1812640, 0.02906648]),
    ],
)
def test_dcgan_keeps_the_numbers_of_earlier_versions(critic, size, pixels, scores):
    torch.set_default_dtype(torch.float32)
    generator, net = build(size, channels=3, critic=critic, nz=8, ngf=4, ndf=4)
    images = generator(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))
    assert images[:2, 1, 5, 7].tolist() == pytest.approx(pixels, rel=1e-3)
    assert net(images)[:2].tolist() == pytest.approx(scores, rel=1e-3)


def conv(inputs, outputs, kernel, bias=True):
    return inputs * outputs * kernel**2 + outputs * bias


def up(inputs, outputs, bias=True):
    """A generator's block, with its two BatchNorms."""
    return (
        2 * inputs + 2 * outputs + conv(inputs, outputs, 3, bias) + conv(outputs, outputs, 3) + conv(inputs, outputs, 1)
    )


def down(inputs, outputs, hidden=None, shortcut=True, norm=False, bias=True):
    hidden = hidden or inputs
    size = conv(inputs, hidden, 3, bias) + conv(hidden, outputs, 3) + shortcut * conv(inputs, outputs, 1)
    return size + norm * 2 * (inputs + hidden)


def output(width):
    return 2 * width + conv(width, 3, 3)


PUBLISHED = {
    # the public DCGAN code's, at 64 pixels
    ("dcgan", "batch", 64, 100): (3_576_704, 2_765_568),
    # SNGAN table 4
    ("resnet", "none", 32, 128): (
        129 * 4096 + 3 * up(256, 256) + output(256),
        down(3, 128, 128) + down(128, 128) + 2 * down(128, 128, shortcut=False) + 129,
    ),
    # SNGAN's code for 64 pixels
    ("resnet", "none", 64, 128): (
        129 * 16384 + up(1024, 512) + up(512, 256) + up(256, 128) + up(128, 64) + output(64),
        down(3, 64, 64) + down(64, 128) + down(128, 256) + down(256, 512) + down(512, 1024) + 1025,
    ),
    # SNGAN table 6
    ("resnet", "none", 128, 128): (
        129 * 16384 + up(1024, 1024) + up(1024, 512) + up(512, 256) + up(256, 128) + up(128, 64) + output(64),
        down(3, 64, 64)
        + sum(down(width, 2 * width) for width in (64, 128, 256, 512))
        + down(1024, 1024, shortcut=False)
        + 1025,
    ),
    # WGAN-GP's CIFAR-10 ResNet
    ("resnet-wgan-gp", "none", 32, 128): (
        129 * 2048 + 3 * up(128, 128) + output(128),
        down(3, 128, 128) + down(128, 128) + 2 * down(128, 128, shortcut=False) + 129,
    ),
    # WGAN-GP's code for 64 pixels, layer norm in the critic
    ("resnet-wgan-gp", "layer", 64, 128): (
        129 * 8192 + up(512, 512, False) + up(512, 256, False) + up(256, 128, False) + up(128, 64, False) + output(64),
        conv(3, 64, 3)
        + sum(down(a, b, norm=True, bias=False) for a, b in ((64, 128), (128, 256), (256, 512), (512, 512)))
        + 4 * 4 * 512
        + 1,
    ),
    # not published: a block more in each net, between those of the greatest width
    ("resnet-wgan-gp", "layer", 128, 128): (
        129 * 8192 + 2 * up(512, 512, False) + sum(up(2 * a, a, False) for a in (256, 128, 64)) + output(64),
        conv(3, 64, 3)
        + sum(down(a, b, norm=True, bias=False) for a, b in ((64, 128), (128, 256), (256, 512), (512, 512), (512, 512)))
        + 4 * 4 * 512
        + 1,
    ),
}


@pytest.mark.parametrize(("name", "norm", "size", "nz"), PUBLISHED)
def test_sizes_are_the_published_ones(name, norm, size, nz):
    config = TrainConfig(generator=name, critic=name, critic_norm=norm, nz=nz)
    with torch.device("meta"):
        nets = models.build(config, 3, size)
    assert tuple(sum(p.numel() for p in net.parameters()) for net in nets) == PUBLISHED[name, norm, size, nz]


def test_known_totals_of_the_published_sizes():
    """The arithmetic above, once worked out by hand: 4.28 and 1.05 million for SNGAN's CIFAR-10 pair."""
    assert PUBLISHED["resnet", "none", 32, 128] == (4_276_739, 1_053_825)


SMALL = [
    *((name, size) for name in ("dcgan", "resnet", "resnet-wgan-gp") for size in (32, 64, 128)),
]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("name", "size"), SMALL)
def test_shapes(name, size, condition):
    generator, critic = build(size, generator=name, critic=name, condition=condition)
    y = labels_for(critic)
    images = generator(torch.randn(4, 6), *y)
    assert images.shape == (4, 2, size, size)
    assert images.abs().max() <= 1
    assert critic(images, *y).shape == (4,)
    assert critic.classes == generator.classes == (0 if condition == "none" else CLASSES)
    if condition == "classes":
        assert critic.logits(images).shape == (4, CLASSES)


def test_residual_paths_by_hand():
    """With its 3x3 convolutions zero, a block is its shortcut: pooled or upsampled, and 1x1 convolved."""
    x = torch.randn(2, 3, 4, 4)
    for block in (
        CriticBlock(3, 5, "layer", down=True),
        CriticBlock(3, 3, "none", down=False),
        GeneratorBlock(3, 5, nn.BatchNorm2d, True),
    ):
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
        wanted = x
        if isinstance(block, GeneratorBlock):
            wanted = wanted.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif block.down:
            wanted = wanted.view(2, 3, 2, 2, 2, 2).mean((3, 5))
        if isinstance(block.shortcut, nn.Conv2d):
            weight = block.shortcut.weight[:, :, 0, 0]
            wanted = torch.einsum("oc,bchw->bohw", weight, wanted) + block.shortcut.bias[None, :, None, None]
        torch.testing.assert_close(block(x), wanted)


@pytest.mark.parametrize("first", [True, False])
def test_critic_blocks_are_those_of_the_zoo(first):
    """An SNGAN block written independently, whose layer norm has a weight an element instead of a channel: all 1."""
    theirs = zoo.Block(3, 3, 8, lambda layer: layer, None if first else nn.LayerNorm, first)
    ours = CriticBlock(3, 3, "layer", down=True, first=first)
    for mine, other in zip((ours.conv1, ours.conv2, ours.shortcut), (*theirs.convs, theirs.shortcut), strict=True):
        mine.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_generator_blocks_by_hand():
    block, x, double = GeneratorBlock(3, 5, nn.BatchNorm2d, True), torch.randn(2, 3, 4, 4), nn.Upsample(scale_factor=2)
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(5)
    residual = nn.Sequential(first, nn.ReLU(), double, block.conv1, second, nn.ReLU(), block.conv2)
    torch.testing.assert_close(block(x), residual(x) + block.shortcut(double(x)))


@pytest.mark.parametrize(
    ("name", "size", "pooled"),
    [
        ("resnet", 32, lambda h: h.relu().sum((2, 3))),
        ("resnet", 128, lambda h: h.relu().sum((2, 3))),
        ("resnet-wgan-gp", 32, lambda h: h.relu().mean((2, 3))),
        ("resnet-wgan-gp", 64, lambda h: h.flatten(1)),
        ("resnet-wgan-gp", 128, lambda h: h.flatten(1)),
    ],
)
def test_what_the_dense_layer_takes(name, size, pooled):
    _, critic = build(size, critic=name)
    blocks, inputs = [m for m in critic.body if isinstance(m, CriticBlock)], []
    for module in (*blocks, critic.head):
        module.register_forward_hook(lambda module, given, result: inputs.append((given[0], result)))
    critic(torch.randn(2, 2, size, size))
    torch.testing.assert_close(inputs[-1][0], pooled(inputs[-2][1]))
    sides = {32: [16, 8, 8, 8], 64: [32, 16, 8, 4], 128: [64, 32, 16, 8, 4, 4]}[size]
    assert [result.shape[2] for _, result in inputs[:-1]] == sides[: len(blocks)]
    assert len(blocks) == (5 if (name, size) == ("resnet-wgan-gp", 128) else len(sides))


def test_sum_and_mean_pooling_differ_by_the_number_of_positions():
    pools = [models.resnet.Pool(how) for how in ("sum", "mean", "none")]
    h = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(pools[0](h), 16 * pools[1](h))
    torch.testing.assert_close(pools[2](h).view(2, 3, 16).sum(2), pools[0](h))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition": "concat", "classes": 0}, "--condition concat: wanted data with at least two classes, got 0"),
        ({"size": 48}, "--image-size: wanted one of 32, 64, 128, got 48"),
        ({"critic": "cost-model", "critic_norm": "layer"}, "--critic-norm: wanted none for cost-model"),
        ({"labels": 10, "condition": "concat"}, "--labels: wanted --condition classes"),
        ({"label_attribute": "Smiling"}, "--label-attribute: wanted --data celeba:PATH, got lfw-mini"),
        ({"critic": "resnet50"}, "--critic: wanted one of dcgan, cost-model, resnet, resnet-wgan-gp"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        build(**arguments)
