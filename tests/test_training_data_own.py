"""Images of one's own: arrays and torch data sets, as they come, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from gpkernels.training import TrainConfig, Trainer
from gpkernels.training.data import ImageSet

NOISE = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), np.uint8)


class Own(Dataset):
    def __init__(self, items, **more):
        self.items = items
        self.__dict__.update(more)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_in_either_order(wrap, channels):
    wanted = NOISE[:, :channels]
    for given in (wanted, wanted.transpose(0, 2, 3, 1)):
        images = ImageSet.from_arrays(wrap(given))
        assert np.array_equal(images.images, wanted)
        assert images.images.flags["C_CONTIGUOUS"]
        assert (images.labels, images.classes, images.held_out()) == (None, 0, None)


def test_labels_and_held_out_images():
    held_out = ImageSet.from_arrays(NOISE[:3], [0, 1, 1])
    labels = np.arange(12, dtype=np.uint8) % 3
    images = ImageSet.from_arrays(NOISE, labels, ("a", "b", "c"), held_out, name="mine")
    assert images.labels.dtype == np.int64
    assert (images.name, images.class_names) == ("mine", ("a", "b", "c"))
    assert images.held_out() is held_out
    assert held_out.class_names == ("0", "1")
    assert ImageSet.from_arrays(NOISE, torch.from_numpy(labels)).labels.tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1, 2]],), TypeError, "images: wanted a numpy array or a torch.Tensor, got list"),
        ((NOISE / 255,), TypeError, "images: wanted uint8, got float64"),
        ((NOISE[0],), ValueError, r"images: wanted \(N, C, S, S\) or .*, got shape \(3, 32, 32\)"),
        ((NOISE[:0],), ValueError, r"N at least 1, got shape \(0, 3, 32, 32\)"),
        ((NOISE[:, :2],), ValueError, r"C 1 or 3 .*, got shape \(12, 2, 32, 32\)"),
        ((NOISE[:, :, :31],), ValueError, r"got shape \(12, 3, 31, 32\)"),
        ((NOISE[:, :, :3, :3],), ValueError, r"got shape \(12, 3, 3, 3\), which may be either"),
        ((NOISE, [0.0] * 12), TypeError, "labels: wanted whole numbers, got float64"),
        ((NOISE, [0] * 11), ValueError, r"labels: wanted shape \(12,\), one for each image, got shape \(11,\)"),
        ((NOISE, [2] * 12, ("a", "b")), ValueError, "labels: wanted numbers from 0 to 1, got 2 to 2"),
        ((NOISE, [-1] * 12), ValueError, "labels: wanted numbers from 0 to "),
        ((NOISE, None, ("a",)), ValueError, "class_names: wanted none, since there are no labels"),
    ],
)
def test_bad_arrays_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ImageSet.from_arrays(*arguments)


FORMS = {
    "PIL": lambda image: Image.fromarray(image.transpose(1, 2, 0)),
    "PIL with alpha": lambda image: Image.fromarray(image.transpose(1, 2, 0)).convert("RGBA"),
    "array": lambda image: image.transpose(1, 2, 0),
    "tensor": torch.from_numpy,
    "ToTensor": lambda image: torch.from_numpy(image).float() / 255,
    "float64": lambda image: image / 255,
}


@pytest.mark.parametrize("form", FORMS)
def test_data_sets_of_every_form_of_image(form):
    items = [FORMS[form](image) for image in NOISE]
    images = ImageSet.from_dataset(Own(items))
    assert np.array_equal(images.images, NOISE)
    assert images.labels is None
    told = []
    labelled = Own([(item, index % 2) for index, item in enumerate(items)], classes=["no", "yes"])
    images = ImageSet.from_dataset(labelled, progress=lambda done, total: told.append((done, total)))
    assert np.array_equal(images.images, NOISE)
    assert images.labels.tolist() == [0, 1] * 6
    assert images.class_names == ("no", "yes")
    assert told[-1] == (12, 12)
    assert ImageSet.from_dataset(labelled, ["a", "b"]).class_names == ("a", "b")


def test_floating_point_values_are_rounded():
    images = ImageSet.from_dataset(Own([np.full((1, 2, 2), value) for value in (0.0, 0.999, 0.501, 1.0)]))
    assert images.images[:, 0, 0, 0].tolist() == [0, 255, 128, 255]


def test_grey_data_sets():
    wanted = NOISE[:, :1]
    for items in ([Image.fromarray(image[0]) for image in wanted], [torch.from_numpy(image[0]) for image in wanted]):
        assert np.array_equal(ImageSet.from_dataset(Own(items)).images, wanted)
    tensors = TensorDataset(torch.from_numpy(wanted), torch.arange(12))
    assert ImageSet.from_dataset(tensors).labels.tolist() == list(range(12))


GOOD = torch.from_numpy(NOISE[0])


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (iter([GOOD]), TypeError, "dataset: wanted a map-style data set with a length, got list_iterator"),
        (Own([]), ValueError, "dataset: wanted at least one item, got 0"),
        (Own([GOOD, "a.png"]), TypeError, r"dataset\[1\]: wanted a PIL image, or .*, got str"),
        (Own([GOOD.int()]), TypeError, r"dataset\[0\]: wanted a PIL image, or .*, got int32"),
        (Own([GOOD / 127.5 - 1]), ValueError, r"values in \[0, 1\] \(leave out Normalize\), got -1 to 1"),
        (Own([GOOD * float("nan")]), ValueError, r"dataset\[0\]: wanted floating-point values"),
        (Own([GOOD, GOOD[:, :16, :16]]), ValueError, r"dataset\[1\]: wanted an image of \(3, 32, 32\), as the first"),
        (Own([GOOD[:, :16]]), ValueError, r"dataset\[0\]: wanted \(N, C, S, S\)"),
        (Own([(GOOD, 1), GOOD]), ValueError, r"dataset\[1\]: wanted a label with every image or with none, got None"),
        (Own([GOOD, (GOOD, 1)]), ValueError, r"dataset\[1\]: wanted a label with every image or with none, got 1"),
        (Own([(GOOD, 1.5)]), TypeError, r"dataset\[0\]: wanted a whole number as label, got float"),
        (Own([(GOOD, 5)], classes=("a", "b")), ValueError, "labels: wanted numbers from 0 to 1, got 5 to 5"),
    ],
)
def test_bad_data_sets_are_named(dataset, error, message):
    with pytest.raises(error, match=message):
        ImageSet.from_dataset(dataset)


def test_training_on_them(tmp_path):
    images = ImageSet.from_dataset(Own([(image, index % 2) for index, image in enumerate(torch.from_numpy(NOISE))]))
    settings = TrainConfig(ngf=2, ndf=2, nz=4, batch_size=4, steps=1, condition="projection")
    assert Trainer(settings, images, tmp_path).run()
