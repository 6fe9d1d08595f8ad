"""Compiles what the launchers would launch, for GPUs that need not be here; prints one JSON record each.

The launchers run on CPU tensors with `launch` replaced, so that kernels, arguments and constants are the real ones;
Triton's own binder specialises them as it would at a launch.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from gpkernels.ops import _triton
from gpkernels.ops.grad_penalty import triton as penalty
from gpkernels.ops.interpolate import triton as interpolate
from gpkernels.ops.norm_act import triton as norm_act
from gpkernels.ops.pairwise_cost import triton as pairwise_cost
from gpkernels.ops.perturb import triton as perturb

ARCHITECTURES = (80, 90, 100)
SEED = torch.tensor([1, 2])
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


def source(kernel, arguments, constants, target):
    """The source as specialised for a call, and the options of the compiler."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, **constants)
    _, signature, constexprs, attributes = kernel._pack_args(backend, {}, bound, specialization, {})
    return ASTSource(kernel, signature, constexprs, attributes), options


def launches(calls):
    """The distinct (kernel, arguments, constants) that `calls` would launch."""
    found = {}

    def record(kernel, programs, *arguments, **constants):
        assert programs > 0
        specialised, options = source(kernel, arguments, constants, GPUTarget("cuda", 90, 32))
        found.setdefault((specialised.hash(), *options.items()), (kernel, arguments, constants))

    for module in (_triton, interpolate, perturb, penalty, pairwise_cost, norm_act):
        module.launch = record
    calls()
    return list(found.values())


def call_small_ops(x):
    accumulation = torch.float64 if x.dtype == torch.float64 else torch.float32
    for eps, per_element in ((torch.empty(len(x), dtype=accumulation), False), (None, False), (None, True)):
        seed = SEED if eps is None else None
        interpolate.interpolate(x, x, eps, seed, per_element)
        interpolate.interpolate_backward(x, eps, seed, per_element, True, True)
    for noise, sigma in ((0, None), (1, torch.empty((), dtype=accumulation))):
        perturb.perturb(x, sigma, 0.5, noise, SEED)
        perturb.perturb_backward(x, 0.5, noise, SEED)
    losses = torch.empty(len(x), dtype=accumulation)
    pairwise_cost.pairwise_cost(x, x, losses, losses, 2e-4, 0.0)
    pairwise_cost.pairwise_cost_backward(losses, losses)


def call_penalty(x, form, norm, axes, reduction):
    options = (form, 1.0, norm, axes, reduction)
    value, saved = penalty.grad_norm_penalty(x, *options)
    penalty.grad_norm_penalty_backward(value, x, saved, *options)
    penalty.grad_norm_penalty_double_backward(x, value, x, saved, *options)


def call_norm_act(shape, groups, dtype=torch.float32, memory_format=torch.contiguous_format, act=True, affine=True):
    x = torch.empty(shape, dtype=dtype, memory_format=memory_format)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    statistic = torch.empty((len(x), groups) if groups else x.shape[1], dtype=accumulation)
    weight = torch.empty(x.shape[1], dtype=accumulation) if affine else None
    inputs = (x, x, x if act else None, statistic, statistic, weight, groups, 0.2)
    norm_act.norm_act_backward(*inputs, affine)
    norm_act.norm_act_double_backward(x, *inputs)


def common_calls():
    aligned = (4, 64, 64, 64)
    for dtype in (torch.float32, torch.bfloat16):
        call_small_ops(torch.empty(aligned, dtype=dtype))
        call_penalty(torch.empty(aligned, dtype=dtype), 1, 2, 1, 2)
    call_penalty(torch.empty(aligned), 0, 0, 0, 0)
    call_penalty(torch.empty(aligned), 0, 0, 1, 0)
    call_norm_act((64, 64, 128, 128), 8)
    call_norm_act((64, 64, 128, 128), 0, memory_format=torch.channels_last)
    call_norm_act((512, 4096), 1)
    call_norm_act((64, 64, 64, 64), 64, torch.bfloat16)


def other_calls():
    """The rest of the options, and shapes without alignment; the architectures differ less than these do."""
    for form, norm in zip(range(6), (0, 1, 2, 2, 1, 0), strict=True):
        call_penalty(torch.empty(64, 64, 32, 32), form, norm, 0, 0)
    for dtype in (torch.float32, torch.float64):
        call_small_ops(torch.empty(700, 5, 3, 7, dtype=dtype))
        call_penalty(torch.empty(700, 5, 3, 7, dtype=dtype), 0, 2, 0, 0)
        for norm in (0, 2):
            rgb = torch.empty(64, 3, 128, 128, dtype=dtype)
            call_penalty(rgb, 0, norm, 1, 2)
            call_penalty(rgb.contiguous(memory_format=torch.channels_last), 0, norm, 1, 2)
    for shape in ((1, 1), (1, 3, 1, 1), (3, 1, 1, 1)):  # Triton makes a size of 1 a constant
        call_small_ops(torch.empty(shape))
        for axes in range(3):
            call_penalty(torch.empty(shape), 0, 2, axes, 0)
    call_penalty(torch.empty(1, 100003, dtype=torch.float16), 0, 0, 0, 0)


def other_norm_acts():
    call_norm_act((64, 64, 128, 128), 0)
    call_norm_act((64, 64, 127, 127), 64)
    call_norm_act((64, 256, 32, 32), 32, memory_format=torch.channels_last)
    call_norm_act((64, 512, 4, 4), 512)
    call_norm_act((64, 1 << 16), 1, torch.float16)
    call_norm_act((256, 512), 0, act=False, affine=False)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        call_norm_act((64, 64, 32, 32), 8, torch.float64, memory_format)
    call_norm_act((64, 64, 8, 8), 64, torch.float64)
    for groups in (0, 1):
        call_norm_act((1, 1), groups)


def spills(cubin, stack):
    """Accesses to local memory; a stack alone may be that of a called division."""
    if not stack:
        return 0
    sass = subprocess.run([BIN / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\b(?:STL|LDL)\b", sass))


def report(kernel, arguments, constants, arch):
    target = GPUTarget("cuda", arch, 32)
    specialised, options = source(kernel, arguments, constants, target)
    compiled = triton.compile(specialised, target=target, options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([BIN / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        resources = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
        spilled = spills(cubin, resources["STACK"] + resources["LOCAL"])
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    if "PER_GROUP" in constants:
        in_memory = constants["PER_GROUP"] if constants["PER_GROUP"] > 1 else named["groups"]
        row = in_memory if constants["LAST"] else named["pixels"]
    else:
        row = named.get("n") or (named.get("inner", 1) if named.get("inner", 1) > 1 else named.get("reduce", 1))
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "dtype": str(arguments[0].dtype),
        "constants": {name: str(value) for name, value in constants.items()},
        "registers": resources["REG"],
        "spills": spilled,
        "shared": compiled.metadata.shared,
        "vector_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "vector_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "rounds_bfloat16": "cvt.rn.bf16" in ptx,
        "aligned": arguments[0].dtype == torch.float32 and row % 16 == 0,
    }


if __name__ == "__main__":
    common, others = launches(common_calls), launches(other_calls) + launches(other_norm_acts)
    print(json.dumps([report(*launch, arch) for arch in ARCHITECTURES for launch in common + others * (arch == 90)]))
