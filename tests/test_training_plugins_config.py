"""Config files, and what --help of train says."""

import dataclasses
import json
import re
import sys

import pytest
from threads import one_thread  # noqa: F401

from gpkernels import cli
from gpkernels.errors import UserError
from gpkernels.training import from_file, from_preset
from gpkernels.training.config import flag, settings

SMALL = {"ngf": 4, "ndf": 4, "batch_size": 4, "nz": 8, "log_every": 1}


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_config_of_a_run_is_read_back(tmp_path):
    config = from_preset("dragan", {"lr": 3e-5, "clip": 0.5, "max_images": 7, "flip": False})
    assert from_file(written(tmp_path / "config.json", config.to_dict())) == config


def test_a_config_file_starts_from_its_preset_and_flags_go_over_it(tmp_path):
    file = written(tmp_path / "mine.json", {"preset": "wgan-gp", "lr": 1, "ngf": 8, "clip": None})
    wanted = from_preset("wgan-gp", {"lr": 1.0, "ngf": 8})
    assert from_file(file) == wanted
    assert type(from_file(file).lr) is float
    assert from_file(file, {"ngf": 16, "preset": "wgan-gp"}) == dataclasses.replace(wanted, ngf=16)
    assert from_file(written(file, {"ngf": 8}), {"preset": "r1"}) == from_preset("r1", {"ngf": 8})


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_toml_is_read_as_json_is(tmp_path):
    file = written(tmp_path / "mine.toml", 'preset = "wgan-gp"\nlr = 1\nngf = 8\nflip = false # comment\n')
    assert from_file(file) == from_preset("wgan-gp", {"lr": 1.0, "ngf": 8, "flip": False})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            {"ngff": 8},
            "--config: wanted settings of this version in .*a.json, got 'ngff' (did you mean ngf?)",
        ),
        ("a.json", {"batch-size": 8}, "got 'batch-size' (did you mean batch_size?)"),
        ("a.json", {"xyzzy": 8}, "got 'xyzzy'"),
        ("a.json", {"ngf": "8"}, "--config: wanted int for ngf in .*a.json, got '8'"),
        ("a.json", {"ngf": True}, "wanted int for ngf in .*a.json, got True"),
        ("a.json", {"ngf": None}, "wanted int for ngf in .*a.json, got None"),
        ("a.json", {"flip": 1}, "wanted bool for flip in .*a.json, got 1"),
        ("a.json", {"ngf": 0}, "--ngf: wanted at least 1, got 0"),
        ("a.json", {"preset": "vae"}, "--preset: wanted one of"),
        ("a.json", [1], "wanted settings by name in .*a.json, got a list"),
        ("a.json", "{", "a.json is not the JSON it is named: "),
        ("a.toml", "ngf = ", "a.toml is not the TOML it is named: "),
        ("a.toml", "[train]\nngf = 1", "got 'train'"),
        ("a.yaml", "ngf: 1", "wanted a file named .json or .toml, got .*a.yaml"),
    ],
)
def test_bad_config_files_are_named(tmp_path, name, content, message):
    file = written(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        from_file(file)
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), str(caught.value))


def test_two_presets_are_refused(tmp_path, capsys):
    file = written(tmp_path / "mine.json", {"preset": "wgan-gp"})
    assert cli.main(["train", "--config", str(file), "--preset", "r1"]) == 2
    error = capsys.readouterr().err
    assert f"--preset: wanted wgan-gp, which {file} starts from, got r1" in error
    assert cli.main(["train", "--config", str(tmp_path / "none.json")]) == 2
    assert "none.json: No such file" in capsys.readouterr().err


def test_train_takes_a_config_file_and_trackers(tmp_path, capsys):
    """Also on resume, where a file may not say otherwise than the checkpoint; trackers are those of before."""
    file = written(tmp_path / "mine.json", {**SMALL, "steps": 1})
    out = str(tmp_path / "run")
    usual = ["train", "--no-report", "--config", str(file), "--out", out]
    assert cli.main([*usual, "--ndf", "8", "--tracker", "tensorboard,none"]) == 2
    assert "--tracker: wanted none or names, got tensorboard,none" in capsys.readouterr().err
    assert cli.main([*usual, "--ndf", "8", "--tracker", "none"]) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["ngf"], config["ndf"]) == (4, 8)
    assert cli.main([*usual, "--resume", "--steps", "2"]) == 2
    assert "--ndf: wanted 8, as the checkpoint was trained, got 4" in capsys.readouterr().err
    assert cli.main([*usual, "--resume", "--steps", "2", "--ndf", "8"]) == 0
    assert [record["step"] for record in log(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run/tensorboard").exists()
    assert cli.main(["train", "--no-report", "--config", str(file), "--out", str(tmp_path / "usual")]) == 0
    assert (tmp_path / "usual/tensorboard").exists()


def test_help_has_every_option_in_a_group_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    options = {}
    group = None
    for line in text.split("\n"):
        if re.match(r"\S.*:$", line):
            group = line[:-1]
        elif match := re.match(r"  (--[a-z0-9-]+)", line):
            options[name := match[1]] = [group, line]
        elif group and line.startswith("    "):
            options[name][1] += " " + line.strip()
    assert {flag(name) for name in settings()} | {"--out", "--resume", "--config", "--tracker", "--report"} == set(
        options
    )
    for name, (_, described) in options.items():
        assert re.search(r"[(; ]default: [^)]", described), name
    groups = {name: group for name, (group, _) in options.items()}
    assert (groups["--out"], groups["--data"], groups["--crop"]) == ("folders and files", "images", "images")
    assert (groups["--penalty"], groups["--ndf"]) == ("loss and penalty", "nets")
    assert (groups["--lr"], groups["--device"]) == ("training", "this run")
    for name, spec in settings().items():
        if spec.default is not None:
            assert f"(default: {spec.default})" in options[flag(name)][1]
