"""The trainer: losses by hand, a step by hand, repeatable and resumable to the bit, and learning."""

import copy
import dataclasses
import json

import critics
import numpy as np
import oracles
import pytest
import torch
from small_runs import same, stopped_after
from threads import one_thread  # noqa: F401

from gpkernels.errors import UserError
from gpkernels.spectral import spectral_norm_handle
from gpkernels.training import TrainConfig, Trainer, checkpoint, data, models

SMALL = {"ngf": 4, "ndf": 4, "batch_size": 4, "nz": 8, "log_every": 1}


@pytest.fixture(scope="module")
def faces():
    return data.load(TrainConfig())


@pytest.fixture(scope="module")
def halves(faces):
    """16 faces in two classes, the brighter and the darker, and 10 held out: four steps an epoch."""

    def labelled(images, **more):
        bright = images.mean((1, 2, 3)) > np.median(images.mean((1, 2, 3)))
        return data.ImageSet("halves", images, labels=bright.astype(np.int64), class_names=("dark", "bright"), **more)

    return labelled(faces.images[:16], load_held_out=lambda: labelled(faces.images[16:26]))


def trainer(faces, out, *, resume=None, **settings):
    return Trainer(TrainConfig(**{**SMALL, **settings}), faces, out, resume=resume)


def weights(trained):
    state = checkpoint.load(trained.out)
    return {
        f"{net}.{name}": value for net in ("generator", "ema", "critic") for name, value in state[net].items()
    }, state["optimizers"]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("critic", ["dcgan", "cost-model"])
def test_models_have_the_shapes_of_dcgan(size, critic):
    config = TrainConfig(critic=critic, ngf=8, ndf=8)
    generator, net = models.build(config, 3, size)
    images = generator(torch.randn(4, 100))
    assert images.shape == (4, 3, size, size)
    assert images.abs().max() <= 1
    assert net(images).shape == (4,)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == {32: 4, 64: 5}[size]
    assert all(c.bias is None for c in convolutions)
    has_norm = any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert has_norm == (critic == "cost-model")
    assert torch.cat([c.weight.detach().flatten() for c in convolutions]).std() == pytest.approx(0.02, rel=0.05)


def test_a_critic_step_is_the_formula(faces, tmp_path):
    """Adam's first moment after one step is (1 - beta1) times the gradient of the loss written out by hand."""
    run = trainer(faces, tmp_path, margin=0.01, gamma=0.3, slope=-0.5, loss="gls-gan")
    config, critic = run.config, run.critic
    draws = torch.Generator().manual_seed(1)
    real = faces.batch(config, 0, draws)
    with torch.no_grad():
        fake = run.generator(torch.randn(4, 8, generator=draws))
    a = 0.01 * (real - fake).abs().sum((1, 2, 3)) + critic(real) - critic(fake)
    loss = torch.maximum(a, -0.5 * a).mean() + 0.3 * critic(real).mean()
    loss = loss + 10 * oracles.gradient_penalty(critic, real, "linear", axes="pixel")
    wanted = critics.parameter_gradients(loss, critic)
    parameters = list(critic.parameters())
    run.generator.load_state_dict(trainer(faces, tmp_path).generator.state_dict())  # undo BatchNorm's update
    terms = run.train_step()
    assert terms["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for parameter, grad in zip(parameters, wanted, strict=True):
        moment = run.optimizers["critic"].state[parameter]["exp_avg"]
        torch.testing.assert_close(moment, 0.5 * grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("penalty", ["ls_gan_pg", "none"])
def test_spectral_norm_of_the_critic(faces, tmp_path, penalty):
    """All its weights are normalised, u and v move once a step, and logging moves nothing."""
    run = trainer(faces, tmp_path, spectral_norm=True, penalty=penalty)
    handle = spectral_norm_handle(run.critic)
    assert len(handle) == 4
    assert len(spectral_norm_handle(run.generator)) == 0
    for _ in range(20):
        run.train_step()
    largest = [torch.linalg.svdvals(handle.layers[name][0].weight.flatten(1))[0].item() for name in handle]
    assert largest == pytest.approx([1.0] * 4, abs=0.05)
    before = {name: value.clone() for name, value in run.critic.state_dict().items()}
    run.grad_norms()
    assert all(torch.equal(value, before[name]) for name, value in run.critic.state_dict().items())


def test_average_follows_the_generator(faces, tmp_path):
    run = trainer(faces, tmp_path)
    before = {name: value.clone() for name, value in run.ema.state_dict().items()}
    run.train_step()
    for name, value in run.generator.state_dict().items():
        if value.dtype.is_floating_point:
            wanted = before[name] + (value - before[name]) * (1 - 1 / 10)
            torch.testing.assert_close(run.ema.state_dict()[name], wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"critic": "cost-model"},
        {"penalty": "coupled", "penalty_axes": "sample"},
        {"penalty": "local", "penalty_interval": 3},
        {"penalty": "none", "loss": "gls-gan", "slope": 0.5},
        {"spectral_norm": True},
        {"spectral_norm": True, "critic": "cost-model", "penalty": "none", "channels_last": False},
        {"optimizer": "rmsprop", "clip": 0.01, "critic_steps": 3, "fresh_z": True, "loss": "wasserstein"},
        {"penalty": "r1+r2", "penalty_axes": "sample", "penalty_interval": 2, "critic_lr": 1e-3},
        {"loss": "relativistic-average", "critic_norm": "batch", "z": "uniform"},
        {"loss": "wasserstein", "spectral_norm": True, "clip": 0.1, "critic_steps": 2},
        {"loss": "cls-gan", "condition": "classes", "labels": 4, "critic_norm": "batch", "gamma": 1.0, "log_every": 4},
    ],
    ids=str,
)
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(faces, halves, tmp_path, settings):
    faces = halves if "condition" in settings else faces
    whole = trainer(faces, tmp_path / "whole", steps=9, **settings)
    assert whole.run()
    first = trainer(faces, tmp_path / "parts", steps=9, **settings)
    assert not stopped_after(first, 4).run()
    torch.manual_seed(99)  # what another process would have
    state = checkpoint.load(tmp_path / "parts")
    second = trainer(faces, tmp_path / "parts", steps=9, resume=state, **settings)
    assert second.step == 4
    assert second.run()
    results = [weights(t) for t in (whole, second)]
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name]), name
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)
    logs = [(t.out / "log.jsonl").read_text() for t in (whole, second)]
    assert logs[0] == logs[1]


