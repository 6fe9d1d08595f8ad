"""Loads the native libraries, which register the C++ kernels with torch; remembers why when it cannot."""

import importlib
from pathlib import Path
from typing import Any

import torch

from gpkernels._version import __version__

build_info: dict[str, Any] | None = None
"""What was built (version, compiler, flags, SIMD level, ...), or None without a native library."""

missing: str = ""
"""Why there are no C++ CPU kernels, in words; empty when there are."""

cuda_missing: str = ""
"""Why there are no C++ CUDA kernels, in words; empty when there are."""

CUDA_LIBRARY = Path(__file__).parent / "_cuda_kernels.so"


def load() -> None:
    global build_info, missing, cuda_missing
    try:
        native = importlib.import_module("gpkernels._C")
    except ModuleNotFoundError:
        missing = "the C++ kernels were not built (no compiler when gpkernels was installed, or GPKERNELS_BUILD=none)"
    except ImportError as error:
        missing = f"the C++ kernels do not load: {error}"
    else:
        build_info = native.build_info()
        if build_info["version"] != __version__:
            missing = f"the C++ kernels are of version {build_info['version']}, the package of {__version__}: rebuild"
    cuda_missing = _load_cuda()


def _load_cuda() -> str:
    """Loads the CUDA library; the reason if it is not usable. Needs a torch with CUDA, not a GPU."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not CUDA_LIBRARY.is_file():
        return "the CUDA kernels were not built (no nvcc when gpkernels was installed, or GPKERNELS_BUILD=cpu)"
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        return f"the CUDA kernels do not load: {error}"
    return ""
