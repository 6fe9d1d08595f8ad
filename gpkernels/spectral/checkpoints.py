"""State dicts of spectrally normalised models, between the names of different libraries.

| format | weight | vectors |
|---|---|---|
| "torch" | parametrizations.NAME.original | parametrizations.NAME.0._u, ._v (torch's parametrization, and ours) |
| "torch-legacy" | NAME_orig | NAME_u, NAME_v (`torch.nn.utils.spectral_norm`) |
| "biggan" | weight | u0 of shape (1, rows), sv0 (1,), no v (BigGAN-PyTorch, `layers.SN`) |
| "mimicry" | weight | sn_u of shape (1, rows), sn_sigma (1,), no v (mimicry, `modules.spectral_norm`) |

In all four W has the outputs as rows, and u lives on them. BigGAN-PyTorch and mimicry keep no v: it is W^T u / |W^T u|,
one product; and they iterate once more in evaluation without keeping it, which `handle.update()` after loading repeats.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gpkernels._checks import check_choice, fail
from gpkernels.ops.spectral_norm import reference


class Layer(NamedTuple):
    """A normalised weight: the module's prefix ("" or "path."), its name, and vectors of shape (rows,) and (cols,)."""

    prefix: str
    name: str
    weight: Tensor
    u: Tensor
    v: Tensor


class _Format(NamedTuple):
    weight: str  # what follows the prefix, with {} for the name of the weight
    vectors: tuple[str, str]
    has_v: bool


_FORMATS = {
    "torch": _Format("parametrizations.{}.original", ("parametrizations.{}.0._u", "parametrizations.{}.0._v"), True),
    "torch-legacy": _Format("{}_orig", ("{}_u", "{}_v"), True),
    "biggan": _Format("weight", ("u0", "sv0"), False),
    "mimicry": _Format("weight", ("sn_u", "sn_sigma"), False),
}
FORMATS = tuple(_FORMATS)


def convert(state_dict: Mapping[str, Tensor], target: str, *, source: str | None = None) -> dict[str, Tensor]:
    """The state dict in the names of another format; what is not a normalised weight keeps its name.

    Args:
        state_dict: of a model, or of a part of one. It is not changed; the result shares its tensors
            and its `_metadata`.
        target, source: names of the table above. source=None recognises it.

    Raises:
        TypeError: not a mapping of strings.
        ValueError: an unknown format; a format not recognised, or several; a weight without its vectors, so also one
            normalised as a vector or by norm="convolution", which other formats do not have, or a vector without its
            weight; shapes that do not belong together; a key that the result would have twice; for "biggan" and
            "mimicry", a weight of another name than "weight", rows that are not its first dimension, or several
            singular values a layer.
    """
    check_choice("target", target, FORMATS)
    source = recognise(state_dict) if source is None else source
    check_choice("source", source, FORMATS)
    layers, rest = _parse(state_dict, source)
    if not layers:
        raise fail("state_dict", f"weights in the names of {source!r}", _some(state_dict))
    places: dict[str, dict[str, Tensor]] = {}
    for layer in layers:
        places[_keys(source, layer.prefix, layer.name)[0]] = _written(layer, target)
    bare = [key for key in rest if target != source and _is_bare(source, key, rest)]
    if bare:
        raise fail("state_dict", "u and v of every weight", f"none of {', '.join(sorted(bare))}")
    result: OrderedDict[str, Tensor] = OrderedDict()
    if hasattr(state_dict, "_metadata"):
        result._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for key, value in state_dict.items():  # in the order of the source
        entries = places.get(key, {key: value} if key in rest else {})
        for name, tensor in entries.items():
            if name in result:
                raise fail("state_dict", "keys that stay apart", f"two tensors for {name!r} in {target!r}")
            result[name] = tensor
    return result


def _is_bare(form: str, key: str, rest: set[str]) -> bool:
    """A normalised weight without vectors: another parametrization has a state of its own."""
    after = _FORMATS[form].weight.partition("{}")[2]
    if not after or not key.endswith(after):
        return False
    beside = key.removesuffix(after)
    if form == "torch":
        allowed = {key, f"{beside}.0._x"}
        return all(k in allowed for k in rest if k.startswith(f"{beside}."))
    return f"{beside}_mask" not in rest  # torch.nn.utils.prune


def recognise(state_dict: Mapping[str, Tensor]) -> str:
    """The format of a state dict. Raises ValueError if it has none of them, or several."""
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise TypeError(f"state_dict: wanted a mapping of names to tensors, got {type(state_dict).__name__}")
    found = [name for name in FORMATS if _has(state_dict, name)]
    if len(found) != 1:
        raise fail("state_dict", "one of the formats " + ", ".join(FORMATS), found or _some(state_dict))
    return found[0]


