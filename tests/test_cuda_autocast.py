"""CUDA's autocast without a GPU: fake tensors on a device that answers autograd and autocast, and runs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shim import build

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a CUDA device of its own")


@pytest.fixture(scope="module")
def library():
    return build.fake_cuda()


@pytest.mark.parametrize("part", ["rows", "critics"])
def test_dtypes_are_torchs(library, part):
    """Of results and first and second derivatives of every row of the table, and of scores, penalties and gradients of
    the zoo's critics."""
    script = Path(__file__).parent / "cuda_autocast.py"
    done = subprocess.run(
        [sys.executable, script, part],
        cwd=script.parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "compared" in done.stdout
