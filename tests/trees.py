"""Small image trees for the trainer's tests."""

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
