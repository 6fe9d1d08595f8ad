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
import time
from pathlib import Path

import pytest
import ranks
import torch
import trees
from small_runs import same
from threads import one_thread  # noqa: F401

from gpkernels import cli
from gpkernels.training import Trainer, checkpoint
from gpkernels.training.data import prepared

TRAIN = ["train", "--ngf", "2", "--ndf", "2", "--nz", "4", "--batch-size", "8", "--log-every", "1", "--device", "cpu"]
RESUME = ["train", "--resume"]
PLAIN = ["--no-report", "--tracker", "none"]


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
    """(name, arguments, what is particular here, on how many machines)"""
    nothing = contextlib.nullcontext()
    stop = before_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    full = OSError, 28, "No space left on device", "log.jsonl"
    oom = RuntimeError, "CUDA out of memory"
    own = ["--no-sync-batchnorm", "--critic-norm", "batch", *PLAIN]
    apart = ["--data", f"folder:images {rank}", "--image-size", "32", "--cache", f"cache {rank}"]
    elsewhere = ["--out", "nowhere"] if rank else []
    yield "whole", [*TRAIN, "--steps", "6"], nothing, 1
    yield "parts", [*TRAIN, *PLAIN, "--steps", "6"], stop if rank == 1 else nothing, 1
    yield "parts", [*RESUME, *PLAIN], nothing, 1
    yield "once alone", [*RESUME, "--steps", "6"], nothing, 1
    yield "folder", [*TRAIN, *PLAIN, "--steps", "2"], nothing, 1  # without --out
    yield "own statistics", [*TRAIN, *own, "--steps", "4"], nothing, 1
    yield "own statistics in parts", [*TRAIN, *own, "--steps", "2"], nothing, 1
    yield "own statistics in parts", [*RESUME, *PLAIN, "--steps", "4"], nothing, 1
    yield "machines", [*TRAIN, *apart, *elsewhere, *PLAIN, "--steps", "2"], preparing(), 2
    yield "machines", [*RESUME, *apart, *elsewhere, *PLAIN, "--steps", "4"], preparing(), 2
    yield "other images", [*TRAIN, "--data", f"folder:{'other ' * rank}images {rank}"], nothing, 2
    yield "divided", [*TRAIN, "--batch-size", "9"], nothing, 1
    yield "mapped", [*TRAIN, "--device", "cuda:1"], nothing, 1
    yield "nothing there", [*RESUME], nothing, 1
    yield "diverges", [*TRAIN, *PLAIN, "--lr", "1e39", "--steps", "6"], nothing, 1
    yield "writer fails", [*TRAIN, *PLAIN, "--steps", "6"], patched_log(*full) if rank == 0 else nothing, 1
    yield "memory", [*TRAIN, *PLAIN, "--steps", "6"], before_step(2, lambda: fail(*oom)) if rank == 1 else nothing, 1
    yield "killed", [*TRAIN, *PLAIN, "--steps", "6"], before_step(2, lambda: os._exit(9)) if rank == 1 else nothing, 1


