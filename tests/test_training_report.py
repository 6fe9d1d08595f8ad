"""The report of a run: nearest images by brute force, walks, and a file that holds all it shows."""

import base64
import io
import json
import math
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from threads import one_thread  # noqa: F401

from gpkernels import cli
from gpkernels.training import PRESETS, TrainConfig, Trainer, checkpoint, data, from_preset, nearest, page, report
from gpkernels.training.config import settings
from gpkernels.training.config_file import with_overrides

SMALL = {"ngf": 4, "ndf": 4, "batch_size": 8, "nz": 8, "log_every": 1}


def random_images(count, seed, channels=3, size=5):
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=draws, dtype=torch.uint8)


def brute_force(query, images, mirrored, leave_out):
    """(distance, number, mirrored) of the nearest, in numpy, one image after another."""
    found = []
    for number, image in enumerate(images.astype(np.float64)):
        for side in (False, True) if mirrored else (False,):
            other = image[:, :, ::-1] if side else image
            if number != leave_out:
                found.append((math.sqrt(np.mean((query.astype(np.float64) - other) ** 2)), number, side))
    return min(found)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("left_out", [False, True])
def test_nearest_is_that_of_brute_force(monkeypatch, mirrored, left_out):
    monkeypatch.setattr(nearest, "_CHUNK", 7)  # 20 images are three chunks
    images = random_images(20, 1).numpy()
    queries = torch.cat(
        [random_images(6, 2), torch.from_numpy(images[[0, 9, 19]]), torch.from_numpy(images[[3]]).flip(3)]
    )
    leave_out = torch.tensor([0, 6, 7, 13, 14, 19, 0, 9, 19, 3]) if left_out else None
    found = nearest.nearest(queries, images, mirrored=mirrored, leave_out=leave_out)
    for index, query in enumerate(queries.numpy()):
        wanted = brute_force(query, images, mirrored, leave_out[index] if left_out else None)
        assert found.distance[index].item() == pytest.approx(wanted[0], rel=1e-12, abs=1e-12)
        assert (found.number[index].item(), bool(found.mirrored[index])) == wanted[1:]
    if not left_out:
        assert found.distance[6:9].tolist() == [0, 0, 0]
        assert (found.distance[9].item() == 0) == mirrored


def test_nearest_keeps_its_digits_where_images_differ_by_little():
    """Images of 128x128 that are one grey level in one pixel apart."""
    images = np.full((3, 3, 128, 128), 250, np.uint8)
    images[1, 0, 0, 0] = 240
    query = torch.from_numpy(images[[1]].copy())
    query[0, 0, 0, 0] = 241
    found = nearest.nearest(query, images, mirrored=True)
    assert found.number.tolist() == [1]
    assert found.distance.item() == pytest.approx(math.sqrt(1 / (3 * 128 * 128)))


def test_suspicious_counts_below_the_twentieth_part():
    real = torch.arange(101, dtype=torch.float64)
    assert nearest.suspicious(torch.tensor([0.0, 4.9, 5.0, 50.0]), real) == (2, 5.0)


