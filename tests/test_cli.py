"""The command line in real processes: training, interruption, resuming, sampling; one-line errors, exit code 2."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import trees

from gpkernels import cli
from gpkernels.training import TrainConfig, Trainer, checkpoint
from gpkernels.training.command import _device, _StopOnSignal

SMALL = ["--ngf", "4", "--ndf", "4", "--nz", "8", "--batch-size", "4", "--log-every", "1"]
SMALL += ["--tracker", "none", "--no-report"]


def gpkernels(*arguments, cwd=None):
    command = [sys.executable, "-m", "gpkernels", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command line, in this process."""
    code = cli.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_train_then_sample_on_a_folder(tmp_path):
    trees.folder(tmp_path / "images", 8)
    (tmp_path / "images/broken.png").write_text("no")
    trained = gpkernels(
        "train", "--data", "folder:images", "--image-size", 32, "--out", "run", "--epochs", 2, *SMALL, cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    assert "skipped images/broken.png" in trained.stdout
    assert "8 images of 32x32" in trained.stdout
    assert sorted(p.name for p in (tmp_path / "run/samples").iterdir()) == ["epoch_0001.png", "epoch_0002.png"]
    drawn = gpkernels("sample", "run/checkpoints/step_00000004", "--n", 10, "--out", "new/grid.png", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert "10 images of ls-gan-pg after step 4 -> new/grid.png" in drawn.stdout
    assert (tmp_path / "new/grid.png").stat().st_size > 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_interrupt_saves_and_resume_goes_on(tmp_path, number):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "gpkernels", "train", "--out", str(out), "--steps", "100000", *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").is_file() or not (out / "log.jsonl").stat().st_size:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == ""
    assert f"Go on with: gpkernels train --out {out} --resume" in output
    step = checkpoint.load(out)["step"]
    assert step >= 1
    resumed = gpkernels("train", "--out", out, "--resume", "--steps", step + 3, "--no-report")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after step {step}" in resumed.stdout
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 4))


def test_default_run_folders_are_new_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(capsys, "train", "--steps", 1, *SMALL)[0] == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["ls-gan-pg-001", "ls-gan-pg-002"]


def test_presets_are_listed_with_what_they_set(capsys):
    """Each row says what a config of the preset holds; "also" is flags that `train` takes."""
    from gpkernels.training import PRESETS, from_preset

    code, text, _ = run(capsys, "presets")
    assert code == 0
    elsewhere = {"loss", "penalty", "spectral_norm", "clip", "optimizer", "lr", "beta1", "beta2"}
    elsewhere |= {"batch_size", "critic_steps", "epochs"}
    listed = {block.splitlines()[0]: block.splitlines()[1:] for block in text.strip().split("\n\n")}
    assert list(listed) == list(PRESETS)
    for name, (doc, *lines) in listed.items():
        assert doc.strip() == PRESETS[name].doc
        rows = dict(line.split(maxsplit=1) for line in lines)
        assert list(rows) == ["loss", "penalty", "training", "also", "source"]
        config = from_preset(name, {})
        assert (rows["loss"], rows["source"]) == (config.loss, PRESETS[name].source)
        assert rows["training"].startswith(f"{config.optimizer} {config.lr:g}")
        assert f"batches of {config.batch_size}, {config.epochs} epochs, {config.critic_steps} of" in rows["training"]
        flags = [] if rows["also"] == "-" else rows["also"].split()
        also = vars(cli._parser().parse_args(["train", *flags]))
        settings = PRESETS[name].settings
        assert {key: also[key] for key in settings if key in also} == {k: v for k, v in settings.items() if k in also}
        assert {key for key in settings if key not in also} <= elsewhere
    penalties = {name: dict(line.split(maxsplit=1) for line in lines[1:])["penalty"] for name, lines in listed.items()}
    assert penalties["ls-gan-pg"] == "10 x ls_gan_pg, R(n) = linear, norm per pixel"
    assert penalties["wgan-gp"] == "10 x coupled, R(n) = two_sided, norm per sample"
    assert penalties["r1"] == "10 x r1, R(n) = 0.5 x squared, norm per sample"
    assert penalties["wgan"] == "none, weights clipped to 0.01"
    assert penalties["sngan"] == "none, spectral norm"


def test_explicit_flags_override_a_preset(tmp_path, capsys):
    run(capsys, "train", "--preset", "ls-gan", "--steps", 1, "--no-flip", "--out", tmp_path / "run", *SMALL)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["penalty"], config["critic_norm"], config["lr"], config["z"]) == ("none", "batch", 1e-4, "uniform")
    assert (config["flip"], config["ngf"], config["preset"]) == (False, 4, "ls-gan")


def test_help_tells_every_setting_with_its_default():
    from gpkernels.training.config import flag, settings

    text = " ".join(gpkernels("train", "--help").stdout.split())
    assert all(flag(name) in text for name in settings())
    assert "(default: 0.0002)" in text
    for command in ("sample", "presets", "doctor"):
        assert gpkernels(command, "--help").returncode == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", "--out", str(out), "--steps", "1", *SMALL]) == 0
    return out