def test_a_state_from_before_the_first_step_goes_on_to_the_same_bits(faces, tmp_path):
    """Beside another learner too, whose steps u and v of this one must not notice."""
    run, twin = (trainer(faces, tmp_path, spectral_norm=True, penalty="coupled") for _ in range(2))
    state = copy.deepcopy(run.state_dict())
    for _ in range(3):
        run.train_step()
    torch.manual_seed(99)
    twin.train_step()
    twin.load_state_dict(state)
    for _ in range(3):
        twin.train_step()
    same(twin.state_dict(), run.state_dict())


def test_relativistic_generator_compares_with_the_real_images(faces, tmp_path):
    """Adam's first moment is the gradient of the loss by hand, at the updated critic: both sides against the other's
    mean, roles swapped."""
    run, twin = (trainer(faces, tmp_path, loss="relativistic-average", penalty="none") for _ in range(2))
    run.train_step()
    draws = torch.Generator().manual_seed(1)
    real = faces.batch(run.config, 0, draws)
    fake = twin.generator(torch.randn(4, 8, generator=draws))
    critic = run.critic  # which the generator's update leaves as it is
    scores = critic(real), critic(fake)
    softplus = torch.nn.functional.softplus
    loss = softplus(scores[0] - scores[1].mean()).mean() + softplus(scores[0].mean() - scores[1]).mean()
    wanted = torch.autograd.grad(loss, list(twin.generator.parameters()))
    for parameter, grad in zip(run.generator.parameters(), wanted, strict=True):
        torch.testing.assert_close(
            run.optimizers["generator"].state[parameter]["exp_avg"], 0.5 * grad, rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("interval", [1, 2])
def test_r1_and_r2_together_are_their_sum(faces, tmp_path, interval):
    """Each with the whole weight, at the real and at the generated images; in lazy steps both or neither."""
    settings = {"penalty": "r1+r2", "penalty_axes": "sample", "loss": "relativistic-pairing"}
    run, twin = (trainer(faces, tmp_path, penalty_interval=interval, **settings) for _ in range(2))
    draws = torch.Generator().manual_seed(1)
    real = faces.batch(run.config, 0, draws)
    fake = twin.generator(torch.randn(4, 8, generator=draws)).detach()
    sides = [oracles.gradient_penalty(twin.critic, x, "squared").item() for x in (real, fake)]
    terms = [run.train_step() for _ in range(2)]
    assert terms[0]["penalty"].item() == pytest.approx(interval * 10 * sum(sides) / 2, rel=1e-4)
    assert (terms[1]["penalty"].item() > 0) == (interval == 1)


def test_two_learning_rates_are_each_its_net_s(faces, tmp_path):
    run = trainer(faces, tmp_path, lr=1e-4, critic_lr=4e-4, penalty_interval=3)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in run.optimizers.items()}
    assert rates == {"generator": 1e-4, "critic": pytest.approx(4e-4 * 3 / 4)}  # lazy: i / (i + 1)


