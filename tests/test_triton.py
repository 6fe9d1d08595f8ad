"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for every supported architecture."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


def python(*arguments, interpret):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=TESTS.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout


@pytest.mark.parametrize("part", ["random_numbers", "penalty", "pairwise_cost", "norm_act"])
def test_launchers_equal_the_reference(part):
    """Every option, odd and split shapes, both layouts, every dtype, outputs poisoned with NaN."""
    assert "compared" in python(TESTS / "triton_interpreted.py", part, interpret=True)


SMALL_OPS = "not derivative and not gradcheck and not 20000"
PENALTY = (
    "nan_and_inf or linf_shares or curved_at_zero or strided or third and two_sided and l2"
    " or test_value and one_sided-l2 or test_derivatives and contiguous and maximum-linf-pixel"
)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (("test_perturb.py", "test_random.py", "test_pairwise_cost.py"), SMALL_OPS),
        (("test_grad_penalty.py",), PENALTY),
    ],
    ids=["small_ops", "penalty"],
)
def test_op_tests_pass_under_the_interpreter(files, chosen):
    """Part of them, for time. The interpreter rounds to bfloat16 by truncation, so one tolerance there is too tight
    for it; compiled code rounds to nearest, which `test_bfloat16_is_rounded_to_nearest` sees to."""
    paths = [TESTS / name for name in files]
    report = python(
        "-m", "pytest", "-p", "no:cacheprovider", "-x", "-v", *paths, "-k", f"triton and ({chosen})", interpret=True
    )
    assert int(re.search(r"(\d+) passed", report)[1]) > 10, report


@pytest.fixture(scope="module")
def compiled():
    """One record a kernel, variant and architecture; made outside the interpreter."""
    return json.loads(python(TESTS / "triton_compiled.py", interpret=False))


def test_every_kernel_compiles_without_spills(compiled):
    assert {record["arch"] for record in compiled} == {80, 90, 100}
    for record in compiled:
        assert record["spills"] == 0, record
        assert record["registers"] <= 255, record
        assert record["shared"] <= 48 * 1024, record


def test_no_kernel_is_forgotten(compiled):
    from triton.runtime.jit import JITFunction

    from gpkernels.ops import _triton
    from gpkernels.ops.grad_penalty import _triton_kernels as penalty
    from gpkernels.ops.interpolate import triton as interpolate
    from gpkernels.ops.norm_act import _triton_kernels as norm_act
    from gpkernels.ops.pairwise_cost import triton as pairwise_cost
    from gpkernels.ops.perturb import triton as perturb

    modules = (_triton, interpolate, perturb, penalty, pairwise_cost, norm_act)
    kernels = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    for arch in (80, 90, 100):
        assert {record["kernel"] for record in compiled if record["arch"] == arch} == kernels


def test_aligned_float32_is_accessed_16_bytes_at_a_time(compiled):
    """All but the kernels whose rows are partial results."""
    aligned = [record for record in compiled if record["aligned"]]
    assert {record["kernel"] for record in aligned} == {
        "interpolate_kernel",
        "interpolate_backward_kernel",
        "perturb_kernel",
        "perturb_backward_kernel",
        "grad_norm_penalty_kernel",
        "grad_norm_penalty_backward_kernel",
        "grad_norm_penalty_dot_kernel",
        "grad_norm_penalty_double_backward_kernel",
        "pairwise_cost_kernel",
        "norm_act_whole_kernel",
        "norm_act_sums_kernel",
        "norm_act_apply_kernel",
    }
    reductions = (
        "perturb_backward_kernel",
        "grad_norm_penalty_kernel",
        "grad_norm_penalty_dot_kernel",
        "pairwise_cost_kernel",
        "norm_act_sums_kernel",
    )
    for record in aligned:
        assert record["vector_loads"] > 0, record
        assert record["vector_stores"] > 0 or record["kernel"] in reductions, record


def test_bfloat16_is_rounded_to_nearest(compiled):
    written = [r for r in compiled if r["dtype"] == "torch.bfloat16" and r["vector_stores"]]
    assert written
    assert all(r["rounds_bfloat16"] for r in written)
