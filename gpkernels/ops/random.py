"""Philox4x32-10 in plain torch (Salmon et al., SC 2011), the twin of `csrc/philox.h`, and the seeds that key it.

A stream is identified by a seed tensor of two int64 words, drawn from a torch generator, so that
`torch.manual_seed` governs it and a captured CUDA graph draws anew at each replay. Number i of a stream is a
function of (seed, i) alone: every backend draws the same numbers for the same seed tensor.
"""

from __future__ import annotations

import math

import torch

_WORDS = 2**63 - 1  # the range of a seed word
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def draw_seed(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Two fresh int64 words on the device of `like`. Shape (2,).

    A CPU generator serves every device (the same manual seed then gives the same numbers everywhere, at the cost
    of a small copy that a CUDA graph cannot capture); any other generator must be on the device of `like`.
    """
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator: wanted a torch.Generator, got {type(generator).__name__}")
    if generator is None or generator.device.type == like.device.type:
        return torch.randint(_WORDS, (2,), device=like.device, generator=generator)
    if generator.device.type != "cpu":
        raise ValueError(f"generator: wanted one on {like.device} or on the CPU, got one on {generator.device}")
    return torch.randint(_WORDS, (2,), generator=generator).to(like.device)


def philox_words(seed: torch.Tensor, count: int) -> torch.Tensor:
    """Words 0..count-1 of the stream, as int64 in [0, 2^32). Shape (count,)."""
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=seed.device)
    key, stream = seed[0], seed[1]
    c0, c1 = block & _MASK, block >> 32
    c2, c3 = (stream & _MASK).expand_as(block), ((stream >> 32) & _MASK).expand_as(block)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2^64: the low and high words are right
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=1).reshape(-1)[:count]


def uniform(seed: torch.Tensor, count: int) -> torch.Tensor:
    """U[0, 1) on a grid of 2^-24, float32. Shape (count,)."""
    return (philox_words(seed, count) >> 8).to(torch.float32) * 2.0**-24


def uniform_symmetric(seed: torch.Tensor, count: int) -> torch.Tensor:
    """U[-1, 1) on a grid of 2^-23, float32. Shape (count,)."""
    return 2.0 * uniform(seed, count) - 1.0


def normal(seed: torch.Tensor, count: int) -> torch.Tensor:
    """N(0, 1) by Box-Muller, two words for two numbers, float32. Shape (count,)."""
    u = uniform(seed, count + count % 2).reshape(-1, 2)
    radius = torch.sqrt(-2.0 * torch.log(u[:, 0] + 2.0**-24))
    angle = 2.0 * math.pi * u[:, 1]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)
    return pairs.reshape(-1)[:count]


def in_memory_order(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The flat numbers in the shape of `like`, a dense tensor, number i at memory position i."""
    if like.is_contiguous():
        return numbers.view(like.shape)
    order = (0, *range(2, like.dim()), 1)  # channels_last: the channel is innermost
    shape = [like.shape[d] for d in order]
    return numbers.view(shape).movedim(-1, 1)
