"""Small image trees for the trainer's tests."""

import gzip

import numpy as np
from PIL import Image


def picture(path, size=(40, 30), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def folder(root, count=20):
    for index in range(count):
        picture(root / f"class{index % 3}" / f"{index:03d}.{('png', 'jpg', 'bmp')[index % 3]}", seed=index)
    return root


def celeba(root, count=12):
    """torchvision's layout: images, attributes, partition (thirds: train, valid, test)."""
    names = [f"{index + 1:06d}.jpg" for index in range(count)]
    for index, name in enumerate(names):
        picture(root / "celeba" / "img_align_celeba" / name, (178, 218), seed=index)
    rows = "".join(f"{name} 1 -1\n" for name in names)
    (root / "celeba" / "list_attr_celeba.txt").write_text(f"{count}\nBald Young\n{rows}")
    parts = "".join(f"{name} {index * 3 // count}\n" for index, name in enumerate(names))
    (root / "celeba" / "list_eval_partition.txt").write_text(parts)
    return root


def idx(array, magic=None):
    header = b"\0\0\x08" + bytes([array.ndim]) if magic is None else magic
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def clothes(count, seed=0):
    """Images whose every pixel is 20 times the label plus 5; labels 0, 1, ..., 9, 0, ... shuffled."""
    labels = np.random.default_rng(seed).permutation(np.arange(count) % 10).astype(np.uint8)
    return np.repeat(labels * 20 + 5, 28 * 28).reshape(count, 28, 28).astype(np.uint8), labels


def fashion(root, train=60, test=20, suffix=".gz"):
    root.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if suffix == ".gz" else bytes
    for part, count in (("train", train), ("t10k", test)):
        images, labels = clothes(count, seed=count)
        (root / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        (root / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    return root
