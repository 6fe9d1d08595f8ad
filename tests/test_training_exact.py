"""Nothing is lost: a run that is killed again and again ends as one that never was; its log has every line once."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import same

from gpkernels.errors import UserError
from gpkernels.training import checkpoint, log

KILLS = 20


def test_killed_twenty_times_a_run_ends_with_the_same_bits(tmp_path):
    """Weights, their average, optimizers, lazy phase, random states, log, samples and curves."""
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(KILLS)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    left = json.loads(done.stdout)
    assert len(left) == KILLS
    assert len({step for step, _ in left}) > KILLS / 3, left  # kills all along the run
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    same(checkpoint.load(parts), checkpoint.load(whole))
    files = sorted(path.relative_to(whole) for path in [whole / "log.jsonl", *whole.rglob("*.png")])
    assert len(files) > 10
    for file in files:
        assert (parts / file).read_bytes() == (whole / file).read_bytes(), file
    steps = [record["step"] for record in log.read(parts)]
    assert steps == [1, *range(2, 71, 2)]
    assert not list(parts.rglob("*.tmp"))
    assert not list(parts.rglob("*.aside"))


def write(folder, records, lines=0):
    with log.Log(folder, lines) as file:
        for record in records:
            file.write(record)
    return file.lines


def test_a_log_goes_on_after_the_lines_that_a_checkpoint_knows_of(tmp_path):
    """Whatever their steps: lines written after the last checkpoint of a run, such as at its end, are not repeated."""
    assert write(tmp_path, [{"step": 1}, {"step": 2}, {"step": 2, "at": "the end"}]) == 3
    assert write(tmp_path, [{"step": 3}], lines=2) == 3
    assert log.read(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert write(tmp_path, [{"step": 1}]) == 1
    assert log.read(tmp_path) == [{"step": 1}]


def test_half_a_line_is_no_line(tmp_path):
    write(tmp_path, [{"step": 1}, {"step": 2}])
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    assert log.read(tmp_path) == [{"step": 1}]
    assert write(tmp_path, [{"step": 3}], lines=2) == 2
    assert log.read(tmp_path) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("line", ["no", "[1]", "3"])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=r"log.jsonl: wanted a JSON object in line 2, got b"):
        log.read(tmp_path)


def test_a_full_disk_leaves_no_half_line(tmp_path):
    """The file may grow by ten bytes more than its first line."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with log.Log(tmp_path) as file:
        file.write({"step": 1})
        size = (tmp_path / "log.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        try:
            with pytest.raises(OSError, match=r"log\.jsonl") as error:
                file.write({"step": 2, "more": "than ten bytes"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / "log.jsonl")
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'
    assert file.lines == 1
