"""CelebA in every layout: the same images, labels and parts; crops; lists that are missing or damaged."""

import numpy as np
import pytest
import trees
from PIL import Image

from gpkernels.errors import UserError
from gpkernels.training import data
from gpkernels.training.config import CROPS, SPLITS, TrainConfig
from gpkernels.training.data import celeba, prepared


def config(path, **settings):
    return TrainConfig(**{"data": f"celeba:{path}", **settings})


def pictures(folder, count, box=(0, 20, 178, 198)):
    """(count, 3, 64, 64): the first pictures of trees, by Pillow alone."""
    trees.celeba_images(folder, count)
    found = []
    for name in trees.celeba_names(count):
        with Image.open(folder / name) as image:
            found.append(np.asarray(image.convert("RGB").crop(box).resize((64, 64), Image.Resampling.BICUBIC)))
    return np.stack(found).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("layout", trees.CELEBA)
def test_every_layout_is_the_same_data(tmp_path, layout):
    path = trees.CELEBA[layout](tmp_path / "data")
    wanted = pictures(tmp_path / "wanted", 12)
    for number, split in enumerate(("train", "valid", "test")):
        images = data.load(config(path, split=split, label_attribute="Bald"))
        assert np.array_equal(images.images, wanted[4 * number : 4 * number + 4])
        assert images.labels.tolist() == [int(index % 2 == 0) for index in range(4 * number, 4 * number + 4)]
        assert images.class_names == ("not Bald", "Bald")
        assert (images.name, images.skipped) == ("celeba", [])
    held_out = data.load(config(path)).held_out()
    assert np.array_equal(held_out.images, wanted[8:])
    assert held_out.held_out() is None
    everything = data.load(config(path, split="all", label_attribute="Young"))
    assert sorted(everything.labels) == [0] * 8 + [1] * 4
    assert len(everything.images) == 12
    few = data.load(config(path, max_images=3))
    assert few.labels is None
    assert len(few.held_out().images) == 4


def test_shards_may_hold_jpeg(tmp_path):
    path = trees.celeba_parquet(tmp_path / "data", 6, shards=1, kind="JPEG")
    images = data.load(config(path, split="train"))
    assert np.array_equal(images.images, pictures(tmp_path / "wanted", 2))


def test_one_parquet_file(tmp_path):
    folder = trees.celeba_parquet(tmp_path) / "img_align+identity+attr"
    assert len(data.load(config(folder / "valid-00001-of-00002.parquet", split="all")).images) == 2
    (folder / "valid-00001-of-00002.parquet").rename(tmp_path / "some.parquet")
    with pytest.raises(UserError, match=r"--split train: wanted shards whose names, or folders, begin with train"):
        data.load(config(tmp_path / "some.parquet"))


def test_parts_of_shards_from_their_folders(tmp_path):
    """As `refs/convert/parquet` has them: default/train/0000.parquet; `validation` is valid."""
    folder = trees.celeba_parquet(tmp_path, shards=1) / "img_align+identity+attr"
    for old, new in (("train", "train"), ("valid", "validation"), ("test", "test")):
        (folder / new).mkdir()
        (folder / f"{old}-00000-of-00001.parquet").rename(folder / new / "0000.parquet")
    wanted = pictures(tmp_path / "wanted", 12)
    for number, split in enumerate(("train", "valid", "test")):
        images = data.load(config(tmp_path / "hub", split=split))
        assert np.array_equal(images.images, wanted[4 * number : 4 * number + 4])


def test_images_of_another_configuration_are_left_alone(tmp_path):
    """A clone of the data set holds the images in the wild beside the aligned ones."""
    hub = trees.celeba_parquet(tmp_path)
    (hub / "img_in_the_wild").mkdir()
    source = hub / "img_align+identity+attr/train-00000-of-00002.parquet"
    (hub / "img_in_the_wild/train-00000-of-00001.parquet").write_bytes(source.read_bytes())
    assert len(data.load(config(hub, split="all")).images) == 12


@pytest.mark.parametrize("crop", CROPS)
def test_crops(tmp_path, crop):
    images = data.load(config(trees.celeba(tmp_path), crop=crop))
    box = celeba.BOXES.get(crop, (0, 20, 178, 198))  # none: the largest square in the centre
    assert np.array_equal(images.images, pictures(tmp_path / "wanted", 4, box))


def test_boxes_are_centred_and_as_large_as_they_are_called():
    assert set(celeba.BOXES) == set(CROPS) - {"none"}
    for crop, (left, upper, right, lower) in celeba.BOXES.items():
        assert right - left == lower - upper == int(crop)
        assert (left + right) / 2 == 89
        assert 0 <= upper < lower <= 218


def test_splits_are_cut_by_number_where_the_partition_is_missing_and_all_images_are_there():
    """162,770, 19,867 and 19,962 images."""
    stems = [f"{number:06d}" for number in range(1, 202_600)]
    parts = {split: celeba._by_number(stems, split, "no") for split in ("train", "valid", "test")}
    assert [len(part) for part in parts.values()] == [162_770, 19_867, 19_962]
    assert np.array_equal(np.concatenate(list(parts.values())), np.arange(202_599))
    assert stems[parts["valid"][0]] == "162771"
    for damaged in (stems[1:], [*stems[1:], "202600"], [*stems[1:], "face"], [*stems[1:], "202599"]):
        with pytest.raises(UserError, match="no"):
            celeba._by_number(damaged, "train", "no")


