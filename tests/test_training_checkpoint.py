"""Checkpoints: what they hold, how damage is told and survived, which stay; folders that one run at a time uses."""

import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import safetensors.torch
import torch
from small_runs import names, same, stopped_after, trainer
from threads import one_thread  # noqa: F401

from gpkernels import cli
from gpkernels.errors import UserError
from gpkernels.training import Callback, TrainConfig, checkpoint, data, disk


@pytest.fixture(scope="module")
def faces():
    return data.load(TrainConfig())


@pytest.fixture(scope="module")
def finished(faces, tmp_path_factory):
    """A run of four steps with a checkpoint after each; two are kept."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert trainer(faces, out, steps=4, checkpoint_minutes=0.0).run()
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def reseal(folder, **changes):
    """The manifest with `changes`, and digests that fit the files as they are."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    for name in manifest["files"]:
        manifest["files"][name] = checkpoint._fingerprint((folder / name).read_bytes())
    del manifest["sha256"]
    manifest["sha256"] = checkpoint._seal(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_holds_the_whole_state(faces, finished):
    """The nets for other programs, as safetensors; the rest without pickled code; together what the trainer had."""
    assert names(finished) == ["newest", "step_00000003", "step_00000004"]
    newest = finished / "checkpoints/newest"
    assert newest.readlink().name == "step_00000004"
    assert sorted(path.name for path in newest.iterdir()) == [
        *("critic.safetensors", "ema.safetensors", "generator.safetensors", "manifest.json", "training.pt"),
    ]
    run = trainer(faces, finished, steps=4, checkpoint_minutes=0.0, resume=checkpoint.load(finished))
    wanted = run.state_dict()
    for net in ("generator", "ema", "critic"):
        same(safetensors.torch.load_file(newest / f"{net}.safetensors"), dict(wanted[net]))
    training = torch.load(newest / "training.pt", weights_only=True)
    same(training["optimizers"], wanted["optimizers"])
    assert training["log_lines"] == 4
    manifest = json.loads((newest / "manifest.json").read_text())
    assert (manifest["step"], manifest["config"]["ngf"], manifest["size"]) == (4, 4, 32)
    for path in (finished, newest, finished / "checkpoints/step_00000004"):
        same({**wanted, "generator": dict(wanted["generator"])}, checkpoint.load(path))


def test_a_copy_that_followed_links_goes_on(faces, finished, tmp_path):
    """Such as a zip makes, or Windows: `newest` is a folder there."""
    shutil.copytree(finished, tmp_path / "copy")
    assert not (tmp_path / "copy/checkpoints/newest").is_symlink()
    run = trainer(faces, tmp_path / "copy", steps=5, resume=checkpoint.load(tmp_path / "copy"))
    assert run.run()
    assert (tmp_path / "copy/checkpoints/newest").readlink().name == "step_00000005"


def test_every_dtype_shared_memory_and_what_is_no_tensor_come_back(tmp_path):
    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 3

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    def net():
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), Counted(), torch.nn.Conv2d(2, 4, 3).bfloat16())
        net[2].weight = net[0].weight  # tied
        net.register_buffer("count", torch.tensor(7))
        net.register_buffer("columns", torch.arange(12.0).view(3, 4).t())
        return net.to(memory_format=torch.channels_last)

    saved, fresh = net(), net()
    saved[1].calls = 5
    about = {"step": 1, "config": {}, "channels": 1, "size": 32, "classes": 0, "images": {}}
    nets = {name: saved.state_dict() for name in checkpoint.NETS}
    state = checkpoint.load(checkpoint.save(tmp_path, {**about, **nets, "more": [1, torch.ones(2)]}))
    checkpoint.load_weights(fresh, state["critic"], "critic")
    same(dict(fresh.state_dict()), dict(saved.state_dict()))
    assert fresh[1].calls == 5
    same(state["more"], [1, torch.ones(2)])


