"""The ops as cases: each a set of variants that compute the same thing, and the bytes that they must move at least.

A variant is a function of no arguments; the inputs are made once a case. "snippet" is the code one usually sees, "best"
the fastest plain torch we know on the device, "gpkernels" the backend that a user gets, with its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import gpkernels as gp
from gpkernels import registry

SHAPES = ((64, 3, 64, 64), (64, 3, 256, 256))

Variant = Callable[[], object]


class Cost(NamedTuple):
    """What a variant asks of a GPU: tensors of the size of x that its kernels read and write, and their launches.

    Of gpkernels it is the Triton backend, with the launches that torch adds for seeds and upstream gradients.
    """

    passes: int
    launches: int


@dataclass(frozen=True)
class Case:
    """`make(x)` gives the variants for an input x of shape (B, C, H, W), and `costs` what each is expected to cost.

    `agree` gives pairs of tensors that must be equal up to `tolerance`, relative, before any time counts.
    """

    name: str
    op: str
    costs: dict[str, Cost]
    make: Callable[[Tensor], dict[str, Variant]]
    agree: Callable[[Tensor], list[tuple[Tensor, Tensor]]]
    tolerance: float = 1e-5

    @property
    def passes(self) -> int:
        """The least that the computation can move: what one fused pass in each direction does."""
        return self.costs["gpkernels"].passes


def _costs(snippet: tuple[int, int], best: tuple[int, int], gpkernels: tuple[int, int]) -> dict[str, Cost]:
    return {"snippet": Cost(*snippet), "best": Cost(*best), "gpkernels": Cost(*gpkernels)}


def _column(eps: Tensor, x: Tensor) -> Tensor:
    return eps.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def _eps_given(x: Tensor) -> dict[str, Variant]:
    fake, eps = torch.randn_like(x), torch.rand(len(x), device=x.device)
    column = _column(eps, x)
    return {
        "snippet": lambda: column * x + (1 - column) * fake,
        "best": lambda: torch.lerp(fake, x, column),
        "gpkernels": lambda: gp.interpolate(x, fake, eps=eps),
    }


def _eps_drawn(x: Tensor) -> dict[str, Variant]:
    fake = torch.randn_like(x)

    def draw() -> Tensor:
        return torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device, dtype=x.dtype)

    def snippet() -> Tensor:
        eps = draw()
        return eps * x + (1 - eps) * fake

    return {
        "snippet": snippet,
        "best": lambda: torch.lerp(fake, x, draw()),
        "gpkernels": lambda: gp.interpolate(x, fake),
    }


def _eps_per_element(x: Tensor) -> dict[str, Variant]:
    fake = torch.randn_like(x)

    def snippet() -> Tensor:
        eps = torch.rand_like(x)
        return eps * x + (1 - eps) * fake

    return {
        "snippet": snippet,
        "best": lambda: torch.lerp(fake, x, torch.rand_like(x)),
        "gpkernels": lambda: gp.interpolate(x, fake, per_element=True),
    }


def _noise_normal(x: Tensor) -> dict[str, Variant]:
    return {
        "snippet": lambda: x + 0.5 * torch.randn_like(x),
        "best": lambda: torch.randn_like(x).mul_(0.5).add_(x),
        "gpkernels": lambda: gp.perturb(x, scale=0.5),
    }


def _noise_dragan(x: Tensor) -> dict[str, Variant]:
    return {
        "snippet": lambda: x + 0.5 * x.std() * (2 * torch.rand_like(x) - 1),
        "best": lambda: torch.empty_like(x).uniform_(-0.5, 0.5).mul_(x.std()).add_(x),
        "gpkernels": lambda: gp.perturb(x, scale=0.5, noise="uniform", relative=True),
    }


def _plain_norm(grad: Tensor, axes: str) -> Tensor:
    return torch.linalg.vector_norm(
        grad.float() if grad.dtype.itemsize < 4 else grad, dim=1 if axes == "pixel" else tuple(range(1, grad.dim()))
    )


def _penalty(axes: str) -> Callable[[Tensor], dict[str, Variant]]:
    def make(x: Tensor) -> dict[str, Variant]:
        grad = x.clone().requires_grad_()

        def snippet() -> Tensor:
            norm = grad.norm(2, dim=1) if axes == "pixel" else grad.reshape(len(grad), -1).norm(2, dim=1)
            return torch.autograd.grad(((norm - 1) ** 2).mean(), grad)[0]

        def best() -> Tensor:
            return torch.autograd.grad((_plain_norm(grad, axes) - 1).square().mean(), grad)[0]

        def ours() -> Tensor:
            return torch.autograd.grad(gp.grad_norm_penalty(grad, axes=axes), grad)[0]

        return {"snippet": snippet, "best": best, "gpkernels": ours}

    return make


def _double_backward(x: Tensor) -> dict[str, Variant]:
    """The second derivative alone, on a graph of the first kept from one call to the next."""
    grad, tangent = x.clone().requires_grad_(), torch.randn_like(x)

    def second(value: Tensor) -> Variant:
        (first,) = torch.autograd.grad(value, grad, create_graph=True)
        return lambda: torch.autograd.grad(first, grad, tangent, retain_graph=True)[0]

    return {
        "snippet": second(((grad.reshape(len(grad), -1).norm(2, dim=1) - 1) ** 2).mean()),
        "best": second((_plain_norm(grad, "sample") - 1).square().mean()),
        "gpkernels": second(gp.grad_norm_penalty(grad)),
    }


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """||x - y||_1 of each sample. On a CPU a large sample's difference stays in the cache until it is added up."""
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x - y, 1, dim=tuple(range(1, x.dim())))
    if x[0].numel() < 1 << 16:
        return F.l1_loss(x, y, reduction="none").flatten(1).sum(1)
    return torch.stack([F.l1_loss(a, b, reduction="sum") for a, b in zip(x, y, strict=True)])


