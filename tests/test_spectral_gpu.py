"""What only a GPU can show of spectral norm: its launches in a CUDA graph. Skipped without one."""

import oracles
import pytest
import test_gpu
import torch

import gpkernels as gp
from gpkernels.ops.spectral_norm import reference
from gpkernels.ops.spectral_norm.autograd import spectral_iterate, spectral_scale
from gpkernels.ops.spectral_norm.layout import pack

pytestmark = test_gpu.pytestmark

EPS = 1e-12


@pytest.fixture(params=test_gpu.BACKENDS or ["none"])
def kernels(request):
    with gp.backend(request.param):
        yield request.param


def test_iteration_and_gradient_are_captured(kernels):
    """Each replay iterates once more, on the weights as they are then."""
    layers = [((64, 3, 4, 4), 0), ((32, 64, 4, 4), 1), ((1, 512), 0)] * 30  # more than one launch takes
    weights = [torch.randn(shape, device="cuda", requires_grad=True) for shape, _ in layers]
    dims, targets = [dim for _, dim in layers], [1.0] * len(layers)
    u, v = (
        [torch.nn.functional.normalize(torch.randn(n, device="cuda"), dim=0) for n in lengths]
        for lengths in zip(
            *((w.shape[d], w.numel() // w.shape[d]) for w, d in zip(weights, dims, strict=True)), strict=True
        )
    )
    grads = [torch.randn_like(w) for w in weights]

    def run():
        sigma = spectral_iterate(weights, u, v, dims, 1, EPS)
        normalised = spectral_scale(weights, u, v, sigma, dims, targets, EPS)
        return sigma[0], *normalised, *torch.autograd.grad(normalised, weights, grads)

    graph, got = test_gpu.captured(run)
    with torch.no_grad():
        for w in weights:
            w.mul_(0.5)
    for _ in range(2):
        exact = [[x.detach().double().clone() for x in group] for group in (weights, u, v)]
        graph.replay()
        sigma = reference.spectral_norm_iterate(*exact, dims, 1, EPS)
        vectors, doubles = pack(*exact[1:]), [g.double() for g in grads]
        wanted = [
            sigma,
            *reference.spectral_norm_scale(exact[0], sigma, targets, EPS),
            *reference.spectral_norm_scale_backward(doubles, exact[0], vectors, sigma, dims, targets, EPS),
        ]
        for one, other in zip((*got, *u, *v), (*wanted, *exact[1], *exact[2]), strict=True):
            assert oracles.relative_error(one.detach(), other) < 1e-4
