"""Trackers: they show the log and the samples, and no step twice."""

import sys
import time
import types

import pytest
from accelerate import tracking
from small_runs import log_lines, stopped_after, told
from threads import one_thread  # noqa: F401

from gpkernels.errors import UserError
from gpkernels.training import checkpoint
from gpkernels.training.callbacks import Trackers, trackers


def shown(out):
    """What TensorBoard shows of a run: {tag: [(step, value)]}, and the steps of its pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, [(e.step, e.width, e.height) for e in events.Images("samples")] if tags["images"] else []


def test_tensorboard_shows_the_log_and_the_samples(eight_faces, tmp_path):
    told(eight_faces, tmp_path, Trackers("tensorboard"), steps=4).run()
    scalars, images = shown(tmp_path)
    records = log_lines(tmp_path)
    for tag in ("loss/critic_loss", "critic/grad_norm_max", "weights/generator_weight_grad", "loss/penalty"):
        name = tag.split("/")[1]
        assert scalars[tag] == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records]
    assert [step for step, _ in scalars["speed/images_per_second"]] == [1, 2, 3, 4]
    assert images == [(2, 768, 768), (4, 768, 768)]
    assert list((tmp_path / "tensorboard").glob("*/hparams.yml"))


def killed_and_resumed(eight_faces, out, name, pause=0.0):
    """A run of 6 steps, killed after 4 of which 2 are in a checkpoint; `pause` seconds between the sessions."""
    run = told(eight_faces, out, Trackers(name), steps=6)
    stopped_after(run, 2).run()
    state = checkpoint.load(out)
    time.sleep(pause)
    run = told(eight_faces, out, Trackers(name), steps=6, resume=state)
    stopped_after(run, 4)
    run.save = lambda: None  # what is killed leaves none
    run.run()
    time.sleep(pause)
    told(eight_faces, out, Trackers(name), steps=6, resume=state).run()


def test_tensorboard_shows_no_step_twice_after_a_resume(eight_faces, tmp_path):
    # TensorBoard orders the files of a run by the second of their beginning
    killed_and_resumed(eight_faces, tmp_path / "killed", "tensorboard", pause=1.0)
    told(eight_faces, tmp_path / "whole", Trackers("tensorboard"), steps=6).run()
    scalars, images = shown(tmp_path / "killed")
    wanted, pictures = shown(tmp_path / "whole")
    assert {tag for tag, values in scalars.items() if values != wanted[tag] and not tag.startswith("speed/")} == set()
    assert [step for step, _ in scalars["speed/images_per_second"]] == [1, 2, 3, 4, 5, 6]
    assert scalars.keys() == wanted.keys()
    assert images == pictures
    assert (tmp_path / "killed/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()
    assert len(list((tmp_path / "killed/tensorboard").glob("*/hparams.yml"))) == 1


class Fake(tracking.GeneralTracker):
    """A tracker that keeps what it is told; it has runs by number."""

    name = "fake"
    requires_logging_directory = False
    told, runs, broken = [], [], ()

    def __init__(self, project, **options):
        super().__init__()
        self.project, self.options = project, options
        self._fail_if("start")
        self.runs.append(options)

    @property
    def tracker(self):
        return self

    def _fail_if(self, method):
        if method in self.broken:
            raise ConnectionError(f"no net for {method}")

    def store_init_configuration(self, values):
        self.told.append(("config", values))

    def log(self, values, step=None):
        self._fail_if("log")
        self.told.append((step, values))

    def log_images(self, values, step=None):
        self.told.append((step, {name: [image.size for image in images] for name, images in values.items()}))

    def finish(self):
        self.told.append("finish")


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "fake", Fake)
    service = trackers.Service(
        lambda session: {"run": session.identity}, lambda tracker: "run 1", picture=lambda image: ([image], {})
    )
    monkeypatch.setattr(trackers, "SERVICES", {**trackers.SERVICES, "fake": service})
    for name in ("told", "runs"):
        monkeypatch.setattr(Fake, name, [])
    return Fake


def test_another_tracker_goes_on_with_its_run_and_hears_no_step_twice(eight_faces, tmp_path, fake):
    killed_and_resumed(eight_faces, tmp_path, "fake")
    assert fake.runs == [{"run": None}, {"run": "run 1"}, {"run": "run 1"}]
    steps = [told[0] for told in fake.told if "loss/critic_loss" in told[1]]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [told for told in fake.told if "samples" in told[1]] == [
        (step, {"samples": [(768, 768)]}) for step in (2, 4, 6)
    ]
    configs = [told[1] for told in fake.told if told[0] == "config"]
    assert len(configs) == 1
    assert configs[0]["ngf"] == 4
    assert fake.told.count("finish") == 3
    assert trackers.used_before(tmp_path) == ("fake",)


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(eight_faces, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(fake, "broken", ("log",))
    with pytest.warns(RuntimeWarning, match="tracker fake failed and is told no more: ConnectionError: no net") as said:
        assert told(eight_faces, tmp_path, Trackers("fake", "tensorboard"), steps=2).run()
    assert len([w for w in said if "tracker" in str(w.message)]) == 1
    assert [step for step, _ in shown(tmp_path)[0]["loss/penalty"]] == [1, 2]


def test_a_tracker_that_does_not_start_ends_the_run_before_it_begins(eight_faces, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(fake, "broken", ("start",))
    run = told(eight_faces, tmp_path, Trackers("fake"), steps=2)
    with pytest.raises(
        UserError, match="--tracker fake: wanted one that starts, got ConnectionError: no net for start"
    ):
        run.run()
    assert run.step == 0


def test_wandb_is_resumed_by_its_id(eight_faces, tmp_path, monkeypatch):
    """Against a stand-in for the package: its arguments, and pictures as its own class."""
    started, pictures = [], []

    class Run:
        def __init__(self, **options):
            self.id = options["id"]
            started.append(options)

        def log(self, values, step=None):
            pictures.extend(values.get("samples", ()))

        def finish(self):
            pass

    stand_in = types.SimpleNamespace(
        init=lambda **options: Run(**options),
        Image=lambda image: ("wandb picture", image.size),
        config=types.SimpleNamespace(update=lambda values, allow_val_change: None),
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(tracking, "_available_trackers", [*tracking._available_trackers, tracking.LoggerType.WANDB])
    out = tmp_path / "mine"
    killed_and_resumed(eight_faces, out, "wandb")
    assert len({options["id"] for options in started}) == 1
    assert len(started) == 3
    assert all((o["project"], o["name"], o["resume"], o["dir"]) == ("gpkernels", "mine", "allow", out) for o in started)
    assert pictures == [("wandb picture", (768, 768))] * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("neptune", "--tracker: wanted none or some of aim, .*tensorboard, .*wandb, got 'neptune'"),
        ("comet_ml", r"--tracker: wanted comet_ml installed \(pip install comet-ml\), got none"),
    ],
)
def test_trackers_that_cannot_be_had_are_named(name, message):
    with pytest.raises(UserError, match=message):
        Trackers(name)
