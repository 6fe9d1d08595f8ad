"""Critics with the habits that people have: changes in place, shared, frozen and computed weights, parts that no engine
can know, checkpoints, old and new ways of torch."""

import warnings

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from plain import Net
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import gpkernels as gp

X = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def conv(inputs=3, outputs=4, kernel=3):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def body(middle=None, **options):
    """A critic with `middle` between two convolutions."""
    return nn.Sequential(conv(), *([middle] if middle else []), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(256, 1))


def head(net, h):
    return net.head(h.mean((2, 3)))


def net(call, **modules):
    modules = {"first": conv(), "second": conv(4, 4), "head": nn.Linear(4, 1), **modules}
    return Net(call, **modules)


class Tied(nn.Module):
    """One weight in two places: `again` makes the second convolution's from it."""

    def __init__(self, again=lambda w: w, elsewhere=None):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(3, 3, 3, 3) * 0.3), nn.Linear(3, 1)
        self.again, self.elsewhere = again, elsewhere or (lambda h, w: h)

    def forward(self, x):
        first = self.again(self.weight) if self.again is twice else self.weight
        h = F.leaky_relu(F.conv2d(x, first, padding=1), 0.2)
        h = F.leaky_relu(F.conv2d(h, self.again(first), padding=1), 0.2)
        return self.head(self.elsewhere(h, self.weight).mean((2, 3)))


def twice(weight):
    return weight * 1.5


class TiedOffTheGraph(Tied):
    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return super().forward(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=1)


def pruned(module):
    torch.nn.utils.prune.random_unstructured(module[0], "weight", 0.5)
    return module


def traced(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, X, check_trace=False)


def frozen(module, *names):
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not any(name.startswith(n) for n in names))
    return module


def modified_conv(self, x):
    h = F.leaky_relu(self.first(x), 0.2)
    h += self.second(h.detach())
    return head(self, h)


def own_gradient(self, x):
    y = self.first(x)
    (g,) = torch.autograd.grad(F.relu(y).square().sum(), x, create_graph=True)
    return head(self, F.relu(self.first(x + 0.1 * g)))


def detached_part(self, x):
    with torch.no_grad():
        gate = torch.sigmoid(self.second(F.relu(self.first(x))))
    return head(self, F.relu(self.first(x)) * gate + F.relu(self.second(self.first(x.detach()))))


def own_block(self, x):
    with gp.fast_double_backward():
        h = F.leaky_relu(self.first(x), 0.2)
    return head(self, h)


def own_penalty(self, x):
    inner = gp.gradient_penalty(lambda z: head(self, F.silu(self.first(z))), x.detach(), kind="r1")
    return head(self, F.relu(self.first(x))) + inner


def shared_road(self, x):
    """A critic that looks flat but for a parameter on the way."""
    h = F.relu(self.first(x)) * self.head.weight.view(1, 4, 1, 1)
    return head(self, h)


