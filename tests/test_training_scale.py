"""Two processes are one with the whole batch: parameters, optimizers and logs, for all nets, losses and penalties."""

import contextlib
import copy

import pytest
import ranks
import torch
from ranks import trained, weights
from threads import one_thread  # noqa: F401

from benchmarks import processes as model
from gpkernels.training import Learner, TrainConfig
from gpkernels.training.models.batch_norm import synchronise
from gpkernels.training.processes import Processes

PENALISED = {"penalty_axes": "sample", "penalty_weight": 3.0}
CLASSES = {"loss": "cls-gan", "condition": "classes", "gamma": 1.0, "labels": 4}

CASES = {
    "ls-gan-pg": {},
    "unpenalised": {"penalty": "none", "loss": "gls-gan", "slope": 0.5, "z": "uniform"},
    "wgan-gp": {"penalty": "coupled", "loss": "wasserstein", "critic_steps": 2, "fresh_z": True, **PENALISED},
    "wgan": {"penalty": "none", "loss": "wasserstein", "clip": 0.01, "optimizer": "rmsprop", "critic_norm": "batch"},
    "dragan": {"penalty": "local", "loss": "classic-non-saturating", **PENALISED},
    "r1 and r2, lazy": {"penalty": "r1+r2", "penalty_interval": 2, "loss": "relativistic-pairing", **PENALISED},
    "spectral norm": {"penalty": "r1", "loss": "hinge", "spectral_norm": True, **PENALISED},
    "spectral norm alone": {"penalty": "none", "loss": "hinge", "spectral_norm": True},
    "BatchNorm at real": {"critic_norm": "batch", "penalty": "r1", "loss": "hinge", **PENALISED},
    "BatchNorm between": {"critic": "cost-model", "penalty": "coupled", "loss": "wasserstein", **PENALISED},
    "average": {"loss": "relativistic-average", "penalty": "none"},
    "average, penalised": {"loss": "relativistic-average-hinge", "critic_norm": "batch", "penalty": "r2", **PENALISED},
    "classes": {**CLASSES, "critic_norm": "batch", "penalty": "r1", **PENALISED},
    "projection": {"condition": "projection", "critic_norm": "layer", "penalty": "coupled", **PENALISED},
}
IN_PARTS = {
    "ls-gan-pg": {},
    "wgan-gp": {"penalty": "coupled", "loss": "wasserstein", "critic_steps": 2, "fresh_z": True, **PENALISED},
    "dragan": {"penalty": "local", "loss": "classic-non-saturating", **PENALISED},
    "r1 and r2, lazy": {"penalty": "r1+r2", "penalty_interval": 2, "loss": "relativistic-pairing", **PENALISED},
    "spectral norm": {"penalty": "r1", "loss": "hinge", "spectral_norm": True, **PENALISED},
    "average": {"loss": "relativistic-average", "penalty": "r1", **PENALISED},
    "average, fresh z": {"loss": "relativistic-average-hinge", "penalty": "none", "fresh_z": True},
    "classes": {**CLASSES, "penalty": "r1", **PENALISED},
}
STEPS = 3


def settings_of(case):
    kind, name = case
    if kind == "whole":
        return CASES[name], contextlib.nullcontext()
    return {**IN_PARTS[name], "accumulate": 2}, ranks.without_norms_in_generators()


EVERY = [*(("whole", name) for name in CASES), *(("parts", name) for name in IN_PARTS)]


def train_all(processes, folder):
    torch.set_default_dtype(torch.float64)
    for number, case in enumerate(EVERY):
        settings, patched = settings_of(case)
        with patched:
            learner = trained(STEPS, **settings)
        terms = [{name: processes.mean(value) for name, value in step.items()} for step in learner.terms]
        torch.save((weights(learner), terms), f"{folder}/{number}-{processes.index}.pt")
    torch.save(exchanged(), f"{folder}/traffic-{processes.index}.pt")
    learner = trained(2, **OWN)
    torch.save(weights(learner), f"{folder}/own-{processes.index}.pt")
    torch.save([in_float32(settings) for settings in FLOAT32], f"{folder}/float32-{processes.index}.pt")
    torch.save(trained_own_nets(), f"{folder}/own-nets-{processes.index}.pt")
    for options in NORMS:
        torch.save(through_batch_norm(processes, *options), f"{folder}/{options}-{processes.index}.pt")