def _some(state_dict: Mapping[str, Tensor]) -> str:
    return "keys such as " + ", ".join(list(state_dict)[:3]) if state_dict else "no keys"


def _has(state_dict: Mapping[str, Tensor], form: str) -> bool:
    places = (_split(form, key, 0) for key in state_dict)
    return any(all(k in state_dict for k in _keys(form, *place)) for place in places if place)


def _keys(form: str, prefix: str, name: str) -> list[str]:
    row = _FORMATS[form]
    return [prefix + pattern.format(name) for pattern in (row.weight, *row.vectors)]


def _split(form: str, key: str, vector: int) -> tuple[str, str] | None:
    """(prefix, name) if the key is that of a vector in this format."""
    row = _FORMATS[form]
    before, _, after = row.vectors[vector].partition("{}")
    path, dot, last = key.rpartition(".")
    if form == "torch":
        if not key.endswith(after):
            return None
        path, dot, name = key[: -len(after)].rpartition(".")
        outer, outer_dot, word = path.rpartition(".")
        return (outer + outer_dot, name) if dot and word == "parametrizations" and name else None
    if not row.has_v:
        return (path + dot, "weight") if last == before else None
    return (path + dot, last[: -len(after)]) if last.endswith(after) and len(last) > len(after) else None


def _parse(state_dict: Mapping[str, Tensor], form: str) -> tuple[list[Layer], set[str]]:
    """The layers in this format, and the keys that are none of theirs."""
    others = [name for name in FORMATS if name != form and _has(state_dict, name)]
    if others:
        raise fail("state_dict", f"one format, {form!r}", f"{', '.join(map(repr, others))} in it")
    layers: list[Layer] = []
    used: set[str] = set()
    for key in state_dict:
        place = next((found for i in (0, 1) if (found := _split(form, key, i))), None)
        if place is None or key in used:
            continue
        keys = _keys(form, *place)
        missing = [k for k in keys if k not in state_dict]
        if form == "torch-legacy" and keys[0] in missing:
            continue  # something else whose name ends in _u or _v
        if missing:
            raise fail("state_dict", f"{', '.join(keys)} together, as in {form!r}", f"no {', '.join(missing)}")
        if form == "biggan" and f"{place[0]}u1" in state_dict:
            raise fail("state_dict", "one singular value a layer", f"{place[0]}u1")
        weight, u, v = (state_dict[k] for k in keys)
        layers.append(_layer(*place, weight, u, v if _FORMATS[form].has_v else None))
        used.update(keys)
    return layers, set(state_dict) - used


def _layer(prefix: str, name: str, weight: Tensor, u: Tensor, v: Tensor | None) -> Layer:
    where = f"{prefix}{name}"
    if v is not None:
        if weight.dim() < 2 or u.dim() != 1 or v.dim() != 1 or len(u) * len(v) != weight.numel():
            got = f"{tuple(u.shape)} and {tuple(v.shape)} for {tuple(weight.shape)}"
            raise fail(where, "vectors of as many elements as the weight has rows and columns", got)
        if len(u) not in weight.shape:
            raise fail(where, "a u of the size of a dimension of the weight", f"{len(u)} for {tuple(weight.shape)}")
        return Layer(prefix, name, weight, u, v)
    if weight.dim() < 2 or tuple(u.shape) != (1, weight.shape[0]):
        raise fail(where, f"u of shape (1, {weight.shape[0]})", tuple(u.shape))
    u = u[0]
    with torch.no_grad():
        v = reference.matrix(weight, 0).mT @ u.to(weight.dtype if weight.dtype == torch.float64 else torch.float32)
        length = torch.linalg.vector_norm(v)
        v = torch.where(length > 0, v / length, 1 / len(v) ** 0.5).to(u.dtype)
    return Layer(prefix, name, weight, u, v)


def _written(layer: Layer, target: str) -> dict[str, Tensor]:
    row = _FORMATS[target]
    if row.has_v:
        values = [layer.weight, layer.u, layer.v]
    else:
        where = f"{layer.prefix}{layer.name}"
        if layer.name != "weight":
            raise fail(where, f"the name 'weight', the only one of {target!r}", repr(layer.name))
        if len(layer.u) != layer.weight.shape[0]:
            got = f"{len(layer.u)} rows of {tuple(layer.weight.shape)}"
            raise fail(where, f"rows along the first dimension, as in {target!r}", got)
        with torch.no_grad():
            w = reference.matrix(layer.weight, 0)
            sigma = torch.dot(layer.u.to(w.dtype), w @ layer.v.to(w.dtype)).to(layer.u.dtype).reshape(1)
        values = [layer.weight, layer.u[None], sigma]
    return dict(zip(_keys(target, layer.prefix, layer.name), values, strict=True))
