"""Labels: read with their images, kept with them, known in part; runs with a condition."""

import itertools
import json

import critics
import numpy as np
import oracles
import pytest
import torch
import trees
from PIL import Image
from small_runs import stopped_after
from threads import one_thread  # noqa: F401

from gpkernels import cli
from gpkernels.errors import UserError
from gpkernels.training import TrainConfig, Trainer, checkpoint, data
from gpkernels.training.data.image_set import WHOLE, Shard


def config(**settings):
    return TrainConfig(**{"batch_size": 4, "image_size": 32, **settings})


def painted(root, count=12):
    """PNG files all of one value, 10 times the index, in three sub-folders whose names are not in their order."""
    for index in range(count):
        file = root / ("zebra", "ant", "Bear")[index % 3] / f"{index:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (10 * index,) * 3).save(file)
    return root


def painted_label(image):
    """The number of the class among "Bear", "ant", "zebra", from the pixels."""
    return (2, 1, 0)[round(float(image.mean())) // 10 % 3]


def test_sub_folders_are_classes(tmp_path):
    found = data.load(config(data=f"folder:{painted(tmp_path)}"))
    assert found.class_names == ("Bear", "ant", "zebra")
    assert found.labels.tolist() == [painted_label(image) for image in found.images]
    assert found.held_out() is None


def test_a_skipped_image_takes_its_label_along(tmp_path):
    painted(tmp_path)
    broken = tmp_path / "ant/004.png"
    broken.write_bytes(broken.read_bytes()[:60])
    found = data.load(config(data=f"folder:{tmp_path}"))
    assert len(found.images) == len(found.labels) == 11
    assert "004.png" in found.skipped[0]
    assert found.labels.tolist() == [painted_label(image) for image in found.images]


def test_folders_without_classes_have_no_labels(tmp_path):
    painted(tmp_path / "all", 12)
    assert data.load(config(data=f"folder:{tmp_path}")).labels is None  # one sub-folder
    trees.picture(tmp_path / "all/loose.png")
    mixed = data.load(config(data=f"folder:{tmp_path / 'all'}"))
    assert (mixed.labels, mixed.classes) == (None, 0)
    with pytest.raises(UserError, match=r"--condition: wanted data with labels, got all without"):
        mixed.batch_labels(config(), 0)


def smiling(root):
    """CelebA whose attribute rows are in another order than its images: Smiling where the number ends in 2, 3 or 5."""
    trees.celeba(root)
    names = [f"{index + 1:06d}.jpg" for index in range(12)]
    rows = [f"{name} -1  {1 if name[5] in '235' else -1} 1\n" for name in reversed(names)]
    (root / "celeba/list_attr_celeba.txt").write_text("12\nBald Smiling Young\n" + "".join(rows))
    return f"celeba:{root}"


def test_attributes_are_matched_by_file_name(tmp_path):
    found = data.load(config(data=smiling(tmp_path), label_attribute="Smiling", split="all"))
    assert found.labels.tolist() == [0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert found.class_names == ("not Smiling", "Smiling")
    trees.picture(tmp_path / "celeba/img_align_celeba/000002.jpg", (100, 100))  # is skipped
    found = data.load(config(data=f"celeba:{tmp_path}", label_attribute="Smiling", max_images=2))
    assert found.labels.tolist() == [0]
    held_out = found.held_out()  # 9 to 12
    assert held_out.labels.tolist() == [0, 0, 0, 1]
    assert held_out.held_out() is None
    assert data.load(config(data=f"celeba:{tmp_path}", split="all")).held_out() is None
    assert data.load(config(data=f"celeba:{tmp_path}")).labels is None


def bad_attributes(root, how):
    name, file = smiling(root), root / "celeba/list_attr_celeba.txt"
    text = file.read_text()
    if how == "missing":
        file.unlink()
    elif how == "short row":
        file.write_text(text.replace("000003.jpg -1  1 1", "000003.jpg -1  1"))
    elif how == "value":
        file.write_text(text.replace("000003.jpg -1  1 1", "000003.jpg -1  0 1"))
    elif how == "another image":
        file.write_text(text.replace("000003.jpg", "999999.jpg"))
    return name


@pytest.mark.parametrize(
    ("how", "attribute", "message"),
    [
        ("", "Sad", "--label-attribute: wanted one of Bald, Smiling, Young, got 'Sad'"),
        ("missing", "Smiling", "--label-attribute: wanted .*list_attr_celeba.txt, which is missing"),
        ("short row", "Smiling", "a name and 3 times 1 or -1 in the rows of .*, got '000003.jpg -1 1'"),
        ("value", "Smiling", "a name and 3 times 1 or -1 in the rows of .*, got '000003.jpg -1 0 1'"),
        ("another image", "Smiling", "wanted a row for each image in .*, got none for 000003.jpg"),
    ],
)
def test_bad_attributes_are_named(tmp_path, how, attribute, message):
    with pytest.raises(UserError, match=message):
        data.load(config(data=bad_attributes(tmp_path, how), label_attribute=attribute))


@pytest.fixture(scope="module")
def garments(tmp_path_factory):
    return data.load(config(data=f"fashion-mnist:{trees.fashion(tmp_path_factory.mktemp('fashion'))}"))


def test_labels_follow_images_through_shuffling_flips_and_shifts(garments):
    settings, seen = config(batch_size=7, seed=5, shift=2), set()
    for step in range(20):
        images = garments.batch(settings, step, torch.Generator().manual_seed(step))
        labels, known = garments.batch_labels(settings, step)
        pixels = (images[:, 0, 16, 16] + 1) * 127.5
        assert ((pixels - 5) / 20).round().tolist() == labels.tolist()
        assert labels.dtype == torch.int64
        assert known.all()
        assert known.dtype == torch.bool
        seen.add(tuple(labels.tolist()))
    assert len(seen) > 15


@pytest.mark.parametrize("seed", [0, 3, 2**31 - 1])
def test_known_labels_are_equally_many_of_each_class(garments, seed):
    def known(count, seed=seed):
        return garments.known(config(labels=count, condition="classes", seed=seed))

    assert np.bincount(garments.labels[known(20)]).tolist() == [2] * 10
    assert np.array_equal(known(20), known(20))
    assert (known(20) <= known(40)).all()  # fewer labels are among more
    assert not np.array_equal(known(20), known(20, seed=seed // 2 + 7))
    assert known(60).all()


def numbered(garments):
    """60 images of one pixel, its value their number, with the labels of the garments."""
    images = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1)
    return data.ImageSet("numbers", images, labels=garments.labels, class_names=garments.class_names)


def numbers_of(images, settings, step, shard=WHOLE):
    pixels = images.batch(settings, step, torch.Generator(), shard)
    return ((pixels + 1) * 127.5).flatten().round().long().tolist()


@pytest.mark.parametrize("batch_size", [2, 5, 6, 64])
def test_half_of_the_images_have_a_known_label(garments, batch_size):
    """They take turns with the others; each kind comes in shuffled passes of its own, in which none is missing."""
    settings = config(labels=20, condition="classes", batch_size=batch_size)
    images, stream = numbered(garments), []
    wanted = garments.known(settings)
    for step in range(-(-240 // batch_size)):
        chosen = numbers_of(images, settings, step)
        known = images.batch_labels(settings, step)[1]
        assert known.tolist() == wanted[chosen].tolist()
        assert images.batch_labels(settings, step)[0].tolist() == garments.labels[chosen].tolist()
        stream += chosen
    for first, known in ((0, wanted), (1, ~wanted)):
        members, taken = np.flatnonzero(known).tolist(), stream[first:240:2]
        passes = [taken[i : i + len(members)] for i in range(0, 120, len(members))]
        assert all(sorted(images) == members for images in passes)
        assert len(set(map(tuple, passes))) == len(passes) > 1
    again = numbers_of(numbered(garments), settings, 3)  # one that has seen no other step
    assert again == stream[3 * batch_size :][:batch_size]


def test_parts_of_a_half_labelled_batch_are_the_whole(garments):
    settings, images = config(labels=20, condition="classes", batch_size=12), numbered(garments)
    parts = [numbers_of(images, settings, 4, Shard(index, 3)) for index in range(3)]
    assert list(itertools.chain(*parts)) == numbers_of(images, settings, 4)
    assert [garments.known(settings)[part].tolist() for part in parts] == 3 * [[True, False, True, False]]


def test_with_every_label_known_there_is_one_stream(garments):
    settings, images = config(labels=60, condition="classes", batch_size=12), numbered(garments)
    seen = itertools.chain(*(numbers_of(images, settings, step) for step in range(5)))
    assert sorted(seen) == list(range(60))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": 25}, "--labels: wanted a multiple of the 10 classes, got 25"),
        ({"labels": 70}, "--labels: wanted at least 7 images of each class, got 6 of 'T-shirt/top'"),
        ({"max_images": 3}, "--condition classes: wanted images of every class, got none of 'Pullover'"),
        ({"data": "lfw-mini"}, r"--condition classes: wanted data with labels \(fashion-mnist, folder:PATH with a"),
    ],
)
def test_labels_that_do_not_suffice_are_named(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        data.load(config(**{"data": f"fashion-mnist:{trees.fashion(tmp_path)}", "condition": "classes", **settings}))


SMALL = {"ngf": 2, "ndf": 2, "batch_size": 4, "nz": 8, "log_every": 1}


def trainer(images, out, *, resume=None, **settings):
    return Trainer(TrainConfig(**{**SMALL, **settings}), images, out, resume=resume)


@pytest.mark.parametrize("condition", ["concat", "projection", "classes"])
def test_a_conditional_critic_step_is_the_formula(garments, tmp_path, condition):
    """As test_training's, with the labels of the real images for both, in the penalty too."""
    run = trainer(garments, tmp_path, margin=0.01, condition=condition, penalty="r1", penalty_axes="sample")
    settings, critic = run.config, run.critic
    draws = torch.Generator().manual_seed(1)
    real, y = garments.batch(settings, 0, draws), garments.batch_labels(settings, 0)[0]
    generator = trainer(garments, tmp_path, condition=condition).generator
    with torch.no_grad():
        fake = generator(torch.randn(4, 8, generator=draws), y)
    a = 0.01 * (real - fake).abs().sum((1, 2, 3)) + critic(real, y) - critic(fake, y)
    loss = a.clamp(min=0).mean() + 5 * oracles.gradient_penalty(lambda x: critic(x, y), real, "squared")
    wanted = critics.parameter_gradients(loss, critic)
    assert run.train_step()["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for parameter, grad in zip(critic.parameters(), wanted, strict=True):
        moment = run.optimizers["critic"].state[parameter]["exp_avg"]
        torch.testing.assert_close(moment, 0.5 * grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("confidence", [0.0, 0.5])
def test_unknown_labels_are_the_critics_own(garments, tmp_path, confidence):
    """With one known label a class, the step takes the critic's prediction for the other images where it is sure."""
    settings = {"condition": "classes", "labels": 10, "batch_size": 40, "unlabelled_weight": 0.25}
    run = trainer(garments, tmp_path, unlabelled_confidence=confidence, **settings)
    run.critic.head.weight.data *= 3e4  # untrained, it is sure of nothing
    real = garments.batch(run.config, 0, torch.Generator().manual_seed(1))
    labels, known = garments.batch_labels(run.config, 0)
    batch = run._batch(0, torch.Generator().manual_seed(1))
    (y,) = batch.y
    assert torch.equal(batch.real, real)
    assert torch.equal(y[known], labels[known])
    assert torch.equal(y[~known], run.critic.logits(real)[~known].argmax(1))
    sure = run.critic.logits(real).softmax(1).amax(1) >= confidence
    assert torch.equal(batch.weights, torch.where(known, 1.0, 0.25 * sure))
    assert sure.any()
    assert sure.all() == (confidence == 0)
    assert known.tolist() == [True, False] * 20


def test_labels_go_with_their_images_through_several_critic_steps(garments, tmp_path, monkeypatch):
    run = trainer(garments, tmp_path, condition="concat", critic_steps=3, fresh_z=True, penalty="r1+r2")
    seen, objective = [], run.objective.critic
    monkeypatch.setattr(run.objective, "critic", lambda *given: seen.append(given[2]) or objective(*given))
    run.train_step()
    run.train_step()
    assert len(seen) == 6
    for number, batch in enumerate(seen):
        pixels = (batch.real[:, 0, 16, 16] + 1) * 127.5
        assert ((pixels - 5) / 20).round().tolist() == batch.y[0].tolist()
        assert torch.equal(batch.y[0], garments.batch_labels(run.config, number)[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"condition": "classes", "labels": 20, "critic": "cost-model"},
        {"condition": "projection", "generator": "resnet", "critic": "resnet", "spectral_norm": True},
    ],
    ids=str,
)
def test_conditional_runs_resume_to_the_bit(garments, tmp_path, settings):
    whole = trainer(garments, tmp_path / "whole", steps=5, **settings)
    whole.run()
    first = trainer(garments, tmp_path / "parts", steps=5, **settings)
    assert not stopped_after(first, 2).run()
    torch.manual_seed(99)
    second = trainer(garments, tmp_path / "parts", steps=5, resume=checkpoint.load(tmp_path / "parts"), **settings)
    second.run()
    states = [checkpoint.load(run.out) for run in (whole, second)]
    assert states[0]["classes"] == 10
    for net in ("generator", "ema", "critic"):
        for name, value in states[0][net].items():
            assert torch.equal(value, states[1][net][name]), name


def test_samples_go_through_the_classes(garments, tmp_path):
    run = trainer(garments, tmp_path, condition="concat")
    z = torch.randn(12, 8)
    images = run.sample(z)
    y = torch.tensor([*range(10), 0, 1])
    assert torch.equal(images, run.ema(z, y))
    run.save()
    loaded, _, _ = checkpoint.load_generator(tmp_path)
    assert torch.equal(loaded(z, y), images)


def test_the_command_line_trains_with_labels(tmp_path, capsys):
    out = tmp_path / "run"
    small = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [
        "train",
        "--data",
        f"fashion-mnist:{trees.fashion(tmp_path / 'clothes')}",
        "--out",
        str(out),
        "--steps",
        "2",
    ]
    assert cli.main([*command, "--condition", "classes", "--labels", "20", *small]) == 0
    assert json.loads((out / "config.json").read_text())["labels"] == 20
    assert cli.main(["sample", str(out), "--n", "300", "--out", str(tmp_path / "grid.png")]) == 0
    state = checkpoint.load(out)
    state["classes"] = 7
    checkpoint.save(out, state)
    assert cli.main(["train", "--out", str(out), "--resume", "--steps", "3"]) == 2
    assert "--data: wanted 7 classes, as the checkpoint was trained, got 10" in capsys.readouterr().err