def exchanged():
    """Bytes and messages of a step of float32."""
    torch.set_default_dtype(torch.float32)
    learner = Learner(TrainConfig(**ranks.TINY, critic_steps=2, accumulate=2), ranks.image_set())
    with model.counted(learner) as traffic:
        learner.train_step()
    torch.set_default_dtype(torch.float64)
    return traffic.bytes, traffic.messages


OWN = {"sync_batchnorm": False, "critic_norm": "batch", "loss": "hinge", "penalty": "r1", **PENALISED}
FLOAT32 = [
    {},
    {"critic_norm": "batch", "penalty": "r1", "loss": "hinge", **PENALISED},
    {"critic_norm": "layer", "penalty": "coupled", "loss": "wasserstein", "critic_steps": 2, **PENALISED},
]


def in_float32(settings):
    """Gradients of the last update of each net, and all of their states, after a step of float32 by SGD: the first ones
    of Adam and RMSprop divide what is nearly zero by itself, so that they show nothing but its rounding."""
    torch.set_default_dtype(torch.float32)
    learner = Learner(TrainConfig(**{**ranks.TINY, **settings}), ranks.image_set())
    nets = {"generator": learner.generator, "critic": learner.critic}
    learner.optimizers = {name: torch.optim.SGD(net.parameters(), lr=0.05) for name, net in nets.items()}
    learner.train_step()
    torch.set_default_dtype(torch.float64)
    found = {f"{name}.grad.{key}": p.grad for name, net in nets.items() for key, p in net.named_parameters()}
    return found | {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}


def own_nets():
    """Nets with BatchNorms of every dimension, one of them under two names in each net."""
    torch.manual_seed(5)
    twice, in_critic = torch.nn.BatchNorm1d(8), torch.nn.BatchNorm1d(8)
    generator = torch.nn.Sequential(
        *(torch.nn.Linear(4, 8), twice, torch.nn.ReLU(), torch.nn.Linear(8, 8), twice, torch.nn.ReLU()),
        *(torch.nn.Linear(8, 1024), torch.nn.Unflatten(1, (4, 4, 8, 8)), torch.nn.BatchNorm3d(4)),
        *(torch.nn.Flatten(), torch.nn.Tanh(), torch.nn.Unflatten(1, (1, 32, 32))),
    )
    critic = torch.nn.Sequential(
        *(torch.nn.BatchNorm2d(1), torch.nn.Flatten(2), torch.nn.BatchNorm1d(1), torch.nn.Flatten()),
        *(torch.nn.Linear(1024, 8), in_critic, torch.nn.SiLU(), torch.nn.Linear(8, 8), in_critic, torch.nn.SiLU()),
        torch.nn.Linear(8, 1),
    )
    return {"generator": generator, "critic": critic}


def trained_own_nets():
    config = TrainConfig(**{**ranks.TINY, "penalty": "r1", "loss": "hinge", **PENALISED})
    learner = Learner(config, ranks.image_set(ranks.Doubles), **own_nets())
    for _ in range(STEPS):
        learner.train_step()
    return weights(learner)


NORMS = [
    *((2, affine, momentum) for affine in (True, False) for momentum in (0.1, None)),
    *((dimensions, True, 0.1) for dimensions in (0, 1, 3)),
]


