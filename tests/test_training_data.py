"""Data sets: what is read, cropped, skipped and refused; batches as a function of (seed, step)."""

import dataclasses
import time

import numpy as np
import pytest
import torch
import trees

from gpkernels.errors import UserError
from gpkernels.training import Callback, Learner, Trainer, data
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import image_set
from gpkernels.training.data.listing import CENTRE
from gpkernels.training.draws import generator_of


def config(**settings):
    return TrainConfig(**{"batch_size": 4, **settings})


def test_lfw_mini_is_100_faces():
    images = data.load(config())
    assert images.images.shape == (100, 1, 32, 32)
    assert images.images.dtype == np.uint8
    assert "memorises" in images.note
    assert images.epoch_images == 3200
    assert data.load(config(image_size=64)).images.shape == (100, 1, 64, 64)
    assert 60 < images.images.mean() < 200


def test_folder_reads_every_image_below_it(tmp_path):
    images = data.load(config(data=f"folder:{trees.folder(tmp_path)}"))
    assert images.images.shape == (20, 3, 64, 64)
    assert images.skipped == []
    assert data.load(config(data=f"folder:{tmp_path}", max_images=7, image_size=32)).images.shape == (7, 3, 32, 32)


def test_good_images_among_bad_ones_train_and_the_bad_are_named(tmp_path):
    trees.folder(tmp_path, 6)
    (tmp_path / "notes.jpg").write_text("not an image")
    whole = trees.picture(tmp_path / "long.jpg", (200, 200)).read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "readme.txt").write_text("not an image and not called one")
    images = data.load(config(data=f"folder:{tmp_path}"))
    assert len(images.images) == 7
    assert sorted(reason.split(":")[0].rsplit("/")[-1] for reason in images.skipped) == ["notes.jpg", "truncated.jpg"]


def test_step_decides_the_batch():
    images, settings = data.load(config()), config(seed=3)

    def batch(step):
        return images.batch(settings, step, torch.Generator().manual_seed(step))

    assert torch.equal(batch(5), batch(5))
    assert not torch.equal(batch(5), batch(6))
    assert batch(5).shape == (4, 1, 32, 32)
    assert batch(5).dtype == torch.float32
    assert -1 <= batch(5).min() < batch(5).max() <= 1


