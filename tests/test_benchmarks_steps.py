"""The benchmarks of steps: variants that must agree, parts that can be switched off, graphs without zeros, fits."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from threads import one_thread  # noqa: F401
from torch import nn

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize("step", ["penalty step", "LS-GAN-PG step", "WGAN-GP step", "R1 step", "DRAGAN step"])
def test_variants_of_every_step_agree_on_every_critic(module, step):
    """What is timed computes the same: on each critic of the zoo, in its smallest size."""
    steps, critics = module("steps"), module("critics")
    for name, critic in critics.CRITICS.items():
        setting = steps.Setting(step, name, 4, 2, critic.sizes[0])
        problem = setting.make(CPU)
        assert steps.differs(problem.critic, problem.variants, 1e-3) == "", name


def test_a_wrong_variant_is_not_timed(module, monkeypatch, capsys):
    steps, problems = module("steps"), module("problems")
    wrong = problems.step_at_real(
        problems.hinge, lambda grad: 10.1 * grad.flatten(1).norm(2, dim=1).mean(), "ls_gan_pg"
    )
    monkeypatch.setitem(steps.STEPS, "LS-GAN-PG step", wrong)
    assert steps.measure(steps.Setting("LS-GAN-PG step", "DCGAN none", 4, 2, 32), CPU, 1) == []
    assert "gpkernels: the gradient differs by" in capsys.readouterr().out


def test_critics_are_of_their_sizes(module):
    critics = module("critics")
    for name, critic in critics.CRITICS.items():
        for size in critic.sizes:
            net = critic.build(4, size)
            scores = net(torch.randn(2, *critic.shape(size)))
            assert scores.shape[0] == 2, (name, size)


@pytest.mark.parametrize("critic", ["DCGAN none", "DCGAN layer", "MLP"])
def test_a_graph_without_zeros_gives_the_same(module, critic):
    """Bit for bit what it gave with them, with fewer convolutions where there were zero streams."""
    peers, zeros, counts = module("peers"), module("zeros"), module("counts")
    problem = module("steps").Setting("penalty step", critic, 4, 3, 32).make(CPU)
    given = (peers._parameters(problem.critic), *problem.inputs())
    whole = peers.make_fx(peers.nested(problem))(*given)
    wanted, before = whole(*given), counts.count(lambda: whole(*given))
    assert zeros.propagate(whole) > 0
    got, after = whole(*given), counts.count(lambda: whole(*given))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert after.ops < before.ops
    if critic == "DCGAN none":
        assert after.convolutions < before.convolutions


def test_zeros_reach_results_and_sums(module):
    def function(x):
        z = torch.zeros_like(x) * x
        return x + z, z - x, (z @ x).sum(), x * 2

    graph = module("peers").make_fx(function)(torch.randn(3, 3))
    module("zeros").propagate(graph)
    x = torch.randn(3, 3)
    for got, wanted in zip(graph(x), function(x), strict=True):
        assert torch.equal(got, wanted)
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_function" and "mm" in str(n.target)] == []


def test_parts_of_the_engine_are_switched_on_in_turn(module):
    """Each part of the ablation takes something away, and the table is whole again afterwards."""
    ablation, counts, steps = module("ablation"), module("counts"), module("steps")
    from gpkernels.double_backward import bilinear, mode

    table, wins = mode.BY_FUNCTION, bilinear.wins
    problem = steps.Setting("LS-GAN-PG step", "DCGAN batch", 8, 8, 32).make(CPU)
    variants = {**problem.variants, **ablation.variants(problem, "")}
    ops = {name: counts.count(variants[name]).ops for name in ("best", *ablation.PARTS)}
    assert ops["norms"] < ops["activations"] < ops["best"]
    assert ops["first layers"] == ops["norms"]
    assert (mode.BY_FUNCTION, bilinear.wins) == (table, wins)
    with ablation.only(["relu"], False):
        assert {row.name for row in mode.BY_FUNCTION.values()} == {"relu"}


@pytest.mark.parametrize("step", ["penalty step", "LS-GAN-PG step", "WGAN-GP step", "R1 step", "DRAGAN step"])
def test_jax_computes_the_same(module, step):
    pytest.importorskip("jax")
    jax_critics, steps = module("jax_critics"), module("steps")
    for critic in ("DCGAN none", "MLP"):
        problem = steps.Setting(step, critic, 8, 4, 32).make(CPU)
        jax = module("peers")._step(problem, jax_critics.gradients(problem))
        assert steps.differs(problem.critic, {"usual": problem.variants["usual"], "jax": jax}, 1e-3) == ""


@pytest.mark.parametrize("step", ["LS-GAN-PG step", "WGAN-GP step", "R1 step", "DRAGAN step"])
def test_peers_do_whole_steps(module, step):
    """The gradients of the usual code, in as few forwards as there can be; a wrong objective is noticed."""
    forwards = []
    needed = 2 if step in ("LS-GAN-PG step", "R1 step") else 3
    peers, steps, counts = module("peers"), module("steps"), module("counts")
    for critic in ("DCGAN none", "DCGAN batch", "MLP"):
        problem = steps.Setting(step, critic, 4, 3, 32).make(CPU)
        forwards.clear()
        problem.critic.register_forward_pre_hook(lambda *given: forwards.append(1))
        convolutions = counts.count(problem.variants["best"]).convolutions
        assert len(forwards) == needed
        peers._step(problem, peers.nested(problem))()
        assert len(forwards) == 2 * needed
        for gradients in (peers.nested(problem), peers.without_zeros(problem)):
            peer = peers._step(problem, gradients)
            assert steps.differs(problem.critic, {"usual": problem.variants["usual"], "peer": peer}, 1e-3) == ""
            assert counts.count(peer).convolutions <= convolutions
        wrong = problem._replace(objective=problem.objective._replace(penalty=lambda grad: 10.1 * grad.square().sum()))
        peer = peers._step(wrong, peers.nested(wrong))
        assert "peer: the gradient" in steps.differs(
            problem.critic, {"usual": problem.variants["usual"], "peer": peer}, 1e-2
        )


def test_peers_that_cannot_are_named(module, capsys):
    """func.grad of a critic that reads a value back, and JAX of a layer it has not."""
    peers, steps = module("peers"), module("steps")
    problem = steps.Setting("penalty step", "DCGAN batch", 4, 2, 32).make(CPU)
    problem = problem._replace(critic=nn.Sequential(Reading(), *problem.critic))
    assert peers.variants(problem, "here") == {}
    printed = capsys.readouterr().out
    for peer in ("func.grad", "func.grad, compiled", "make_fx, no zeros", "jax"):
        assert f"here: {peer} cannot: " in printed


class Reading(nn.Module):
    def forward(self, x):
        raise RuntimeError("nothing here can be traced")


def test_graphed_steps_leave_their_gradients(module, monkeypatch):
    """With the capture left out, which needs a GPU: the gradients are those of the step, None where it has none."""
    graphs, steps = module("graphs"), module("steps")
    calls = []
    monkeypatch.setattr(graphs.gp, "graphed", lambda step, warmup: calls.append(warmup) or step)
    problem = steps.Setting("LS-GAN-PG step", "DCGAN batch", 4, 2, 32).make(CPU)
    names = list(problem.variants)
    found = {name: graphs.graphed(problem.critic, problem.variants[name]) for name in names}
    assert calls == [3] * 4
    assert steps.differs(problem.critic, {**found, "eager": problem.variants["usual"]}, 1e-3) == ""
    step = graphs.graphed(problem.critic, lambda: None)
    found["usual"]()
    step()
    assert all(p.grad is None for p in problem.critic.parameters())


def test_steps_without_a_penalty_are_not_compared(module):
    steps = module("steps")
    problem = steps.Setting("LS-GAN-PG step", "DCGAN none", 4, 2, 32).make(CPU)
    none = problem.variants["no penalty"]
    assert steps.differs(problem.critic, {**problem.variants, "no penalty, graphed": none}, 1e-3) == ""
    assert steps.differs(problem.critic, {**problem.variants, "other": none}, 1e-3) != ""


def test_results_are_compared_without_tf32(module, monkeypatch):
    """cuDNN's rounding is larger than the tolerance; timed is what was set before."""
    steps, seen = module("steps"), []

    def peers(problem, name):
        return {"peer": lambda: (seen.append(torch.backends.cudnn.allow_tf32), problem.variants["usual"]())}

    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
        assert len(steps.measure(steps.Setting("penalty step", "DCGAN none", 4, 2, 32), CPU, 1, peers)) == 4
        assert seen[0] is False
        assert set(seen[1:]) == {before}
        seen.clear()


