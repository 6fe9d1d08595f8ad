"""Precision, and the step that a CUDA graph could hold: what can be shown of them without a GPU."""

import dataclasses
import math

import pytest
import ranks
import torch
from tape import Tape, Taped, on_tape  # noqa: F401
from threads import one_thread  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import gpkernels as gp
from gpkernels.errors import UserError
from gpkernels.training import Learner, TrainConfig, Trainer, checkpoint, log

PENALISED = {"penalty_axes": "sample", "penalty_weight": 3.0}
SETTINGS = [
    {},
    {"penalty": "coupled", "loss": "wasserstein", "critic_steps": 2, "fresh_z": True, **PENALISED},
    {"penalty": "local", "loss": "hinge", "critic_norm": "batch", **PENALISED},
    {"penalty": "r1+r2", "penalty_interval": 2, "loss": "relativistic-average", "accumulate": 2, **PENALISED},
    {"penalty": "none", "loss": "wasserstein", "clip": 0.01, "optimizer": "rmsprop"},
    {"condition": "projection", "penalty": "r1", "accumulate": 2, **PENALISED},
    {"spectral_norm": True, "penalty": "none", "loss": "hinge", "critic_steps": 2},
    {"spectral_norm": True, "penalty": "r1", "penalty_interval": 2, "loss": "hinge", **PENALISED},
]


def learner(**settings):
    return Learner(TrainConfig(**{**ranks.TINY, **settings}), ranks.image_set())


def dtypes_of_layers(run):
    """Of the outputs of every convolution in a step."""
    seen = set()
    for net in (run.generator, run.critic):
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                module.register_forward_hook(lambda module, args, y: seen.add(y.dtype))
    run.train_step()
    return seen


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_layers_compute_in_it_and_gradients_are_near_those_of_float32(precision, settings):
    """Weights and their gradients, of true size whatever the scale, stay float32. The generator's gradient is taken at
    a critic that Adam has moved, by nearly equal steps whatever the size of its gradient."""
    runs = [learner(precision=name, **settings) for name in ("fp32", precision)]
    for scaler in runs[1].precision.scalers.values() if precision == "fp16" else ():
        scaler.load_state_dict({**scaler.state_dict(), "scale": 64.0})
    assert dtypes_of_layers(runs[1]) == {runs[1].precision._dtype}
    runs[0].train_step()
    for net in ("generator", "critic"):
        grads = [[p.grad for p in getattr(run, net).parameters()] for run in runs]
        assert {grad.dtype for grad in grads[1]} == {torch.float32}
        wanted, found = (torch.cat([grad.flatten() for grad in each]) for each in grads)
        assert (found - wanted).norm() < 0.1 * wanted.norm(), net
    assert {value.dtype for value in runs[1].state_dict()["critic"].values() if value.is_floating_point()} == {
        torch.float32
    }


def test_a_float16_penalty_of_tiny_gradients_does_not_vanish():
    runs = [learner(precision=name, penalty="r1", **PENALISED) for name in ("fp32", "fp16")]
    for run in runs:
        with torch.no_grad():
            run.critic.head.weight.mul_(1e-4)
    penalties = [run.train_step()["penalty"].item() for run in runs]
    assert 0 < penalties[0] < 1e-14
    assert penalties[1] == pytest.approx(penalties[0], rel=0.02, abs=0)


def test_a_step_that_overflows_is_left_out_and_the_scale_falls():
    run = learner(precision="fp16")
    scaler = run.precision.scalers["critic"]
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60})
    before = [p.detach().clone() for p in run.critic.parameters()]
    run.train_step()
    assert all(map(torch.equal, run.critic.parameters(), before))
    assert scaler.get_scale() == 2.0**59
    for _ in range(60):
        run.train_step()
    assert not any(map(torch.equal, run.critic.parameters(), before))


