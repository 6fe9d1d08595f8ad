"""Small critics of every kind that people train, written as they write them: none knows of this package."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

NORMS = {
    "none": lambda channels, size: nn.Identity(),
    "batch": lambda channels, size: nn.BatchNorm2d(channels),
    "instance": lambda channels, size: nn.InstanceNorm2d(channels, affine=True),
    "layer": lambda channels, size: nn.LayerNorm([channels, size, size]),
    "group": lambda channels, size: nn.GroupNorm(2, channels),
}


def dcgan(norm="none", width=4, size=16, channels=3, inplace=True):
    wrap = spectral_norm if norm == "spectral" else (lambda layer: layer)
    make = NORMS["none" if norm == "spectral" else norm]
    layers = [wrap(nn.Conv2d(channels, width, 4, 2, 1)), nn.LeakyReLU(0.2, inplace=inplace)]
    while size > 8:
        size //= 2
        layers += [wrap(nn.Conv2d(width, 2 * width, 4, 2, 1)), make(2 * width, size // 2)]
        layers += [nn.LeakyReLU(0.2, inplace=inplace)]
        width *= 2
    return nn.Sequential(*layers, wrap(nn.Conv2d(width, 1, size // 2)))


class Block(nn.Module):
    """A pre-activation residual block with pooling, as in SNGAN and WGAN-GP."""

    def __init__(self, inputs, outputs, size, wrap=spectral_norm, norm=None, first=False):
        super().__init__()
        self.first = first
        self.norms = nn.ModuleList(
            [norm([inputs, size, size]), norm([outputs, size, size])] if norm else [nn.Identity(), nn.Identity()]
        )
        self.convs = nn.ModuleList(
            [wrap(nn.Conv2d(inputs, outputs, 3, padding=1)), wrap(nn.Conv2d(outputs, outputs, 3, padding=1))]
        )
        self.shortcut = wrap(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x):
        h = x if self.first else F.relu(self.norms[0](x))
        h = self.convs[1](F.relu(self.norms[1](self.convs[0](h))))
        return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))


class ResNet(nn.Module):
    """SNGAN's critic, with projection of a class embedding where labels are given."""

    def __init__(self, wrap=spectral_norm, norm=None, classes=0):
        super().__init__()
        self.blocks = nn.Sequential(
            Block(3, 4, 16, wrap, None, first=True), Block(4, 6, 8, wrap, norm), Block(6, 6, 4, wrap, norm)
        )
        self.head = wrap(nn.Linear(6, 1))
        self.embedding = wrap(nn.Embedding(classes, 6)) if classes else None

    def forward(self, x, y=None):
        h = F.relu(self.blocks(x)).sum((2, 3))
        scores = self.head(h)
        if self.embedding is not None:
            scores = scores + (self.embedding(y) * h).sum(1, keepdim=True)
        return scores


class UNet(nn.Module):
    """An encoder with a decoder: one score an image and one a pixel."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 4, 2, 1), nn.Conv2d(4, 6, 4, 2, 1)])
        self.up = nn.ConvTranspose2d(6, 4, 4, 2, 1)
        self.out = nn.Conv2d(8, 1, 3, padding=1)
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        first = F.leaky_relu(self.down[0](x), 0.2)
        second = F.leaky_relu(self.down[1](first), 0.2)
        up = F.relu(self.up(second))
        pixels = self.out(F.interpolate(torch.cat([up, first], 1), scale_factor=2, mode="bilinear"))
        return torch.cat([self.head(second.mean((2, 3))), pixels.flatten(1)], 1)


class Residual(nn.Module):
    """StyleGAN2's critic: equalised learning rate, FIR-like downsampling, minibatch standard deviation."""

    class Conv(nn.Module):
        def __init__(self, inputs, outputs, kernel):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            gain = self.weight[0].numel() ** -0.5
            return F.conv2d(x, self.weight * gain, self.bias, padding=self.weight.shape[-1] // 2)

    def __init__(self):
        super().__init__()
        self.inputs = self.Conv(3, 4, 1)
        self.conv0, self.conv1, self.skip = self.Conv(4, 4, 3), self.Conv(4, 6, 3), self.Conv(4, 6, 1)
        self.final = self.Conv(7, 6, 3)
        self.head = nn.Linear(6 * 16, 1)

    def forward(self, x):
        x = F.leaky_relu(self.inputs(x), 0.2) * 2**0.5
        h = F.leaky_relu(self.conv0(x), 0.2) * 2**0.5
        h = F.leaky_relu(F.avg_pool2d(self.conv1(h), 2), 0.2)
        x = (h + self.skip(F.avg_pool2d(x, 2))) * 0.5**0.5
        std = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()
        x = torch.cat([x, std.expand(len(x), 1, *x.shape[2:])], 1)
        x = F.leaky_relu(F.max_pool2d(self.final(x), 2), 0.2)
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))


