"""benchmarks/gpu.sh rehearsed without a GPU: every part runs, small, and leaves what it should."""

import csv
import importlib
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ["build", "tests", "steps", "ops", "spectral", "graphs", "peers", "profile", "zoo", "sanitizer", "predictions"]


def script(out, *parts, **environment):
    environment = {
        **os.environ,
        "DRY_RUN": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "LIMIT": "3000",
        **environment,
    }
    command = ["bash", ROOT / "benchmarks/gpu.sh", out, *parts]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_part_does_not_take_all_the_time(tmp_path):
    """Two fifths of it; it is interrupted, so that it can say how far it came, and the next part runs."""
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\ntrap 'echo interrupted; exit 1' INT\nfor i in {1..300}; do sleep 0.1; done\n")
    python.chmod(0o755)
    result = script(tmp_path, "profile", "sanitizer", PYTHON=str(python), LIMIT="5")
    assert result.returncode == 1
    assert re.findall(r"^(\w+) (.*) in", (tmp_path / "summary.txt").read_text(), re.M) == [
        ("profile", "STOPPED by the limit"),
        ("sanitizer", "ok"),
    ]
    assert (tmp_path / "profile.log").read_text() == "interrupted\n"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    result = script(folder)
    logs = "".join(file.read_text()[-2000:] for file in folder.glob("*.log"))
    assert result.returncode == 0, result.stdout + result.stderr + logs
    return folder


def rows(out, part):
    (file,) = out.glob(f"*-{part}-cpu-1-threads.csv")
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_every_part_is_done_once(out):
    summary = (out / "summary.txt").read_text()
    assert re.findall(r"^(\w+) ok in", summary, re.M) == list(PARTS)
    again = script(out)
    assert again.returncode == 0
    assert again.stdout.splitlines() == [f"== {part} was done" for part in PARTS]
    assert (out / "summary.txt").read_text() == summary


def test_one_archive_holds_everything(out):
    with tarfile.open(f"{out}.tar.gz") as archive:
        held = {Path(name).name for name in archive.getnames()}
    assert {"summary.txt", "tests.log", "profile.txt", "predictions.md"} < held


def test_results_name_their_machine(out):
    for part in ("ops", "steps", "spectral", "graphs", "peers", "ablation", "matrix"):
        found = rows(out, part)
        assert len(found) > 3
        assert all(row[key] for row in found for key in ("machine", "torch", "gpkernels", "date"))
    for part in ("ops", "ablation", "matrix"):
        (picture,) = out.glob(f"*-{part}-*.png")
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_gpu_s_tests_are_found(out):
    """Those that will run there exist: on CUDA, and by Triton."""
    found = (out / "tests.log").read_text()
    assert int(re.search(r"tests/test_gpu.py: (\d+)", found)[1]) > 20
    assert "--tool racecheck" in (out / "sanitizer.log").read_text()


def test_profile_says_where_time_goes(out):
    text = (out / "profile.txt").read_text()
    assert re.search(r"LS-GAN-PG step, DCGAN-32 batch, width 8, gpkernels: \d+ us, of which \d+ us in \d+ calls", text)
    assert "x aten::convolution_backward" in text


def test_spectral_norm_takes_few_calls(out):
    """Every critic of the quick run gets its rows, and gpkernels few calls for all layers."""
    found = rows(out, "spectral")
    assert [row["variant"] for row in found] == ["torch", "legacy", "gpkernels", "ops"] * 4
    assert [row["memory"] for row in found] == ["managed"] * 8 + ["kept"] * 8
    assert all(int(row["ops"]) > 20 * int(row["layers"]) for row in found[::4] + found[1::4])
    assert all(row["ops"] == "2" for row in found[2::4] + found[3::4])


def test_peers_agree_with_ours(out):
    """A variant with rows had the gradients of the usual code."""
    found = {(row["case"].partition(", width")[0], row["variant"]) for row in rows(out, "peers")}
    penalties, whole = ("penalty step, DCGAN-32 none", "penalty step, MLP-32"), ("LS-GAN-PG step, DCGAN-32 none",)
    for case in (*penalties, *whole, "WGAN-GP step, MLP-32"):
        for variant in ("gpkernels", "func.grad", "func.grad, compiled", "make_fx, no zeros"):
            assert (case, variant) in found


def test_predictions_have_a_row_for_every_case_and_shape(out, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    cases, steps = (importlib.import_module(f"benchmarks.{name}") for name in ("cases", "steps"))
    text = (out / "predictions.md").read_text()
    assert "not measured" in text
    for case in cases.CASES:
        for shape in cases.SHAPES:
            assert f"| {case.name} | {'x'.join(map(str, shape))} |" in text
    for setting in steps.QUICK:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {setting.name} |")]
        assert all(float(gain) > 1 for gain in re.findall(r"([0-9.]+)x", row.split("|", 2)[2]))


def test_what_does_not_fit_is_left_for_the_next_call(tmp_path):
    result = script(tmp_path, "build", "profile", LIMIT="0")
    assert result.returncode == 1
    assert (tmp_path / "summary.txt").read_text().count("NOT STARTED, no time left") == 2
    assert not list(tmp_path.glob("*.done"))


def test_a_failed_part_does_not_stop_the_others(tmp_path):
    result = script(tmp_path, "profile", "sanitizer", PYTHON="/bin/false")
    assert result.returncode == 1
    assert re.findall(r"^(\w+) (\w+) in", (tmp_path / "summary.txt").read_text(), re.M) == [
        ("profile", "FAILED"),
        ("sanitizer", "ok"),
    ]


def test_unknown_parts_are_refused(tmp_path):
    result = script(tmp_path, "speed")
    assert (result.returncode, "wanted some of build tests steps" in result.stderr) == (2, True)
    result = subprocess.run([sys.executable, "-m", "benchmarks", "speed"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "PART: wanted some of ops, steps" in result.stderr
