"""What nets of a program's own may have that the trainer has to leave alone: frozen layers, modes, states, averages."""

import copy

import numpy as np
import pytest
import torch
from threads import one_thread  # noqa: F401
from torch import nn

from gpkernels.errors import UserError
from gpkernels.training import Learner, TrainConfig, data, models
from gpkernels.training.models.modes import eval_mode
from gpkernels.training.models.norms import still_statistics
from gpkernels.training.objective import CriticLoss

SIZE = 6
SMALL = {"batch_size": 4, "nz": 3, "steps": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 1, SIZE, SIZE), dtype=np.uint8)
    return data.ImageSet("mine", pixels, labels=np.arange(16, dtype=np.int64) % 2, class_names=("a", "b"))


def generator(*norms):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 8), *norms, nn.ReLU(), nn.Linear(8, SIZE**2), nn.Tanh(), nn.Unflatten(1, (1, SIZE, SIZE))
    )


def critic(*norms):
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, 8), *norms, nn.SiLU(), nn.Linear(8, 1))


def learner(images, nets=None, objective=None, **settings):
    nets = nets or {"generator": generator(), "critic": critic()}
    return Learner(TrainConfig(**{**SMALL, **settings}), images, **nets, objective=objective)


def fails(condition):
    """KeyError if the condition holds, so that what surrounds it is left by an exception."""
    assert condition
    raise KeyError


def copies(net):
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"penalty": "r1", "loss": "hinge", "critic_steps": 2},
        {"penalty": "none", "loss": "wasserstein", "optimizer": "rmsprop", "clip": 0.01},
        {"penalty": "coupled", "loss": "wasserstein", "spectral_norm": True, "fresh_z": True},
    ],
    ids=["penalty", "clip", "spectral norm"],
)
def test_frozen_layers_stay_as_they_are(images, settings):
    """In both nets, through clipping too; the rest trains, and stays so between steps."""
    nets = {"generator": generator(), "critic": critic()}
    frozen = [*nets["generator"][0].parameters(), nets["critic"][-1].bias, *nets["critic"][1].parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    values = [parameter.clone() for parameter in frozen]
    flags = {id(p): p.requires_grad for net in nets.values() for p in net.parameters()}
    run = learner(images, nets, **settings)
    start = {name: copies(net) for name, net in nets.items()}
    for _ in range(3):
        run.train_step()
        assert all(p.requires_grad == flags[id(p)] for net in nets.values() for p in net.parameters())
    assert all(torch.equal(parameter, value) for parameter, value in zip(frozen, values, strict=True))
    for name, net in nets.items():
        trained = [key for key, p in net.named_parameters() if p.requires_grad]
        assert trained
        assert not any(torch.equal(net.state_dict()[key], start[name][key]) for key in trained)


def test_frozen_layers_leave_the_step_of_the_others_as_it_is(images):
    """A step of SGD, whose gradients know nothing of each other, is the same for what is not frozen."""
    runs = []
    for freeze in (False, True):
        nets = {"generator": generator(), "critic": critic()}
        nets["critic"][1].requires_grad_(not freeze)
        run = learner(images, nets, penalty="r1", loss="hinge")
        run.optimizers = {name: torch.optim.SGD(run.trained[name], 0.1) for name in nets}
        start = copies(nets["critic"])
        run._update_critic(
            [update := run._inputs()["updates"][0]], [run._as_batch(update)], [nets["generator"](update["z"])], 0
        )
        runs.append((start, copies(nets["critic"])))
    (start, free), (_, frozen) = runs
    assert not torch.equal(free["1.weight"], start["1.weight"])
    assert torch.equal(frozen["1.weight"], start["1.weight"])
    torch.testing.assert_close(frozen["3.weight"], free["3.weight"])
    assert not torch.equal(free["3.weight"], start["3.weight"])


def test_a_critic_is_trained_again_after_an_update_of_the_generator_fails(images):
    run = learner(images, loss="hinge", penalty="none")
    run.objective.generator = lambda *scores: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train_step()
    assert all(p.requires_grad for p in run.critic.parameters())


@pytest.mark.parametrize("name", ["generator", "critic"])
def test_a_net_without_anything_to_train_is_named(images, name):
    nets = {"generator": generator(), "critic": critic()}
    nets[name].requires_grad_(False)
    with pytest.raises(UserError, match=f"{name}: wanted a parameter with requires_grad, got none"):
        learner(images, nets)


def test_eval_mode_is_undone_module_by_module():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()))
    net[1][0].eval()
    modes = [module.training for module in net.modules()]
    with pytest.raises(KeyError), eval_mode(net, critic()):
        fails(not any(module.training for module in net.modules()))
    assert [module.training for module in net.modules()] == modes