def through_batch_norm(processes, dimensions, affine, momentum):
    """A synchronised BatchNorm's output, its derivatives to the third order, and its statistics: this process's part
    of those of the samples, the whole of the others."""
    draws = torch.Generator().manual_seed(3)
    x, a, b, c = torch.randn(4, 6, 3, *(4, 5, 2)[:dimensions], generator=draws)
    x = (x + 100 * torch.arange(6.0).view(-1, 1, *[1] * dimensions))[processes.shard.of(6)].requires_grad_()
    norm = getattr(torch.nn, f"BatchNorm{dimensions or 1}d")(3, affine=affine, momentum=momentum)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
    if processes.count > 1:
        plain = type(norm)
        synchronise(norm)
        assert isinstance(norm, plain)
        assert type(norm) is not plain
    tangents = [t[processes.shard.of(6)] for t in (a, b, c)]
    for _ in range(2):
        y = norm(x)
    found, value = [y], y
    for tangent in tangents:
        (value,) = torch.autograd.grad((value**2 * tangent).sum(), x, create_graph=True)
        found.append(value)
    of_weights = torch.autograd.grad(value.sum(), list(norm.parameters())) if affine else ()
    summed = [processes.mean(grad) * processes.count for grad in of_weights]
    return [processes.gather(value) for value in found], summed, norm.state_dict(), norm.eval()(x + 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of what two processes have trained."""
    folder = tmp_path_factory.mktemp("two")
    ranks.launch(train_all, str(folder))
    return folder


@pytest.fixture(scope="module")
def by_two(two):
    return {case: [torch.load(two / f"{number}-{rank}.pt") for rank in (0, 1)] for number, case in enumerate(EVERY)}


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)


def close_terms(found, wanted):
    """What a log says of a step; some of it is float32."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", EVERY, ids=" ".join)
def test_two_processes_are_one(by_two, case):
    """The processes agree to the bit, and with one process that takes each batch whole up to float64's rounding."""
    settings, patched = settings_of(case)
    with patched:
        learner = trained(STEPS, **{**settings, "accumulate": 1})
    alone = weights(learner)
    (mine, terms), (theirs, _) = by_two[case]
    assert mine.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(mine[name], theirs[name]), name
        close(mine[name], value)
    for found, wanted in zip(terms, learner.terms, strict=True):
        close_terms(found, wanted)


@pytest.mark.parametrize("name", IN_PARTS)
@pytest.mark.parametrize("accumulate", [2, 8])
def test_a_batch_in_parts_is_the_batch(name, accumulate):
    with ranks.without_norms_in_generators():
        whole, parts = (trained(2, **IN_PARTS[name], accumulate=count) for count in (1, accumulate))
    for key, value in weights(whole).items():
        close(weights(parts)[key], value)
    for found, wanted in zip(parts.terms, whole.terms, strict=True):
        close_terms(found, wanted)


