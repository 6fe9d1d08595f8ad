"""Installing: with and without isolation, with and without a compiler; importing: quickly, never building."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONSTRAINTS = {"PIP_CONSTRAINT": str(ROOT / ".ci/constraints.txt")}


def python(*arguments, env=None, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=600,
    )


def source_copy(path):
    """The project as git would hand it out, without what was built in place."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    for name in tracked:
        if name.split("/")[0] in ("csrc", "gpkernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes((ROOT / name).read_bytes())
    return path


def wheel(source, env, *, isolated=False):
    flags = ["--no-deps", "--quiet", "--disable-pip-version-check", *([] if isolated else ["--no-build-isolation"])]
    target = source / "wheels"
    built = python("-m", "pip", "wheel", *flags, "--wheel-dir", target, source, env={**CONSTRAINTS, **env}, cwd=source)
    return built, sorted((source / "wheels").glob("*.whl")) if (source / "wheels").is_dir() else []


PROBE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import gpkernels as gp, torch
print(gp.why_not("cpu"))
x = torch.randn(4, 3)
print(gp.gradient_penalty(torch.nn.Linear(3, 1), x, x) >= 0)
"""


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"GPKERNELS_BUILD": "none"}, "the C++ kernels were not built"),
        ({"GPKERNELS_BUILD": "auto", "CXX": "no-such-compiler"}, "the C++ kernels were not built"),
    ],
    ids=["none", "no compiler"],
)
def test_pure_python_install_works_and_says_so(tmp_path, env, reason):
    built, wheels = wheel(source_copy(tmp_path / "source"), env)
    assert built.returncode == 0, built.stderr
    assert wheels[0].name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(tmp_path / "site")
    probe = python("-c", PROBE, env={"PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path)
    assert probe.returncode == 0, probe.stderr
    assert reason in probe.stdout
    assert "True" in probe.stdout


def test_native_wheel_installs_and_carries_the_kernels(tmp_path):
    """Of an isolated build; the environment that runs the tests was installed without isolation."""
    built, wheels = wheel(source_copy(tmp_path / "source"), {"GPKERNELS_BUILD": "cpu", "MAX_JOBS": "2"}, isolated=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(wheels[0]) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert any(name.startswith("gpkernels/_C.") for name in names)
    assert "gpkernels/py.typed" in names
    assert not [name for name in names if not name.startswith(("gpkernels/", "gpkernels-"))]
    probe = python("-c", PROBE, env={"PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path)
    assert probe.stdout.splitlines()[0] == "None", probe.stdout + probe.stderr


def test_native_library_uses_the_stable_abi_only():
    """No symbol of torch's C++ API, which changes between versions, is needed."""
    (library,) = (ROOT / "gpkernels").glob("_C.*.so")
    symbols = subprocess.run(["nm", "--dynamic", "--undefined-only", library], capture_output=True, text=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at", "_ZNK3c10"))]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"GPKERNELS_BUILD": "gpu"}, "GPKERNELS_BUILD: wanted one of auto, cpu, cuda, none, got 'gpu'"),
        ({"GPKERNELS_BUILD": "cpu", "CXX": "no-such-compiler"}, "no C++ compiler ('no-such-compiler' is not on PATH"),
    ],
)
def test_impossible_builds_are_refused(env, message):
    result = python("setup.py", "--version", env=env)
    assert result.returncode != 0
    assert message in result.stderr


def test_import_builds_nothing_and_costs_little_more_than_torch(tmp_path):
    script = (
        "import sys, time; start = time.perf_counter(); import torch; middle = time.perf_counter(); import gpkernels;"
        "print((time.perf_counter() - middle) / (middle - start));"
        "print([m for m in ('torch.utils.cpp_extension', 'matplotlib', 'PIL', 'rich', 'skimage', 'triton')"
        " if m in sys.modules])"
    )
    results = [python("-c", script, cwd=tmp_path).stdout.splitlines() for _ in range(3)]
    assert results[0][1] == "[]"
    assert min(float(ratio) for ratio, _ in results) < 0.25


def test_trainer_is_imported_by_nothing_else():
    script = "import sys, gpkernels; print([m for m in sys.modules if m.startswith('gpkernels.training')])"
    assert python("-c", script).stdout.strip() == "[]"