def unwritable(tmp_path):
    """A path below a file: no folder can be made there, whoever asks."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda p, t: ["train", "--data", f"folder:{p}/none"], "/none, which does not exist"),
        (lambda p, t: ["train", "--data", f"folder:{p}"], "wanted images"),
        (
            lambda p, t: ["train", "--data", "imagenet"],
            "--data: wanted lfw-mini, fashion-mnist[:PATH], folder",
        ),
        (
            lambda p, t: ["train", "--loss", "focal"],
            "--loss: wanted one of ls-gan, gls-gan, cls-gan, classic-minimax, ",
        ),
        (lambda p, t: ["train", "--preset", "vae"], "--preset: wanted one of 'ls-gan-pg'"),
        (lambda p, t: ["train", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (lambda p, t: ["train", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (lambda p, t: ["train", "--device", "tpu9"], "--device: wanted a device torch can use, got 'tpu9'"),
        (lambda p, t: ["train", "--out", unwritable(p), "--steps", "1", *SMALL], "file/run"),
        (lambda p, t: ["train", "--out", t], "already holds a run; --resume goes on with it"),
        (lambda p, t: ["train", "--resume"], "--resume: wanted --out"),
        (lambda p, t: ["train", "--resume", "--out", p], "which holds neither checkpoints/ nor manifest.json"),
        (
            lambda p, t: ["train", "--resume", "--out", t, "--ndf", "8"],
            "--ndf: wanted 4, as the checkpoint was trained",
        ),
        (lambda p, t: ["sample", p / "none.pt"], "none.pt, which does not exist"),
        (lambda p, t: ["sample", t, "--n", "0"], "--n: wanted a whole number >= 1, got 0"),
        (lambda p, t: ["sample", t, "--seed", 10**20], "--seed: wanted 0 to 2**31 - 1, got 1" + 20 * "0"),
        (lambda p, t: ["sample", t, "--seed", "-1"], "--seed: wanted 0 to 2**31 - 1, got -1"),
        (lambda p, t: ["train", "--loss", "gls-gan", "--slope", "nan"], "--slope: wanted a finite number, got nan"),
        (lambda p, t: ["sample", t, "--out", unwritable(p) / "grid.png"], "file/run"),
        (lambda p, t: [], "the following arguments are required: command"),
    ],
)
def test_what_a_person_can_put_right_is_one_line(tmp_path, monkeypatch, capsys, trained, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(capsys, *arguments(tmp_path, trained))
    assert code == 2
    assert errors.startswith("gpkernels: error: ")
    assert errors.count("\n") == 1
    assert message in errors


def test_a_finished_run_is_done_without_its_samples(tmp_path, capsys, trained):
    out = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    shutil.rmtree(out / "samples")
    code, text, errors = run(capsys, "train", "--resume", "--out", out, "--tracker", "none", "--no-report")
    assert (code, errors) == (0, "")
    assert f"done: curves {out / 'curves.png'}, checkpoint {out / 'checkpoints/step_00000001'}" in text


@pytest.mark.parametrize(
    ("command", "what", "line"),
    [
        (["evaluate", "x"], "gpkernels.training.checkpoint.find", "stopped; the same command starts again"),
        (["train"], "gpkernels.training.data.load", "stopped; the same command goes on, with --resume if it has begun"),
        (
            ["prepare", "--data", "folder:x"],
            "gpkernels.training.prepare._prepare_one",
            "stopped; the same command goes",
        ),
    ],
)
def test_ctrl_c_is_one_line_wherever_it_comes(tmp_path, monkeypatch, capsys, command, what, line):
    def interrupt(*arguments):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(what, interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from what they put aside
    try:
        code, _, errors = run(capsys, *command)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert errors.splitlines()[-1].startswith(f"gpkernels: {line}")
    assert "Traceback" not in errors


def test_ctrl_c_while_images_are_prepared(tmp_path):
    """In a process with threads that decode; the same command goes on to the end."""
    trees.folder(tmp_path / "images", 300)
    arguments = ["prepare", "--data", "folder:images", "--cache", "cache"]
    slow = (
        "import signal, time, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from PIL import Image; plain = Image.open; "
        "Image.open = lambda *a, **k: (time.sleep(0.05), plain(*a, **k))[1]; "
        "runpy.run_module('gpkernels', run_name='__main__')"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", slow, *arguments], cwd=tmp_path, **pipes)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*.journal")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "gpkernels: stopped; the same command goes on\n")
    done = gpkernels(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "300 images of 64x64" in done.stdout


def test_resume_on_other_data_is_refused(tmp_path, capsys, trained):
    trees.folder(tmp_path, 4)
    code, _, errors = run(capsys, "train", "--resume", "--out", trained, "--data", f"folder:{tmp_path}", "--steps", 2)
    assert code == 2
    assert "--data: wanted 1 channels of 32 pixels, as the checkpoint was trained, got 3 of 64" in errors


def test_a_run_on_a_program_s_images_does_not_go_on_with_the_config_s(tmp_path, capsys, eight_faces):
    """Nor with other images than before, unless they are named."""
    settings = {"ngf": 4, "ndf": 4, "nz": 8, "batch_size": 4, "steps": 1}
    Trainer(TrainConfig(**settings), eight_faces, tmp_path / "given").run()
    resume = ("train", "--resume", "--steps", 2, "--tracker", "none", "--no-report", "--out")
    code, _, errors = run(capsys, *resume, tmp_path / "given")
    assert code == 2
    assert "--data: wanted images by name, since a program gave this run its own ('faces', 8 images)" in errors
    assert run(capsys, *resume, tmp_path / "given", "--data", "lfw-mini")[0] == 0
    assert run(capsys, *resume, tmp_path / "given", "--steps", 3)[0] == 0  # now they are lfw-mini's

    trees.folder(tmp_path / "images", 8)
    small = ("--image-size", 32, "--steps", 1, *SMALL)
    named = ("--data", f"folder:{tmp_path / 'images'}")
    assert run(capsys, "train", "--out", tmp_path / "named", *named, *small)[0] == 0
    (tmp_path / "images/class0/000.png").unlink()
    code, _, errors = run(capsys, *resume, tmp_path / "named")
    assert code == 2
    assert "--data: wanted the 8 images of images that the run was trained on, got 7 others of folder:" in errors
    assert run(capsys, *resume, tmp_path / "named", *named)[0] == 0


def test_epochs_of_a_run_that_ends_by_steps_are_refused(capsys, trained):
    code, _, errors = run(capsys, "train", "--resume", "--out", trained, "--epochs", 3)
    assert code == 2
    assert "--epochs: this run ends by --steps 1; wanted --steps, got --epochs 3" in errors


BLOCKING = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from gpkernels.cli import main
"""
EXTRA = ("numpy", "PIL", "matplotlib", "rich", "safetensors", "accelerate", "filelock")
BLOCKED = f"""{BLOCKING.format(names=EXTRA)}
needing = ("train", "sample x", "evaluate x", "report x", "prepare --data folder:x")
assert [main(command.split()) for command in ("losses", "presets", *needing)] == [0, 0, 2, 2, 2, 2, 2]
main(["train", "--help"])
"""