def test_gradient_norms_and_guesses_leave_modes_alone(images):
    """A BatchNorm that is in eval mode inside of a net in training does not begin to train."""
    nets = {"generator": generator(), "critic": critic(nn.BatchNorm1d(8))}
    nets["critic"][2].eval()
    run = learner(images, nets, loss="hinge", penalty="none")
    run.train_step()
    run.grad_norms()
    assert [m.training for m in nets["critic"]] == [True, True, False, True, True]
    _, guessing = models.build(TrainConfig(ndf=2, critic="cost-model", condition="classes", loss="cls-gan"), 1, 32, 2)
    norm = next(module for module in guessing.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    guessing.guess(torch.zeros(2, 1, 32, 32))
    assert not norm.training
    assert guessing.training


class Counting(nn.Linear):
    """A layer that keeps more than tensors in its state."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_a_generator_with_extra_state_trains(images):
    nets = {"generator": generator(Counting(8, 8)), "critic": critic()}
    run = learner(images, nets)
    run.train_step()
    assert nets["generator"][1].calls > 0


def test_the_average_of_a_layer_that_stands_twice_is_that_of_one(images):
    shared = nn.Linear(8, 8)
    nets = {"generator": generator(shared, nn.ReLU(), shared), "critic": critic()}
    run = learner(images, nets)
    before = shared.weight.detach().clone()
    run.train_step()
    assert not torch.equal(shared.weight, before)
    torch.testing.assert_close(run.ema[1].weight, before + (shared.weight.detach() - before) * (1 - 1 / 10))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_still_statistics_are_still(norm, momentum):
    """The number of batches with them, of which the next average is taken where there is no momentum."""
    layer = norm(3, momentum=momentum, track_running_stats=True)
    x = torch.randn(5, 3, 4)
    layer(x)
    before, twin = copies(layer), copy.deepcopy(layer)
    with pytest.raises(KeyError), still_statistics(nn.Sequential(layer)):
        fails(torch.allclose(layer(x + 1), twin(x + 1)))
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.momentum == momentum
    twin.load_state_dict(before)
    assert torch.equal(layer(x + 2), twin(x + 2))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in layer.state_dict().items())


class Differentiates:
    """Least squares, and the mean square of the derivative of its real term in the scores."""

    needs_real = mixes_samples = False

    def critic(self, real_scores, fake_scores, batch, fake):
        term = (real_scores - 1).square().mean()
        (grad,) = torch.autograd.grad(term, real_scores, create_graph=True)
        return CriticLoss(term + fake_scores.square().mean() + grad.square().sum(), {})

    def generator(self, fake_scores, real_scores):
        return (fake_scores - 1).square().mean()


def test_an_objective_may_differentiate(images):
    run = learner(images, objective=Differentiates())
    assert all(p.grad is None for net in (run.generator, run.critic) for p in net.parameters())
    assert run.train_step()["critic_loss"].isfinite()


@pytest.mark.parametrize("name", ["critic", "generator"])
def test_a_loss_without_a_gradient_is_named(images, name):
    objective, plain = Differentiates(), getattr(Differentiates(), name)

    def detached(*inputs):
        found = plain(*inputs)
        return found._replace(loss=found.loss.detach()) if name == "critic" else found.detach()

    setattr(objective, name, detached)
    with pytest.raises(UserError, match=f"objective: wanted the {name}'s loss as a function of the scores, got one"):
        learner(images, objective=objective)


def test_a_given_net_is_used_though_it_counts_as_empty(images):
    class Empty(nn.Sequential):
        def __len__(self):
            return 0

    pixels = data.ImageSet("32", np.zeros((8, 1, 32, 32), np.uint8))
    given = Empty(nn.Flatten(), nn.Linear(32 * 32, 1))
    assert Learner(TrainConfig(**SMALL, ngf=2, ndf=2), pixels, critic=given).critic is given
