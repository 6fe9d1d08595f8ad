"""Fixtures for every test: torch.empty filled with NaN, and the backends that can run on this machine."""

import importlib
import math
from pathlib import Path

import pytest
import torch

from gpkernels import double_backward, registry


@pytest.fixture(autouse=True)
def nan_poisoned_empty():
    """Uninitialised memory, torch's own and that of native kernels, reads as NaN: an output element that a kernel
    does not write fails the test."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def usable_backends():
    return [name for name in registry.BACKENDS if registry.why_not(name) is None]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", usable_backends(), indirect=True)


@pytest.fixture
def backend(request):
    """Runs the test inside `gp.backend(name)`; yields the name."""
    with registry.backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return registry.home_device(backend)


@pytest.fixture(autouse=True)
def small_critics_too(monkeypatch):
    """The engine runs for the tests' critics, which are too small for it to pay."""
    monkeypatch.setattr(double_backward.mode, "SMALL", 0)


@pytest.fixture(scope="session")
def eight_faces():
    """Two steps an epoch with a batch size of 4."""
    from gpkernels.training import TrainConfig, data

    return data.ImageSet("faces", data.load(TrainConfig()).images[:8])


@pytest.fixture
def module(monkeypatch):
    """Modules of benchmarks/ by name; nothing that one test has loaded or measured is left for the next."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)

    def find(name):
        found = importlib.import_module(f"benchmarks.{name}")
        importlib.import_module("benchmarks.experiments").load.cache_clear()
        return found

    return find


@pytest.fixture
def counted_steps(monkeypatch):
    """The steps that trainers take; `limit` of them, and then somebody presses Ctrl-C."""
    from gpkernels.training import Learner

    counted = {"steps": 0, "limit": math.inf}
    step = Learner.train_step

    def train_step(self):
        if counted["steps"] == counted["limit"]:
            raise KeyboardInterrupt
        counted["steps"] += 1
        return step(self)

    monkeypatch.setattr(Learner, "train_step", train_step)
    return counted
