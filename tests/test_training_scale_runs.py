"""Runs of several processes from the command line: one folder, resuming with other numbers of them, and their ends."""

import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from threads import one_thread  # noqa: F401

from gpkernels import cli
from gpkernels.training import Trainer, checkpoint

TRAIN = ["train", "--ngf", "2", "--ndf", "2", "--nz", "4", "--batch-size", "8", "--log-every", "1", "--device", "cpu"]
RESUME = ["train", "--resume"]


@contextlib.contextmanager
def before_step(number, act):
    """Calls `act` in place of the step after so many."""
    plain = Trainer.train_step

    def step(self):
        if self.step == number:
            act()
        return plain(self)

    Trainer.train_step = step
    try:
        yield
    finally:
        Trainer.train_step = plain


def fail(*error):
    """Raises an error that nothing else holds, and with it the process's connections."""
    kind, *arguments = error
    raise kind(*arguments)


def scenarios(rank):
    """(name, arguments, what goes wrong here)"""
    nothing = contextlib.nullcontext()
    stop = before_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    full = OSError, 28, "No space left on device", "log.jsonl"
    oom = RuntimeError, "CUDA out of memory"
    yield "whole", [*TRAIN, "--steps", "6"], nothing
    yield "parts", [*TRAIN, "--steps", "6"], stop if rank == 1 else nothing
    yield "parts", [*RESUME], nothing
    yield "once alone", [*RESUME, "--steps", "6"], nothing
    yield "folder", [*TRAIN, "--steps", "2"], nothing  # without --out
    yield "divided", [*TRAIN, "--batch-size", "9"], nothing
    yield "mapped", [*TRAIN, "--device", "cuda:1"], nothing
    yield "writer fails", [*TRAIN, "--steps", "6"], patched_log(*full) if rank == 0 else nothing
    yield "memory", [*TRAIN, "--steps", "6"], before_step(2, lambda: fail(*oom)) if rank == 1 else nothing
    yield "killed", [*TRAIN, "--steps", "6"], before_step(2, lambda: os._exit(9)) if rank == 1 else nothing


@contextlib.contextmanager
def patched_log(*error):
    plain = Trainer.log
    Trainer.log = lambda self, record, **timing: fail(*error) if self.step == 2 else plain(self, record, **timing)
    try:
        yield
    finally:
        Trainer.log = plain


def worker(rank, folder, ports):
    torch.set_num_threads(1)
    os.chdir(folder)
    for number, ((name, arguments, trouble), port) in enumerate(zip(scenarios(rank), ports, strict=True)):
        os.environ |= ranks.environment(rank, 2, port)
        where = [] if name == "folder" else ["--out", name]
        out, err = io.StringIO(), io.StringIO()
        with trouble, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main([*arguments, *where])
            except RuntimeError as error:
                code = f"{type(error).__name__}: {error}"
        gc.collect()  # the end of the process, as far as the other can tell
        said = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        Path(f"{number}-{rank}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all scenarios, and what each process said in each."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main([*TRAIN, "--steps", "3", "--out", str(folder / "once alone")]) == 0
    names = [name for name, *_ in scenarios(0)]
    ports = [ranks.free_port() for _ in names]
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, args=(rank, str(folder), ports)) for rank in (0, 1)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(120)
        process.kill()
    said = [
        [
            json.loads(path.read_text()) if (path := folder / f"{number}-{rank}.json").exists() else None
            for rank in (0, 1)
        ]
        for number in range(len(names))
    ]
    assert [process.exitcode for process in workers] == [0, 9], said
    return folder, dict(zip(names, said, strict=True)) | {"stopped": said[1]}


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def close_logs(found, wanted):
    """The means over the processes are those of one with the whole batch, in float32 after some steps of Adam."""
    for mine, other in zip(records(found), records(wanted), strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert mine[name] == pytest.approx(value, rel=2e-3, abs=2e-6), (mine["step"], name)


def same_weights(a, b):
    states = [checkpoint.load(folder) for folder in (a, b)]
    for net in ("generator", "critic", "ema"):
        for name, value in states[0][net].items():
            assert torch.equal(value, states[1][net][name]), name


def test_one_folder_and_the_log_of_one_process(runs, tmp_path):
    folder, said = runs
    assert [one["code"] for one in said["whole"]] == [0, 0]
    assert "6 steps of 8 on 2 processes (cpu)" in said["whole"][0]["out"]
    assert said["whole"][1]["out"] == said["whole"][1]["err"] == ""
    assert (folder / "whole/samples/epoch_0001.png").is_file()
    assert cli.main([*TRAIN, "--steps", "6", "--out", str(tmp_path / "alone")]) == 0
    close_logs(folder / "whole", tmp_path / "alone")


def test_a_signal_to_one_process_stops_all_and_resuming_goes_on_to_the_same_bits(runs):
    folder, said = runs
    assert [one["code"] for one in said["stopped"]] == [0, 0]
    assert "stopped after step 3, saved" in said["stopped"][0]["out"]
    same_weights(folder / "whole", folder / "parts")
    assert records(folder / "whole") == records(folder / "parts")


def test_resuming_with_more_and_with_fewer_processes_goes_on_with_the_same_images(runs, tmp_path):
    folder, said = runs
    assert [one["code"] for one in said["once alone"]] == [0, 0]
    assert [record["step"] for record in records(folder / "once alone")] == [1, 2, 3, 4, 5, 6]
    close_logs(folder / "once alone", folder / "whole")
    shutil.copytree(folder / "whole", tmp_path / "fewer")
    arguments = ["--out", str(tmp_path / "fewer"), "--steps", "9"]
    assert cli.main([*RESUME, *arguments, "--accumulate", "1"]) == 0
    assert cli.main([*TRAIN, "--steps", "9", "--out", str(tmp_path / "alone")]) == 0
    close_logs(tmp_path / "fewer", tmp_path / "alone")


def test_one_new_folder_for_all(runs):
    folder, said = runs
    assert [one["code"] for one in said["folder"]] == [0, 0]
    assert [path.name for path in (folder / "runs").iterdir()] == ["ls-gan-pg-001"]


@pytest.mark.parametrize(
    ("name", "codes", "messages"),
    [
        ("divided", [2, 2], [r"--batch-size: wanted a multiple of 2 \(2 processes\), got 9"] * 2),
        ("mapped", [2, 2], ["--device: wanted auto, cuda or cpu for several processes, got 'cuda:1'"] * 2),
        ("writer fails", [2, 2], ["No space left on device", "process 0 has ended: .*No space left on device"]),
        ("memory", [2, 2], ["process 1 has ended: out of memory", r"out of memory .*--batch-size lower \(now 8\)"]),
        ("killed", [2], ["another process has ended without a word"]),
    ],
)
def test_all_end_when_one_does(runs, name, codes, messages):
    said = [one for one in runs[1][name] if one]
    assert [one["code"] for one in said] == codes
    for one, message in zip(said, messages, strict=True):
        assert re.search(message, one["err"]), one
        assert len(one["err"].splitlines()) <= 1


def test_torchrun(tmp_path):
    """The launcher itself, with a second signal from it to every process after the one of the terminal."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(ranks.free_port()), "-m", "gpkernels.training", *TRAIN[1:], "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        [*command, "--steps", "100000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        log = tmp_path / "run/log.jsonl"
        while not (log.is_file() and len(log.read_text().splitlines()) > 3):
            assert process.poll() is None, process.stdout.read()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert "saved. Go on with" in said, said
    state = checkpoint.load(tmp_path / "run")
    assert state["step"] == records(tmp_path / "run")[-1]["step"]
