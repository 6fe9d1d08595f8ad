"""Fashion-MNIST: idx files as they are and as they should not be, padding, labels, the held-out part."""

import gzip
import sys

import numpy as np
import pytest
import trees

from gpkernels.errors import UserError
from gpkernels.training import TrainConfig, data


def config(**settings):
    return TrainConfig(**{"batch_size": 4, "image_size": 32, **settings})


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_is_padded_and_labelled(tmp_path, suffix):
    found = data.load(config(data=f"fashion-mnist:{trees.fashion(tmp_path, suffix=suffix)}"))
    images, labels = trees.clothes(60, seed=60)
    assert found.images.shape == (60, 1, 32, 32)
    assert np.array_equal(found.images[:, 0, 2:30, 2:30], images)
    assert found.images.sum() == images.sum(dtype=int)  # the frame is black
    assert found.labels.tolist() == labels.tolist()
    assert found.labels.dtype == np.int64
    assert found.classes == 10
    assert found.class_names[9] == "Ankle boot"
    held_out = found.held_out()
    assert held_out.labels.tolist() == trees.clothes(20, seed=20)[1].tolist()
    assert held_out.held_out() is None
    larger = data.load(config(data=f"fashion-mnist:{tmp_path}", image_size=64, max_images=7))
    assert larger.images.shape == (7, 1, 64, 64)
    assert larger.labels.tolist() == labels[:7].tolist()
    assert len(larger.held_out().images) == 20


def test_fashion_mnist_is_found_where_debian_puts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    trees.fashion(tmp_path / "share/datasets/fashion-mnist", 10, 10)
    assert len(data.load(config(data="fashion-mnist")).images) == 10


def test_fashion_mnist_without_a_test_part(tmp_path):
    trees.fashion(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    assert data.load(config(data=f"fashion-mnist:{tmp_path}")).held_out() is None


def damaged(root, how):
    images, labels = trees.clothes(60, seed=60)
    files = {name: trees.fashion(root) / f"train-{name}.gz" for name in ("images-idx3-ubyte", "labels-idx1-ubyte")}
    content = {
        "magic": ("images-idx3-ubyte", trees.idx(images, b"\0\0\x0d\x03")),
        "labels as images": ("images-idx3-ubyte", trees.idx(labels)),
        "empty": ("images-idx3-ubyte", b""),
        "short": ("images-idx3-ubyte", trees.idx(images)[:-1]),
        "long": ("images-idx3-ubyte", trees.idx(images) + b"\0"),
        "header alone": ("images-idx3-ubyte", trees.idx(images)[:10]),
        "huge": ("images-idx3-ubyte", trees.idx(images)[:4] + b"\xff" * 12),
        "side": ("images-idx3-ubyte", trees.idx(images[:, :27])),
        "count": ("labels-idx1-ubyte", trees.idx(labels[:59])),
        "label": ("labels-idx1-ubyte", trees.idx(labels + 1)),
        "nothing": ("images-idx3-ubyte", trees.idx(images[:0])),
    }
    if how in content:
        name, value = content[how]
        files[name].write_bytes(gzip.compress(value))
    if how == "nothing":
        files["labels-idx1-ubyte"].write_bytes(gzip.compress(trees.idx(labels[:0])))
    if how == "truncated":
        files["images-idx3-ubyte"].write_bytes(files["images-idx3-ubyte"].read_bytes()[:-20])
    if how == "not gzip":
        files["images-idx3-ubyte"].write_bytes(trees.idx(images))
    if how == "no labels":
        files["labels-idx1-ubyte"].unlink()
    if how == "no images":
        files["images-idx3-ubyte"].unlink()
    return f"fashion-mnist:{root}"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("magic", "train-images-idx3-ubyte.gz to begin with 00000803, got '00000d03'"),
        ("labels as images", "to begin with 00000803, got '00000801'"),
        ("empty", "to begin with 00000803, got ''"),
        ("short", r"wanted 47056 bytes for \(60, 28, 28\) in .*train-images-idx3-ubyte.gz, got 47055"),
        ("long", r"wanted 47056 bytes for \(60, 28, 28\) in .*train-images-idx3-ubyte.gz, got 47057"),
        ("header alone", "in .*train-images-idx3-ubyte.gz, got 10"),
        ("huge", r"bytes for \(4294967295, 4294967295, 4294967295\)"),
        ("side", r"wanted images of 28x28 in .*, got \(27, 28\)"),
        ("count", "wanted a label an image, got 60 and 59 in .*train-labels-idx1-ubyte.gz"),
        ("label", "wanted labels below 10 in .*train-labels-idx1-ubyte.gz, got 10"),
        ("nothing", "wanted images, got none in"),
        ("truncated", "train-images-idx3-ubyte.gz is damaged"),
        ("not gzip", "train-images-idx3-ubyte.gz is damaged"),
        ("no labels", "wanted .*train-labels-idx1-ubyte, or that with .gz, which is missing"),
        ("no images", "wanted train-images-idx3-ubyte, or that with .gz, in .*dataset-fashion-mnist"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, how, message):
    with pytest.raises(UserError, match=message):
        data.load(config(data=damaged(tmp_path, how)))
