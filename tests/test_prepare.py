"""Prepared files: the pixels of a load without one, found again by what decides them, resumed, shared, checked."""

import dataclasses
import errno
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import trees
from preparing import config, many, prepare, same

from gpkernels import cli
from gpkernels.errors import UserError
from gpkernels.training import data, disk
from gpkernels.training.data import prepared


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPKERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(capsys, *arguments):
    code = cli.main(["prepare", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("broken", [(), (0,), (19,), (3, 4, 11)])
def test_prepared_images_are_those_of_a_load_without(tmp_path, broken, cache):
    """Labels, names and skipped files too, wherever the gaps of unreadable files are."""
    trees.folder(tmp_path / "images")
    files = sorted((tmp_path / "images").rglob("*.*"))
    for index in broken:
        files[index].write_bytes(b"no")
    settings = config(tmp_path / "images")
    wanted = data.load(settings)
    assert not cache.exists()
    sidecar, decoded = prepare(settings)
    assert decoded == 20
    got = data.load(settings)
    same(got, wanted)
    assert isinstance(got.images, np.memmap)
    assert not isinstance(wanted.images, np.memmap)
    plain = np.load(sidecar.path)
    assert plain.shape == (20 - len(broken), 3, 32, 32)
    assert np.array_equal(plain, wanted.images)
    content = json.loads(sidecar.path.with_suffix(".json").read_text())
    assert content["sha256"] == hashlib.sha256(sidecar.path.read_bytes()).hexdigest()
    assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".lock", ".npy"]


def test_attributes_and_parts_of_celeba_are_prepared(tmp_path, capsys):
    settings = config(trees.celeba(tmp_path), "celeba", label_attribute="Bald")
    wanted = data.load(settings)
    code, text, _ = run(capsys, "--data", settings.data, "--image-size", 32, "--jobs", 1)
    assert code == 0
    assert text.count(": 4 images of 32x32, 1.24e-05 GB; 4 decoded in") == 2  # train and test
    for attribute in ("Bald", "Young", None):
        chosen = dataclasses.replace(settings, label_attribute=attribute)
        got = data.load(chosen)
        assert isinstance(got.images, np.memmap)
        assert isinstance(got.held_out().images, np.memmap)
        if attribute == "Bald":
            same(got, wanted)
            same(got.held_out(), wanted.held_out())
    with pytest.raises(UserError, match="--label-attribute: wanted one of Bald, Young, got 'Sad'"):
        data.load(dataclasses.replace(settings, label_attribute="Sad"))
    assert "already prepared, sha256 as it should be" in run(capsys, "--data", settings.data, "--image-size", 32)[1]


@pytest.mark.parametrize("layout", trees.CELEBA)
def test_every_layout_is_prepared(tmp_path, layout):
    settings = config(trees.CELEBA[layout](tmp_path / "data"), "celeba", label_attribute="Young")
    wanted = data.load(settings)
    prepare(settings)
    got = data.load(settings)
    same(got, wanted)
    assert isinstance(got.images, np.memmap)


CHANGES = {
    "an image": lambda root: trees.picture(root / "celeba/img_align_celeba/000002.jpg", (178, 218), seed=99),
    "its time": lambda root: os.utime(root / "celeba/img_align_celeba/000002.jpg", ns=(1, 1)),
    "a list": lambda root: trees.celeba_lists(root / "celeba", 12) or os.utime(
        root / "celeba/list_attr_celeba.txt", ns=(1, 1)),
    "the name": lambda root: (root / "celeba/img_align_celeba/000002.jpg").rename(
        root / "celeba/img_align_celeba/000013.jpg") and trees.picture(
        root / "celeba/img_align_celeba/000002.jpg", (178, 218)) and (
        root / "celeba/img_align_celeba/000013.jpg").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changed_is_prepared_anew(tmp_path, change):
    settings = config(trees.celeba(tmp_path), "celeba")
    first, _ = prepare(settings)
    assert prepare(settings)[1] == 0
    CHANGES[change](tmp_path)
    assert not isinstance(data.load(settings).images, np.memmap)
    second, decoded = prepare(settings)
    assert decoded == 4
    assert second.path != first.path


@pytest.mark.parametrize(
    "settings", [{"crop": "108"}, {"crop": "none"}, {"split": "valid"}, {"max_images": 3}, {"image_size": 64}]
)
def test_other_settings_are_another_file(tmp_path, settings):
    usual = config(trees.celeba(tmp_path), "celeba")
    prepare(usual)
    other = dataclasses.replace(usual, **settings)
    assert not isinstance(data.load(other).images, np.memmap)
    assert isinstance(data.load(dataclasses.replace(usual, batch_size=7, flip=False)).images, np.memmap)


def test_a_journal_tells_of_pixels_that_are_on_the_disk(tmp_path, monkeypatch):
    folder = many(tmp_path, 100)
    (folder / "00050.png").unlink()
    (folder / "00050.png").write_bytes(b"no")
    synced = []
    plain = os.fsync

    def sync(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().suffix)
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    prepare(config(folder))
    assert synced[:3] == [".part", ".journal", ".part"]  # the last one after its gap was closed
    assert synced[3] == ".tmp"  # the sidecar


def test_a_journal_of_other_chunks_is_not_gone_on_from(tmp_path, cache):
    settings = config(trees.folder(tmp_path / "images", 5))
    wanted = data.load(settings)
    kind, _, path = settings.data.partition(":")
    file = prepared._path(settings, data.LISTINGS[kind](settings, Path(path)), 32)
    cache.mkdir()
    file.with_suffix(".part").write_bytes(bytes(1000))
    head = {"format": prepared.FORMAT, "images": 5, "size": 32, "chunks": 2}
    file.with_suffix(".journal").write_text(f"{json.dumps(head)}\n[0, []]\n")
    assert prepare(settings)[1] == 5
    same(data.load(settings), wanted)


def test_without_its_source_the_newest_of_several_files_is_used(tmp_path):
    settings = config(trees.folder(tmp_path / "images", 5))
    first, _ = prepare(settings)
    trees.picture(tmp_path / "images/class0/999.png")
    second, _ = prepare(settings)
    (tmp_path / "images").rename(tmp_path / "gone")
    for newer, older, count in ((first, second, 5), (second, first, 6)):
        os.utime(newer.path.with_suffix(".json"), (2e9, 2e9))
        os.utime(older.path.with_suffix(".json"), (1e9, 1e9))
        assert len(data.load(settings).images) == count


def test_a_sidecar_with_fewer_labels_than_images_is_damaged(tmp_path):
    settings = config(trees.folder(tmp_path / "images", 6))
    sidecar, _ = prepare(settings)
    file = sidecar.path.with_suffix(".json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "labels": content["labels"][:5]}))
    with pytest.raises(UserError, match=r"is damaged .*5 labels of 6 images"):
        data.load(settings)


def test_a_moved_source_keeps_its_file_and_a_lost_one_too(tmp_path):
    """The fingerprint is of names, sizes and times below the path; without the path its name has to do."""
    settings = config(trees.celeba(tmp_path / "here"), "celeba", label_attribute="Young")
    wanted, _ = data.load(settings), prepare(settings)
    prepare(data.test_part(settings))
    (tmp_path / "here").rename(tmp_path / "there")
    assert isinstance(data.load(config(tmp_path / "there", "celeba")).images, np.memmap)
    got = data.load(settings)
    same(got, wanted)
    assert len(got.held_out().images) == 4
    with pytest.raises(UserError, match=r"got .*/here, which does not exist"):
        data.load(dataclasses.replace(settings, crop="108"))


def test_large_sources_are_prepared_by_training(tmp_path, monkeypatch, cache, capsys):
    trees.folder(tmp_path / "images", 6)
    monkeypatch.setattr(prepared, "AUTOMATIC", 6 * 3 * 32 * 32)
    small = config(tmp_path / "images", max_images=5)
    assert not isinstance(data.load(small).images, np.memmap)
    told = []
    images = data.load(config(tmp_path / "images"), lambda done, total: told.append((done, total)))
    assert isinstance(images.images, np.memmap)
    assert told[-1] == (6, 6)
    out = tmp_path / "run"
    arguments = ["--image-size", "32", "--steps", "1", "--ngf", "4", "--ndf", "4", "--batch-size", "4"]
    assert cli.main(["train", "--data", f"folder:{tmp_path / 'images'}", "--out", str(out), *arguments]) == 0
    assert "6 images of 32x32 (images)" in capsys.readouterr().out
    assert len(list(cache.glob("*.npy"))) == 1


def test_the_mapped_file_is_never_written_to(tmp_path):
    settings = config(trees.folder(tmp_path / "images", 3))
    sidecar, _ = prepare(settings)
    data.load(settings).images[:] = 0
    assert data.load(settings).images.any()
    assert disk.sha256(sidecar.path) == sidecar.sha256


class Unpickled:
    """Leaves a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_damaged_file_is_found_out(tmp_path, capsys):
    settings = config(trees.folder(tmp_path / "images", 5))
    sidecar, _ = prepare(settings)
    wanted = sidecar.path.read_bytes()
    sidecar.path.write_bytes(wanted[:-1] + bytes([wanted[-1] ^ 1]))
    code, text, _ = run(capsys, "--data", settings.data, "--image-size", 32)
    assert code == 0
    assert "has another sha256 than its sidecar says: preparing it anew" in text
    assert sidecar.path.read_bytes() == wanted
    sidecar.path.write_bytes(wanted[:-1])
    with pytest.raises(UserError, match=r"--cache: wanted uint8 of \(5, 3, 32, 32\) in .*npy, .*delete both"):
        data.load(settings)
    np.save(sidecar.path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"got another file \(.*[Oo]bject"):
        data.load(settings)
    sidecar.path.write_bytes(pickle.dumps(Unpickled(tmp_path / "unpickled")))
    with pytest.raises(UserError, match=r"got another file"):
        data.load(settings)
    assert not (tmp_path / "unpickled").exists()
    sidecar.path.with_suffix(".json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"--cache: .*json is damaged \(KeyError\('settings'\)\); delete it"):
        data.load(settings)


def test_no_image_leaves_nothing_behind(tmp_path, cache):
    trees.folder(tmp_path / "images", 2)
    for file in (tmp_path / "images").rglob("*.*"):
        file.write_bytes(b"no")
    with pytest.raises(UserError, match=r"wanted at least one readable image, got none; first: .*not an image"):
        prepare(config(tmp_path / "images"))
    assert [file.suffix for file in cache.iterdir()] == [".lock"]


def test_a_full_disk_is_said_and_gone_on_from(tmp_path, monkeypatch):
    folder = many(tmp_path, 300)
    write, calls = os.pwrite, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(prepared, "_SYNC_SECONDS", 0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"--cache: wanted to write .*No space left"):
            prepare(config(folder))
    _, decoded = prepare(config(folder))
    assert 0 < decoded < 300
    enough = os.statvfs(tmp_path)
    little = os.statvfs_result((*enough[:4], 1, *enough[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: little)
    with pytest.raises(UserError, match=r"--cache: wanted 0.00 GB free in .*, got 0.00 GB"):
        prepare(config(folder, max_images=299))


def test_a_cache_that_cannot_be_written(tmp_path):
    trees.folder(tmp_path / "images", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"--cache: wanted to write .*npy in .*/file, got (Not a directory|File exists)"
    ):
        prepare(config(tmp_path / "images", cache=str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --data"),
        (("--data", "lfw-mini"), "--data: wanted folder:PATH or celeba:PATH, got 'lfw-mini'"),
        (("--data", "folder:"), "--data: wanted folder:PATH or celeba:PATH, got 'folder:'"),
        (("--data", "folder:/none"), "--data folder: wanted a folder or a .zip file, got /none, which does not exist"),
        (("--data", "folder:/none", "--jobs", 0), "--jobs: wanted at least 1, got 0"),
        (("--data", "folder:/none", "--image-size", 65), "--image-size: wanted 32, 64 or 128, got 65"),
        (("--data", "celeba:/none", "--crop", 100), "--crop: wanted one of 178, 148"),
    ],
)
def test_what_a_person_can_put_right_is_one_line(capsys, arguments, message):
    code, _, errors = run(capsys, *arguments)
    assert code == 2
    assert errors.startswith("gpkernels: error: ")
    assert errors.count("\n") == 1
    assert message in errors


def test_skipped_files_are_named_and_counted(tmp_path, capsys):
    trees.folder(tmp_path, 25)
    for file in sorted(tmp_path.rglob("*.*"))[:23]:
        file.write_bytes(b"no")
    code, text, _ = run(capsys, "--data", f"folder:{tmp_path}", "--image-size", 32)
    assert code == 0
    assert text.count("\nskipped ") == 21
    assert "skipped 3 more, named in " in text
    assert ": 2 images of 32x32" in text
