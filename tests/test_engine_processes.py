"""The second-order engine on several threads and in several processes, and after exceptions."""

import copy
import gc
import threading

import plain
import pytest
import torch
import torch.nn.functional as F
import zoo
from plain import float64_on_one_thread  # noqa: F401
from test_engine_torch import no_compiled_code_left, small_critic  # noqa: F401
from torch import nn

import gpkernels as gp
from gpkernels import double_backward
from gpkernels.double_backward.attention import by_math


def is_rerouted():
    y = F.relu(torch.ones(2, requires_grad=True))
    return y.grad_fn.name() == "ActivateBackward"


def test_the_mode_is_of_this_thread_and_of_its_block():
    seen, here = [], []
    with gp.fast_double_backward():
        thread = threading.Thread(target=lambda: seen.append(is_rerouted()))
        thread.start()
        thread.join()
        here.append(is_rerouted())
        with gp.fast_double_backward():
            here.append(is_rerouted())
        here.append(is_rerouted())
        critic, x, _ = zoo.make("dcgan batch")
        plain.assert_same_as_plain(critic, x)
        plain.assert_same_as_plain(zoo.make("u-net")[0], x)
        here.append(is_rerouted())
    assert seen == [False]
    assert here == [True] * 4
    assert not is_rerouted()


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["critic", "scores", "hook", "block"])
def test_exceptions_leave_no_mode_behind(where):
    def fail(*unused):
        raise Stop

    critic, x = small_critic(), torch.randn(4, 3, 8, 8)
    if where == "block":
        with pytest.raises(Stop), gp.fast_double_backward(), gp.fast_double_backward():
            fail()
    else:
        if where == "critic":
            critic[3].register_forward_hook(fail)
        elif where == "hook":
            critic[0].register_full_backward_hook(fail)
        call = (lambda x: critic(x)[:1]) if where == "scores" else critic
        for run in (lambda: gp.gradient_penalty(call, x, kind="r1"), lambda: gp.score_and_penalty(call, x)):
            with pytest.raises((Stop, ValueError)):
                run()
    assert not is_rerouted()
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch.is_grad_enabled()


def test_threads_at_once():
    critic, x, _ = zoo.make("transformer")
    wanted = plain.step(copy.deepcopy(critic), x, True, ours=False)
    both_inside, results = threading.Barrier(2), {}

    def run(name):
        twin = copy.deepcopy(critic)
        first = [True]

        def wait(*unused):
            if first.pop() if first else False:
                both_inside.wait(30)

        twin.patches.register_forward_hook(wait)
        twin.encoder.register_forward_hook(wait)
        if name == "late":
            both_inside.wait(30)  # enters while the other is inside
            first.clear()
        results[name] = plain.step(twin, x, True, ours=True)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("early", "late")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        plain.assert_close(result, wanted)


def test_threads_that_leave_in_the_order_they_came():
    """What is set for the whole process while a penalty runs is set back when the last one ends."""
    settings = attention_settings()
    x = torch.randn(2, 2, 3, 4)
    inside, left = threading.Event(), threading.Event()

    def other():
        with gp.fast_double_backward():
            F.scaled_dot_product_attention(x, x, x.clone().requires_grad_())
            inside.set()
            left.wait(30)

    thread = threading.Thread(target=other)
    with gp.fast_double_backward():
        thread.start()
        inside.wait(30)
    left.set()
    thread.join()
    assert attention_settings() == settings
    compiled_runs = []

    def counting(graph, inputs):
        compiled_runs.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=counting)(x)
    assert compiled_runs, "torch.compile no longer compiles"


def test_attention_on_threads_at_once():
    settings = attention_settings()
    inside, both_inside, left = threading.Event(), threading.Event(), threading.Event()

    def first():
        inside.set()
        both_inside.wait(0.3)

    def second():
        both_inside.set()
        left.wait(0.3)

    def other():
        inside.wait(30)
        by_math(second)(None)

    thread = threading.Thread(target=other)
    thread.start()
    by_math(first)(None)
    left.set()
    thread.join()
    assert attention_settings() == settings


def attention_settings():
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()


def test_attention_settings_are_left_alone():
    settings = attention_settings()
    critic, x, _ = zoo.make("transformer")
    gp.gradient_penalty(critic, x, kind="r1").backward()
    assert attention_settings() == settings


def ddp_critic(norm):
    torch.manual_seed(1)
    return nn.Sequential(zoo.dcgan(norm), nn.Flatten())


def ddp_loss(run, critic, real, fake):
    if run == "joint":
        scores, penalty = gp.score_and_penalty(critic, real)
        return critic(fake).mean() - scores.mean() + penalty
    eps = torch.full((len(real),), 0.3, dtype=real.dtype)
    return critic(fake).mean() - critic(real).mean() + gp.gradient_penalty(critic, real, fake, eps=eps)


def ddp_data():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 4, 3, 16, 16, generator=generator)


def ddp_gradients(run, norm, real, fake):
    critic = nn.parallel.DistributedDataParallel(ddp_critic(norm), find_unused_parameters=norm == "spectral")
    for _ in range(2):  # a second step finds the first one's reduction finished
        critic.zero_grad()
        ddp_loss(run, critic, real, fake).backward()
    return [p.grad for p in critic.parameters()]


def ddp_process(rank, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    double_backward.mode.SMALL = 0
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    real, fake = ddp_data()[:, rank::2]
    for run in ("penalty", "joint"):
        for norm in ("none", "spectral", "batch"):
            torch.save(ddp_gradients(run, norm, real, fake), f"{folder}/{run}-{norm}-{rank}.pt")
    # A wrapped critic keeps the group, and gloo's threads keep tensors: what dies after the interpreter aborts.
    gc.collect()
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(ddp_process, (str(tmp_path),), nprocs=2)
    real, fake = ddp_data()
    for run in ("penalty", "joint"):
        for norm in ("none", "spectral", "batch"):
            found = [torch.load(tmp_path / f"{run}-{norm}-{rank}.pt") for rank in (0, 1)]
            plain.assert_close(*found)
            if norm == "none":
                critic = ddp_critic(norm)
                ddp_loss(run, critic, real, fake).backward()
                plain.assert_close(found[0], [p.grad for p in critic.parameters()])