@pytest.mark.parametrize("number", range(len(FLOAT32)))
def test_two_processes_are_one_in_float32(two, number):
    """To 1e-5 of the largest element of each tensor."""
    mine, theirs = (torch.load(two / f"float32-{rank}.pt")[number] for rank in (0, 1))
    for name, value in in_float32(FLOAT32[number]).items():
        assert torch.equal(mine[name], theirs[name]), name
        assert (mine[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


class Half:
    """One process by hand: nets of its own, plain BatchNorms in them, given its half of each batch."""

    def __init__(self, twin):
        self.generator, self.critic = copy.deepcopy(twin.generator), copy.deepcopy(twin.critic)

    def critic_gradients(self, real, z):
        """Of hinge and R1, weight 3; the critic's running statistics follow real images, the generator's z."""
        self.fake = self.generator(z)
        x = real.requires_grad_()
        real_scores = self.critic(x)
        running = {name: value.clone() for name, value in self.critic.named_buffers()}
        (of_images,) = torch.autograd.grad(real_scores.sum(), x, create_graph=True)
        fake_scores = self.critic(self.fake.detach())
        loss = torch.relu(1 - real_scores).mean() + torch.relu(1 + fake_scores).mean()
        loss = loss + 3 * 0.5 * of_images.square().sum((1, 2, 3)).mean()
        gradients = torch.autograd.grad(loss, list(self.critic.parameters()))
        self.keep(running)
        return gradients

    def generator_gradients(self):
        running = {name: value.clone() for name, value in self.critic.named_buffers()}
        gradients = torch.autograd.grad(-self.critic(self.fake).mean(), list(self.generator.parameters()))
        self.keep(running)
        return gradients

    def keep(self, buffers):
        for name, value in self.critic.named_buffers():
            value.copy_(buffers[name])


def test_without_synchronisation_each_process_has_statistics_of_its_own(two):
    """The mean of the gradients of both halves, each through BatchNorms of its own, goes to the weights of both;
    running statistics stay each process's own, so that a checkpoint has the first one's."""
    twin = trained(0, **OWN)
    halves = [Half(twin), Half(twin)]
    optimizers = [
        {net: torch.optim.Adam(getattr(half, net).parameters(), 2e-4, (0.5, 0.999)) for net in ("critic", "generator")}
        for half in halves
    ]

    def step(net, gradients):
        for half, optimizer in zip(halves, optimizers, strict=True):
            for p, *each in zip(getattr(half, net).parameters(), *gradients, strict=True):
                p.grad = sum(each) / 2
            optimizer[net].step()

    for _ in range(2):
        inputs = twin._inputs()["updates"][0]
        parts = zip(inputs["real"].chunk(2), inputs["z"].chunk(2), strict=True)
        step("critic", [half.critic_gradients(*part) for half, part in zip(halves, parts, strict=True)])
        step("generator", [half.generator_gradients() for half in halves])
        twin.step += 1
    found = [torch.load(two / f"own-{rank}.pt") for rank in (0, 1)]
    for mine, half in zip(found, halves, strict=True):
        for net in ("generator", "critic"):
            for name, value in getattr(half, net).state_dict().items():
                if value.is_floating_point():
                    close(mine[f"{net}.{name}"], value)
    assert not torch.allclose(*(each["critic.body.3.running_mean"] for each in found))


def test_two_processes_are_one_with_norms_of_ones_own(two):
    """The statistics of BatchNorm1d and 3d are those of all samples too, under whatever name a net calls them."""
    mine, theirs = (torch.load(two / f"own-nets-{rank}.pt") for rank in (0, 1))
    for name, value in trained_own_nets().items():
        assert torch.equal(mine[name], theirs[name]), name
        close(mine[name], value)


@pytest.mark.parametrize("options", NORMS, ids=str)
def test_synchronised_batch_norm_is_batch_norm_of_all_samples(two, options):
    """In its output, three derivatives, the gradient of its parameters, its state and its eval mode, though the two
    parts' means are far from each other."""
    wanted = through_batch_norm(Processes(torch.device("cpu")), *options)
    for rank in (0, 1):
        found = torch.load(two / f"{options}-{rank}.pt")
        for got, value in zip(found[:2], wanted[:2], strict=True):
            torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[2], wanted[2])
        torch.testing.assert_close(found[3], wanted[3][3 * rank : 3 * rank + 3])


@pytest.mark.parametrize("settings", [{}, {"fresh_z": True}, {"loss": "relativistic-average"}], ids=str)
def test_repeated_forwards_leave_running_statistics_alone(settings):
    """In parts, whatever is computed twice: the generator's statistics follow each part of z once, and the critic's
    each part of the real images."""
    still = {"lr": 0.0, "penalty": "none", "accumulate": 2, "critic_norm": "batch"}
    learner, twin = (trained(0, **still, **settings) for _ in range(2))
    inputs = twin._inputs()
    learner.train_step()
    (update,) = inputs["updates"]
    reals = update["real"].chunk(2)
    with torch.no_grad():
        for z in update["z"].chunk(2):
            twin.generator(z)
        for real in reals:
            twin.critic(real)
        if "z" in inputs:
            for z in inputs["z"].chunk(2):
                twin.generator(z)
    for net in ("generator", "critic"):
        buffers = dict(getattr(twin, net).named_buffers())
        for name, mine in getattr(learner, net).named_buffers():
            if "running" in name:
                torch.testing.assert_close(mine, buffers[name])


def test_counted_traffic_is_the_gradients_and_the_statistics(two):
    """4 bytes a parameter and update, though each is of two parts; and for each BatchNorm of the generator mean and
    variance at each of its six forwards, and their gradients for both processes at its two backwards."""
    learner = Learner(TrainConfig(**ranks.TINY, critic_steps=2), ranks.image_set())
    generator, critic = (sum(p.numel() for p in net.parameters()) for net in (learner.generator, learner.critic))
    norms = [m.num_features for m in learner.generator.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    statistics = sum(2 * channels for channels in norms)
    wanted = 4 * (generator + 2 * critic + 6 * statistics + 2 * 2 * statistics)
    assert len(norms) == 3
    assert torch.load(two / "traffic-0.pt") == (wanted, 3 + 8 * len(norms))
