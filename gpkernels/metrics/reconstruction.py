"""Minimum Reconstruction Error: how near a generator can come to an image that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpkernels._checks import check_choice, check_count, check_floating, check_number, fail
from gpkernels.latents import LATENTS


def minimum_reconstruction_error(
    generator: Callable[..., Tensor],
    images: Tensor,
    nz: int,
    *,
    z: str = "normal",
    labels: Tensor | None = None,
    starts: int = 3,
    steps: int = 100,
    lr: float = 0.2,
    batch: int = 64,
    seed: int = 0,
) -> Tensor:
    """(N,): the least ||x - G(z)||_2 found for each image, by Adam on z from `starts` draws of z.

    An upper bound of the Minimum Reconstruction Error min_z ||x - G(z)|| of the LS-GAN paper (Qi 2020), which falls
    with more starts and steps [memory: that the paper's norm is the Euclidean one].

    generator: z (B, nz) to images (B, C, H, W), called as generator(z, y) where `labels` (N,) are given; batches
    hold the starts of several images. images: (N, C, H, W), float, in the generator's range and on its device.
    z: what the starts are drawn from, as the generator was trained: "normal", N(0, 1)^nz, or "uniform", U[-1, 1)^nz.
    On its way z is unconstrained, outside the cube of a uniform z too.
    Raises ValueError for images of another shape than the generator's, an unknown z, and for a generator without
    gradient.
    """
    check_floating("images", images)
    check_choice("z", z, LATENTS)
    for name, value in (("nz", nz), ("starts", starts), ("steps", steps), ("batch", batch)):
        check_count(name, value)
    check_number("lr", lr, minimum=0)
    if labels is not None and labels.shape != images.shape[:1]:
        raise fail("labels", f"shape {tuple(images.shape[:1])}", tuple(labels.shape))
    draws = torch.Generator().manual_seed(seed)
    first = LATENTS[z](len(images), starts, nz, generator=draws)  # drawn at once: the same whatever the batch
    parts = []
    at_once = max(1, batch // starts)
    for start in range(0, len(images), at_once):
        wanted = images[start : start + at_once].repeat_interleave(starts, 0)
        chosen = (
            () if labels is None else (labels[start : start + at_once].repeat_interleave(starts).to(images.device),)
        )
        begin = first[start : start + at_once].flatten(0, 1).to(images)
        errors = _descend(generator, chosen, wanted, begin, steps, lr)
        parts.append(errors.view(-1, starts).amin(1))
    return torch.cat(parts)


def _descend(
    generator: Callable[..., Tensor], labels: tuple[Tensor, ...], wanted: Tensor, z: Tensor, steps: int, lr: float
) -> Tensor:
    """The least error on the way, one for each z."""
    z = z.requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=lr)
    best = torch.full((len(z),), torch.inf, device=z.device, dtype=wanted.dtype)
    for step in range(steps + 1):
        with torch.enable_grad():
            made = generator(z, *labels)
            if made.shape != wanted.shape:
                raise fail("images", f"the generator's shape {tuple(made.shape[1:])}", tuple(wanted.shape[1:]))
            if not made.requires_grad:
                raise fail("generator", "images with a gradient to z", "images without one")
            squares = (made - wanted).square().flatten(1).sum(1)
        best = torch.minimum(best, squares.detach().sqrt())
        if step < steps:
            (z.grad,) = torch.autograd.grad(squares.sum(), z)
            optimizer.step()
    return best
