"""The presets: what they say, a step of the historic WGAN by hand, and that each learns real images."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from threads import one_thread  # noqa: F401

from gpkernels import metrics
from gpkernels.errors import UserError
from gpkernels.training import PRESETS, Learner, Trainer, data, from_preset, models
from gpkernels.training.objective import Penalties

SIZES = {"ngf": 8, "ndf": 8, "batch_size": 16, "image_size": 32}

LEARN = {
    "ls-gan-pg": (200, 1.85, {"lr": 2e-3}),
    "ls-gan-pg-mini": (200, 2.2, {"ngf": 16, "ndf": 16, "lr": 1e-3}),
    "ls-gan-pg-cost-model": (200, 1.55, {"lr": 5e-3}),
    "ls-gan": (150, 1.7, {"lr": 5e-3}),
    "ls-gan-cost-model": (200, 1.7, {"lr": 5e-3}),
    "gls-gan": (120, 2.0, {"lr": 2e-3}),
    "cls-gan": (200, 1.25, {"lr": 5e-3}),
    "gan": (150, 1.7, {"lr": 2e-3}),
    "gan-ns": (150, 1.5, {"lr": 2e-3}),
    "dcgan": (150, 1.35, {"lr": 2e-3}),
    "lsgan-least-squares": (200, 1.85, {"lr": 2e-3}),
    "wgan": (80, 2.0, {"lr": 4e-3}),
    "wgan-gp": (70, 1.6, {"lr": 4e-3}),
    "dragan": (200, 1.3, {"ngf": 16, "ndf": 16, "lr": 2e-3}),
    "r1": (120, 2.1, {"lr": 2e-3}),
    "r2": (150, 1.85, {"lr": 2e-3}),
    "sngan": (40, 2.0, {"lr": 2e-3, "ngf": 4, "ndf": 4}),
    "cgan": (120, 1.65, {"lr": 2e-3}),
}
"""Steps, the factor by which the distance falls at least (the worst of three seeds over 1.3, or less), and what is not
the preset's own beside SIZES. With the generator's loss negated the distance does not fall."""


@pytest.fixture(scope="module")
def faces():
    return data.load(from_preset("ls-gan-pg-mini", {}))


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """The faces of lfw-mini turned by 0, 90, 180 and 270 degrees, in a folder a class."""
    root = tmp_path_factory.mktemp("turned")
    file = Path(importlib.util.find_spec("skimage").submodule_search_locations[0]) / "data/lfw_subset.npy"
    for index, image in enumerate(np.load(file)[:100]):
        for turns in range(4):
            path = root / str(90 * turns) / f"{index:03d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.uint8(np.rot90(image, turns) * 255)).save(path)
    return f"folder:{root}"


@pytest.fixture(scope="module")
def labelled(turned):
    """Where labelled images are: Fashion-MNIST if it is installed, else the turned faces."""
    for prefix in (sys.prefix, "/usr"):
        folder = Path(prefix) / "share/datasets/fashion-mnist"
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return f"fashion-mnist:{folder}"
    return turned


def distance(run, images):
    """The sliced Wasserstein distance of 100 samples to the real images; with a condition, class by class, the mean."""
    z = models.draw_z(run.config, 100, torch.Generator().manual_seed(1))
    real = torch.from_numpy(images.images).float() / 127.5 - 1
    found = []
    for label in range(max(1, run.ema.classes)):
        y = torch.full((100,), label) if run.ema.classes else None
        of_class = real if y is None else real[torch.from_numpy(images.labels == label)]
        with torch.no_grad():
            found.append(metrics.sliced_wasserstein(of_class, run.ema(z, y), directions=128))
    return sum(found) / len(found)


def train(name, where, out, *, seed=0, steps=None, **settings):
    """By which factor the distance falls."""
    wanted, _, changed = LEARN[name]
    config = from_preset(name, {**SIZES, **changed, "seed": seed, "data": where, "max_images": 1000, **settings})
    images = data.load(config)
    run = Trainer(config, images, out)
    before = distance(run, images)
    for _ in range(steps or wanted):
        run.train_step()
    return before / distance(run, images)


def test_a_step_of_wgan_is_algorithm_1(faces, tmp_path):
    """Arjovsky et al. 2017: critic steps on images and z of their own, RMSprop, clipping after each, and fresh z."""
    settings = {"ngf": 4, "ndf": 4, "nz": 8, "batch_size": 4, "critic_steps": 3}
    run, twin = (Trainer(from_preset("wgan", settings), faces, tmp_path) for _ in range(2))
    critic, generator, draws = twin.critic, twin.generator, torch.Generator().manual_seed(1)
    optimizers = [torch.optim.RMSprop(net.parameters(), lr=5e-5, alpha=0.99) for net in (critic, generator)]
    for number in range(3):
        real = faces.batch(run.config, number, draws)
        fake = generator(torch.randn(4, 8, generator=draws)).detach()
        optimizers[0].zero_grad()
        (critic(fake).mean() - critic(real).mean()).backward()
        optimizers[0].step()
        for parameter in critic.parameters():
            parameter.data.clamp_(-0.01, 0.01)
    optimizers[1].zero_grad()
    (-critic(generator(torch.randn(4, 8, generator=draws))).mean()).backward()
    optimizers[1].step()
    run.train_step()
    assert max(parameter.abs().max() for parameter in run.critic.parameters()) == 0.01
    for net, wanted in ((run.critic, critic), (run.generator, generator)):
        for parameter, other in zip(net.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)


PUBLISHED = {
    # loss, penalty, optimizer with its rate and betas, batch, critic steps, z, whether the generator's update draws z
    "ls-gan-pg": ("ls-gan", "ls_gan_pg", ("adam", 2e-4, 0.5, 0.999), 64, 1, "normal", False),
    "ls-gan": ("ls-gan", "none", ("adam", 1e-4, 0.5, 0.999), 64, 1, "uniform", False),
    "gls-gan": ("gls-gan", "none", ("adam", 1e-4, 0.5, 0.999), 64, 1, "uniform", False),
    "cls-gan": ("cls-gan", "none", ("adam", 1e-3, 0.5, 0.999), 64, 1, "normal", False),
    "cls-gan-semi": ("cls-gan", "none", ("adam", 1e-3, 0.5, 0.999), 64, 1, "normal", False),
    "dcgan": ("classic-non-saturating", "none", ("adam", 2e-4, 0.5, 0.999), 128, 1, "uniform", False),
    "lsgan-least-squares": ("least-squares", "none", ("adam", 2e-4, 0.5, 0.999), 64, 1, "uniform", False),
    "wgan": ("wasserstein", "none", ("rmsprop", 5e-5), 64, 5, "normal", True),
    "wgan-gp": ("wasserstein", "coupled", ("adam", 1e-4, 0.0, 0.9), 64, 5, "normal", True),
    "dragan": ("classic-non-saturating", "local", ("adam", 1e-4, 0.5, 0.9), 128, 1, "uniform", True),
    "r1": ("classic-non-saturating", "r1", ("rmsprop", 1e-4), 64, 1, "normal", True),
    "r2": ("classic-non-saturating", "r2", ("rmsprop", 1e-4), 64, 1, "normal", True),
    "sngan": ("hinge", "none", ("adam", 2e-4, 0.0, 0.9), 64, 5, "normal", True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name):
    config = from_preset(name, {})
    optimizer = (config.optimizer, config.lr)
    if config.optimizer == "adam":
        optimizer += (config.beta1, config.beta2)
    got = (config.loss, config.penalty, optimizer, config.batch_size, config.critic_steps, config.z, config.fresh_z)
    assert got == PUBLISHED[name]
    if config.penalty != "none":
        assert config.penalty_weight == 10
        (penalty,) = Penalties(config).each
        assert penalty.axes == ("pixel" if name == "ls-gan-pg" else "sample")


def test_every_preset_is_a_config_with_a_source():
    for name, preset in PRESETS.items():
        assert from_preset(name, {}).preset == name
        assert preset.doc
        assert preset.source
    assert set(LEARN) == set(PRESETS) - {"cls-gan-semi"}  # whose classifier is tested below
    with pytest.raises(UserError, match=r"--preset: wanted one of 'ls-gan-pg', .*, got 'wgan-lp'"):
        from_preset("wgan-lp", {})


@pytest.mark.parametrize("name", LEARN)
def test_presets_learn(name, request, tmp_path):
    """The distance to real images falls by the table's factor, at the table's learning rates.

    A limitation: none of them is the preset's own, at which so few steps would move little. Most are ten times as large
    or more, ls-gan's 50 and wgan's 80 times. That the published rates train as well is not shown here.
    """
    where = "lfw-mini"
    if from_preset(name, {}).condition != "none":
        where = request.getfixturevalue("labelled")
    torch.use_deterministic_algorithms(False)
    assert train(name, where, tmp_path) > LEARN[name][1]


def test_a_classifier_learns_from_few_labels(turned):
    """Which way up a face is, from 5 labels a way: the error on images whose labels nobody told, where chance is 0.75.

    Seeds 0 to 2 give 0.08 to 0.14; if every guess counted, however unsure, 0.73 to 0.75: the critic learns its own.
    """
    config = from_preset("cls-gan-semi", {**SIZES, "data": turned, "labels": 20})
    images = data.load(config)
    run = Learner(config, images)
    for _ in range(100):
        run.train_step()
    unknown = ~images.known(config)
    guessed = run.critic.guess(torch.from_numpy(images.images[unknown]).float() / 127.5 - 1).argmax(1)
    assert (guessed.numpy() != images.labels[unknown]).mean() < 0.2
