"""Runs that must stop: full disks, folders that cannot be written to, too little memory. Each is a line that says what
to do, and leaves the checkpoints before it whole."""

import errno
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from small_runs import SMALL
from threads import one_thread  # noqa: F401
from torch import nn

from gpkernels import cli
from gpkernels.errors import UserError
from gpkernels.training import Callback, TrainConfig, Trainer, checkpoint, data, failures, log

FLAGS = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def faces():
    return data.load(TrainConfig())


def trainer(faces, out, *, resume=None, callbacks=(), **settings):
    return Trainer(TrainConfig(**{**SMALL, **settings}), faces, out, resume=resume, callbacks=callbacks)


def stopped(run):
    """The message that a run stops with."""
    with pytest.raises(UserError) as error:
        run.run()
    return str(error.value)


def test_a_full_disk_ends_a_run_in_one_line(tmp_path, faces):
    """No file may be larger than 50 kB, which training.pt is: as a full disk, the kernel refuses the rest of it."""
    out = tmp_path / "run"
    trainer(faces, out, steps=2).run()
    before = {path: path.read_bytes() for path in (out / "checkpoints/step_00000002").iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", "gpkernels", "train", "--resume", "--out", str(out), "--steps", "4"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"gpkernels: error: --out: no space left (File too large) for {out}/checkpoints/step_00000004.tmp/training.pt; "
        f"the checkpoints before it are whole. Free some, then: gpkernels train --out {out} --resume\n"
    )
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        *("newest", "step_00000000", "step_00000002"),
    ]
    assert not list(out.rglob("*.tmp"))
    assert trainer(faces, out, steps=4, resume=checkpoint.load(out)).run()
    assert [record["step"] for record in log.read(out)] == [1, 2, 3, 4]


def raising(error, at=2):
    class Fail(Callback):
        def on_step(self, trainer, terms):
            if trainer.step == at:
                raise error

    return Fail()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "no space left (No space left on device) for {out}/x; the checkpoints before it are whole"),
        (errno.EDQUOT, "no space left (Disk quota exceeded) for {out}/x"),
        (errno.EROFS, "wanted a folder that can be written to, got {out} ({out}/x: Read-only file system)"),
    ],
)
def test_what_callbacks_write_is_of_the_run_too(faces, tmp_path, number, text):
    run = trainer(faces, tmp_path, callbacks=[raising(OSError(number, os.strerror(number), str(tmp_path / "x")))])
    assert text.format(out=tmp_path) in stopped(run)
    assert checkpoint.load(tmp_path)["step"] == 0


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "no", "/elsewhere"), OSError("odd"), RuntimeError("odd")])
def test_other_errors_are_left_as_they_are(faces, tmp_path, error):
    with pytest.raises(type(error)) as raised:
        trainer(faces, tmp_path, callbacks=[raising(error)]).run()
    assert raised.value is error


def test_a_folder_that_cannot_be_written_to_is_refused_before_images_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *args: pytest.fail("images were read"))
    (tmp_path / "file").write_text("")
    for out, message in (
        ("/proc/self/run", "wanted a folder that can be written to, got /proc/self/run (not allowed in /proc/self)"),
        (tmp_path / "file/run", f"wanted a folder, got {tmp_path}/file/run, where {tmp_path}/file is a file"),
    ):
        assert cli.main(["train", "--out", str(out), *FLAGS]) == 2
        assert capsys.readouterr().err == f"gpkernels: error: --out: {message}\n"


def test_a_library_s_run_in_such_a_folder_is_refused(faces, tmp_path):
    assert "--out: wanted a folder that can be written to, got /sys/run" in stopped(trainer(faces, "/sys/run"))


class Greedy(nn.Module):
    """Asks for a petabyte."""

    def forward(self, x):
        return x + torch.empty(1 << 48).sum()


class Raise(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Greedy(), "can't allocate memory"),
        (Raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")), "Tried to allocate 20.00"),
        (Raise(MemoryError("Unable to allocate 8. GiB for an array")), "Unable to allocate 8. GiB"),
    ],
    ids=["cpu", "cuda", "numpy"],
)
def test_too_little_memory_says_what_helps(faces, tmp_path, layer, reason):
    run = trainer(faces, tmp_path)
    run.critic.parts = nn.Sequential(layer)
    run.critic.forward = layer.forward
    message = stopped(run)
    assert message.startswith("out of memory (")
    assert reason in message
    assert "what helps: --batch-size lower (now 4)" in message
    assert "--image-size" not in message  # 32 pixels are the least
    assert checkpoint.load(tmp_path)["step"] == 0


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (
            {"data": "folder:x", "batch_size": 8, "accumulate": 2},
            "--batch-size lower (now 8), --accumulate higher (now 2), --precision bf16 (now fp32), --image-size lower "
            "(now 64), --ngf lower (now 64), --ndf lower (now 64)",
        ),
        (
            {"batch_size": 4, "accumulate": 4, "precision": "bf16", "ndf": 1},
            "--batch-size lower (now 4), --ngf lower (now 64)",
        ),
        (
            {"batch_size": 2, "precision": "fp16", "image_size": 128, "ngf": 1, "ndf": 1},
            "--accumulate higher (now 1), --image-size lower (now 128)",
        ),
        ({"batch_size": 2, "accumulate": 2, "precision": "bf16", "ngf": 1, "ndf": 1}, "a machine with more of it"),
    ],
)
def test_advice_is_what_can_still_be_done(tmp_path, settings, advice):
    with (
        pytest.raises(UserError, match=re.escape(f"out of memory (odd); what helps: {advice}") + "$"),
        failures.explained(TrainConfig(**settings), tmp_path),
    ):
        raise MemoryError("odd")


def test_too_little_memory_for_the_nets_themselves(faces, tmp_path):
    with pytest.raises(UserError, match=r"out of memory .*what helps: .*--ngf lower \(now 1000000000\)"):
        trainer(faces, tmp_path, ngf=10**9)
    assert not failures.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
