"""Small image trees for the trainer's tests."""

import gzip
import io
import shutil
import zipfile

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


ATTRIBUTES = {"Bald": lambda index: index % 2 == 0, "Young": lambda index: index % 3 == 0}


def celeba_names(count):
    return [f"{index + 1:06d}.jpg" for index in range(count)]


def celeba_images(folder, count):
    for index, name in enumerate(celeba_names(count)):
        picture(folder / name, (178, 218), seed=index)


def celeba_lists(folder, count, suffix=".txt"):
    """Attributes and partition (thirds: train, valid, test), as CelebA's authors have them, or Kaggle's .csv."""
    folder.mkdir(parents=True, exist_ok=True)
    names = celeba_names(count)
    values = [[1 if has(index) else -1 for has in ATTRIBUTES.values()] for index in range(count)]
    parts = [index * 3 // count for index in range(count)]
    if suffix == ".csv":
        header = ",".join(["image_id", *ATTRIBUTES])
        attributes = "".join(f"{name},{','.join(map(str, row))}\r\n" for name, row in zip(names, values, strict=True))
        attributes = f"{header}\r\n{attributes}"
        partition = "image_id,partition\n" + "".join(f"{n},{part}\n" for n, part in zip(names, parts, strict=True))
    else:
        rows = "".join(f"{n} {' '.join(f'{v:2d}' for v in row)}\n" for n, row in zip(names, values, strict=True))
        attributes = f"{count}\n{' '.join(ATTRIBUTES)}\n{rows}"
        partition = "".join(f"{name} {part}\n" for name, part in zip(names, parts, strict=True))
    (folder / f"list_attr_celeba{suffix}").write_text(attributes)
    (folder / f"list_eval_partition{suffix}").write_text(partition)


def celeba(root, count=12):
    """torchvision's layout."""
    celeba_images(root / "celeba/img_align_celeba", count)
    celeba_lists(root / "celeba", count)
    return root


def celeba_kaggle(root, count=12):
    celeba_images(root / "img_align_celeba/img_align_celeba", count)
    celeba_lists(root, count, ".csv")
    return root


def celeba_plain(root, count=12):
    """The images in one folder, the lists beside it."""
    celeba_images(root / "faces", count)
    celeba_lists(root, count)
    return root / "faces"


def zipped(file, folder):
    """All of `folder` as a zip."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file


def celeba_zip(root, count=12):
    """The authors' img_align_celeba.zip, unopened, and their lists beside it."""
    celeba_images(root / "open/img_align_celeba", count)
    zipped(root / "img_align_celeba.zip", root / "open")
    shutil.rmtree(root / "open")
    celeba_lists(root, count)
    return root


def celeba_kaggle_zip(root, count=12):
    """Kaggle's archive with everything in it."""
    return zipped(root / "archive.zip", celeba_kaggle(root / "open", count))


def celeba_parquet(root, count=12, shards=2, kind="PNG"):
    """Hugging Face's layout: shards of each part, several row groups in each, the pixels of the .jpg files as PNG."""
    import pyarrow as pa
    import pyarrow.parquet

    celeba_images(root / "open", count)
    names = celeba_names(count)
    folder = root / "hub/img_align+identity+attr"
    folder.mkdir(parents=True)
    for number, part in enumerate(("train", "valid", "test")):
        of_part = [index for index in range(count) if index * 3 // count == number]
        for shard in range(shards):
            chosen = of_part[shard * len(of_part) // shards : (shard + 1) * len(of_part) // shards]
            table = {"image": [{"bytes": encoded(root / "open" / names[i], kind), "path": names[i]} for i in chosen]}
            table["celeb_id"] = chosen
            table |= {name: [has(index) for index in chosen] for name, has in ATTRIBUTES.items()}
            file = folder / f"{part}-{shard:05d}-of-{shards:05d}.parquet"
            pyarrow.parquet.write_table(pa.table(table), file, row_group_size=2)
    shutil.rmtree(root / "open")
    return root / "hub"


def encoded(file, kind):
    """The bytes of an image file, as it is or decoded and written as PNG."""
    if kind == "JPEG":
        return file.read_bytes()
    buffer = io.BytesIO()
    with Image.open(file) as image:
        image.save(buffer, "PNG")
    return buffer.getvalue()


CELEBA = {
    "torchvision": celeba,
    "torchvision, inner folder": lambda root, count=12: celeba(root, count) / "celeba",
    "kaggle": celeba_kaggle,
    "plain": celeba_plain,
    "zip": celeba_zip,
    "kaggle's zip": celeba_kaggle_zip,
    "parquet": celeba_parquet,
}
"""Writes the same images in each layout; returns the path to be given."""


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