def test_classification_error_is_logged_each_epoch(halves, tmp_path):
    """The share of held-out images of which another class has the lower loss, read once."""
    reads = []
    load = halves.load_held_out
    images = dataclasses.replace(halves, load_held_out=lambda: reads.append(1) or load())
    settings = {"loss": "cls-gan", "condition": "classes", "critic_steps": 2, "log_every": 3}
    run = trainer(images, tmp_path, epochs=3, **settings)
    run.run()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    errors = {record["step"]: record["classification_error"] for record in records if "classification_error" in record}
    assert list(errors) == [2, 4, 6]  # 16 images, 4 a batch, 2 batches a step
    assert len(reads) == 1
    held_out = load()
    x, run.critic = torch.from_numpy(held_out.images).float() / 127.5 - 1, run.critic.eval()
    losses = torch.stack([run.critic(x, torch.full((10,), y)) for y in range(2)])
    wrong = losses.argmin(0) != torch.from_numpy(held_out.labels)
    assert errors[6] == wrong.float().mean().item()
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_same_seed_repeats_and_another_differs(faces, tmp_path):
    runs = [trainer(faces, tmp_path / str(i), steps=3, seed=seed) for i, seed in enumerate((1, 1, 2))]
    for run in runs:
        run.run()
    a, b, c = (weights(run)[0]["generator.layers.0.weight"] for run in runs)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_log_lines_after_the_last_checkpoint_are_dropped_on_resume(faces, tmp_path):
    run = trainer(faces, tmp_path, steps=4)
    run.run()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 5}) + "\n")
    again = trainer(faces, tmp_path, steps=6, resume=checkpoint.load(tmp_path))
    again.run()
    lines = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 1e-6, "--lr: wanted 0.0002, as the checkpoint was trained, got 1e-06"),
        ("penalty_interval", 4, "--penalty-interval: wanted 1, as the checkpoint was trained, got 4"),
        ("seed", 5, "--seed: wanted 0, as the checkpoint was trained, got 5"),
    ],
)
def test_a_state_is_refused_with_other_settings(faces, tmp_path, name, value, message):
    """Of which the optimizers, or the order of the images, would go on with the old."""
    trainer(faces, tmp_path, steps=1).run()
    state = checkpoint.load(tmp_path)
    with pytest.raises(UserError, match=message):
        trainer(faces, tmp_path, steps=2, resume=state, **{name: value})
    fresh = trainer(faces, tmp_path / "fresh", **{name: value})
    with pytest.raises(UserError, match=message):
        fresh.load_state_dict(state)
    del state["config"][name]  # as in a checkpoint from before there was this setting: it had the default
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: wanted"):
        fresh.load_state_dict(state)
    others = {"epochs": 3, "accumulate": 2, "keep": 5, "checkpoint_minutes": 1.0, "log_every": 2}
    assert trainer(faces, tmp_path, steps=2, resume=checkpoint.load(tmp_path), **others).run()


def test_run_folder_holds_what_it_promises(faces, tmp_path):
    from PIL import Image

    run = trainer(faces, tmp_path, steps=3)
    run.run()
    assert json.loads((tmp_path / "config.json").read_text())["ngf"] == 4
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert set(record) == {
        "step",
        "epoch",
        "critic_loss",
        "generator_loss",
        "score_real",
        "score_fake",
        "gap",
        "margin",
        "penalty",
        "grad_norm",
        "grad_norm_max",
        "critic_weight_grad",
        "generator_weight_grad",
    }
    with Image.open(tmp_path / "samples/epoch_0001.png") as grid:
        assert grid.size == (8 * 96, 8 * 96)
        shown = np.asarray(grid)[96 : 2 * 96 : 3, 2 * 96 : 3 * 96 : 3]  # row 1, column 2: sample 10, enlarged by 3
    wanted = (run.sample(run.fixed_z)[10, 0].numpy() + 1) * 127.5
    assert np.abs(shown - wanted).max() <= 0.5 + 1e-3
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.width > 500
    assert not list(tmp_path.rglob("*.tmp"))


