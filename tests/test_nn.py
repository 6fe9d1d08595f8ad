"""GradientPenalty: the same penalty as an object, lazy regularisation, presets, state."""

import copy
import pickle

import critics
import pytest
import torch

import gpkernels as gp


def test_equals_the_function():
    critic, real, fake = critics.conv(), critics.images(), critics.images()
    penalty = gp.GradientPenalty("coupled", weight=3.0, form="one_sided", target=0.5)
    got = penalty(critic, real, fake, generator=torch.Generator().manual_seed(1))
    wanted = gp.gradient_penalty(
        critic, real, fake, weight=3.0, form="one_sided", target=0.5, generator=torch.Generator().manual_seed(1)
    )
    critics.assert_same_gradients(got, wanted, critic)
    scores, value = gp.GradientPenalty("r1").score_and_penalty(critic, real)
    torch.testing.assert_close(scores, critic(real))
    torch.testing.assert_close(value, gp.gradient_penalty(critic, real, kind="r1"))


def test_lazy_steps_cost_nothing_and_average_to_the_penalty():
    critic, real, calls = critics.conv(), critics.images(), []
    critic.register_forward_hook(lambda *_: calls.append(1))
    penalty = gp.GradientPenalty("r1", interval=4)
    values = [penalty(critic, real).item() for _ in range(8)]
    assert len(calls) == 2
    assert values[1:4] == values[5:] == [0.0] * 3
    wanted = gp.gradient_penalty(critic, real, kind="r1").item()
    assert sum(values) / 8 == pytest.approx(wanted, rel=1e-12)


def test_lazy_scores_are_there_on_every_step():
    critic, real = critics.conv(), critics.images()
    penalty = gp.GradientPenalty("r1", interval=2)
    (first, due), (second, skipped) = (penalty.score_and_penalty(critic, real) for _ in range(2))
    torch.testing.assert_close(first, second)
    assert due > 0
    assert skipped == 0
    assert second.requires_grad


def test_lazy_adam_correction():
    """lr * i/(i+1) and betas^(i/(i+1)) (Karras et al. 2020, appendix B); nothing changes without laziness."""
    corrected = gp.GradientPenalty("r1", interval=16).lazy_adam(lr=0.0017, betas=(0.0, 0.99))
    assert corrected["lr"] == pytest.approx(0.0016)
    assert corrected["betas"] == (0.0, pytest.approx(0.99 ** (16 / 17)))
    assert gp.GradientPenalty("r1").lazy_adam(lr=1e-3, betas=(0.5, 0.9)) == {"lr": 1e-3, "betas": (0.5, 0.9)}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_phase_survives_copies_and_checkpoints(duplicate, tmp_path):
    critic, real = critics.conv(), critics.images()
    penalty = gp.GradientPenalty("r1", interval=3)
    penalty(critic, real)
    torch.save(penalty.state_dict(), tmp_path / "penalty.pt")
    restored = gp.GradientPenalty("r1", interval=3)
    restored.load_state_dict(torch.load(tmp_path / "penalty.pt", weights_only=True))
    for each in (duplicate(penalty), restored):
        assert [each(critic, real).item() > 0 for _ in range(3)] == [False, False, True]


def test_presets():
    critic, real, fake = critics.conv(), critics.images(), critics.images()
    for name in gp.GradientPenalty.presets:
        assert gp.GradientPenalty.from_preset(name, target=0.0)(critic, real, fake) > 0
    pixel = gp.GradientPenalty.from_preset("ls-gan-pg", weight=2.0)(critic, real)
    torch.testing.assert_close(
        pixel, gp.gradient_penalty(critic, real, kind="ls_gan_pg", form="linear", axes="pixel", weight=2.0)
    )
    with pytest.raises(ValueError, match="name: wanted one of 'wgan-gp'"):
        gp.GradientPenalty.from_preset("wgan")
    with pytest.raises(TypeError):
        gp.GradientPenalty.presets["mine"] = {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "r3"}, ValueError, "kind: wanted one of"),
        ({"form": "cubic"}, ValueError, "form: wanted one of"),
        ({"interval": 0}, ValueError, "interval: wanted a whole number >= 1, got 0"),
        ({"interval": 1.5}, TypeError, "interval: wanted a whole number, got float"),
        ({"microbatch": -1}, ValueError, "microbatch: wanted a whole number >= 1"),
        ({"kind": "r1", "scale": 0.5}, ValueError, "scale: wanted None for kind 'r1'"),
    ],
)
def test_bad_options_are_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        gp.GradientPenalty(**arguments)
