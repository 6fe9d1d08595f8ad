"""What can be checked of the benchmarks without measuring: their picture, their predictions, and the costs behind."""

import copy
import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpkernels as gp
from gpkernels import _support

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/2026-11-22-ops-cpu-2-threads.csv"


def run(*arguments, **environment):
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.cases")


def test_roofline_draws_committed_results(tmp_path):
    picture = tmp_path / "picture.png"
    result = run("benchmarks.roofline", RESULTS, "--out", picture)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_roofline_without_matplotlib_says_so(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no matplotlib here')")
    arguments = [str(RESULTS), "--out", str(tmp_path / "picture.png")]
    code = f"import sys, runpy; sys.path[:0] = [{str(tmp_path)!r}]; sys.argv[1:] = {arguments}"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}; runpy.run_module('benchmarks.roofline', run_name='__main__')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "no picture: no matplotlib here\n"), result.stderr


def test_arithmetic_is_counted():
    counts = importlib.import_module("benchmarks.counts")
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)
    a, b = torch.randn(4, 6), torch.randn(6, 7)
    of_convolution = 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)
    assert counts.count(lambda: a @ b).flops == 2 * 4 * 6 * 7
    assert counts.count(lambda: torch.nn.functional.conv2d(x, w).sum().backward()).flops == 3 * of_convolution


def test_costs_count_every_launch(cases, monkeypatch):
    """Calls that reach a device are launches; of gpkernels, those of torch and those of the Triton backend. Plain torch
    is counted on the meta device: as on a GPU."""
    counts = importlib.import_module("benchmarks.counts")
    pytest.importorskip("triton")
    launches = []
    for module in ("_triton", "interpolate.triton", "perturb.triton", "grad_penalty.triton", "pairwise_cost.triton"):
        module = importlib.import_module(f"gpkernels.ops.{module}")
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **constants: launches.append(kernel))
    monkeypatch.setattr(_support, "interprets_triton", lambda: True)
    for case in cases.CASES:
        with gp.backend("reference"):
            plain = case.make(torch.randn(cases.SHAPES[0], device="meta"))
        for name in ("snippet", "best"):
            assert counts.count(plain[name]).ops == case.costs[name].launches, (case.name, name)
        for shape in cases.SHAPES:
            with gp.backend("triton"):
                ours = case.make(torch.randn(shape))["gpkernels"]
                launches.clear()
                ops = counts.count(ours).ops
                assert ops + len(launches) == case.costs["gpkernels"].launches, (case.name, shape)


def test_spectral_notices_a_wrong_result(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    spectral = importlib.import_module("benchmarks.spectral")
    layers = [spectral.spectral_norm(spectral.spiked(layer)) for layer in spectral.dcgan(4)]
    grads = [torch.randn_like(layer.weight) for layer in layers]
    variants = {"torch": spectral.Modules(layers, grads), "ops": spectral.Ops(copy.deepcopy(layers), grads)}
    assert spectral.differs(variants) == ""
    variants["ops"].targets[2] = 1.01
    assert "ops: result 2, of shape (16, 8, 4, 4), differs by" in spectral.differs(variants)


def test_legacy_spectral_norm_runs_as_in_a_forward(monkeypatch):
    """What a forward of the layer does to weight and vectors; and what torch's parametrization comes to."""
    monkeypatch.syspath_prepend(ROOT)
    spectral = importlib.import_module("benchmarks.spectral")
    plain = torch.nn.ModuleList(spectral.spiked(layer) for layer in spectral.dcgan(4))
    layers = [spectral.spectral_norm(layer) for layer in copy.deepcopy(plain)]
    grads = [torch.randn_like(layer.weight) for layer in layers]
    legacy = spectral.Legacy(plain, layers, grads)
    first = copy.deepcopy(legacy.layers[0])
    first(torch.randn(1, 3, 8, 8))
    normalised, _ = legacy()
    assert torch.equal(normalised[0], first.weight)
    assert torch.equal(legacy.state()[0], first.weight_u)
    assert torch.equal(legacy.state()[1], first.weight_v)
    variants = {"torch": spectral.Modules(layers, grads), "legacy": legacy}
    assert spectral.differs(variants) == ""
    with torch.no_grad():
        legacy.layers[2].weight_orig.mul_(1.01)
    assert "legacy: result 7, of shape (16, 8, 4, 4), differs by" in spectral.differs(variants)


def test_convolution_compares_before_it_times(tmp_path):
    out = tmp_path / "rows.csv"
    result = run("benchmarks.convolution", "--quick", "--only", "grey", "--out", out)
    assert result.returncode == 0, result.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["forward", "torch", "gpkernels"] * 2
    assert {row["taken"] for row in rows} == {"True"}


def test_every_variant_begins_a_round():
    timing, began = importlib.import_module("benchmarks.timing"), []
    variants = {name: (lambda name=name: began.append(name)) for name in "abc"}
    timing.interleaved(variants, torch.device("cpu"), 4)
    turns = [name for i, name in enumerate(began) if i == 0 or began[i - 1] != name]
    assert "".join(turns).endswith("abcbcacababc")


def test_memory_that_is_kept_stays_kept():
    timing = importlib.import_module("benchmarks.timing")
    timing.interleaved({"a": list}, torch.device("cpu"), 2)
    with pytest.raises(RuntimeError, match="keep_memory: wanted True in a process that keeps its memory already"):
        timing.interleaved({"a": list}, torch.device("cpu"), 2, keep_memory=False)


def test_results_name_the_code_they_are_of(tmp_path, monkeypatch):
    """Its commit, and whether it differed: result files and pages may."""
    machine = importlib.import_module("benchmarks.machine")
    for name in ("gpkernels/a.py", "benchmarks/b.py", "benchmarks/results/c.csv", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "c"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for changed, commit in (
        ("README.md", head),
        ("benchmarks/results/c.csv", head),
        ("benchmarks/b.py", f"{head}-dirty"),
    ):
        Path(changed).write_text("2")
        assert machine.machine(torch.device("cpu"))["commit"] == commit
