"""Small critics for the tests, smooth and kinked, with and without norm layers, in float64."""

import torch
from torch import nn


class Conditional(nn.Module):
    """A projection critic: score = f(x) + <embedding(y), features(x)>, scaled by a keyword."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Softplus(), nn.Flatten())
        self.embedding = nn.Embedding(5, 6 * 16)
        self.head = nn.Linear(6 * 16, 1)

    def forward(self, x, y, *, gain=1.0):
        h = self.features(x)
        return gain * (self.head(h)[:, 0] + (self.embedding(y) * h).sum(1))


def conv(norm=None, scores=(1,)):
    """Two convolutions on (B, 2, 6, 6); scores of shape (B, *scores)."""
    norms = {
        None: nn.Identity,
        "batch": lambda: nn.BatchNorm2d(4),
        "instance": lambda: nn.InstanceNorm2d(4, affine=True),
        "layer": lambda: nn.LayerNorm([4, 6, 6]),
    }
    layers = [nn.Conv2d(2, 4, 3, padding=1), norms[norm](), nn.LeakyReLU(0.2)]
    if scores == (1, 1, 1):
        return nn.Sequential(*layers, nn.Conv2d(4, 1, 6)).double()
    if scores == "patch":
        return nn.Sequential(*layers, nn.Conv2d(4, 1, 3)).double()
    outputs = scores[0] if scores else 1
    tail = [nn.Flatten(0)] if scores == () else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, outputs), *tail).double()


def images(count=5):
    return torch.randn(count, 2, 6, 6, dtype=torch.float64)


def parameter_gradients(value, critic):
    grads = torch.autograd.grad(value, list(critic.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(critic.parameters(), grads, strict=True)]


def assert_same_gradients(value, wanted, critic, tolerance=1e-12):
    torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)
    for got, right in zip(parameter_gradients(value, critic), parameter_gradients(wanted, critic), strict=True):
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance)