def test_jax_names_the_layer_it_has_not(module, monkeypatch):
    """Found out before anything is compiled."""
    monkeypatch.setitem(sys.modules, "jax", sys)
    sys.numpy = None
    try:
        with pytest.raises(TypeError, match="no JAX form of BatchNorm2d"):
            module("jax_critics").gradients(module("steps").Setting("penalty step", "DCGAN batch", 4, 2, 32).make(CPU))
    finally:
        del sys.numpy


def test_slope_is_the_power(module):
    power, intercept = module("scaling").slope([1, 2, 8], [3.0, 3 * 2**1.5, 3 * 8**1.5])
    assert (power, math.exp(intercept)) == pytest.approx((1.5, 3.0))


def test_pictures_of_committed_or_quick_results(module, tmp_path):
    """From the rows of one small setting."""
    steps, ablation, matrix = module("steps"), module("ablation"), module("matrix")
    setting = steps.Setting("LS-GAN-PG step", "DCGAN none", 4, 2, 32)
    about = module("machine").machine(CPU)
    found = [{**row, **about} for row in steps.measure(setting, CPU, 1, ablation.variants)]
    for name, draw in (("ablation", ablation.draw), ("matrix", matrix.draw)):
        draw(tmp_path / f"{name}.png", found)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_bfloat16_steps_agree_within_their_precision(module):
    steps = module("steps")
    setting = steps.Setting("R1 step", "DCGAN none", 8, 8, 32, "bfloat16")
    found = steps.measure(setting, CPU, 1)
    assert [row["dtype"] for row in found] == ["bfloat16"] * 4


