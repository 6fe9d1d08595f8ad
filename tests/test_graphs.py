"""gp.graphed where there is no GPU: its refusals, and that steps may be captured. `tests/test_gpu.py` has the rest."""

import pytest
import torch
import zoo
from tape import Taped, on_tape  # noqa: F401

import gpkernels as gp


def test_refuses_what_a_cuda_graph_cannot_hold():
    with pytest.raises(TypeError, match="step: wanted a callable, got int"):
        gp.graphed(3)
    with pytest.raises(ValueError, match="warmup: wanted a whole number >= 1, got 0"):
        gp.graphed(torch.sin, warmup=0)
    step = gp.graphed(torch.sin)
    with pytest.raises(ValueError, match=r"inputs\[0\]: wanted a CUDA tensor, since graphs are CUDA's, got one on cpu"):
        step(torch.ones(2))
    with pytest.raises(TypeError, match=r"inputs\[0\]: wanted a torch.Tensor, got float"):
        step(1.0)


def critic_step(critic, optimizer, kwargs, kind):
    """A step with everything in it: two forwards or a shared one, a penalty, its draws, an optimizer."""

    def step(real, fake):
        optimizer.zero_grad(set_to_none=True)
        if kind in ("r1", "ls_gan_pg"):
            scores, penalty = gp.score_and_penalty(critic, real, kind=kind, weight=3.0, critic_kwargs=kwargs)
        else:
            scores = critic(real, **kwargs)
            penalty = gp.gradient_penalty(critic, real, fake, kind=kind, weight=3.0, critic_kwargs=kwargs)
        loss = critic(fake, **kwargs).mean() - scores.mean() + penalty
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.usefixtures("on_tape")
@pytest.mark.parametrize("kind", ["coupled", "local", "r1", "ls_gan_pg"])
@pytest.mark.parametrize("name", [*zoo.ZOO, "spectral_norm_all"])
def test_a_captured_step_is_the_step(name, kind):
    """To the bit, in losses, weights, running statistics, u and v, over replays with other images and other draws."""
    runs = []
    for wrap in (lambda step: step, lambda step: Taped(step, warmup=2)):
        critic, x, kwargs = zoo.make("dcgan none" if name == "spectral_norm_all" else name, torch.float32)
        if name == "spectral_norm_all":
            gp.spectral_norm_all(critic)
        torch.manual_seed(0)
        step = wrap(critic_step(critic, torch.optim.Adam(critic.parameters(), lr=1e-2, fused=True), kwargs, kind))
        batches = [torch.randn(2, *x.shape) for _ in range(6)]
        losses = [step(*batch).clone() for batch in batches]
        runs.append((losses, critic.state_dict()))
    assert len({loss.item() for loss in runs[0][0]}) == 6
    assert all(map(torch.equal, runs[1][0], runs[0][0]))
    for key, value in runs[0][1].items():
        assert torch.equal(runs[1][1][key], value), key


@pytest.mark.usefixtures("on_tape")
def test_the_tape_notices_what_a_graph_would_not_repeat():
    """A number that Python keeps, a draw of Python's, and a value that is read back."""
    x, count = torch.ones(3), iter(range(9))
    counting = Taped(lambda x: x * next(count), warmup=1)
    assert [counting(x)[0].item() for _ in range(4)] == [0, 1, 1, 1]
    with pytest.raises(RuntimeError, match="waits for the device"):
        Taped(lambda x: x / x.sum().item(), warmup=0)(x)
