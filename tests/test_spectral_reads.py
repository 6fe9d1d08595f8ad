"""Reads of a normalised weight, which go past torch's calls of modules."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import gpkernels as gp


@pytest.fixture
def layer_and_list():
    """A layer with a normalised weight, and its list of parametrizations."""
    layer = nn.Linear(4, 3)
    gp.spectral_norm(layer)
    return layer, layer.parametrizations.weight


def test_reads_pass_torchs_calls_of_modules_by_unless_something_waits_there(layer_and_list, monkeypatch):
    layer, owner = layer_and_list
    wanted, calls = layer.weight.detach().clone(), []
    plain = parametrize.ParametrizationList.forward
    monkeypatch.setattr(parametrize.ParametrizationList, "forward", lambda self: calls.append("list") or plain(self))
    for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied.weight, wanted)
    assert calls == []
    for module in (owner, owner[0]):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *unused: calls.append("hook"))
            assert torch.equal(layer.weight, wanted)
            handle.remove()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *unused: calls.append("hook"))
    assert torch.equal(layer.weight, wanted)
    handle.remove()
    assert calls == ["list", "hook", "hook", "list", "list", "hook", "list", "hook", "hook", "list", "hook"]


def test_reads_are_cached_where_torch_is_asked_to(layer_and_list):
    layer, _ = layer_and_list
    layer.eval()
    assert layer.weight is not layer.weight
    with parametrize.cached():
        assert layer.weight is layer.weight


def test_a_parametrization_after_ours_is_applied(layer_and_list):
    layer, _ = layer_and_list
    wanted = 2 * layer.weight.detach()

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(layer, "weight", Twice())
    assert torch.equal(layer.weight, wanted)
    other = {"parametrizations.weight.original": torch.eye(3, 4)}
    plain = nn.Linear(4, 3)
    gp.spectral_norm(plain)
    swapped = torch.func.functional_call(plain, {**other, "bias": torch.zeros(3)}, (torch.eye(4),))
    assert torch.allclose(swapped, torch.eye(4, 3))