def numbered(count, **more):
    """Images that tell their number by their grey value."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 1, 32, 32))
    return data.ImageSet("numbered", images, **more)


def shown(images, settings, steps, shard=data.WHOLE):
    """The numbers of the images of steps, in order."""
    batches = [images.batch(settings, step, torch.Generator().manual_seed(step), shard) for step in steps]
    return ((torch.cat(batches)[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_neighbouring_seeds_share_neither_the_order_of_a_pass_nor_the_draws_of_a_step():
    pairs = [(seed, number) for seed in range(3) for number in range(3)]
    images = numbered(50)
    passes = {tuple(shown(images, config(batch_size=50, seed=seed), [number])) for seed, number in pairs}
    drawn = {torch.rand((), generator=generator_of(config(seed=seed), number)).item() for seed, number in pairs}
    assert (len(passes), len(drawn)) == (9, 9)


def test_fingerprints_tell_images_labels_and_classes_apart():
    draws = np.random.default_rng(0)
    pixels, labels = draws.integers(0, 256, (300, 1, 8, 8), np.uint8), np.arange(300) % 2

    def fingerprint(pixels=pixels, labels=labels, names=("a", "b")):
        return data.ImageSet("set", pixels, labels=labels, class_names=names).fingerprint()

    assert fingerprint() == fingerprint(pixels.copy(), labels.copy())
    others = [(pixels[1:],), (pixels[::-1],), (pixels.reshape(75, 4, 8, 8),), (pixels, labels[::-1]), (pixels, None)]
    others += [(pixels, labels, ("b", "a"))]
    assert len({fingerprint(), *(fingerprint(*other) for other in others)}) == 7


@pytest.mark.parametrize(("size", "box"), [((40, 30), (5, 0, 35, 30)), ((30, 41), (0, 5, 30, 35))])
def test_the_largest_square_in_the_centre_is_kept(size, box):
    assert CENTRE.of(*size) == box


def test_links_to_folders_are_not_followed(tmp_path):
    trees.folder(tmp_path / "images", 3)
    trees.folder(tmp_path / "others", 4)
    (tmp_path / "images/class0/again").symlink_to(tmp_path / "others")
    (tmp_path / "images/round").symlink_to(tmp_path / "images")
    assert len(data.load(config(data=f"folder:{tmp_path}/images", image_size=32)).images) == 3


@pytest.mark.parametrize("batch_size", [2, 7, 10, 23, 50])
def test_every_pass_shows_every_image_once_whatever_the_batch(batch_size):
    """No image is dropped at the end of a pass, or comes again before all have been."""
    stream = shown(numbered(23), config(batch_size=batch_size), range(-(-69 // batch_size)))
    passes = [stream[23 * i : 23 * (i + 1)] for i in range(3)]
    assert all(sorted(seen) == list(range(23)) for seen in passes)
    assert passes[0] != passes[1] != passes[2]


def test_parts_of_a_batch_are_the_whole():
    """Images, their mirroring and shifts, and their labels."""
    labels = np.arange(23) % 3
    images = numbered(23, labels=labels, class_names=("a", "b", "c"))
    noise = np.random.default_rng(0).integers(0, 256, (23, 3, 8, 8), np.uint8)
    images = dataclasses.replace(images, images=noise, shift=2)
    settings = config(batch_size=12)
    for step in (0, 1, 5):
        parts = [images.batch(settings, step, torch.Generator().manual_seed(9), data.Shard(i, 3)) for i in range(3)]
        assert torch.equal(torch.cat(parts), images.batch(settings, step, torch.Generator().manual_seed(9)))
        parts = [images.batch_labels(settings, step, data.Shard(i, 3))[0] for i in range(3)]
        assert torch.equal(torch.cat(parts), images.batch_labels(settings, step)[0])


def test_fewer_images_than_a_batch_still_fill_it(tmp_path):
    images = data.load(config(data=f"folder:{trees.folder(tmp_path, 3)}", batch_size=8))
    assert images.batch(config(batch_size=8), 0, torch.Generator()).shape[0] == 8


def test_augmentation_flips_and_shifts_whole_images():
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 1, 3, 4).repeat(400, 1, 1, 1)
    draws = torch.Generator().manual_seed(0)
    assert torch.equal(data.augment(image, flip=False, shift=0, generator=draws), image)
    flipped = data.augment(image, flip=True, shift=0, generator=draws)
    same = (flipped == image).flatten(1).all(1)
    assert torch.equal(flipped[~same], image[~same].flip(3))
    assert 140 < same.sum() < 260
    shifted = data.augment(image, flip=False, shift=1, generator=draws)
    assert {tuple(s.flatten().tolist()) for s in shifted} == {
        tuple(
            image[0, 0][[min(max(r + dy, 0), 2) for r in range(3)]][:, [min(max(c + dx, 0), 3) for c in range(4)]]
            .flatten()
            .tolist()
        )
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: "mnist",
            r"wanted lfw-mini, fashion-mnist\[:PATH\], folder:PATH or celeba:PATH, got 'mnist'",
        ),
        (lambda p: "folder:", "--data: wanted lfw-mini"),
        (
            lambda p: f"folder:{p}/none",
            "--data folder: wanted a folder or a .zip file, got .*/none, which does not exist",
        ),
        (lambda p: f"folder:{trees.picture(p / 'a.png')}", "which is a file"),
        (lambda p: f"folder:{p}", r"--data folder: wanted images \(.*\) in .*, got none"),
        (lambda p: (p / "a.jpg").write_text("x") and f"folder:{p}", "wanted at least one readable image, got none"),
    ],
)
def test_bad_data_is_named(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        data.load(config(data=make(tmp_path)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_resident_images_give_the_same_batches(monkeypatch, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    noise = np.random.default_rng(0).integers(0, 256, (23, 3, 8, 8), np.uint8)
    settings = config(batch_size=12, shift=2)

    def batches(images):
        return torch.cat([images.batch(settings, s, torch.Generator().manual_seed(s)) for s in range(4)])

    wanted, resident = batches(data.ImageSet("noise", noise)), data.ImageSet("noise", noise.copy())
    monkeypatch.setattr(image_set, "_room", lambda device: noise.nbytes - 1)
    resident.reside_on(torch.device(device))
    assert resident._resident is None
    monkeypatch.setattr(image_set, "_room", lambda device: noise.nbytes)
    resident.reside_on(torch.device(device))
    resident.images = np.zeros_like(noise)  # which are not looked at any more
    got = batches(resident)
    assert got.device.type == device
    assert torch.equal(got.cpu(), wanted)


def test_images_do_not_reside_on_a_cpu(tmp_path):
    images = data.load(config())
    Learner(config(ngf=2, ndf=2, device="cpu"), images)
    assert images._resident is None


def test_how_long_steps_wait_for_images_is_told(tmp_path, monkeypatch):
    class Told(Callback):
        shares = ()

        def on_log(self, trainer, record):
            self.shares += (record["input_share"],)

    def slowly(*arguments, batch=data.ImageSet.batch):
        time.sleep(0.1)
        return batch(*arguments)

    monkeypatch.setattr(data.ImageSet, "batch", slowly)
    told, began = Told(), time.perf_counter()
    settings = config(ngf=2, ndf=2, batch_size=2, nz=4, steps=4, log_every=2)
    trainer = Trainer(settings, data.load(settings), tmp_path, callbacks=[told])
    trainer.run()
    seconds = time.perf_counter() - began
    assert len(told.shares) == 3
    assert all(0 < share < 1 for share in told.shares)
    assert 0.4 <= trainer.input_seconds < seconds
    assert "input_share" not in (tmp_path / "log.jsonl").read_text()
