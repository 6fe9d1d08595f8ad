"""Builds the native kernels; everything else about the package is in pyproject.toml.

GPKERNELS_BUILD=auto (default)  the C++ CPU kernels where there is a compiler, else a pure-Python install; with them the
                                CUDA kernels where torch has CUDA and there is an nvcc
                cpu             the C++ CPU kernels, or fail
                cuda            the CPU and the CUDA kernels, or fail; torch and this machine may be without CUDA
                none            pure Python: the reference backend only
GPKERNELS_CUDA_ARCHS            the GPUs the CUDA kernels are compiled for: compute capabilities, "+PTX" for later ones
CUDA_HOME                       where bin/nvcc is; else PATH and /usr/local/cuda are searched
GPKERNELS_SANITIZE=1            with AddressSanitizer and UndefinedBehaviorSanitizer, for the tests
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "cuda", "none")
# The C++ uses the LibTorch stable ABI of this version, so that one build runs on every later torch.
STABLE_ABI = "0x020a000000000000"  # 2.10
CUDA_ARCHS = "80;90;100+PTX"
CUDA_LIBRARY = "gpkernels._cuda_kernels"  # no Python module: registers the ops when torch loads it
CUDA_SOURCES = sorted([*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/cuda").glob("*.cpp")])


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


def native_extension(cuda_archs):
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension

    sanitized = os.environ.get("GPKERNELS_SANITIZE") == "1"
    flags = ["-O1" if sanitized else "-O3", "-g0", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden"]
    link_flags = []
    if sanitized:
        flags += [
            "-g",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=undefined",
            "-fno-omit-frame-pointer",
        ]
        link_flags += ["-fsanitize=address,undefined"]
    return CppExtension(
        "gpkernels._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp") if path not in CUDA_SOURCES),
        include_dirs=[pybind11.get_include()],
        define_macros=[
            ("TORCH_TARGET_VERSION", STABLE_ABI),
            ("GPKERNELS_VERSION", c_string(package_version())),
            ("GPKERNELS_FLAGS", c_string(" ".join(flags))),
            ("GPKERNELS_TORCH", c_string(torch.__version__)),
            ("GPKERNELS_BUILT_CUDA_ARCHS", c_string(cuda_archs)),
        ],
        extra_compile_args=flags,
        extra_link_args=link_flags,
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
    )


def nvcc():
    """Path of the CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=Path(home) / "bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def missing_nvcc():
    """What the CUDA build lacks, or None."""
    if nvcc():
        return None
    home = os.environ.get("CUDA_HOME")
    where = f"CUDA_HOME, {home}, has no bin/nvcc" if home else "it is neither on PATH nor in /usr/local/cuda/bin"
    return f"no CUDA compiler nvcc ({where})"


def wanted_architectures():
    return os.environ.get("GPKERNELS_CUDA_ARCHS", CUDA_ARCHS)


def architecture_flags():
    """nvcc's flags for GPKERNELS_CUDA_ARCHS."""
    text = wanted_architectures()
    flags = []
    for word in text.split(";"):
        match = re.fullmatch(r"(\d+[af]?)(\+PTX)?", word.strip())
        if match is None:
            sys.exit(f"GPKERNELS_CUDA_ARCHS: wanted compute capabilities such as {CUDA_ARCHS!r}, got {text!r}")
        number, ptx = match.groups()
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def build_cuda(target, objects):
    """Compiles csrc/cuda into the library `target`, with its object files in `objects`."""
    import torch

    torch_path = Path(torch.__file__).parent
    tool = [nvcc(), "-ccbin", os.environ.get("CXX", "c++").split()[0], "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA", f"-I{torch_path / 'include'}"]
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        result = objects / f"{source.name}.o"
        archs = architecture_flags() if source.suffix == ".cu" else []
        subprocess.run([*tool, *flags, *archs, "-c", str(source), "-o", str(result)], check=True)
        return str(result)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    say(f"compiling {len(CUDA_SOURCES)} CUDA sources with {tool[0]}")
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(compile_one, CUDA_SOURCES))
    # libtorch.so brings in libtorch_cuda.so where torch has one; the CUDA runtime is linked statically.
    libraries = [f"-L{torch_path / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
    if (torch_path / "lib/libtorch_cuda.so").is_file():
        libraries.append("-ltorch_cuda")
    subprocess.run([*tool, "-shared", "-cudart=static", *results, *libraries, "-o", str(target)], check=True)


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def get_ext_filename(self, name):
            if name.rpartition(".")[2] == CUDA_LIBRARY.rpartition(".")[2]:
                return f"{name.replace('.', os.sep)}.so"
            return super().get_ext_filename(name)

        def build_extension(self, extension):
            if extension.name != CUDA_LIBRARY:
                super().build_extension(extension)
                return
            build_cuda(Path(self.get_ext_fullpath(extension.name)).resolve(), Path(self.build_temp).resolve() / "cuda")

    return Build


def wants_cuda(choice):
    """Whether to build the CUDA kernels. Exits where they were asked for and cannot be built."""
    import torch

    missing = missing_nvcc()
    if missing and choice == "cuda":
        sys.exit(f"GPKERNELS_BUILD=cuda: {missing}")
    if missing and choice == "auto" and torch.version.cuda:
        say(f"installing without the CUDA kernels: {missing}")
    wanted = not missing and (choice == "cuda" or (choice == "auto" and torch.version.cuda is not None))
    if wanted:
        architecture_flags()  # a bad list stops the build before it starts
    return wanted


def main():
    choice = os.environ.get("GPKERNELS_BUILD", "auto")
    if choice not in CHOICES:
        sys.exit(f"GPKERNELS_BUILD: wanted one of {', '.join(CHOICES)}, got {choice!r}")
    missing = "GPKERNELS_BUILD=none" if choice == "none" else missing_tool()
    if missing and choice in ("cpu", "cuda"):
        sys.exit(f"GPKERNELS_BUILD={choice}: {missing}")
    if missing:
        say(f"installing pure Python, without native kernels: {missing}")
        setup()
        return
    cuda = wants_cuda(choice)
    extensions = [native_extension(wanted_architectures() if cuda else "")]
    if cuda:
        extensions.append(Extension(CUDA_LIBRARY, []))
    setup(ext_modules=extensions, cmdclass={"build_ext": build_command()})


main()