def test_walks_go_from_end_to_end_on_the_way_they_say():
    start, end = torch.randn(2, 3, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.linspace(0, 1, 5, dtype=torch.float64)
    straight = report.between(start, end, at, spherical=False)
    torch.testing.assert_close(straight, torch.stack([start + (end - start) * t for t in at], 1))
    walk = report.between(start, end, at, spherical=True)
    torch.testing.assert_close(walk[:, 0], start)
    torch.testing.assert_close(walk[:, -1], end)
    lengths = walk.norm(dim=2)
    torch.testing.assert_close(lengths, lengths[:, :1] + (lengths[:, -1:] - lengths[:, :1]) * at)
    directions = walk / lengths[:, :, None]
    turns = (directions[:, 1:] * directions[:, :-1]).sum(2).acos()
    torch.testing.assert_close(turns, turns[:, :1].expand_as(turns))  # evenly, and in one plane:
    total = (directions[:, 0] * directions[:, -1]).sum(1).acos()
    torch.testing.assert_close(turns.sum(1), total)
    assert straight.norm(dim=2)[:, 2].max() < lengths.min()  # which the straight way falls short of
    same = report.between(start, start.clone(), at, spherical=True)
    torch.testing.assert_close(same, start[:, None].expand_as(same), rtol=1e-6, atol=1e-6)


class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.links, self.open = [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            self.images.setdefault(attributes["alt"], []).append(attributes["src"])
        self.links += [value for name, value in attributes.items() if name in ("href", "src")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def picture(source):
    with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def faces():
    images = data.load(TrainConfig()).images
    held_out = data.ImageSet("faces", images[40:60])
    return data.ImageSet("faces <of> many", images[:40], load_held_out=lambda: held_out)  # five steps an epoch


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "run"
    trained = Trainer(TrainConfig(**SMALL, epochs=12), faces, out)
    trained.run()
    (out / "evaluation.json").write_text(
        json.dumps(
            {
                "metrics": [{"metric": "swd", "value": 12.3456789, "better": "lower", "n": 500, "n_real": 20}],
                "checkpoint": {"step": 60},
                "data": {"name": "faces", "part": "held-out"},
                "notes": ["a <note>"],
            }
        )
    )
    return trained


@pytest.fixture(scope="module")
def written(run):
    path = report.write(run.out, run.config, run.step, run.ema, run.images)
    return path.read_text()


def test_a_report_is_one_file_that_asks_for_no_other(run, written):
    parsed = Parsed(written)
    assert parsed.open == []
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(parsed.tags)
    assert "http://" not in written
    assert "https://" not in written
    assert "default-src 'none'" in written
    assert "faces &lt;of&gt; many" in written
    assert "<of>" not in written
    assert not list(run.out.glob("*.tmp"))


def test_a_report_shows_samples_a_timeline_and_walks(run, written):
    images = Parsed(written).images
    with Image.open(run.out / "samples/epoch_0012.png") as grid:
        last = np.asarray(grid)
    assert np.array_equal(picture(images["samples"][0]), last)
    epochs = [int(name.removeprefix("epoch ")) for name in images if name.startswith("epoch ")]
    assert epochs == [1, 2, 3, 5, 6, 7, 8, 10, 11, 12]
    for epoch in (1, 12):
        with Image.open(run.out / f"samples/epoch_{epoch:04d}.png") as grid:
            assert np.array_equal(picture(images[f"epoch {epoch}"][0]), np.asarray(grid)[:96])
    walk = picture(images["walks between latent vectors"][0])
    assert walk.shape == (4 * 96, 10 * 96)
    ends = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    for row, column, z in ((0, 0, ends[0]), (3, 9, ends[7])):
        shown = walk[row * 96 : (row + 1) * 96 : 3, column * 96 : (column + 1) * 96 : 3]
        wanted = (run.ema(z[None])[0, 0].detach().numpy() + 1) * 127.5
        assert np.abs(shown - wanted).max() <= 0.5 + 1e-3


def test_a_report_tells_every_number_of_the_log_and_what_it_is(run, written):
    record = json.loads((run.out / "log.jsonl").read_text().splitlines()[-1])
    for name in set(record) - {"step", "epoch"}:
        row = f"<td>{name}</td><td>{record[name]:.5g}</td><td>"
        assert row in written.replace("&#x27;", "'")
        assert report.MEANINGS[name]
    assert "<td>swd</td><td>12.346</td><td>lower</td><td>500</td><td>20</td>" in written
    assert "a &lt;note&gt;" in written


def test_a_report_tells_machine_sessions_and_how_to_repeat(run, written):
    (session,) = json.loads((run.out / "sessions.json").read_text())
    assert (session["from_step"], session["to_step"], session["device"]) == (0, 60, "cpu")
    assert session["seconds"] > 0
    assert session["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert session["machine"]["processor"] in written
    assert "<td>0 to 60</td>" in written
    assert (
        "gpkernels train --preset ls-gan-pg --nz 8 --ngf 4 --ndf 4 --batch-size 8 --epochs 12 --log-every 1" in written
    )


def test_a_summary_counts_the_images_of_every_update(faces):
    text = report._summary(TrainConfig(batch_size=10, critic_steps=3), 4, faces)
    assert "After 4 steps of the generator on 40 images of 32x32 pixels, grey: 120 images seen, 3.0 passes." in text


def test_a_table_has_the_last_of_each_number_though_it_is_not_in_the_last_line():
    records = [
        {"step": 1, "epoch": 1, "gap": 1.0},
        {"step": 2, "epoch": 1, "gap": 2.0},
        {"step": 2, "classification_error": 0.5},
    ]
    text = "".join(report._curves(records))
    assert "<td>gap</td><td>2</td>" in text
    assert "<td>classification_error</td><td>0.5</td>" in text


def test_what_a_program_brought_is_that_of_the_last_session():
    held = [{"given": {"critic": "old.Critic"}}, {"given": {"critic": "mine.Critic"}}]
    text = "".join(report._settings(TrainConfig(), held))
    assert "critic mine.Critic" in text
    assert "old.Critic" not in text


@pytest.mark.parametrize(
    "made",
    [
        page.page("<b>&", []),
        page.heading("<b>&"),
        page.paragraph("<b>&"),
        page.code("<b>&"),
        page.folded("<b>&", ""),
        page.table(["<b>&"], []),
        page.table(["x"], [["<b>&"]]),
        page.figure(b"", "<b>&"),
        page.row("<b>&", b""),
    ],
)
def test_text_on_a_page_is_text(made):
    assert "<b>" not in made
    assert "&lt;b&gt;&amp;" in made


def test_a_page_may_load_nothing():
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in page.page("title", [])


def test_a_generator_that_repeats_training_images_is_found_out(faces, run, tmp_path):
    class Repeats(torch.nn.Module):
        """The training images in turn, half of them mirrored."""

        def forward(self, z):
            images = torch.from_numpy(faces.images).float() / 127.5 - 1
            chosen = images[torch.arange(len(z)) % len(images)]
            chosen[::2] = chosen[::2].flip(3)
            return chosen

    text = report.write(tmp_path, run.config, 60, Repeats(), faces).read_text()
    row = re.search(r"<td>samples</td><td>64</td>((?:<td>[\d.]+</td>)+)", text)
    assert re.findall(r"[\d.]+", row[1]) == ["0.0"] * 4
    assert "64 of 64 samples have a training image nearer than" in text
    assert "<td>held-out images</td><td>20</td>" in text
    pairs = Parsed(text).images["0.0"]
    assert len(pairs) == 12
    for source in pairs:
        pair = picture(source)
        assert np.array_equal(pair[:96], pair[96:])


def test_samples_are_compared_as_held_out_images_are(faces, run, written):
    wanted = [brute_force(image, faces.images, True, None)[0] for image in faces.held_out().images]
    quantiles = np.quantile(wanted, [0, 0.05, 0.5, 0.95])
    cells = "".join(f"<td>{value:.1f}</td>" for value in quantiles)
    assert f"<td>held-out images</td><td>20</td>{cells}" in written


def test_without_held_out_images_training_images_are_compared_with_each_other(faces, run, tmp_path):
    alone = data.ImageSet("faces", faces.images[:10])
    text = report.write(tmp_path, run.config, 60, run.ema, alone).read_text()
    wanted = [brute_force(image, alone.images, True, number)[0] for number, image in enumerate(alone.images)]
    assert f"<td>training images (each to another)</td><td>10</td><td>{min(wanted):.1f}</td>" in text
    single = data.ImageSet("face", faces.images[:1])
    assert (
        "samples have a training image nearer"
        not in report.write(tmp_path, run.config, 60, run.ema, single).read_text()
    )


def test_a_report_of_a_conditional_run_walks_within_a_class(faces, tmp_path):
    labelled = data.ImageSet(
        "two", faces.images[:16], labels=np.arange(16, dtype=np.int64) % 2, class_names=("even", "odd")
    )
    config = TrainConfig(**{**SMALL, "steps": 2, "condition": "concat", "z": "uniform"})
    trained = Trainer(config, labelled, tmp_path)
    trained.callbacks = ()
    trained.run()
    text = report.write(tmp_path, config, 2, trained.ema, labelled).read_text()
    assert "along a straight line" in text
    walk = picture(Parsed(text).images["walks between latent vectors"][0])
    ends = torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for row in range(4):
        wanted = trained.ema(ends[4 + row][None], torch.tensor([row % 2]))[0, 0].detach().numpy()
        assert np.abs(walk[row * 96 : (row + 1) * 96 : 3, 9 * 96 :: 3] - (wanted + 1) * 127.5).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("changed", [{}, {"flip": False, "lr": 3e-5, "data": "folder:my images", "margin": 1e-3}])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_of_a_report_gives_the_same_config(preset, changed):
    config = from_preset(preset, changed)
    words = shlex.split(report.as_command(config))
    options = cli._parser().parse_args(words[1:])
    given = {name: getattr(options, name) for name in settings() if hasattr(options, name)}
    assert with_overrides(None, given) == config


def test_what_no_flag_says_is_repeated_from_the_file():
    assert report.as_command(from_preset("wgan", {"clip": None})) == "gpkernels train --config config.json"


def test_the_command_writes_the_report_of_a_run_anew(tmp_path, capsys):
    """train writes one at its end, the same; one that is stopped, or told not to, none."""
    small = ["--ngf", "4", "--ndf", "4", "--nz", "8", "--batch-size", "4", "--steps", "2", "--tracker", "none"]
    out = tmp_path / "run"
    assert cli.main(["train", "--out", str(out), *small]) == 0
    assert f"done: report {out / 'report.html'}, samples" in capsys.readouterr().out
    first = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"report {out / 'report.html'}\n"
    assert (out / "report.html").read_bytes() == first
    assert cli.main(["train", "--out", str(tmp_path / "none"), "--no-report", *small]) == 0
    assert not (tmp_path / "none/report.html").exists()
    assert cli.main(["report", str(tmp_path)]) == 2
    assert checkpoint.load(out)["step"] == 2
