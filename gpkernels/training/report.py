"""report.html: a run in one file, to be kept, sent and read without this package."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from gpkernels.pixels import to_float, to_uint8
from gpkernels.training import log, models, page, pictures
from gpkernels.training.callbacks import sessions
from gpkernels.training.config import TrainConfig, flag
from gpkernels.training.data import ImageSet
from gpkernels.training.disk import write_atomically
from gpkernels.training.nearest import Nearest, nearest, suspicious
from gpkernels.training.presets import from_preset

NAME = "report.html"
MEANINGS = {
    "critic_loss": "the critic's loss, penalty included",
    "generator_loss": "the generator's loss",
    "score_real": "mean of the critic's output on real images",
    "score_fake": "mean of the critic's output on generated images",
    "gap": "by how much the two means differ, positive where the critic tells real from fake",
    "margin": "mean of lambda ||x - G(z)||_1, by which scores are to differ",
    "penalty": "the weighted gradient penalty, 0 at steps that a lazy one leaves out",
    "grad_norm": "mean l2 norm of the critic's gradient at the real images of a batch",
    "grad_norm_max": "the largest of these norms: the critic's Lipschitz constant is at least this",
    "critic_weight_grad": "l2 norm of the gradient in all of the critic's weights",
    "generator_weight_grad": "l2 norm of the gradient in all of the generator's weights",
    "classification_error": "share of held-out images that the critic puts into a wrong class",
}
"""What the numbers of a log are."""

_SAMPLES = 64
_WALKS, _STOPS = 4, 10
_STRIPS = 10
_PAIRS = 12
_MEMORISING = (
    "Each sample is compared, pixel by pixel, with every training image{mirrored}. A distance is the root mean square "
    "of the differences, in grey levels from 0 to 255. A generator that repeats training images has distances near 0. "
    "Larger ones prove nothing: a copy that is shifted or recoloured is far in pixels, and a blurred or flat sample is "
    "near to many images. So look at the pairs, which are the nearest of all {count} samples."
)


def write(folder: Path, config: TrainConfig, step: int, generator: nn.Module, images: ImageSet) -> Path:
    """Writes report.html into a run folder, from what lies there, the averaged generator in eval mode after `step`
    steps, and the training images. Returns its path."""
    records, held = log.read(folder), sessions.read(folder)
    classes = 0 if config.condition == "none" else images.classes
    z = models.draw_z(config, _SAMPLES, torch.Generator().manual_seed(config.seed))
    samples = models.images_of(generator, z, models.labels_in_turn(classes, len(z)))
    device = next((p.device for p in generator.parameters()), torch.device("cpu"))
    body = [
        page.heading(f"{config.preset} on {images.name}", 1),
        page.paragraph(_summary(config, step, images)),
        page.heading("Samples"),
        page.paragraph("The averaged generator on fixed latent vectors, unselected."),
        page.picture(pictures.png(pictures.grid(samples)), "samples"),
        *_timeline(folder / "samples"),
        page.heading("Walks between latent vectors"),
        page.paragraph("From left to right each row goes from one latent vector to another: " + _way(config)),
        page.picture(pictures.png(_walks(config, generator, classes)), "walks between latent vectors"),
        *_curves(records),
        *_memory(config, samples, images, device),
        *_measured(folder),
        *_settings(config, held),
        *_machines(held),
    ]
    content = page.page(f"{config.preset} on {images.name}, step {step}", body).encode()
    write_atomically(folder / NAME, lambda file: file.write(content))
    return folder / NAME


def _summary(config: TrainConfig, step: int, images: ImageSet) -> str:
    seen = step * config.batch_size * config.critic_steps
    colour = "grey" if images.channels == 1 else "in colour"
    text = (
        f"After {step} steps of the generator on {len(images.images)} images of {images.size}x{images.size} pixels, "
        f"{colour}: {seen} images seen, {seen / len(images.images):.1f} passes. "
    )
    return text + images.note


def _timeline(folder: Path) -> Iterator[str]:
    """The first row of the grids of some epochs, evenly apart, the first and the last among them."""
    files = sorted(folder.glob("epoch_*.png"))
    if not files:
        return
    count = min(len(files), _STRIPS)
    chosen = sorted({round(i * (len(files) - 1) / max(count - 1, 1)) for i in range(count)})
    yield page.heading("Timeline")
    yield page.paragraph("The same latent vectors after epochs of training.")
    side = math.ceil(math.sqrt(_SAMPLES))
    for file in (files[index] for index in chosen):
        with Image.open(file) as grid:
            strip = grid.crop((0, 0, grid.width, grid.height // side))
            yield page.row(f"epoch {int(file.stem.removeprefix('epoch_'))}", pictures.png(strip))


def _way(config: TrainConfig) -> str:
    return "along a great circle, as suits z of N(0, 1)." if config.z == "normal" else "along a straight line."


def _walks(config: TrainConfig, generator: nn.Module, classes: int) -> Image.Image:
    ends = models.draw_z(config, 2 * _WALKS, torch.Generator().manual_seed(config.seed + 1)).chunk(2)
    at = torch.linspace(0, 1, _STOPS)
    z = between(ends[0], ends[1], at, spherical=config.z == "normal").flatten(0, 1)
    y = torch.arange(_WALKS).repeat_interleave(_STOPS) % classes if classes else None
    return pictures.grid(models.images_of(generator, z, y), _STOPS)


def between(start: Tensor, end: Tensor, at: Tensor, *, spherical: bool) -> Tensor:
    """(N, stops, nz): from `start` to `end`, each (N, nz), at places (stops,) in [0, 1].

    Spherical: along a great circle, the length going evenly from one's to the other's, so that no stop is shorter than
    vectors of N(0, 1) are (White 2016, "Sampling generative networks" [memory]).
    """
    at = at[None, :, None]
    start, end = start[:, None], end[:, None]
    if not spherical:
        return start + (end - start) * at
    lengths = [z.norm(dim=2, keepdim=True) for z in (start, end)]
    cosine = (start * end).sum(2, keepdim=True) / (lengths[0] * lengths[1])
    angle = cosine.clamp(-1, 1).acos().clamp_min(1e-4)
    turned = (start / lengths[0] * ((1 - at) * angle).sin() + end / lengths[1] * (at * angle).sin()) / angle.sin()
    return turned * (lengths[0] + (lengths[1] - lengths[0]) * at)


def _curves(records: list[dict[str, Any]]) -> Iterator[str]:
    if not records:
        return
    yield page.heading("Curves")
    yield page.picture(pictures.curves(records), "the log's numbers over the steps", smooth=True)
    last: dict[str, Any] = {}
    for record in records:
        last |= record
    rows = [(name, f"{value:.5g}", MEANINGS.get(name, "")) for name, value in last.items() if name not in _PLACE]
    yield page.table(("number", "at the end", "what it is"), rows)


_PLACE = ("step", "epoch")


def _memory(config: TrainConfig, samples: Tensor, images: ImageSet, device: torch.device) -> Iterator[str]:
    """The memorisation check."""
    queries = to_uint8(samples)
    found = nearest(queries, images.images, mirrored=config.flip, device=device)
    what, real = _real_distances(config, images, len(samples), device)
    mirrored = ", as it is and mirrored" if config.flip else ""
    yield page.heading("Nearest training images")
    yield page.paragraph(_MEMORISING.format(mirrored=mirrored, count=len(samples)))
    sets = {"samples": found.distance, what: real}
    rows = [
        (name, len(d), *(f"{value:.1f}" for value in d.quantile(d.new_tensor([0, 0.05, 0.5, 0.95])).tolist()))
        for name, d in sets.items()
        if len(d)
    ]
    yield page.table(("to the nearest training image", "images", "least", "5 %", "median", "95 %"), rows)
    if len(real):
        close, limit = suspicious(found.distance, real)
        yield page.paragraph(
            f"{close} of {len(samples)} samples have a training image nearer than {limit:.1f}, as 5 % of the {what} "
            f"have: {0.05 * len(samples):.0f} would be expected of samples as far from the training images as those."
        )
    for index in found.distance.argsort()[:_PAIRS].tolist():
        yield page.figure(pictures.png(_pair(samples[index], images, found, index)), f"{found.distance[index]:.1f}")
    yield page.paragraph("Above a sample, below the training image nearest to it, with their distance.")


def _real_distances(config: TrainConfig, images: ImageSet, count: int, device: torch.device) -> tuple[str, Tensor]:
    """What samples are compared with, and its distances: held-out images; without such, training images to others."""
    draws = torch.Generator().manual_seed(config.seed)
    held_out = images.held_out()
    source = images if held_out is None else held_out
    chosen = torch.randperm(len(source.images), generator=draws)[:count].sort().values
    queries = torch.from_numpy(source.images[chosen.numpy()])
    if held_out is not None:
        return "held-out images", nearest(queries, images.images, mirrored=config.flip, device=device).distance
    if len(images.images) == 1:
        return "training images", torch.zeros(0)
    others = nearest(queries, images.images, mirrored=config.flip, leave_out=chosen, device=device)
    return "training images (each to another)", others.distance


def _pair(sample: Tensor, images: ImageSet, found: Nearest, index: int) -> Image.Image:
    twin = torch.from_numpy(images.images[int(found.number[index])])
    twin = twin.flip(2) if found.mirrored[index] else twin
    return pictures.grid(torch.stack([sample.float(), to_float(twin)]), 1)


def _measured(folder: Path) -> Iterator[str]:
    file = folder / "evaluation.json"
    if not file.is_file():
        return
    found = json.loads(file.read_text())
    yield page.heading("Measured by gpkernels evaluate")
    rows = [(m["metric"], f"{m['value']:.5g}", m["better"], m["n"], m["n_real"]) for m in found["metrics"]]
    yield page.table(("metric", "value", "better", "samples", "real images"), rows)
    yield page.paragraph(
        f"After step {found['checkpoint']['step']}, against {found['data']['part']} images of "
        f"{found['data']['name']}. {' '.join(found['notes'])}"
    )


def _settings(config: TrainConfig, held: list[dict[str, Any]]) -> Iterator[str]:
    yield page.heading("Settings, and how to repeat the run")
    given = held[-1]["given"] if held else {}
    if given:
        parts = ", ".join(f"{name} {what}" for name, what in given.items())
        yield page.paragraph(f"Not the config's own, but the program's that trained: {parts}. Repeat it from there.")
    yield page.code(as_command(config))
    yield page.paragraph("With the same versions and data, a run on a CPU repeats bit for bit.")
    yield page.folded("all settings: config.json", page.code(json.dumps(config.to_dict(), indent=2)))


def as_command(config: TrainConfig) -> str:
    """The command that trains as this config does: the preset, and what differs from it."""
    usual = from_preset(config.preset, {}).to_dict()
    words = ["gpkernels", "train", "--preset", config.preset]
    for name, value in config.to_dict().items():
        if value == usual[name]:
            continue
        if value is None:  # which no flag says
            return "gpkernels train --config config.json"
        words += [flag(name if value else f"no_{name}")] if isinstance(value, bool) else [flag(name), str(value)]
    return shlex.join(words)


def _machines(held: list[dict[str, Any]]) -> Iterator[str]:
    if not held:
        return
    yield page.heading("Machine and versions")
    rows = [
        (
            f"{session['from_step']} to {session.get('to_step', 'where it was killed')}",
            session["started"],
            session.get("seconds", ""),
            session["device"],
            "; ".join(f"{name}: {value}" for name, value in session["machine"].items()),
            ", ".join(f"{name} {value}" for name, value in session["versions"].items()),
        )
        for session in held
    ]
    yield page.table(("steps", "started", "seconds", "device", "machine", "versions"), rows)
