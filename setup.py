"""Builds the native kernels; everything else about the package is in pyproject.toml.

GPKERNELS_BUILD=auto (default)  the C++ kernels where there is a compiler, else a pure-Python install
                cpu             the C++ kernels, or fail
                none            pure Python: the reference backend only
GPKERNELS_SANITIZE=1            with AddressSanitizer and UndefinedBehaviorSanitizer, for the tests
"""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "cuda", "none")
# The C++ uses the LibTorch stable ABI of this version, so that one build runs on every later torch.
STABLE_ABI = "0x020a000000000000"  # 2.10


def say(message):
    print(f"gpkernels: {message}", file=sys.stderr)


def package_version():
    return re.search(r'__version__ = "(.+)"', (ROOT / "gpkernels/_version.py").read_text())[1]


def c_string(text):
    return f'"{text}"'


def missing_tool():
    """What the C++ build lacks, or None."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler!r} is not on PATH; CXX names another)"
    for module in ("torch", "pybind11"):
        try:
            __import__(module)
        except ImportError as error:
            return f"the build environment has no {module} ({error})"
    return None


def native_extension():
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-O3", "-g0", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden"]
    link_flags = []
    if os.environ.get("GPKERNELS_SANITIZE") == "1":
        flags += [
            "-g",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=undefined",
            "-fno-omit-frame-pointer",
        ]
        link_flags += ["-fsanitize=address,undefined"]
    extension = CppExtension(
        "gpkernels._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
        include_dirs=[pybind11.get_include()],
        define_macros=[
            ("TORCH_TARGET_VERSION", STABLE_ABI),
            ("GPKERNELS_VERSION", c_string(package_version())),
            ("GPKERNELS_FLAGS", c_string(" ".join(flags))),
            ("GPKERNELS_TORCH", c_string(torch.__version__)),
        ],
        extra_compile_args=flags,
        extra_link_args=link_flags,
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
    )
    return extension, BuildExtension


def main():
    choice = os.environ.get("GPKERNELS_BUILD", "auto")
    if choice not in CHOICES:
        sys.exit(f"GPKERNELS_BUILD: wanted one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "cuda":
        sys.exit("GPKERNELS_BUILD=cuda: this version has no CUDA kernels; wanted auto, cpu or none")
    missing = "GPKERNELS_BUILD=none" if choice == "none" else missing_tool()
    if missing and choice == "cpu":
        sys.exit(f"GPKERNELS_BUILD=cpu: {missing}")
    if missing:
        say(f"installing pure Python, without native kernels: {missing}")
        setup()
        return
    extension, build_ext = native_extension()
    setup(ext_modules=[extension], cmdclass={"build_ext": build_ext})


main()
