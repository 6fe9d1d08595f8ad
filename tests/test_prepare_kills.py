"""Preparations that are killed, shared and waited for."""

import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from preparing import config, many, prepare, same

from gpkernels.training import data, disk
from gpkernels.training.data import decoding, prepared


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPKERNELS_CACHE", str(tmp_path / "cache"))


PREPARE = """
import sys
from pathlib import Path
from gpkernels.training import data
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import decoding, prepared
decode, prepared._SYNC_SECONDS = decoding.decode, 0
def slow(*arguments):
    import time; time.sleep(0.0005); return decode(*arguments)
decoding.decode = slow
settings = TrainConfig(data="folder:" + sys.argv[1], image_size=32)
listing = data.LISTINGS["folder"](settings, Path(sys.argv[1]))
print("ready", flush=True)
print(prepared.prepare(settings, listing, 32, lambda done, total: None, 2)[1])
"""


def test_a_killed_preparation_goes_on_where_it_was(tmp_path):
    folder = many(tmp_path, 1500)
    (folder / "00003.png").unlink()
    (folder / "00003.png").write_bytes(b"no")
    settings = config(folder)
    wanted = data.load(settings)
    process = subprocess.Popen([sys.executable, "-c", PREPARE, folder], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while sum(file.read_text().count("\n") for file in (tmp_path / "cache").glob("*.journal")) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (journal,) = (tmp_path / "cache").glob("*.journal")
    with journal.open("a") as file:
        file.write("[7, [[")  # a line that was cut off
    before = (len(journal.read_text().splitlines()) - 2) * decoding.CHUNK
    assert not list((tmp_path / "cache").glob("*.json"))
    told = []
    sidecar, decoded = prepare(settings, lambda done, total: told.append((done, total)))
    assert told[0][1] == 1500
    assert 100 < told[0][0] <= before
    assert decoded == 1500 - told[0][0]
    assert told[-1] == (1500, 1500)
    same(data.load(settings), wanted)
    assert disk.sha256(sidecar.path) == sidecar.sha256


@pytest.mark.parametrize("moment", ["moved", "renamed"])
def test_a_preparation_killed_at_its_end_goes_on(tmp_path, monkeypatch, moment):
    """While gaps are closed, and between the renaming of the array and that of its sidecar."""
    folder = many(tmp_path, 300)
    for name in ("00100.png", "00200.png"):
        (folder / name).unlink()
        (folder / name).write_bytes(b"no")
    settings = config(folder)
    wanted = data.load(settings)

    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patched:
        if moment == "moved":
            patched.setattr(np.memmap, "flush", killed)
        else:
            patched.setattr(prepared.Sidecar, "write", killed)
        with pytest.raises(Killed):
            prepare(settings)
    assert not isinstance(data.load(settings).images, np.memmap)
    sidecar, decoded = prepare(settings)
    assert decoded == (300 - 64 if moment == "moved" else 300)
    same(data.load(settings), wanted)
    assert disk.sha256(sidecar.path) == sidecar.sha256


def test_processes_share_one_preparation(tmp_path):
    folder = many(tmp_path, 400)
    process = subprocess.Popen([sys.executable, "-c", PREPARE, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    _, decoded = prepare(config(folder))
    assert {decoded, int(process.communicate(timeout=120)[0])} == {0, 400}


def test_who_waits_sees_how_far_the_other_is(tmp_path, monkeypatch):
    folder = many(tmp_path, 200)
    monkeypatch.setattr(prepared, "_SYNC_SECONDS", 0)
    begun, going_on, told = threading.Event(), threading.Event(), []

    def first(done, total):
        if 0 < done < total:
            begun.set()
            assert going_on.wait(60)

    thread = threading.Thread(target=prepare, args=(config(folder), first))
    thread.start()
    assert begun.wait(60)

    def second(done, total):
        told.append((done, total))
        going_on.set()

    assert prepare(config(folder), second)[1] == 0
    thread.join()
    assert told[0][1] == 200
    assert told[0][0] < 200
