"""Evaluators and `gpkernels evaluate`: metrics order real images rightly, results repeat, nonsense is refused."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from PIL import Image
from threads import one_thread  # noqa: F401
from torch import nn

from gpkernels import cli, metrics
from gpkernels.metrics import command, evaluator, features, table
from gpkernels.metrics.images import to_bytes
from gpkernels.training import TrainConfig, Trainer, checkpoint, data, disk, models

SKIMAGE = Path(importlib.util.find_spec("skimage").submodule_search_locations[0]) / "data"
N = 100


@pytest.fixture(scope="module")
def patches():
    """Patches of three photographs in random order: uint8, (2 N, 3, 32, 32)."""
    cut = []
    for name in ("chelsea.png", "coffee.png", "astronaut.png"):
        with Image.open(SKIMAGE / name) as photograph:
            pixels = torch.from_numpy(np.array(photograph.convert("RGB"))).permute(2, 0, 1)
        cut.append(pixels.unfold(1, 32, 32).unfold(2, 32, 32).flatten(1, 2).transpose(0, 1))
    cut = torch.cat(cut)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[: 2 * N]]


def blurred(images):
    return F.avg_pool2d(F.pad(images.float(), (2, 2, 2, 2), "replicate"), 5, 1).round().to(torch.uint8)


def noise(images):
    return torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def grey(images):
    return images.float().mean(1, keepdim=True).to(torch.uint8)


def test_metrics_order_real_blurred_and_noise(patches):
    """Noise is further from the real images than their other half in every metric. Blurring shows in features, in fine
    patches, and as lost variety; whole images as vectors hardly see it."""
    real, other = patches[:N], patches[N:]
    measure = metrics.Evaluator(real, ["kid", "precision", "recall", "kid_pixels", "swd", "swd_pyramid"], n=N)
    same, blur, far = (measure(lambda n, fake=fake: fake) for fake in (other, blurred(other), noise(other)))
    for name in ("kid_pixels", "swd", "swd_pyramid"):
        assert same[name].value < far[name].value / 2, name
    kid = [result["kid_effnetlite0"] for result in (same, blur, far)]
    assert abs(kid[0].value) < 2 * kid[0].spread < kid[1].value / 2 < kid[2].value / 4
    fine = [result["swd_pyramid"].detail["levels"][32] for result in (same, blur, far)]
    assert fine[0] < fine[1] / 2 < fine[2] / 4
    recall, precision = (
        [r[f"{name}_effnetlite0"].value for r in (same, blur, far)] for name in ("recall", "precision")
    )
    assert recall[0] > 0.7 > 0.3 > recall[1] > recall[2] == 0
    assert precision[0] > 0.7 > precision[2] == 0
    assert [result.n_real for result in same.values()] == [N] * 6


def test_face_rate_orders_faces_and_noise():
    faces = torch.from_numpy(np.uint8(np.load(SKIMAGE / "lfw_subset.npy")[:100] * 255))[:, None]
    measure = metrics.Evaluator(faces, ["face_rate"], n=100)
    for fake, low, high in ((faces, 0.98, 1.0), (blurred(faces), 0.5, 1.0), (noise(faces), 0.0, 0.02)):
        (result,) = measure(lambda n, fake=fake: fake).values()
        assert low <= result.value <= high
        assert result.detail["real"] >= 0.98
    assert any("CelebA" in note for note in result.notes)
    assert any("grey images" in note for note in result.notes)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_frechet_distance_of_pixels_and_of_real_inception_features(tmp_path, patches):
    """`fid` runs the user's network; its mean and covariance give the distance."""
    images = patches[:, :, ::8, ::8]  # 48 pixels

    class Eight(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean((2, 3)).repeat(1, 683)[:, :2048]

    torch.jit.script(Eight()).save(tmp_path / "weights.pt")
    options = {"n": N, "fid_weights": tmp_path / "weights.pt"}
    with pytest.raises(ValueError, match=r"n: wanted at least 2049 images for fid \(a covariance .* KID does with few"):
        metrics.Evaluator(images, ["fid"], **options)
    got = metrics.evaluate(lambda n: images[N:], images[:N], ["fd_pixels", "kid_inception"], **options)
    floats = (images.flatten(1) / 127.5 - 1).split(N)
    kept = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert got["fd_pixels"] == pytest.approx(metrics.frechet_distance(*floats), rel=1e-4)
    means = [x.float().mean((2, 3)).repeat(1, 683)[:, :2048] for x in (images[:N][kept], images[N:])]
    assert got["kid_inception"] == pytest.approx(metrics.kid(*means).value, rel=1e-4)


def test_a_value_is_the_same_alone_and_among_others(patches):
    real, fake = patches[:N], blurred(patches[N:])
    names = ["kid_pixels", "recall_pixels", "swd_pyramid", "swd"]
    together = metrics.evaluate(lambda n: fake[:n], real, names, n=100, seed=3)
    assert list(together) == names
    for name in names:
        assert metrics.evaluate(lambda n: fake[:n], real, [name], n=100, seed=3) == {name: together[name]}
    assert metrics.evaluate(lambda n: fake[:n], real, names, n=100, seed=4) != together


def test_features_of_the_real_images_are_computed_once(patches, monkeypatch):
    counts = []
    extract = features.extract
    monkeypatch.setattr(evaluator, "extract", lambda e, images: counts.append(len(images)) or extract(e, images))
    measure = metrics.Evaluator(patches[:110], ["kid_pixels", "precision_pixels"], n=100)
    for _ in range(2):
        measure(lambda n: patches[:n])
    assert counts == [100] * 3


def test_bytes_and_floats_are_the_same_images(patches):
    real, fake = patches[:N], patches[N:]
    names = ["swd", "kid_pixels"]
    wanted = metrics.evaluate(lambda n: fake, real, names, n=N)
    assert metrics.evaluate(lambda n: fake / 127.5 - 1, real / 127.5 - 1, names, n=N) == wanted
    assert torch.equal(to_bytes("x", torch.full((1, 1, 1, 1), 1.0005)), torch.full((1, 1, 1, 1), 255))


def test_table_is_complete():
    assert set(table.SHORT.values()) <= set(metrics.METRICS)
    assert {row.better for row in metrics.METRICS.values()} == {"lower", "higher"}
    assert [name for name in metrics.METRICS if name.startswith("fid")] == ["fid"]
    assert metrics.METRICS["fid"].wants == "fid_weights"
    for name, row in metrics.METRICS.items():
        assert row.name == name
        assert row.doc
        assert any(letter.isdigit() for letter in row.source)
    assert table.find("kid").name == "kid_effnetlite0"


@pytest.mark.parametrize(
    ("real", "names", "options", "message"),
    [
        (150, ["fid2"], {}, "metrics: wanted one of kid_effnetlite0, .*, got 'fid2'"),
        (150, [], {}, "names: wanted at least one metric, got none"),
        (99, ["kid_pixels"], {}, "real: wanted at least 100 images for kid_pixels"),
        (150, ["swd"], {"n": 99}, "n: wanted at least 100 images for swd .*, got 99"),
        (150, ["fd_pixels"], {}, "real: wanted at least 193 images for fd_pixels .*got 150"),
        (150, ["fid"], {}, "fid_weights: wanted a file of Inception weights for fid"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_sampling(real, names, options, message):
    with pytest.raises(ValueError, match=message):
        metrics.Evaluator(torch.zeros(real, 3, 8, 8), names, **options)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.full((100, 1, 8, 8), float("nan")), ValueError, "sampler: wanted finite values in"),
        (torch.full((100, 1, 8, 8), 3.0), ValueError, r"sampler: wanted finite values in \[-1, 1\], got .* 3 to 3"),
        (
            torch.zeros(90, 1, 8, 8),
            ValueError,
            r"sampler: wanted images of shape \(100, 1, 8, 8\), got \(90, 1, 8, 8\)",
        ),
        (torch.zeros(100, 2, 8, 8), ValueError, r"sampler: wanted images of shape \(N, 1 or 3, H, W\)"),
        (torch.zeros(100, 1, 8, 8, dtype=torch.int64), TypeError, "sampler: wanted uint8 or floating-point images"),
        ([1], TypeError, "sampler: wanted a torch.Tensor, got list"),
    ],
)
def test_samples_that_are_no_images_are_refused(images, error, message):
    measure = metrics.Evaluator(torch.zeros(100, 1, 8, 8), ["swd"], n=100)
    with pytest.raises(error, match=message):
        measure(lambda n: images)


def test_reconstruction_needs_a_generator():
    measure = metrics.Evaluator(torch.zeros(100, 1, 8, 8), ["mre"], n=100)
    with pytest.raises(ValueError, match="generator: wanted the generator and nz, which mre inverts"):
        measure(lambda n: torch.zeros(n, 1, 8, 8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    small = ["--ngf", "4", "--ndf", "4", "--nz", "8", "--batch-size", "4", "--log-every", "1"]
    assert cli.main(["train", "--out", str(out), "--steps", "1", *small]) == 0
    return out


def run(capsys, *arguments):
    code = cli.main(["evaluate", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_command_prints_and_writes(trained, tmp_path, capsys):
    """The report has what it promises, in the table and in the file; a second run repeats it to the bit."""
    reports = []
    for name in ("one", "two"):
        code, text, errors = run(
            capsys, trained, "--metrics", "swd,kid_pixels,face_rate,mre", "--n", 130, "--seed", 5,
            "--mre-images", 2, "--device", "cpu", "--out", tmp_path / f"new/{name}.json",
        )  # fmt: skip
        assert (code, errors) == (0, "")
        reports.append(json.loads((tmp_path / f"new/{name}.json").read_text()))
    assert reports[0] == reports[1]
    assert not list(tmp_path.rglob("*.tmp"))
    report = reports[0]
    assert report["checkpoint"]["sha256"] == disk.sha256(trained / "checkpoints/step_00000001/ema.safetensors")
    assert (report["checkpoint"]["step"], report["seed"], report["n"]) == (1, 5, 130)
    assert {"gpkernels", "torch", "python", "facenet-pytorch"} <= set(report["versions"])
    assert report["data"] == {"name": "lfw-mini", "part": "training", "images": 100}
    rows = {row["metric"]: row for row in report["metrics"]}
    assert list(rows) == ["swd", "kid_pixels", "face_rate_onet", "mre"]
    assert [row["n_real"] for row in rows.values()] == [100, 100, 100, 2]
    assert rows["kid_pixels"]["spread"] > 0
    assert rows["kid_pixels"]["detail"] == {"subsets": 100, "size": 50}
    assert rows["face_rate_onet"]["extractor"].startswith("onet.pt (facenet-pytorch ")
    assert len(rows["mre"]["detail"]["per_image"]) == 2
    for name, row in rows.items():
        assert f"{name} " in text
        assert f"{row['value']:.5g}" in text
    for note in ("trained partly on CelebA", "images the model was trained on", "grey images repeated"):
        assert note in text


def test_command_s_numbers_are_those_of_the_library(trained, tmp_path, capsys):
    run(capsys, trained / "checkpoints/newest", "--metrics", "swd", "--n", 100, "--device", "cpu")
    report = json.loads((trained / "evaluation.json").read_text())
    generator, config, _ = checkpoint.load_generator(trained)
    z = torch.randn(100, config.nz, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fake = generator(z)
    real = torch.from_numpy(data.load(TrainConfig()).images)
    wanted = metrics.sliced_wasserstein(real / 127.5 - 1, to_bytes("fake", fake) / 127.5 - 1)
    assert report["metrics"][0]["value"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("z", ["normal", "uniform"])
def test_mre_starts_from_the_checkpoint_s_own_z(trained, tmp_path, capsys, monkeypatch, z):
    generator, _ = models.build(TrainConfig(ngf=2, ndf=2, nz=8), 1, 32)
    for weight in generator.eval().parameters():
        weight.data *= 10  # untrained, it gives nearly the same image for every z
    monkeypatch.setattr(checkpoint, "load_generator", lambda path: (generator, TrainConfig(nz=8, z=z), 7))
    options = [
        "--metrics",
        "mre",
        "--n",
        100,
        "--mre-images",
        2,
        "--device",
        "cpu",
        "--out",
        tmp_path / "evaluation.json",
    ]
    assert run(capsys, trained, *options)[0] == 0
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    kept = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:2]
    real = torch.from_numpy(data.load(TrainConfig()).images[kept.numpy()]) / 127.5 - 1
    wanted = metrics.minimum_reconstruction_error(generator, real, 8, z=z)
    assert row["detail"]["per_image"] == pytest.approx(wanted.tolist(), rel=1e-5)


class Labelled:
    """A generator of flat images whose grey tells the label."""

    def __call__(self, z, y):
        assert z.shape == (len(y), 8)
        return (y[:, None, None, None] / 4 + 0 * z.sum()).expand(-1, 1, 32, 32)

    def to(self, device):
        return self

    def requires_grad_(self, flag):
        return self


class Split(data.ImageSet):
    """As data with labels and a held-out part: a quarter has label 1."""

    labels = None

    def held_out(self):
        images = Split("held out", self.images[:100] // 2)
        images.labels = np.arange(100) % 4 // 3
        return images


def test_labels_have_the_real_frequencies_and_held_out_images_are_used(trained, tmp_path, capsys, monkeypatch):
    to = ["--out", tmp_path / "evaluation.json"]
    config = TrainConfig(nz=8, condition="concat")
    monkeypatch.setattr(checkpoint, "load_generator", lambda path: (Labelled(), config, 7))
    images = np.zeros((200, 1, 32, 32), np.uint8)
    monkeypatch.setattr(checkpoint, "images", lambda path: {"fingerprint": Split("all", images).fingerprint()})
    load = data.load
    monkeypatch.setattr(data, "load", lambda config: Split("all", images))
    evaluators = []

    class Spy(metrics.Evaluator):
        def __call__(self, sampler, **options):
            evaluators.append((self, sampler(4000)))
            return super().__call__(sampler, **options)

    monkeypatch.setattr(command, "Evaluator", Spy)
    code, text, errors = run(capsys, trained, "--metrics", "swd,mre", "--n", 100, "--mre-images", 3, *to)
    assert (code, errors) == (0, "")
    assert "100 held-out images" in text
    assert "labels drawn with the frequencies of the real images'" in text
    ((measure, fake),) = evaluators
    grey_of_one = to_bytes("x", torch.full((1, 1, 1, 1), 0.25)).item()
    assert (fake == grey_of_one).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert measure.labels.double().mean() == 0.25
    monkeypatch.setattr(data, "load", load)
    assert "--condition concat: wanted data with labels" in run(capsys, trained, "--data", "lfw-mini", *to)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda t, p: [p / "none"], "/none, which does not exist"),
        (lambda t, p: [t, "--metrics", "inception_score"], "metrics: wanted one of kid_effnetlite0"),
        (lambda t, p: [t, "--metrics", "fd"], "wanted at least 1281 images for fd_effnetlite0"),
        (lambda t, p: [t, "--metrics", "fid"], "fid_weights: wanted a file of Inception weights"),
        (lambda t, p: [t, "--metrics", "fid", "--fid-weights", p / "none.pth"], "none.pth, which does not exist"),
        (lambda t, p: [t, "--metrics", ""], "names: wanted at least one metric"),
        (lambda t, p: [t, "--n", 0], "--n: wanted a whole number >= 1, got 0"),
        (lambda t, p: [t, "--seed", -1], "--seed: wanted 0 to 2**31 - 1, got -1"),
        (lambda t, p: [t, "--data", "imagenet"], "--data: wanted lfw-mini"),
        (lambda t, p: [t, "--device", "tpu9"], "--device: wanted a device torch can use"),
        (lambda t, p: [t, "--metrics", "swd", "--n", "99"], "n: wanted at least 100 images for swd"),
    ],
)
def test_what_a_person_can_put_right_is_one_line(trained, tmp_path, capsys, arguments, message):
    code, _, errors = run(capsys, *arguments(trained, tmp_path))
    assert code == 2
    assert errors.startswith("gpkernels: error: ")
    assert errors.count("\n") == 1
    assert message in errors


def test_other_data_is_said_to_be_other(trained, capsys, monkeypatch):
    loaded = []
    images = np.arange(100, dtype=np.uint8)[:, None, None, None].repeat(32, 2).repeat(32, 3)
    monkeypatch.setattr(data, "load", lambda config: loaded.append(config) or data.ImageSet("x", images))
    code, text, _ = run(capsys, trained, "--data", "folder:elsewhere", "--metrics", "swd", "--n", 100)
    assert code == 0
    assert "100 other images of folder:elsewhere" in text
    assert "whether it was trained on them is not known" in text
    assert (loaded[0].data, loaded[0].image_size) == ("folder:elsewhere", 32)


def test_held_out_is_what_the_checkpoint_s_own_data_holds_out(tmp_path, capsys):
    """Of other data it is the test part, on which the model may have been trained."""
    celeba = trees.celeba(tmp_path / "data", 300)
    small = ["--ngf", "4", "--ndf", "4", "--nz", "8", "--batch-size", "4", "--steps", "1", "--tracker", "none"]
    folder, own = f"folder:{celeba / 'celeba/img_align_celeba'}", f"celeba:{celeba}"
    for name, data_set in (("folder", folder), ("own", own)):
        flags = ["--data", data_set, "--image-size", "32", "--out", str(tmp_path / name), "--no-report", *small]
        assert cli.main(["train", *flags]) == 0
    capsys.readouterr()
    usual = ("--metrics", "swd", "--n", 100, "--device", "cpu")
    other = "whether it was trained on them is not known"
    code, text, _ = run(capsys, tmp_path / "folder", "--data", own, *usual)
    assert code == 0
    assert f"100 other test images of {own}" in text
    assert other in text
    (tmp_path / "data").rename(tmp_path / "moved")
    for flags in ((), ("--data", f"celeba:{tmp_path / 'moved'}")):
        if not flags:
            (tmp_path / "data").symlink_to(tmp_path / "moved")
        code, text, _ = run(capsys, tmp_path / "own", *flags, *usual)
        assert code == 0
        assert "100 held-out images of celeba:" in text
        assert other not in text


def test_images_that_a_program_gave_are_not_taken_for_the_config_s(tmp_path, capsys):
    """Said where nobody named the data; the report says it as well."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 32, 32), np.uint8)
    settings = {"ngf": 4, "ndf": 4, "nz": 8, "batch_size": 4, "steps": 1}
    Trainer(TrainConfig(**settings), data.ImageSet.from_arrays(pixels, name="my faces"), tmp_path).run()
    usual = ("--metrics", "swd", "--n", 100, "--device", "cpu")
    code, text, _ = run(capsys, tmp_path, *usual)
    assert code == 0
    assert "100 other images of lfw-mini" in text
    assert "trained on images that a program gave it ('my faces', 40 images), not on lfw-mini" in text
    code, text, _ = run(capsys, tmp_path, "--data", "lfw-mini", *usual)
    assert code == 0
    assert "whether it was trained on them is not known" in text
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "trained on images that a program gave it ('my faces', 40 images)" in capsys.readouterr().err
    page = (tmp_path / "report.html").read_text()
    assert "trained on images that a program gave it (&#x27;my faces&#x27;, 40 images), not on lfw-mini" in page
    assert "Not the config&#x27;s own, but the program&#x27;s that trained: images my faces (40)." in page


def test_colour_data_for_a_grey_checkpoint_is_refused(trained, tmp_path, capsys):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "one.png")
    code, _, errors = run(capsys, trained, "--data", f"folder:{tmp_path}", "--metrics", "swd")
    assert code == 2
    assert "--data: wanted images of shape (1, 32, 32), as the checkpoint makes, got (3, 32, 32)" in errors


def test_a_diverged_generator_is_refused(trained, tmp_path, capsys):
    state = checkpoint.load(trained)
    state["ema"] = {name: value * float("nan") if value.is_floating_point() else value for name, value in
                    state["ema"].items()}  # fmt: skip
    checkpoint.save(tmp_path, state)
    code, _, errors = run(capsys, tmp_path, "--metrics", "swd")
    assert code == 2
    assert "checkpoint: its generator does not give images (images: wanted finite values in [-1, 1]" in errors


def test_help_lists_every_metric(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert all(name in text and row.source in text for name, row in metrics.METRICS.items())