class Attention(nn.Module):
    """SAGAN's self-attention between convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 4, 2, 1), nn.Conv2d(4, 1, 4)
        self.query, self.key, self.value = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 1)
        self.gamma = nn.Parameter(torch.full((), 0.7))

    def forward(self, x):
        h = F.relu(self.first(x))
        q, k, v = (layer(h).flatten(2) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(q.mT @ k, -1)
        h = h + self.gamma * (v @ weights.mT).view_as(h)
        return self.last(F.avg_pool2d(h, 2, padding=1, ceil_mode=True, count_include_pad=False)[..., :4, :4])


class Transformer(nn.Module):
    """Patches, tokens, two encoder layers, a class token."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 1))

    def forward(self, x):
        h = self.patches(x).flatten(2).mT
        h = self.encoder(torch.cat([self.token.expand(len(x), -1, -1), h], 1))
        return self.head(h[:, 0])


class Cost(nn.Module):
    """A critic that scales, clamps and views its way through functional calls."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 3, 3, 3) * 0.3)
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        h = (torch.conv2d(2 * x - 1, self.w) / 3).clamp(min=-0.1)
        h = h[:, :, ::2].permute(0, 2, 3, 1).relu().mean((1, 2))
        return self.fc(h).unbind(1)[0]


IMAGES = (3, 16, 16)
ZOO = {
    **{f"dcgan {norm}": (lambda norm=norm: dcgan(norm), IMAGES, {}) for norm in (*NORMS, "spectral")},
    "sngan resnet": (ResNet, IMAGES, {}),
    "sngan projection": (lambda: ResNet(classes=5), IMAGES, {"y": 5}),
    "wgan-gp resnet": (lambda: ResNet(lambda layer: layer, nn.LayerNorm), IMAGES, {}),
    "u-net": (UNet, IMAGES, {}),
    "patchgan": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 4, 2, 1),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(4, 8, 4, 2, 1, bias=False),
            nn.InstanceNorm2d(8),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(8, 1, 3, 1, 1),
        ),
        IMAGES,
        {},
    ),
    "stylegan2": (Residual, IMAGES, {}),
    "audio": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 9, 4, 4),
            nn.LeakyReLU(0.2),
            nn.Conv1d(4, 8, 5, 4, 2, groups=2),
            nn.PReLU(8),
            nn.AvgPool1d(2),
            nn.Flatten(),
            nn.Linear(16, 1),
        ),
        (2, 64),
        {},
    ),
    "3-d": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 4, 3, 2, 1),
            nn.BatchNorm3d(4),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(4, 1, 2),
        ),
        (1, 8, 8, 8),
        {},
    ),
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 16), nn.ReLU6(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
        ),
        (6,),
        {},
    ),
    "self-attention": (Attention, IMAGES, {}),
    "transformer": (Transformer, IMAGES, {}),
    "functional": (Cost, IMAGES, {}),
}


def make(name, dtype=torch.float64, batch=4, seed=0):
    """(critic, x, keyword arguments of the critic)."""
    torch.manual_seed(seed)
    build, shape, classes = ZOO[name]
    critic = build().to(dtype)
    kwargs = {key: torch.randint(count, (batch,)) for key, count in classes.items()}
    return critic, torch.randn(batch, *shape, dtype=dtype), kwargs
