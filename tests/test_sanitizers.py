"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: a build of its own runs the op tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_packaging

ROOT = Path(__file__).parent.parent
TESTS = [
    "test_interpolate.py",
    "test_perturb.py",
    "test_grad_penalty.py",
    "test_pairwise_cost.py",
    "test_norm_act.py",
    "test_conv2d_input_gradient.py",
    "test_raw_ops.py",
    "test_spectral_norm.py",
]
SKIPPED_TESTS = "not gradcheck and not third and not derivatives_equal and not compiles and not opcheck"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy of the project, built in place with the sanitizers, and the environment that runs it."""
    source = test_packaging.source_copy(tmp_path_factory.mktemp("sanitized"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env={**os.environ, "GPKERNELS_SANITIZE": "1", "GPKERNELS_BUILD": "cpu", "MAX_JOBS": "2"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-3000:]
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    return source, {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:handle_segv=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": f"{source}:{source / 'tests'}",
    }


def test_ops_are_clean_under_address_and_undefined_behaviour_sanitizers(sanitized):
    source, env = sanitized
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-k",
            f"cpu and {SKIPPED_TESTS} or native and not opcheck",
            *(source / "tests" / name for name in TESTS),
        ],
        cwd=source,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    report = result.stdout[-4000:] + result.stderr[-4000:]
    assert result.returncode == 0, report
    assert int(re.search(r"(\d+) passed", report)[1]) > 300
    assert "ERROR: AddressSanitizer" not in report
    assert "runtime error" not in report


def test_sanitizers_do_catch_an_overrun(sanitized):
    """The proof that the build above watches: a kernel given a size larger than its memory is stopped."""
    source, env = sanitized
    overrun = (
        "import ctypes, torch, gpkernels\n"
        f"assert gpkernels.__file__.startswith({str(source)!r}), gpkernels.__file__\n"
        "buffer = ctypes.CDLL(None).malloc\n"
        "buffer.restype = ctypes.c_void_p\n"
        "address = buffer(ctypes.c_size_t(40))\n"
        "import numpy\n"
        "view = (ctypes.c_float * 64).from_address(address)\n"
        "x = torch.from_numpy(numpy.frombuffer(view, dtype='float32'))\n"
        "torch.ops.gpkernels.grad_norm_penalty(x.view(4, 16), 0, 1.0, 0, 0, 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", overrun], env=env, capture_output=True, text=True, cwd=source)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