def test_everyone_s_random_numbers_go_on_where_they_were(faces, tmp_path):
    run = trainer(faces, tmp_path)
    torch.rand(5), np.random.rand(5), random.random()
    run.save()
    drawn = torch.rand(3), np.random.rand(3), random.random()
    again = trainer(faces, tmp_path, resume=checkpoint.load(tmp_path))
    assert again.step == 0
    assert torch.equal(torch.rand(3), drawn[0])
    assert (np.random.rand(3) == drawn[1]).all()
    assert random.random() == drawn[2]


class CodeInIt:
    def __reduce__(self):
        return os._exit, (1,)


FOLDER = "step_00000004 is damaged: "
DAMAGE = {
    "truncated": (lambda f: truncate(f / "critic.safetensors"), "critic.safetensors has 5936 bytes, not 11872"),
    "flipped": (lambda f: flip(f / "ema.safetensors"), r"ema.safetensors is not what was saved \(its sha256 differs\)"),
    "torch file": (lambda f: flip(f / "training.pt"), "training.pt is not what was saved"),
    "missing": (lambda f: (f / "training.pt").unlink(), "it has no training.pt"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
    "manifest truncated": (lambda f: truncate(f / "manifest.json"), "manifest.json is not JSON"),
    "manifest changed": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('"ngf": 4', '"ngf": 5')),
        r"manifest.json is not what was saved \(its sha256 differs\)",
    ),
    "manifest of numbers": (lambda f: (f / "manifest.json").write_text("[1, 2]"), "manifest.json is not what was"),
    "not tensors": (lambda f: ((f / "ema.safetensors").write_text("hello"), reseal(f)), "its tensors cannot be read"),
    "code in it": (lambda f: (torch.save(CodeInIt(), f / "training.pt"), reseal(f)), "its tensors cannot be read"),
    "another file of torch's": (
        lambda f: (torch.save([1], f / "training.pt"), reseal(f)),
        "its tensors cannot be read",
    ),
}


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(run, capsys, how):
    damage, message = DAMAGE[how]
    newest = run / "checkpoints/step_00000004"
    damage(newest)
    with pytest.raises(checkpoint.Damaged, match=FOLDER + message):
        checkpoint.load(newest)
    assert capsys.readouterr().err == ""
    assert checkpoint.load(run)["step"] == 3
    errors = capsys.readouterr().err
    assert FOLDER in errors
    assert errors.endswith("; step_00000003, the one before it, is used\n")
    assert errors.count("\n") == 1
    assert checkpoint.find(run).name == "step_00000003"


def test_a_run_that_goes_on_may_delete_what_is_being_read(run, capsys, monkeypatch):
    """Then its newer one is taken, without a word."""
    read = checkpoint._verified

    def overtaken(folder, *args):
        monkeypatch.setattr(checkpoint, "_verified", read)
        folder.rename(folder.with_name("step_00000005"))
        return read(folder, *args)

    monkeypatch.setattr(checkpoint, "_verified", overtaken)
    assert checkpoint.find(run).name == "step_00000005"
    assert capsys.readouterr().err == ""


