"""Builds csrc/cuda for the host: as a library that torch loads, and as a driver that the sanitizers watch.

`load()` gives the raw ops, by name: the CUDA kernels and their entry points, executed on CPU tensors.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import gpkernels  # noqa: F401  # defines the schemas

SHIM = Path(__file__).parent
CUDA = SHIM.parent.parent / "csrc/cuda"
KERNELS = sorted(CUDA.glob("*.cu"))
OPS = (
    "interpolate",
    "interpolate_backward",
    "perturb",
    "perturb_backward",
    "grad_norm_penalty",
    "grad_norm_penalty_backward",
    "grad_norm_penalty_double_backward",
    "pairwise_cost",
    "pairwise_cost_backward",
    "norm_act_backward",
    "norm_act_double_backward",
    "spectral_norm_iterate",
    "spectral_norm_update",
    "spectral_norm_scale",
    "spectral_norm_scale_backward",
)
TORCH = Path(torch.__file__).parent
INCLUDES = [f"-I{SHIM}", f"-I{CUDA}", f"-I{TORCH / 'include'}"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
FLAGS = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
WARNINGS = ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = {"thread": ["-fsanitize=thread"], "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover"]}


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="gpkernels-shim-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _run(command: list[Any]) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")


def _objects(name: str, sources: list[Path], flags: list[str]) -> list[Path]:
    folder = _folder() / name
    folder.mkdir()
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        _run(["g++", "-x", "c++", "-c", *FLAGS, *WARNINGS, *flags, *DEFINES, *INCLUDES, source, "-o", target])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    return objects


@functools.cache
def library() -> Path:
    """The shared library that registers the ops of namespace gpkernels_shim for CPU tensors."""
    sources = [*KERNELS, *sorted(CUDA.glob("*.cpp")), *(SHIM / f"{n}.cpp" for n in ("launch", "fibers", "torch_stubs"))]
    flags = ["-O1", "-DGPK_LIBRARY=gpkernels_shim", "-DGPK_DEVICE=CPU"]
    objects = _objects("library", sources, flags)
    target = _folder() / "gpkernels_shim.so"
    link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}", "-Wl,-Bsymbolic", "-Wl,--no-undefined"]
    _run(["g++", "-shared", *objects, *link, "-o", target])
    return target


@functools.cache
def load() -> dict[str, Callable[..., Any]]:
    """The raw ops by name, with the signatures of torch.ops.gpkernels, run by the CUDA kernels on the host."""
    _definitions()
    torch.ops.load_library(library())
    return {name: getattr(torch.ops.gpkernels_shim, name) for name in OPS}


@functools.cache
def _definitions() -> torch.library.Library:
    definitions = torch.library.Library("gpkernels_shim", "DEF")
    for name in OPS:
        definitions.define(str(getattr(torch.ops.gpkernels, name).default._schema).partition("::")[2])
    return definitions


def launches() -> int:
    """Kernels launched so far."""
    count = ctypes.CDLL(str(library())).gpk_shim_launches
    count.restype = ctypes.c_int64
    return count()


@functools.cache
def driver(sanitize: str) -> Path:
    """The program driver.cpp with every kernel, under ThreadSanitizer ("thread") or AddressSanitizer ("address")."""
    flags = [*SANITIZERS[sanitize], "-fno-omit-frame-pointer"]
    sources = [*KERNELS, *(SHIM / f"{n}.cpp" for n in ("launch", "threads", "torch_stubs", "driver"))]
    objects = _objects(sanitize, sources, ["-O1", *flags])
    target = _folder() / f"driver-{sanitize}"
    _run(["g++", *flags, *objects, "-pthread", "-o", target])
    return target


def fake_cuda() -> Path:
    """The shared library that gives a torch without CUDA a device for fake tensors."""
    target = _folder() / "fake_cuda.so"
    link = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
    flags = ["-std=c++20", "-fPIC", "-shared", "-w", f"-I{TORCH / 'include'}"]
    _run(["g++", *flags, SHIM / "fake_cuda.cpp", *link, "-o", target])
    return target
