"""What `benchmarks.predictions` says spectral norm costs on a GPU, held to the code."""

import importlib
from pathlib import Path

import pytest
import torch
from torch.nn.utils.parametrizations import spectral_norm

import gpkernels as gp
from gpkernels import _support

ROOT = Path(__file__).parent.parent


@pytest.fixture
def modules(monkeypatch):
    """benchmarks.predictions, .spectral and .counts"""
    monkeypatch.syspath_prepend(ROOT)
    return [importlib.import_module(f"benchmarks.{name}") for name in ("predictions", "spectral", "counts")]


def test_costs_of_spectral_norm(modules, monkeypatch):
    """Launches of torch and of the Triton backend, and the bytes that torch's calls touch."""
    pytest.importorskip("triton")
    predictions, spectral, counts = modules
    launches = []
    launcher = importlib.import_module("gpkernels.ops.spectral_norm.triton")
    monkeypatch.setattr(launcher, "launch", lambda kernel, *args, **constants: launches.append(kernel))
    monkeypatch.setattr(_support, "interprets_triton", lambda: True)
    for name, make in spectral.CRITICS.items():
        if name == "SNGAN-ResNet-64":
            continue  # as the others, but 150 MB
        layers = make()
        grads = [torch.randn_like(layer.weight) for layer in layers]
        layers = [spectral_norm(layer) for layer in layers]
        costs, size = predictions.spectral_costs(len(layers)), sum(grad.nbytes for grad in grads)
        counted = counts.count(spectral.Modules(layers, grads))
        assert counted.ops == costs["torch"].launches
        assert counted.bytes / size == pytest.approx(costs["torch"].passes, rel=0.02)
        with gp.backend("triton"):
            ours = spectral.Ops(layers, grads)
            ours()  # makes the tables
            launches.clear()
            assert counts.count(ours).ops == 0
        assert len(launches) == costs["gpkernels"].launches


def test_predictions_have_a_row_for_every_critic(modules):
    predictions, spectral, _ = modules
    assert [row[0] for row in predictions.spectral_table()[1:]] == list(spectral.CRITICS)
