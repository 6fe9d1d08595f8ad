"""Three linear layers under spectral norm, and what their tests ask of them."""

import pytest
import torch
from test_spectral_modules import largest
from torch import nn

import gpkernels as gp


def linears(width=64, **options):
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1))
    return model, gp.spectral_norm_all(model, **options)


def originals(model):
    return [layer.parametrizations.weight.original for layer in model]


@torch.no_grad()
def norms(model):
    return [largest(layer.weight) for layer in model]


def assert_normalised(model):
    assert norms(model) == pytest.approx([1.0] * len(model), rel=0.06)