def test_an_overflow_is_logged_without_its_terms_and_divergence_ends_the_run(tmp_path):
    config = TrainConfig(**{**ranks.TINY, "precision": "fp16", "steps": 6})
    run = Trainer(config, ranks.image_set(), tmp_path)
    scaler = run.precision.scalers["critic"]
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**18})
    run.run()
    lines = log.read(tmp_path)
    assert [record["step"] for record in lines] == [1, 2, 3, 4, 5, 6]
    assert ["critic_loss" in record for record in lines] == [False, False, False, True, True, True]
    assert {"step", "epoch", "grad_norm"} <= lines[0].keys()
    assert all(math.isfinite(value) for record in lines for value in record.values())
    with torch.no_grad():
        next(run.generator.parameters()).fill_(float("nan"))
    run.config = dataclasses.replace(config, steps=200)
    with pytest.raises(UserError, match="training diverged"):
        run.run()


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"precision": "bf16"}, {"accumulate": 2}], ids=str)
def test_resumed_to_the_bit(tmp_path, settings):
    """The scale of fp16 goes with the run."""
    whole, resumed = learner(**settings), learner(**settings)
    if "precision" in settings:
        state = whole.precision.state_dict()
        whole.precision.load_state_dict({net: {**each, "scale": 2.0**20} for net, each in state.items()})
    for step in range(4):
        if step == 2:
            checkpoint.save(tmp_path, whole.state_dict())
            resumed.load_state_dict(checkpoint.load(tmp_path))
            assert settings != {"precision": "fp16"} or resumed.precision.scalers["critic"].get_scale() == 2.0**18
        for run in (whole, resumed) if step >= 2 else (whole,):
            run.train_step()
    for net in ("generator", "critic"):
        assert whole.precision.scalers[net].get_scale() == resumed.precision.scalers[net].get_scale()
        assert all(map(torch.equal, getattr(whole, net).parameters(), getattr(resumed, net).parameters()))


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


RANDOM = ("rand", "normal_", "uniform_", "bernoulli", "multinomial", "exponential", "perturb")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_reads_nothing_back_and_draws_nothing(settings):
    """What a CUDA graph cannot hold, or would repeat."""
    run = learner(**settings)
    inputs = run._inputs()
    with Calls() as calls:
        run._updates(inputs)
    assert len(calls.names) > 20
    assert not {name for name in calls.names if "_local_scalar_dense" in name or "is_nonzero" in name}
    assert not {name for name in calls.names if name.split("::")[1].startswith(RANDOM)}


@pytest.mark.usefixtures("on_tape")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_captured_steps_are_the_steps(monkeypatch, settings):
    """To the bit, with a graph for each phase of a lazy penalty, and evaluation between the steps."""
    made = []
    monkeypatch.setattr(gp, "graphed", lambda step: made.append(Taped(step, warmup=1)) or made[-1])
    plain, captured = learner(**settings), learner(**settings)
    captured.config = dataclasses.replace(captured.config, device="auto", cuda_graph=True)
    for _ in range(6):
        terms = [run.train_step() for run in (plain, captured)]
        assert terms[0].keys() == terms[1].keys()
        assert all(torch.equal(terms[1][name], value) for name, value in terms[0].items())
        scores = [scored(run) for run in (plain, captured)]
        assert torch.equal(*scores)
    assert len(made) == (2 if "penalty_interval" in settings else 1)
    assert all(isinstance(graph.graph, Tape) for graph in made)
    for name, value in ranks.weights(plain).items():
        assert torch.equal(ranks.weights(captured)[name], value), name


@torch.no_grad()
def scored(run):
    """The critic's view of an image between steps, as callbacks take it."""
    run.critic.eval()
    image = torch.linspace(-1, 1, 32 * 32).reshape(1, 1, 32, 32)
    scores = run.critic(image, *([torch.zeros(1, dtype=torch.long)] if run.config.condition == "projection" else []))
    run.critic.train()
    return scores


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_graphed_steps_are_the_steps(settings):
    """Up to rounding, which Adam enlarges; more steps than a graph's warm-up has."""
    runs = [learner(**{**settings, "device": "cuda", "cuda_graph": graph}) for graph in (False, True)]
    for _ in range(10):
        terms = [{name: value.item() for name, value in run.train_step().items()} for run in runs]
    assert terms[1] == pytest.approx(terms[0], rel=5e-2, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, "--precision: wanted one of fp32, bf16, fp16, got 'fp8'"),
        ({"accumulate": 3}, "--accumulate: wanted a divisor of --batch-size 8, got 3"),
        ({"accumulate": 0}, "--accumulate: wanted at least 1, got 0"),
        ({"accumulate": 2, "penalty_axes": "batch"}, "--penalty-axes: wanted sample or pixel for a batch that is comp"),
        ({"cuda_graph": True}, "--cuda-graph: wanted a GPU, got --device cpu"),
        ({"cuda_graph": True, "device": "auto"}, "--cuda-graph: wanted a GPU, got --device cpu"),
        ({"cuda_graph": True, "device": "cuda", "precision": "fp16"}, "--cuda-graph: wanted --precision fp32 or bf16"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(monkeypatch, settings, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        learner(**settings)