class ScaledTanh(torch.autograd.Function):
    """An operation the package has never heard of."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def checkpointed(self, x, reentrant=False):
    h = checkpoint(
        lambda x: F.relu(self.second(self.norm(F.leaky_relu(self.first(x), 0.2)))), x, use_reentrant=reentrant
    )
    return head(self, h)


def checkpointed_with_hooks(self, x):
    def part(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return F.leaky_relu(self.first(x), 0.2)

    return head(self, checkpoint(part, x, use_reentrant=False))


def vmapped(self, x):
    return torch.func.vmap(lambda one: head(self, F.leaky_relu(self.first(one[None]), 0.2))[0])(x)


def per_sample_gradient(self, x):
    inner = torch.func.vmap(torch.func.grad(lambda one: F.silu(self.first(one[None])).sum()))(x)
    return head(self, F.relu(self.first(x + inner)))


CRITICS = {
    "in place": lambda: nn.Sequential(
        conv(), nn.ReLU(True), conv(4, 4), nn.BatchNorm2d(4), nn.LeakyReLU(0.2, True), nn.Flatten(), nn.Linear(256, 1)
    ),
    "in place on max_pool2d": lambda: body(nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.ReLU(True))),
    "in place on avg_pool2d": lambda: body(nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.ReLU(True))),
    "in place on a view": lambda: net(lambda self, x: head(self, F.relu_(self.first(x)[:, :, ::2]))),
    "in place addition": lambda: net(modified_conv),
    "in place scaling of leaky_relu": lambda: net(lambda self, x: head(self, F.leaky_relu(self.first(x), 0.2).mul_(2))),
    "in place scaling of relu6": lambda: net(lambda self, x: head(self, F.relu6(self.first(x)).mul_(2))),
    "in place scaling of relu": lambda: net(lambda self, x: head(self, F.relu(self.first(x)).mul_(2))),  # raises
    "in place scaling of a pool": lambda: net(lambda self, x: head(self, F.max_pool2d(self.first(x), 2).mul_(2))),
    "in place dropout": lambda: body(nn.Sequential(nn.LeakyReLU(0.2), nn.Dropout2d(0.3, inplace=True))),
    "dropout": lambda: body(nn.Dropout(0.4)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Sequential(conv(), nn.ReLU())), body()[2:]),
    "tied": Tied,
    "tied and scaled": lambda: Tied(lambda w: w * 1.5),
    "tied along a chain": lambda: Tied(twice),
    "tied, weights saved elsewhere": TiedOffTheGraph,
    "tied to a product": lambda: Tied(elsewhere=lambda h, w: h * w.mean()),
    "tied to a scale": lambda: net(shared_road),
    "tied bias": lambda: net(lambda self, x: head(self, F.relu(self.first(x)) + self.first.bias.view(1, 4, 1, 1))),
    "frozen first": lambda: frozen(body(), "0"),
    "frozen weights": lambda: frozen(body(nn.BatchNorm2d(4)), "0.weight", "1.weight", "4.weight"),
    "frozen biases": lambda: frozen(body(nn.BatchNorm2d(4)), "0.bias", "1.bias", "4.bias"),
    "frozen but a norm": lambda: frozen(body(nn.GroupNorm(2, 4)), "0", "4"),
    "frozen": lambda: frozen(body(), ""),
    "batch norm, eval": lambda: body(nn.BatchNorm2d(4)).eval(),
    "batch norm, momentum None": lambda: body(nn.BatchNorm2d(4, momentum=None)),
    "batch norm without statistics": lambda: body(nn.BatchNorm2d(4, track_running_stats=False, affine=False)).eval(),
    "instance norm with statistics": lambda: body(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "layer norm without bias": lambda: body(nn.LayerNorm([4, 8, 8], bias=False)),
    "circular padding": lambda: body(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
    "reflected padding": lambda: body(nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect")),
    "channels last": lambda: body(nn.Sequential(conv(4, 4), nn.InstanceNorm2d(4))).to(
        memory_format=torch.channels_last
    ),
    "pruned": lambda: pruned(body()),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten(), nn.LazyLinear(1)),
    "traced": lambda: traced(body(nn.BatchNorm2d(4))),
    "no parameters": lambda: Net(lambda self, x: F.leaky_relu(x, 0.2).square().mean((1, 2, 3))),
    "views of instance norm": lambda: net(
        lambda self, x: self.out(
            F.instance_norm(self.first(x).contiguous(memory_format=torch.channels_last)).view(4, -1)
        ),
        out=nn.Linear(256, 1),
    ),
    "a bias of two dimensions": lambda: net(
        lambda self, x: F.linear(F.relu(self.first(x)).flatten(1), self.out.weight, self.out.bias.expand(4, 1)),
        out=nn.Linear(256, 1),
    ),
    "weight times gain": lambda: net(
        lambda self, x: head(self, F.relu(F.conv2d(x, self.first.weight * 0.7, self.first.bias * 0.1)))
    ),
    "weight standardisation": lambda: nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 1)),
    "weight norm": lambda: body(parametrizations.weight_norm(conv(4, 4))),
    "orthogonal": lambda: body(parametrizations.orthogonal(conv(4, 4))),
    "spectral norm and batch norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(conv()), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(256, 1)
    ),
    "hypernetwork": lambda: net(
        lambda self, x: head(self, F.relu(F.conv2d(self.first(x), self.hyper(x.mean((0, 2, 3))).view(4, 4, 3, 3)))),
        hyper=nn.Linear(3, 144),
    ),
    "hypernetwork on a constant": lambda: net(
        lambda self, x: head(self, F.relu(F.conv2d(self.first(X), self.hyper(x.mean((0, 2, 3))).view(4, 4, 3, 3)))),
        hyper=nn.Linear(3, 144),
    ),
    "its own gradient": lambda: net(own_gradient),
    "parts without gradient": lambda: net(detached_part),
    "its own block": lambda: net(own_block),
    "its own penalty": lambda: net(own_penalty),
    "an unknown Function": lambda: net(lambda self, x: head(self, F.relu(ScaledTanh.apply(self.first(x))))),
    "unknown ops": lambda: net(
        lambda self, x: head(self, F.relu(torch.fft.rfft2(F.elu(self.first(x))).abs() + 1).cumsum(-1))
    ),
    "checkpoint": lambda: net(checkpointed, norm=nn.BatchNorm2d(4)),
    "checkpoint, reentrant": lambda: net(lambda self, x: checkpointed(self, x, True), norm=nn.Identity()),
    "checkpoint of saved tensor hooks": lambda: net(checkpointed_with_hooks),
    "vmap inside": lambda: net(vmapped),
    "torch.func.grad inside": lambda: net(per_sample_gradient),
    "bfloat16 inside": lambda: net(lambda self, x: head(self, F.relu(self.first(x)).float().double())),
    "scores of float16": lambda: net(lambda self, x: head(self, F.relu(self.first(x))).half().float()),
    "scores scaled in place": lambda: net(lambda self, x: head(self, F.relu(self.first(x))).mul_(2).view(-1)),
}
