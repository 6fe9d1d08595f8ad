"""The JSON beside a prepared array: what it holds, of what, and whether it is still that."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpkernels._version import __version__
from gpkernels.errors import UserError
from gpkernels.training.data.image_set import ImageSet
from gpkernels.training.data.listing import Attributes
from gpkernels.training.disk import write_atomically

FORMAT = 1


@dataclass
class Sidecar:
    """`settings` decide the images (source, image_size, cut, ...); `path` is the array's; the rest is about them."""

    path: Path
    data: str
    settings: dict[str, Any]
    name: str
    shape: tuple[int, ...]
    sha256: str
    decoder: str
    skipped: list[str]
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    attributes: Attributes | None
    no_attributes: str

    @classmethod
    def read(cls, path: Path, wanted: dict[str, Any]) -> Sidecar | None:
        """The sidecar of the array at `path` if both are there and its settings are `wanted`; others are not looked at.

        Raises UserError if it is damaged, or not of this array.
        """
        file = path.with_suffix(".json")
        if not (file.is_file() and path.is_file()):
            return None
        try:
            content = json.loads(file.read_text())
            if content["format"] != FORMAT:
                return None
            has = {**content["settings"], "data": content["data"]}
            if any(has[name] != value for name, value in wanted.items()):
                return None
            sidecar = cls._from_json(path, content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--cache: {file} is damaged ({error!r}); delete it to prepare the images anew") from None
        sidecar._check_array()
        return sidecar

    @classmethod
    def _from_json(cls, path: Path, content: dict[str, Any]) -> Sidecar:
        count, *_ = shape = tuple(content["shape"])
        labels = None if content["labels"] is None else np.array(content["labels"], np.int64)
        attributes = None
        if content["attributes"] is not None:
            names = content["attributes"]["names"]
            bits = np.frombuffer(bytes.fromhex(content["attributes"]["bits"]), np.uint8)
            values = np.unpackbits(bits.reshape(len(names), -1), axis=1, count=count)
            attributes = Attributes(names, values.T.astype(bool))
        if labels is not None and labels.shape != (count,):
            raise ValueError(f"{len(labels)} labels of {count} images")
        return cls(
            path=path,
            data=content["data"],
            settings=content["settings"],
            name=content["name"],
            shape=shape,
            sha256=content["sha256"],
            decoder=content["decoder"],
            skipped=content["skipped"],
            labels=labels,
            class_names=tuple(content["class_names"]),
            attributes=attributes,
            no_attributes=content["no_attributes"],
        )

    def write(self) -> None:
        attributes = None
        if self.attributes is not None:
            bits = np.packbits(self.attributes.values.T, axis=1)
            attributes = {"names": self.attributes.names, "bits": bits.tobytes().hex()}
        content = {
            "format": FORMAT,
            "name": self.name,
            "data": self.data,
            "shape": self.shape,
            "sha256": self.sha256,
            "settings": self.settings,
            "decoder": self.decoder,
            "gpkernels": __version__,
            "skipped": self.skipped,
            "class_names": self.class_names,
            "no_attributes": self.no_attributes,
            "labels": None if self.labels is None else self.labels.tolist(),
            "attributes": attributes,
        }
        text = json.dumps(content, indent=1)
        write_atomically(self.path.with_suffix(".json"), lambda file: file.write(text.encode()))

    def remove(self) -> None:
        """The sidecar first: without it the array is not looked at."""
        self.path.with_suffix(".json").unlink()
        self.path.unlink()

    def describe(self) -> str:
        count, _, height, width = self.shape
        return f"{self.path}: {count} images of {width}x{height}, {self.path.stat().st_size / 1e9:.3g} GB"

    def _check_array(self) -> None:
        try:
            found = self._map()
        except (ValueError, OSError, EOFError) as error:
            raise self._not_that(str(error)) from None
        if found.shape != self.shape or found.dtype != np.uint8:
            raise self._not_that(f"it holds {found.dtype} of {found.shape}")

    def _not_that(self, reason: str) -> UserError:
        return UserError(
            f"--cache: wanted uint8 of {self.shape} in {self.path}, as its sidecar says, got another file ({reason}); "
            "delete both to prepare the images anew"
        )

    def _map(self) -> np.ndarray:
        """Mapped copy-on-write: torch wants arrays that could be written, and the file stays as it is."""
        return np.load(self.path, mmap_mode="c", allow_pickle=False)

    def images(self, label_attribute: str | None) -> ImageSet:
        """The images, mapped into memory, with the labels that `label_attribute` chooses."""
        labels, names = self.labels, self.class_names
        if label_attribute is not None:
            labels, names = attribute_labels(self.attributes, label_attribute, self.no_attributes)
        return ImageSet(self.name, self._map(), skipped=list(self.skipped), labels=labels, class_names=names)


def attribute_labels(attributes: Attributes | None, attribute: str, missing: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and the names of the two classes. Raises UserError for an attribute that the data does not have."""
    if attributes is None:
        raise UserError(f"--label-attribute: wanted {missing}, which is missing")
    return attributes.labels(attribute), (f"not {attribute}", attribute)
