"""Loads the native library, which registers the C++ kernels with torch; remembers why when it cannot."""

import importlib
from typing import Any

from gpkernels._version import __version__

build_info: dict[str, Any] | None = None
"""What was built (version, compiler, flags, SIMD level, ...), or None without a native library."""

missing: str = ""
"""Why there is no native library, in words; empty when there is one."""


def load() -> None:
    global build_info, missing
    try:
        native = importlib.import_module("gpkernels._C")
    except ModuleNotFoundError:
        missing = "the C++ kernels were not built (no compiler when gpkernels was installed, or GPKERNELS_BUILD=none)"
        return
    except ImportError as error:
        missing = f"the C++ kernels do not load: {error}"
        return
    build_info = native.build_info()
    if build_info["version"] != __version__:
        missing = f"the C++ kernels are of version {build_info['version']}, the package of {__version__}: rebuild"