def test_where_none_is_whole_each_is_named(run):
    for path in checkpoint.held(run):
        truncate(path / "training.pt")
    with pytest.raises(UserError, match=r"step_00000004 is damaged: .*; checkpoint: .*step_00000003 is damaged: "):
        checkpoint.load(run)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: p / "none",
            "wanted a run folder or a checkpoint in its checkpoints/, got .*none, which does not exist",
        ),
        (lambda p: p / "run/log.jsonl", "log.jsonl, which is a file"),
        (lambda p: p / "run/samples", "samples, which holds neither checkpoints/ nor manifest.json"),
        (lambda p: shutil.rmtree(p / "run/checkpoints") or (p / "run/checkpoints").mkdir() or p / "run", "holds none"),
        (lambda p: reseal(p / "run/checkpoints/newest", format=9) or p / "run", "is of format 9, this version reads 2"),
    ],
)
def test_what_is_no_checkpoint_is_refused(run, tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        checkpoint.load(make(tmp_path))


def test_weights_of_another_architecture_are_refused(run):
    newest = run / "checkpoints/newest"
    config = json.loads((newest / "manifest.json").read_text())["config"]
    reseal(newest, config={**config, "ngf": 8})
    with pytest.raises(UserError, match="its generator is of another architecture than its config"):
        checkpoint.load_generator(run)


def test_resuming_past_a_damaged_checkpoint_ends_with_the_same_bits(faces, tmp_path, capsys):
    """The damaged one is kept aside, and made anew."""
    whole = tmp_path / "whole"
    trainer(faces, whole, steps=4, checkpoint_minutes=0.0).run()
    run, wanted = shutil.copytree(whole, tmp_path / "run", symlinks=True), checkpoint.load(whole)
    truncate(run / "checkpoints/step_00000004/training.pt")
    assert cli.main(["train", "--resume", "--out", str(run)]) == 0
    output = capsys.readouterr()
    assert "step_00000003, the one before it, is used" in output.err
    assert "renamed to step_00000004.aside" in output.err
    assert "resuming after step 3" in output.out
    assert names(run) == ["newest", "step_00000003", "step_00000004", "step_00000004.aside"]
    same(checkpoint.load(run), wanted)
    assert (run / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_an_earlier_checkpoint_can_be_gone_back_to(faces, run):
    """What came after it is put aside, so that the newest is again of the run that goes on."""
    again = trainer(faces, run, steps=4, resume=checkpoint.load(run / "checkpoints/step_00000003"))
    stopped_after(again, 3)
    again.stop()
    assert not again.run()
    assert names(run) == ["newest", "step_00000003", "step_00000004.aside"]
    assert (run / "checkpoints/newest").readlink().name == "step_00000003"


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(faces, tmp_path, keep):
    held = []

    class Look(Callback):
        def on_checkpoint(self, trainer, path):
            held.append([checkpoint.step_of(each) for each in checkpoint.held(trainer.out)])
            assert path == checkpoint.held(trainer.out)[0]
            assert (tmp_path / "checkpoints/newest").resolve() == path.resolve()

    trainer(faces, tmp_path, steps=5, checkpoint_minutes=0, keep=keep, callbacks=[Look()]).run()
    assert held == [list(range(step, max(-1, step - keep), -1)) for step in range(6)]


def test_checkpoints_are_written_at_the_start_each_epoch_the_end_and_by_the_clock(faces, tmp_path, monkeypatch):
    """100 images of which 40 make a step: epochs of faces are 32 passes, so 80 steps; here the clock moves 1 a step."""
    minutes, saved = [0.0], []
    monkeypatch.setattr("gpkernels.training.loop.time.monotonic", lambda: 60 * minutes[0])

    class Clock(Callback):
        def on_step(self, trainer, terms):
            minutes[0] += 1

        def on_checkpoint(self, trainer, path):
            saved.append(trainer.step)

    images = data.ImageSet("few", faces.images[:20])
    settings = {"steps": 13, "checkpoint_minutes": 3, "batch_size": 4}
    assert images.epoch_images == 20
    trainer(images, tmp_path, callbacks=[Clock()], **settings).run()
    assert saved == [0, 3, 5, 8, 10, 13]


def test_the_same_step_again_replaces_its_checkpoint(faces, tmp_path):
    run = trainer(faces, tmp_path)
    run.save()
    with torch.no_grad():
        next(run.critic.parameters()).add_(1)
    run.save()
    assert names(tmp_path) == ["newest", "step_00000000"]
    same(checkpoint.load(tmp_path)["critic"], dict(run.critic.state_dict()))


def test_what_is_just_saved_stays(faces, run):
    """Whatever lies there of later steps."""
    again = trainer(faces, run, keep=1, resume=checkpoint.load(run / "checkpoints/step_00000003"))
    again.save()
    assert names(run) == ["newest", "step_00000003", "step_00000004"]


def test_of_two_of_one_step_the_one_that_was_not_replaced_counts(run):
    """Both are there where a run was killed after it had saved a step once more."""
    shutil.copytree(run / "checkpoints/step_00000004", run / "checkpoints/step_00000004.old")
    assert checkpoint.find(run).name == "step_00000004"


def test_training_leaves_the_state_that_it_went_on_from_as_it_is(faces, run):
    state = checkpoint.load(run)
    trainer(faces, run, resume=state).train_step()
    same(state, checkpoint.load(run))


def test_a_checkpoint_loses_its_name_before_its_files(run, monkeypatch):
    """So that what a killed run leaves of it is no checkpoint."""
    emptied = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: emptied.append(path.name))
    disk.delete(run / "checkpoints/step_00000003")
    assert names(run) == ["newest", "step_00000003.tmp", "step_00000004"]
    assert emptied == ["step_00000003.tmp"] * 2


def test_what_a_killed_run_left_half_written_is_deleted(run):
    for path in (
        *("config.json.tmp", "sessions.json.tmp", "trackers.json.tmp", "curves.png.tmp", "report.html.tmp"),
        *("diverged.pt.tmp", "samples/epoch_0002.png.tmp", "checkpoints/step_00000005.tmp/critic.safetensors"),
    ):
        (run / path).parent.mkdir(exist_ok=True)
        (run / path).write_bytes(b"half")
    (run / "checkpoints/newest.tmp").symlink_to("step_00000005")
    checkpoint.begin(run, 4)
    assert not list(run.rglob("*.tmp"))
    assert names(run) == ["newest", "step_00000003", "step_00000004"]


def test_a_second_run_in_the_folder_is_refused(faces, run, capsys):
    """While another has it; the lock goes with the process, so a killed one leaves none behind."""
    message = f"--out: wanted a folder that no run uses, got {run}, used by process "
    before = (run / "log.jsonl").read_bytes()
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        with disk.FolderLock(run):
            os.write(theirs, b"locked")
            signal.pause()
    os.read(ours, 6)
    try:
        second = trainer(faces, run, steps=5, resume=checkpoint.load(run))
        with pytest.raises(UserError, match=message + str(child)):
            second.run()
        assert cli.main(["train", "--resume", "--out", str(run), "--steps", "5"]) == 2
        assert message + str(child) in capsys.readouterr().err
        assert (run / "log.jsonl").read_bytes() == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert second.run()


def test_a_new_run_in_a_used_folder_is_refused(faces, run):
    with pytest.raises(UserError, match="already holds a run; --resume goes on with it"):
        trainer(faces, run)


def test_the_command_line_takes_runs_and_checkpoints(run, tmp_path, capsys):
    for source, step in ((run, 4), (run / "checkpoints/newest", 4), (run / "checkpoints/step_00000003", 3)):
        assert cli.main(["sample", str(source), "--n", "4", "--out", str(tmp_path / "grid.png")]) == 0
        assert f"4 images of ls-gan-pg after step {step}" in capsys.readouterr().out
    truncate(run / "checkpoints/newest/ema.safetensors")
    assert cli.main(["sample", str(run), "--n", "4", "--out", str(tmp_path / "grid.png")]) == 0
    assert "after step 3" in capsys.readouterr().out
    evaluate = ["evaluate", str(run), "--metrics", "swd", "--n", "100", "--device", "cpu"]
    assert cli.main(evaluate) == 0
    report = json.loads((run / "evaluation.json").read_text())
    assert report["checkpoint"]["path"] == str(run / "checkpoints/step_00000003")
    assert cli.main(["sample", str(run / "checkpoints/newest")]) == 2
    assert "ema.safetensors has 10344 bytes, not 20688" in capsys.readouterr().err