def test_missing_training_extra_is_named():
    """Commands that can do without the trainer's libraries do; the others say how to get them."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: gpkernels train" in done.stdout
    assert done.stderr.splitlines() == [
        f"gpkernels: error: {command} wants numpy, which is not installed: pip install 'gpkernels[train]'"
        for command in ("train", "sample", "evaluate", "report", "prepare")
    ]


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        (("matplotlib", "accelerate", "rich"), ("sample", "RUN", "--n", "1", "--out", "NEW.png")),
        (
            ("matplotlib", "accelerate", "rich"),
            ("evaluate", "RUN", "--n", "100", "--metrics", "swd", "--out", "NEW.json"),
        ),
        (("accelerate", "rich"), ("report", "RUN")),
        (("matplotlib", "accelerate", "safetensors"), ("prepare", "--data", "folder:IMAGES", "--cache", "NEW")),
    ],
    ids=lambda what: what[0],
)
def test_a_command_wants_no_more_than_it_uses(tmp_path, trained, missing, arguments):
    trees.folder(tmp_path / "images", 4)
    places = {"RUN": str(trained), "NEW": str(tmp_path / "new"), "IMAGES": str(tmp_path / "images")}
    command = list(arguments)
    for name, place in places.items():
        command = [word.replace(name, place) for word in command]
    program = BLOCKING.format(names=missing) + f"raise SystemExit(main({command!r}))\n"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_runs_as_a_module_for_launchers(tmp_path):
    command = [sys.executable, "-m", "gpkernels.training", "--steps", "1", "--out", str(tmp_path / "run"), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr


def test_a_second_signal_is_immediate_but_within_a_second(monkeypatch):
    """A launcher passes on what the terminal has sent already."""
    now, stops = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with _StopOnSignal(lambda: stops.append(now[0])):
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 0.9
        os.kill(os.getpid(), signal.SIGINT)
        assert stops == [100.0]
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert stops == [100.0]


def test_the_device_is_a_flag_s_or_a_file_s_or_that_of_the_run(tmp_path):
    (tmp_path / "config.json").write_text('{"device": "cuda:1"}')
    (tmp_path / "mine.toml").write_text('device = "cuda:2"')
    (tmp_path / "other.toml").write_text("steps = 3")
    (tmp_path / "damaged.json").write_text("{")

    def device(config=None, **flags):
        file = config and tmp_path / config
        return _device(argparse.Namespace(config=file, **{"resume": False, "out": None, **flags}))

    resumed = {"resume": True, "out": tmp_path}
    assert device() == device("other.toml") == device("damaged.json") == device("missing.json") == "auto"
    assert device("mine.toml") == device("mine.toml", **resumed) == "cuda:2"
    assert device(**resumed) == device("other.toml", **resumed) == "cuda:1"
    assert device("mine.toml", **resumed, device="cpu") == "cpu"