def test_a_part_that_is_not_there(tmp_path):
    trees.celeba(tmp_path)
    file = tmp_path / "celeba/list_eval_partition.txt"
    file.write_text(file.read_text().replace(" 2\n", " 1\n"))
    assert data.load(config(tmp_path)).held_out() is None
    with pytest.raises(UserError, match="--split test: wanted images of that part in"):
        data.load(config(tmp_path, split="test"))
    assert {split: len(data.load(config(tmp_path, split=split)).images) for split in SPLITS if split != "test"} == {
        "train": 4,
        "valid": 8,
        "all": 12,
    }


def test_an_image_of_another_size_is_skipped(tmp_path):
    trees.celeba(tmp_path)
    trees.picture(tmp_path / "celeba/img_align_celeba/000001.jpg", (100, 100))
    images = data.load(config(tmp_path))
    assert len(images.images) == 3
    assert "000001.jpg: wanted 178x218 pixels, got 100x100" in images.skipped[0]
    assert len(data.load(config(tmp_path, crop="none")).images) == 4


def edited(root, name, old, new):
    file = trees.celeba(root) / "celeba" / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    return root


def without(root, *names):
    trees.celeba(root)
    for name in names:
        (root / "celeba" / name).unlink()
    return root


def emptied(root):
    return without(root, *(f"img_align_celeba/{name}" for name in trees.celeba_names(12)))


ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none", "--data celeba: wanted a folder, a .zip or a .parquet file, got .*/none, which"),
        (lambda p: trees.picture(p / "a.png"), "which is a file"),
        (lambda p: p, r"--data celeba: wanted img_align_celeba \(a folder of images, or .zip\) in .* got none of"),
        (emptied, "got none of these"),
        (lambda p: without(p, PARTITION), "--split train: wanted .*list_eval_partition.txt, which is missing"),
        (lambda p: edited(p, PARTITION, "000002.jpg 0", "000002.jpg 3"), "a name and 0, 1 or 2 in .* '000002.jpg 3'"),
        (lambda p: edited(p, PARTITION, "000002.jpg 0", "000002.jpg"), "a name and 0, 1 or 2 in .* got '000002.jpg'"),
    ],
)  # fmt: skip
def test_bad_data_is_named(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        data.load(config(make(tmp_path)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: edited(p, ATTRIBUTES, "12\n", "13\n"), "as many rows as it states .* got '13' stated and 12 rows"),
        (lambda p: edited(p, ATTRIBUTES, "12\n", ""), "got 'Bald Young' stated and 11 rows"),
        (lambda p: edited(p, ATTRIBUTES, "000004.jpg", "000003.jpg"), "wanted one row for each .* got two for 000003"),
        (lambda p: edited(p, ATTRIBUTES, "000004.jpg", "x\33[1m"), "none for 000004.jpg"),
        (lambda p: edited(p, ATTRIBUTES, "000004.jpg -1", "\33[1m 7"), "a name and 2 times 1 or -1 .* got '\\?\\[1m 7"),
    ],
)  # fmt: skip
def test_bad_attributes_are_named_where_they_are_asked_for(tmp_path, monkeypatch, make, message):
    """From a prepared file too, which without them is made all the same."""
    path = make(tmp_path / "data")
    assert len(data.load(config(path)).images) == 4
    with pytest.raises(UserError, match=message):
        data.load(config(path, label_attribute="Bald"))
    monkeypatch.setattr(prepared, "AUTOMATIC", 0)
    cache = {"cache": str(tmp_path / "cache")}
    assert len(data.load(config(path, **cache)).images) == 4
    with pytest.raises(UserError, match=message):
        data.load(config(path, label_attribute="Bald", **cache))


@pytest.mark.parametrize("layout", ["torchvision", "kaggle", "plain"])
def test_part_of_the_images_will_do(tmp_path, layout):
    """With the lists of them all: rows belong to images by name."""
    path = trees.CELEBA[layout](tmp_path / "data")
    for number in (3, 5, 12):
        next((tmp_path / "data").rglob(f"{number:06d}.jpg")).unlink()
    assert len(data.load(config(path)).images) == 3
    assert data.load(config(path, label_attribute="Bald")).labels.tolist() == [1, 0, 0]
    assert data.load(config(path, split="all", label_attribute="Bald")).labels.tolist() == [1, 0, 0, 0, 1, 0, 1, 0, 1]


def test_kaggles_lists_are_checked_too(tmp_path):
    trees.celeba_kaggle(tmp_path)
    trees.picture(tmp_path / "img_align_celeba/img_align_celeba/000013.jpg", (178, 218))
    with pytest.raises(UserError, match=r"wanted a row for each image in .*csv, got none for 000013.jpg"):
        data.load(config(tmp_path, split="all", label_attribute="Bald"))
    (tmp_path / "list_attr_celeba.csv").unlink()
    assert len(data.load(config(tmp_path, split="all")).images) == 13
    with pytest.raises(UserError, match=r"--label-attribute: wanted .*list_attr_celeba.txt, which is missing"):
        data.load(config(tmp_path, label_attribute="Bald"))
