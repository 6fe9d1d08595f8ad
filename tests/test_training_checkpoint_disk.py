"""Checkpoints on the disk: killed, synced and failing writes, and what of a folder is a run's own."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from small_runs import names, same, trainer
from threads import one_thread  # noqa: F401

from gpkernels.training import TrainConfig, checkpoint, data, disk


@pytest.fixture(scope="module")
def faces():
    return data.load(TrainConfig())


OPERATIONS = ("mkdir", "rename", "replace", "symlink", "fsync", "open", "rmdir", "unlink")


def dying_at(count):
    """Makes this process kill itself, with no chance to tidy up, at the so-manieth change of files from here on."""
    left = [count]

    def counted(operation):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_killed_at_any_point_of_a_save_a_whole_checkpoint_remains(faces, tmp_path, again):
    """Of two that are kept; the one being saved follows a step later, or replaces the newest."""
    torch.set_num_threads(1)
    run, seen, point = trainer(faces, tmp_path / "run", keep=1), set(), 0
    run.save()
    states = [checkpoint.load(run.out)]
    name, parameter = next(run.critic.named_parameters())
    with torch.no_grad():
        parameter.add_(1)
    run.step += not again
    state = run.state_dict()
    checkpoint.save(tmp_path / "other", state, 1)
    states.append(checkpoint.load(tmp_path / "other"))
    before = shutil.copytree(run.out, tmp_path / "before", symlinks=True)
    while True:
        shutil.rmtree(run.out)
        shutil.copytree(before, run.out, symlinks=True)
        if (child := os.fork()) == 0:
            dying_at(point)
            checkpoint.save(run.out, state, 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = checkpoint.load(run.out)
        which = int(torch.equal(found["critic"][name], states[1]["critic"][name]))
        same(found, states[which])
        seen.add(which)
        checkpoint.begin(run.out, found["step"])
        assert not list(run.out.rglob("*.tmp"))
        assert (run.out / "checkpoints/newest").exists()
        checkpoint.save(run.out, state, 1)
        same(checkpoint.load(run.out), states[1])
        assert names(run.out) == ["newest", f"step_{run.step:08d}"]
        point += 1
    assert seen == {0, 1}
    assert point > 20


def test_what_gets_its_name_is_on_the_disk(faces, tmp_path, monkeypatch):
    """As after a power failure: files, and the names in a folder, before it is renamed, and then its new name."""
    run = trainer(faces, tmp_path / "run")
    done = []

    def sync(descriptor, plain=os.fsync):
        done.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        plain(descriptor)

    def renaming(plain):
        def rename(source, target):
            inside = list(source.iterdir()) if source.is_dir() else []
            done.append(("rename", target, [] if source.is_symlink() else [source, *inside]))
            plain(source, target)

        return rename

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", renaming(os.rename))
    monkeypatch.setattr(os, "replace", renaming(os.replace))
    run.out.mkdir()
    with run._log:
        run._log.write({"step": 0})
        run.save()
    disk.write_atomically(tmp_path / "config.json", lambda file: file.write(b"{}"))
    assert [path.name for kind, path, *_ in done if kind == "rename"] == ["step_00000000", "newest", "config.json"]
    for number, (kind, path, *moved) in enumerate(done):
        if kind == "rename":
            assert set(*moved) <= {synced for kind, synced, *_ in done[:number] if kind == "fsync"}
            assert done[number + 1] == ("fsync", path.parent)
    assert done[0] == ("fsync", run.out / "log.jsonl")


def test_a_run_deletes_no_file_of_someone_else_s(faces, tmp_path):
    """Such as in a folder that has held something before."""
    theirs = (
        "notes.tmp",
        "data.tmp/image.png",
        "samples/mine.tmp",
        "drafts/chapter.tmp",
        "checkpoints/step_by_step.tmp",
    )
    for path in theirs:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("mine")
    trainer(faces, tmp_path, steps=1).run()
    trainer(faces, tmp_path, steps=2, resume=checkpoint.load(tmp_path)).run()
    assert [(tmp_path / path).read_text() for path in theirs] == ["mine"] * len(theirs)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    disk.write_atomically(path, lambda file: file.write(b"old"))

    def broken(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        disk.write_atomically(path, broken)
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_the_file_system_has_no_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, number):
    """As Lustre without -o flock, and some NFS."""

    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk.fcntl, "flock", flock)
    message = f"locks no files .*{os.strerror(number)}"
    with pytest.warns(RuntimeWarning, match=message) as warned, disk.FolderLock(tmp_path):
        disk.check_free(tmp_path)
    assert len({str(warning.message) for warning in warned}) == 1  # which Python shows once
    monkeypatch.setattr(disk.fcntl, "flock", lambda file, how: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"), disk.FolderLock(tmp_path):
        pass