def test_training_learns_faces(faces, tmp_path):
    """After 400 small steps the generator's images are far nearer to real faces than at initialisation: the
    sliced Wasserstein distance to the real images falls to below half."""

    def distance(images):
        directions = torch.randn(1024, 128, generator=torch.Generator().manual_seed(0))
        directions /= directions.norm(dim=0)
        real = torch.from_numpy(faces.images).float().flatten(1) / 127.5 - 1
        quantiles = torch.linspace(0.01, 0.99, 50)
        projected = [torch.quantile(x.flatten(1) @ directions, quantiles, dim=0) for x in (images, real)]
        return (projected[0] - projected[1]).abs().mean().item()

    torch.use_deterministic_algorithms(False)
    run = trainer(faces, tmp_path, ngf=8, ndf=8, nz=16, batch_size=16, lr=1e-3, ema=0.98, log_every=100)
    z = torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    before = distance(run.sample(z))
    for _ in range(400):
        run.train_step()
    assert distance(run.sample(z)) < before / 2


def test_divergence_stops_with_the_term_that_broke(faces, tmp_path):
    run = trainer(faces, tmp_path, steps=3)
    run.train_step()
    run.save()
    with torch.no_grad():
        next(run.critic.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"training diverged: critic_loss is nan at step 2"):
        run.run()
    assert checkpoint.load(tmp_path)["step"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "softmax"}, "--loss: wanted one of ls-gan, gls-gan, cls-gan, classic-minimax, .*, got 'softmax'"),
        ({"epsilon": 0.0, "loss": "hinge"}, "--epsilon: wanted a number > 0, got 0"),
        ({"epsilon": 2.0}, "--epsilon: wanted 1 for loss 'ls-gan', got 2"),
        ({"epsilon": 2.0, "loss": "relativistic-average"}, "--epsilon: wanted 1 for loss 'relativistic-average'"),
        ({"gamma": 1.0, "loss": "hinge"}, "--gamma: wanted 0 for loss 'hinge'"),
        ({"loss": "cls-gan"}, "--condition: wanted classes for loss 'cls-gan', got none"),
        (
            {"condition": "classes", "loss": "hinge"},
            "--loss: wanted ls-gan, gls-gan, cls-gan for condition classes, got",
        ),
        ({"penalty_interval": 4, "optimizer": "rmsprop"}, "--penalty-interval: wanted 1 for optimizer rmsprop, got 4"),
        (
            {"penalty_per_element": True, "penalty": "r1"},
            "--penalty-per-element: wanted --penalty coupled, which weighs pairs, got r1",
        ),
        (
            {"penalty_norm_eps": 1e-8, "penalty_norm": "l1"},
            "--penalty-norm-eps: wanted --penalty-norm l2, which has a root, got l1",
        ),
        (
            {"penalty_noise": "normal", "penalty": "local"},
            "--penalty-scale: wanted a number for --penalty-noise normal",
        ),
        ({"penalty_noise": "normal"}, "--penalty-noise: wanted --penalty local, which draws noise, got ls_gan_pg"),
        ({"penalty_scale": 0.1}, "--penalty-scale: wanted --penalty local, which draws noise, got ls_gan_pg"),
        ({"slope": 0.5}, "--slope: wanted 0 for loss 'ls-gan'"),
        ({"slope": 2.0, "loss": "gls-gan"}, "--slope: wanted a number <= 1, got 2"),
        ({"penalty": "wgan"}, "--penalty: wanted one of none, coupled"),
        ({"image_size": 48}, "--image-size: wanted 32, 64 or 128, got 48"),
        ({"batch_size": 1}, "--batch-size: wanted at least 2, got 1"),
        ({"lr": float("nan")}, "--lr: wanted a finite number, got nan"),
        ({"lr": float("inf")}, "--lr: wanted a finite number, got inf"),
        ({"margin": float("inf")}, "--margin: wanted a finite number, got inf"),
        ({"epsilon": float("inf"), "loss": "hinge"}, "--epsilon: wanted a finite number, got inf"),
        ({"slope": float("-inf"), "loss": "gls-gan"}, "--slope: wanted a finite number, got -inf"),
        ({"unlabelled_confidence": 1.5}, "--unlabelled-confidence: wanted at most 1, got 1.5"),
        ({"beta1": 1.0}, "--beta1: wanted a number below 1, got 1"),
        ({"seed": 2**31}, "--seed: wanted a number below 2"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)