def test_counts_are_the_committed_ones(module):
    """Launches and convolutions of the usual code and of ours, the same on any machine."""
    gate = module("gate")
    committed = {row["case"]: row for row in module("experiments").read(gate.FILE)}
    assert set(committed) == set(gate.MEASURED)
    assert gate.differences(committed, gate.all_counts()) == []


def test_gate_measures_every_case(module, monkeypatch):
    """Small ones in their place, once each."""
    gate = module("gate")
    measure = gate.steps.measure
    monkeypatch.setattr(
        gate.steps, "measure", lambda setting, *rest: measure(dataclasses.replace(setting, width=2, batch=4), *rest)
    )
    monkeypatch.setitem(gate.spectral.CRITICS, "DCGAN-64", lambda: gate.spectral.dcgan(4))
    for case, measured in gate.MEASURED.items():
        row = measured(1)
        assert row["case"] == case
        assert row["over_usual"] > 0


def test_gate_names_what_changed(module):
    gate = module("gate")
    was = {"a": dict.fromkeys(gate.COLUMNS, "3")}
    now = {"a": {**was["a"], "ops_gpkernels": "4"}, "b": was["a"]}
    assert gate.differences(was, now)[0] == "a: ops_gpkernels is 4, was 3"
    assert len(gate.differences(was, now)) == 1 + len(gate.COLUMNS)


def test_gate_fails_on_a_loss_of_more_than_a_tenth(module, monkeypatch, tmp_path, capsys):
    """Measured twice, and only against the same machine."""
    gate = module("gate")
    monkeypatch.setattr(gate, "FILE", tmp_path / "gate.csv")
    monkeypatch.setattr(gate, "SETTINGS", [])
    ratios = {"a": [2.0], "b": [3.0]}
    monkeypatch.setattr(
        gate,
        "MEASURED",
        {name: lambda rounds, left=left: {"case": "", "over_usual": left.pop(0)} for name, left in ratios.items()},
    )
    assert gate.main(["--update"]) == 0
    ratios["a"] += [1.81]
    ratios["b"] += [2.0, 2.71]
    assert gate.main([]) == 0  # b was slow once
    ratios["a"] += [1.7, 1.79]
    ratios["b"] += [3.0]
    assert gate.main([]) == 1
    assert "a: 1.79x the usual code, was 2.00x" in capsys.readouterr().out
    monkeypatch.setattr(gate, "machine", lambda device: {"machine": "another"})
    ratios["a"] += [1.0]
    ratios["b"] += [1.0]
    assert gate.main([]) == 0
    assert "of another machine" in capsys.readouterr().out


def test_the_model_of_processes_is_its_formula(module):
    """Of four, a ring moves 2 * 3/4 of the bytes, a tree has 2 * 2 hops a message; one exchanges nothing."""
    processes = module("processes")
    traffic, link = processes.Traffic(bytes=1000, messages=3), processes.Link(bandwidth=1e4, latency=0.01)
    assert processes.predicted(1.0, traffic, link, 1) == 1.0
    assert processes.predicted(1.0, traffic, link, 4) == pytest.approx(1 + 0.15 + 0.12)
    config = module("critics").TrainConfig(batch_size=8)
    (row,) = processes.rows_of(config, 1.0, traffic, link, [4])
    assert (row["added_ms"], row["images_per_s"]) == (270.0, round(32 / 1.27))
    assert row["efficiency"] == pytest.approx(1 / 1.27, rel=1e-3)


def test_bytes_of_a_step_are_those_of_the_gradients(module):
    """Each net's parameters once a step, and little else: the statistics of the generator's norms."""
    processes = module("processes")
    config = module("critics").TrainConfig(ngf=4, ndf=4, nz=8, batch_size=4, image_size=32)
    learner = module("trainer").Learner(config, processes.noise(config))
    parameters = sum(p.numel() * 4 for net in (learner.generator, learner.critic) for p in net.parameters())
    traffic = processes.traffic_of(config)
    assert parameters <= traffic.bytes < 1.05 * parameters
