"""The CUDA kernels as nvcc compiles them for every architecture: registers, spills, widths of accesses, symbols."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import test_packaging

ARCHS = ("sm_80", "sm_90", "sm_100")
WIDE = re.compile(r"spectral_product\w*FactorE2E")  # two vectors at once


def cuda_tool(name):
    """Path of a tool of the CUDA toolkit, which triton brings along in part; None if there is none."""
    spec = importlib.util.find_spec("triton")
    triton = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else Path("/nowhere")
    folders = (os.environ.get("PATH", ""), "/usr/local/cuda/bin", str(triton))
    return shutil.which(name, path=os.pathsep.join(folders))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The package built with its CUDA kernels: (path of the CUDA library, what ptxas said of each kernel)."""
    if cuda_tool("nvcc") is None:
        pytest.skip("no CUDA compiler nvcc on PATH or in /usr/local/cuda/bin")
    source = test_packaging.source_copy(tmp_path_factory.mktemp("cuda"))
    env = {"GPKERNELS_BUILD": "cuda", "MAX_JOBS": "2", "NVCC_APPEND_FLAGS": "-Xptxas -v"}
    result = test_packaging.python("setup.py", "build_ext", "--inplace", env=env, cwd=source)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return source / "gpkernels/_cuda_kernels.so", result.stdout + result.stderr


def test_no_kernel_spills_registers(compiled):
    log = compiled[1]
    for arch in ARCHS:
        assert len(re.findall(rf"Compiling entry function '\w+' for '{arch}'", log)) > 50
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    assert len(spills) > 150
    assert set(spills) == {("0", "0")}
    wide = [text for text in log.split("Compiling entry function")[1:] if WIDE.search(text.partition("\n")[0])]
    assert len(wide) == 4 * len(ARCHS)
    several = [int(re.search(r"Used (\d+) registers", text)[1]) for text in wide]
    assert max(several) <= 96
    assert sum(count > 80 for count in registers) <= sum(count > 80 for count in several)


@pytest.mark.parametrize("arch", ARCHS)
def test_memory_is_accessed_16_bytes_at_a_time(compiled, arch):
    cuobjdump = cuda_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH, in /usr/local/cuda/bin or in triton")
    env = {**os.environ, "PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ['PATH']}"}
    sass = subprocess.run(
        [cuobjdump, "-sass", "-arch", arch, compiled[0]], capture_output=True, text=True, env=env, check=True
    ).stdout
    functions = {name: text for name, _, text in (part.partition("\n") for part in sass.split("Function : ")[1:])}
    wanted = {  # kernel: (part of the mangled name, loads, stores)
        "interpolate, a sample": ("map_by_rowIf.*BlendIfE", 2, 1),
        "interpolate, an element": ("map_by_elementIf.*BlendIfE", 2, 1),
        "interpolate backward": ("map_by_rowIf.*SplitIfE", 1, 2),
        "perturb": ("add_noiseIfE", 1, 1),
        "perturb backward": ("dot_noiseIfE", 1, 0),
        "norms of rows": ("reduce_rows.*NormTermIfLb0E", 1, 0),
        "norms of columns": ("reduce_columns.*NormTermIfLb0E", 1, 0),
        "penalty backward, rows": ("map_rows.*FirstMapIfE", 1, 1),
        "penalty backward, columns": ("map_columns.*FirstMapIfE", 1, 1),
        "double backward, dots": ("reduce_rows.*DotTermIfE", 2, 0),
        "double backward, rows": ("map_rows.*SecondMapIfE", 2, 1),
        "double backward, columns": ("map_columns.*SecondMapIfE", 2, 1),
        "distances of pairs": ("reduce_rows.*DistanceTermIfE", 2, 0),
        # Sums and map; in runs both twice, with a gamma a run and one an element.
        "norm, runs": ("norm_runs.*NormPassIfLb0E", 12, 2),
        "norm, bands": ("norm_bands.*NormPassIfLb0E", 6, 1),
        "norm, samples": ("norm_samples.*NormPassIfLb0E", 3, 1),
        "norm twice, runs": ("norm_runs.*NormPassIfLb1E", 16, 4),
        "norm twice, runs of 2 bytes": ("norm_runs.*BFloat16ELb1E", 16, 4),
        "norm twice, bands": ("norm_bands.*NormPassIfLb1E", 8, 2),
        "norm twice, samples": ("norm_samples.*NormPassIfLb1E", 4, 2),
        # Four units of a row where rows are added up, and where columns are.
        "spectral norm, W^T u": ("spectral_productIfLNS.*FactorE0E", 8, 0),
        "spectral norm, W v": ("spectral_productIfLNS.*FactorE1E", 8, 0),
        "spectral norm, W t and W v": ("spectral_productIfLNS.*FactorE2E", 8, 0),
        "spectral norm, W t and W v, 2 bytes": ("spectral_product.*BFloat16ELNS.*FactorE2E", 4, 0),
        "spectral norm, scale": ("spectral_scaleIfE", 1, 1),
        "spectral norm, <G, W>": ("spectral_dotIfE", 2, 0),
        "spectral norm, gradient": ("spectral_gradIfE", 2, 1),
    }
    for kernel, (pattern, loads, stores) in wanted.items():
        (text,) = [text for name, text in functions.items() if re.search(pattern, name)]
        assert len(re.findall(r"\bLDG\.E\.128", text)) >= loads, kernel
        assert len(re.findall(r"\bSTG\.E\.128", text)) >= stores, kernel
    assert not re.findall(r"\b(?:ATOM|ATOMG|RED)\.[\w.]*F(?:16|32|64)", sass), "a floating-point atomic"


def test_library_has_every_architecture_and_needs_the_stable_abi_only(compiled):
    symbols = subprocess.run(["nm", "-D", "--undefined-only", compiled[0]], capture_output=True, text=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in names
    assert not [name for name in names if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at", "_ZNK3c10"))]
    if cuobjdump := cuda_tool("cuobjdump"):
        command = [cuobjdump, "--list-elf", "--list-ptx", compiled[0]]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert all(f".{arch}.cubin" in listed for arch in ARCHS)
        assert ".sm_100.ptx" in listed


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"CUDA_HOME": "/nowhere"},
            "=cuda: no CUDA compiler nvcc (CUDA_HOME, /nowhere, has no bin/nvcc)",
        ),
        ({"GPKERNELS_CUDA_ARCHS": "hopper"}, "GPKERNELS_CUDA_ARCHS: wanted compute capabilities such as"),
    ],
)
def test_impossible_cuda_builds_are_refused(env, message):
    if "CUDA_HOME" not in env and cuda_tool("nvcc") is None:
        pytest.skip("no CUDA compiler nvcc on PATH or in /usr/local/cuda/bin")
    result = test_packaging.python("setup.py", "--version", env={"GPKERNELS_BUILD": "cuda", **env})
    assert result.returncode != 0
    assert message in result.stderr
