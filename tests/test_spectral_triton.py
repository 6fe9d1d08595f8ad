"""spectral_norm's Triton kernels without a GPU: run by Triton's interpreter, and compiled for every architecture."""

import json
import re

import pytest
import test_triton
from test_triton import TESTS, python

pytestmark = test_triton.pytestmark


def test_launchers_equal_the_reference():
    """Ragged groups, both ways through memory, every dtype, counts of launches, outputs poisoned with NaN."""
    assert "compared" in python(TESTS / "spectral_interpreted.py", interpret=True)


CHOSEN = "agrees_with_torch or no_layers or nan_reaches or zero_weight or test_values and float32 and (33 or 16)"


def test_op_tests_pass_under_the_interpreter():
    """Part of them, for time."""
    report = python(
        "-m", "pytest", "-p", "no:cacheprovider", "-x", "-v", TESTS / "test_spectral_norm.py", "-k",
        f"triton and ({CHOSEN})", interpret=True,
    )  # fmt: skip
    assert int(re.search(r"(\d+) passed", report)[1]) > 10, report


@pytest.fixture(scope="module")
def compiled():
    """One record a kernel, variant and architecture; made outside the interpreter."""
    return json.loads(python(TESTS / "spectral_compiled.py", interpret=False))


def test_every_kernel_compiles_without_spills(compiled):
    from triton.runtime.jit import JITFunction

    from gpkernels.ops.spectral_norm import _triton_kernels, _triton_scale_kernels

    kernels = {
        name
        for module in (_triton_kernels, _triton_scale_kernels)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert len(kernels) == 5
    for arch in (80, 90, 100):
        assert {record["kernel"] for record in compiled if record["arch"] == arch} == kernels
    for record in compiled:
        assert record["spills"] == 0, record
        assert record["registers"] <= 255, record
        assert record["shared"] <= 48 * 1024, record


def test_rows_of_units_are_accessed_16_bytes_at_a_time(compiled):
    """Every kernel that reads weights has a way for rows of aligned units; bfloat16 is rounded to nearest."""
    stores = ("spectral_norm_scale_kernel", "spectral_norm_grad_kernel")
    aligned = [r for r in compiled if r["arch"] != 90]  # there, odd groups too
    for record in (r for r in aligned if r["kernel"] != "spectral_norm_finish_kernel"):
        assert record["vector_loads"] > 0, record
        assert record["vector_stores"] > 0 or record["kernel"] not in stores, record
        if record["kernel"] in stores and record["constants"]["W"] == "8":
            assert record["rounds_bfloat16"], record
