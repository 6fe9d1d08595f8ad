"""`gpkernels doctor`: what it says, and that it notices each kernel that is wrong."""

import dataclasses
import sys

import pytest
import torch

from gpkernels import cli, doctor, registry


def run(capsys):
    """(exit code, stdout)."""
    return cli.main(["doctor"]), capsys.readouterr().out


def test_doctor_reports_and_checks(capsys):
    code, text = run(capsys)
    assert code == 0
    assert "native compiler: " in text
    assert "grad_norm_penalty on cpu: ok" in text
    assert "cuda tensors: " in text
    assert torch.cuda.is_available() or "not cuda: torch sees no CUDA device" in text


def test_doctor_checks_every_kernel_there_is(capsys):
    ops = {*registry.ops(), "conv2d_input_gradient"}
    assert set(doctor._CHECKS) == ops
    _, text = run(capsys)
    for op in ops:
        assert f"  {op} on cpu: ok" in text
        assert f"\n{op}\n  cpu tensors: cpu" in text


def off(function):
    """`function` with all its tensors one per cent too large."""

    def larger(found):
        return found * 1.01 if isinstance(found, torch.Tensor) else type(found)(map(larger, found))

    return lambda *args: larger(function(*args))


def kernels():
    """(op, which of its functions)."""
    rows = {op: registry._rows[op, "cpu"] for op in registry.ops()}
    for op, row in rows.items():
        for name in ("forward", "backward", "double_backward", "iterate", "update"):
            if getattr(row, name) is not None and (op, name) != ("norm_act", "forward"):  # torch's own runs there
                yield op, name


@pytest.mark.parametrize(("op", "name"), list(kernels()))
def test_doctor_fails_when_a_kernel_is_wrong(capsys, monkeypatch, op, name):
    row = registry._rows[op, "cpu"]
    monkeypatch.setitem(registry._rows, (op, "cpu"), dataclasses.replace(row, **{name: off(getattr(row, name))}))
    registry._chosen.clear()
    code, text = run(capsys)
    registry._chosen.clear()
    assert code == 1
    assert f"{op} on cpu: WRONG" in text
    assert text.count("WRONG") == 1


def test_doctor_fails_when_the_kernel_for_few_channels_is_wrong(capsys, monkeypatch):
    module = sys.modules["gpkernels.ops.conv2d_input_gradient"]
    monkeypatch.setattr(module, "_kernel", off(module._kernel))
    code, text = run(capsys)
    assert code == 1
    assert "conv2d_input_gradient on cpu: WRONG" in text
    assert text.count("WRONG") == 1
