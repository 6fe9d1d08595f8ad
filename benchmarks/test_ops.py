"""The ops under pytest-benchmark: `pytest benchmarks/test_ops.py`, with its options to save and compare runs.

`python -m benchmarks.ops` takes variants in turn, which these tables do not; they are for a quick look at one op:
`pytest benchmarks/test_ops.py -k interpolate`.
"""

import pytest
import torch

from benchmarks import cases
from benchmarks.ops import agrees

VARIANTS = ("snippet", "best", "gpkernels")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_op(benchmark, case, variant):
    torch.manual_seed(0)
    x = torch.randn(cases.SHAPES[0])
    assert agrees(case, x)
    benchmark.group = case.name
    benchmark(case.make(x)[variant])