def _pairs(x: Tensor) -> dict[str, Variant]:
    """The costs of LS-GAN, and the gradients in the critic's losses."""
    fake, margin = torch.randn_like(x), 1.0 / x[0].numel()
    real_loss, fake_loss = losses = [torch.randn(len(x), device=x.device, requires_grad=True) for _ in range(2)]
    up = torch.rand(len(x), device=x.device)

    def plain(distance: Callable[[Tensor, Tensor], Tensor]) -> Variant:
        def run() -> tuple[Tensor, ...]:
            cost = torch.relu(margin * distance(x, fake) + real_loss - fake_loss)
            return cost, *torch.autograd.grad(cost, losses, up)

        return run

    def ours() -> tuple[Tensor, ...]:
        cost, _ = gp.pairwise_cost(x, fake, real_loss, fake_loss, margin=margin)
        return cost, *torch.autograd.grad(cost, losses, up)

    snippet = plain(lambda x, y: (x - y).abs().flatten(1).sum(1))
    return {"snippet": snippet, "best": plain(_distance), "gpkernels": ours}


def _variants_agree(make: Callable[[Tensor], dict[str, Variant]]) -> Callable[[Tensor], list[tuple[Tensor, Tensor]]]:
    """Each of the tensors that a variant returns, or the one."""

    def agree(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        variants = make(x)
        results: dict[str, Any] = {name: run() for name, run in variants.items()}
        tensors = {name: result if isinstance(result, tuple) else (result,) for name, result in results.items()}
        return [pair for name in ("snippet", "best") for pair in zip(tensors["gpkernels"], tensors[name], strict=True)]

    return agree


def _reference_agrees(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], list[tuple[Tensor, Tensor]]]:
    """For random ops: the same seed on the reference backend."""

    def agree(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(0)
        ours = call(x)
        torch.manual_seed(0)
        with gp.backend("reference"):
            return [(ours, call(x))]

    return agree


CASES = (
    Case(
        "interpolate, eps given",
        "interpolate",
        _costs((7, 4), (3, 1), (3, 1)),
        _eps_given,
        _variants_agree(_eps_given),
    ),
    Case(
        "interpolate, eps drawn",
        "interpolate",
        _costs((7, 5), (3, 2), (3, 2)),
        _eps_drawn,
        _reference_agrees(lambda x: gp.interpolate(x, -x)),
    ),
    Case(
        "interpolate, eps per element",
        "interpolate",
        _costs((12, 5), (5, 2), (3, 2)),
        _eps_per_element,
        _reference_agrees(lambda x: gp.interpolate(x, -x, per_element=True)),
    ),
    Case(
        "perturb, normal",
        "perturb",
        _costs((6, 3), (6, 3), (2, 2)),
        _noise_normal,
        _reference_agrees(lambda x: gp.perturb(x, scale=0.5)),
    ),
    Case(
        "perturb, DRAGAN",
        "perturb",
        _costs((11, 7), (7, 4), (3, 3)),
        _noise_dragan,
        _reference_agrees(lambda x: gp.perturb(x, scale=0.5, noise="uniform", relative=True)),
    ),
    Case(
        "penalty per sample, forward + backward",
        "grad_norm_penalty",
        _costs((7, 13), (7, 13), (3, 4)),
        _penalty("sample"),
        _variants_agree(_penalty("sample")),
    ),
    Case(
        "penalty per pixel, forward + backward",
        "grad_norm_penalty",
        _costs((13, 13), (13, 13), (3, 4)),
        _penalty("pixel"),
        _variants_agree(_penalty("pixel")),
    ),
    Case(
        "penalty per sample, double backward",
        "grad_norm_penalty",
        _costs((29, 21), (29, 21), (5, 3)),
        _double_backward,
        _variants_agree(_double_backward),
        1e-4,
    ),
    Case(
        "pairwise cost, forward + backward",
        "pairwise_cost",
        _costs((6, 9), (4, 8), (2, 3)),
        _pairs,
        _variants_agree(_pairs),
    ),
)


class _OneOp(torch.autograd.Function):
    """A plain autograd Function around one torch op each way: the yardstick of host overhead."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return grad_out * x


class _OneOpOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):  # type: ignore[no-untyped-def]
        return torch.lerp(x, y, 0.5)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        return grad_out * 0.5, None


def overhead(device: torch.device) -> dict[str, dict[str, Variant]]:
    """Forward + backward on 12 numbers: what a call costs the host. Per op, our call and the plain Function."""
    x, y = torch.randn(4, 3, device=device, requires_grad=True), torch.randn(4, 3, device=device)
    eps, up = torch.rand(4, device=device), torch.randn(4, 3, device=device)
    loss = torch.rand(4, device=device, requires_grad=True)
    two = lambda: torch.autograd.grad(_OneOpOfTwo.apply(x, y), x, up)  # noqa: E731
    return {
        "interpolate": {
            "plain Function": two,
            "gpkernels": lambda: torch.autograd.grad(gp.interpolate(x, y, eps=eps), x, up),
        },
        "perturb": {
            "plain Function": two,
            "gpkernels": lambda: torch.autograd.grad(gp.perturb(x, scale=0.5), x, up),
        },
        "grad_norm_penalty": {
            "plain Function": lambda: torch.autograd.grad(_OneOp.apply(x), x),
            "gpkernels": lambda: torch.autograd.grad(gp.grad_norm_penalty(x), x),
        },
        "pairwise_cost": {
            "plain Function": two,
            "gpkernels": lambda: torch.autograd.grad(gp.pairwise_cost(up, y, loss, eps)[0], loss, eps),
        },
    }


def backend_of(case: Case, x: Tensor) -> str:
    return registry.choose(case.op, x, **({"form": 0} if case.op == "grad_norm_penalty" else {})).backend