@contextlib.contextmanager
def preparing():
    """Small data is prepared as large data is."""
    plain = prepared.AUTOMATIC
    prepared.AUTOMATIC = 0
    try:
        yield
    finally:
        prepared.AUTOMATIC = plain


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
    for number, ((name, arguments, trouble, machines), port) in enumerate(zip(scenarios(rank), ports, strict=True)):
        os.environ |= ranks.environment(rank, 2, port, machines)
        where = [] if name == "folder" or "--out" in arguments else ["--out", name]
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
    assert cli.main([*TRAIN, *PLAIN, "--steps", "3", "--out", str(folder / "once alone")]) == 0
    for rank in (0, 1):
        trees.folder(folder / f"images {rank}")
    trees.folder(folder / "other images 1", 19)
    names = [name for name, *_ in scenarios(0)]
    ports = [ranks.free_port() for _ in names]
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, args=(rank, str(folder), ports)) for rank in (0, 1)]
    for process in workers:
        process.start()
    deadline = time.monotonic() + 300
    for process in workers:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
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
    assert cli.main([*TRAIN, *PLAIN, "--steps", "6", "--out", str(tmp_path / "alone")]) == 0
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
    assert cli.main([*RESUME, *PLAIN, *arguments, "--accumulate", "1"]) == 0
    assert cli.main([*TRAIN, *PLAIN, "--steps", "9", "--out", str(tmp_path / "alone")]) == 0
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
        (
            "other images",
            [2, 2],
            [
                "process 1 has ended: --data: wanted the images and labels of process 0",
                r"--data: wanted the images .* got others in process 1 \(19 images of other images 1\)",
            ],
        ),
        (
            "nothing there",
            [2, 2],
            ["got nothing there, which does not exist", "process 0 has ended: checkpoint: wanted"],
        ),
        (
            "diverges",
            [2, 2],
            [
                "diverged: .* the checkpoint of step 0 is kept .*; in one process and without --cuda-graph the layer",
                "training diverged: .* at step 1",
            ],
        ),
        ("killed", [2], ["another process has ended without a word"]),
    ],
)
def test_all_end_when_one_does(runs, name, codes, messages):
    said = [one for one in runs[1][name] if one]
    assert [one["code"] for one in said] == codes
    for one, message in zip(said, messages, strict=True):
        assert re.search(message, one["err"]), one
        assert len(one["err"].splitlines()) <= 1


def test_a_resumed_run_logs_the_same_where_each_process_has_statistics_of_its_own(runs):
    folder, said = runs
    assert [one["code"] for one in said["own statistics in parts"]] == [0, 0]
    assert records(folder / "own statistics") == records(folder / "own statistics in parts")
    same_weights(folder / "own statistics", folder / "own statistics in parts")


def test_machines_that_share_no_folder(runs, tmp_path, monkeypatch):
    """Each has the images in a place of its own and prepares them itself; the run folder, which the second one does not
    have, is that of the first."""
    folder, said = runs
    assert [one["code"] for one in said["machines"]] == [0, 0], said["machines"]
    assert not (folder / "nowhere").exists()
    prepared_here = [[path.name for path in (folder / f"cache {rank}").glob("*.npy")] for rank in (0, 1)]
    assert [len(names) for names in prepared_here] == [1, 1]
    monkeypatch.chdir(folder)
    alone = [*TRAIN, *PLAIN, "--data", "folder:images 0", "--image-size", "32", "--steps", "4"]
    assert cli.main([*alone, "--out", str(tmp_path / "alone")]) == 0
    close_logs(folder / "machines", tmp_path / "alone")


def test_torchrun_on_two_machines(runs, tmp_path):
    """The launcher itself, with a second signal from it to every process after the one of the terminal. Up to the step
    where "whole" ends, the bits are those of the two processes of one machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(ranks.free_port())]
    train = [
        "-m",
        "gpkernels.training",
        *TRAIN[1:],
        *PLAIN,
        "--steps",
        "100000",
        "--checkpoint-minutes",
        "0",
        "--keep",
        "1000",
    ]
    with contextlib.ExitStack() as stack:
        agents = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, "--node-rank", str(node), *train, "--out", str(tmp_path / f"run {node}")],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
            for node in (0, 1)
        ]
        log = tmp_path / "run 0/log.jsonl"
        while not (log.is_file() and len(log.read_text().splitlines()) > 6):
            for agent in agents:
                assert agent.poll() is None, agent.stdout.read()
        for agent in agents:
            agent.send_signal(signal.SIGTERM)
        said = [agent.communicate(timeout=120)[0] for agent in agents]
    assert "saved. Go on with" in said[0], said
    assert not (tmp_path / "run 1").exists()
    whole, found = (
        checkpoint.load(run / "checkpoints/step_00000006") for run in (runs[0] / "whole", tmp_path / "run 0")
    )
    assert records(tmp_path / "run 0")[:6] == records(runs[0] / "whole")
    same({**found, "config": None}, {**whole, "config": None})
    assert checkpoint.load(tmp_path / "run 0")["step"] == records(tmp_path / "run 0")[-1]["step"]
