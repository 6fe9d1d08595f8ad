"""gradient_penalty and score_and_penalty against the usual snippet: every kind, form, norm, axes and score shape."""

import itertools

import critics
import oracles
import pytest
import torch
from torch import nn

import gpkernels as gp

FORMS = ("two_sided", "one_sided", "one_sided_linear", "maximum", "linear", "squared")


def test_promise_on_an_unmodified_critic():
    """loss + gp.gradient_penalty(critic, real, fake): value and parameter gradients of hand-written WGAN-GP."""
    critic, real, fake, eps = critics.conv(), critics.images(), critics.images(), torch.rand(5, dtype=torch.float64)
    loss = critic(fake).mean() - critic(real).mean()
    weight = eps.reshape(-1, 1, 1, 1)
    wanted = 10 * oracles.gradient_penalty(critic, weight * real + (1 - weight) * fake)
    critics.assert_same_gradients(loss + gp.gradient_penalty(critic, real, fake, eps=eps), loss + wanted, critic)


@pytest.mark.parametrize(
    ("form", "norm", "axes"), list(itertools.product(FORMS, ("l2", "l1", "linf"), ("sample", "pixel", "batch")))
)
def test_every_form_norm_and_axes(backend, form, norm, axes):
    critic, x = critics.conv(), critics.images()
    options = {"form": form, "target": 0.4, "norm": norm, "axes": axes}
    wanted = 3 * oracles.gradient_penalty(critic, x, **options)
    critics.assert_same_gradients(gp.gradient_penalty(critic, x, kind="r1", weight=3.0, **options), wanted, critic)
    scores, penalty = gp.score_and_penalty(critic, x, kind="r1", weight=3.0, **options)
    critics.assert_same_gradients(scores.mean() + penalty, critic(x).mean() + wanted, critic)


@pytest.mark.parametrize("kind", ["coupled", "local", "r1", "r2", "ls_gan_pg"])
@pytest.mark.parametrize("norm", [None, "batch", "instance", "layer"])
def test_every_kind_at_its_point_with_its_form(kind, norm):
    critic, real, fake = critics.conv(norm), critics.images(), critics.images()

    def generator():
        return torch.Generator().manual_seed(3)

    x = {
        "coupled": gp.interpolate(real, fake, generator=generator()),
        "local": gp.perturb(real, scale=0.5, noise="uniform", relative=True, generator=generator()),
        "r1": real,
        "r2": fake,
        "ls_gan_pg": real,
    }[kind]
    form, weight = {"r1": ("squared", 5.0), "r2": ("squared", 5.0), "ls_gan_pg": ("linear", 10.0)}.get(
        kind, ("two_sided", 10.0)
    )
    wanted = weight * oracles.gradient_penalty(critic, x, form)
    got = gp.gradient_penalty(critic, real, fake, kind=kind, generator=generator())
    critics.assert_same_gradients(got, wanted, critic)


@pytest.mark.parametrize("scores", [(), (1,), (1, 1, 1), (3,), "patch"], ids=str)
def test_score_shapes_are_summed_per_sample(scores):
    critic, x = critics.conv(scores=scores), critics.images()
    wanted = 10 * oracles.gradient_penalty(critic, x, "linear")
    critics.assert_same_gradients(gp.gradient_penalty(critic, x, kind="ls_gan_pg"), wanted, critic)


def test_conditional_critic_through_args_and_kwargs():
    critic, x, y = critics.Conditional().double(), critics.images(), torch.arange(5)
    wanted = 10 * oracles.gradient_penalty(lambda x: critic(x, y, gain=2.0), x, "linear")
    options = {"kind": "ls_gan_pg", "critic_args": (y,), "critic_kwargs": {"gain": 2.0}}
    critics.assert_same_gradients(gp.gradient_penalty(critic, x, **options), wanted, critic)
    critics.assert_same_gradients(gp.gradient_penalty(critic, x, microbatch=2, **options), wanted, critic)
    critics.assert_same_gradients(gp.score_and_penalty(critic, x, **options)[1], wanted, critic)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("axes", ["sample", "pixel"])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_microbatch_gives_the_same_value_and_gradients(size, axes, norm):
    critic, real, fake, eps = critics.conv(norm), critics.images(), critics.images(), torch.rand(5)
    options = {"eps": eps, "axes": axes, "target": 0.5}
    whole = gp.gradient_penalty(critic, real, fake, **options)
    parts = gp.gradient_penalty(critic, real, fake, microbatch=size, **options)
    critics.assert_same_gradients(3 * parts, 3 * whole, critic)
    scores, penalty = gp.score_and_penalty(critic, real, axes=axes, microbatch=size)
    wanted = gp.score_and_penalty(critic, real, axes=axes)
    critics.assert_same_gradients(scores.square().mean() + penalty, wanted[0].square().mean() + wanted[1], critic)


def test_microbatch_draws_once_for_the_batch():
    critic, real, fake = critics.conv(), critics.images(), critics.images()
    for kind in ("coupled", "local"):
        values = [
            gp.gradient_penalty(
                critic, real, fake, kind=kind, microbatch=size, generator=torch.Generator().manual_seed(1)
            )
            for size in (None, 2)
        ]
        torch.testing.assert_close(*values)


def test_microbatch_reaches_leaves_outside_the_critic():
    """Labels embedded by another network, and a critic that is a closure."""
    critic, embed = critics.conv(), nn.Linear(2, 36).double()
    x, y = critics.images(), torch.randn(5, 2, dtype=torch.float64)

    def closure(x, code):
        return critic(x * code.reshape(-1, 1, 6, 6))

    both = nn.ModuleList([critic, embed])
    values = [
        gp.gradient_penalty(closure, x, kind="r1", microbatch=size, critic_args=(embed(y),)) for size in (None, 2)
    ]
    critics.assert_same_gradients(values[1], values[0], both)


def test_microbatch_bounds_memory():
    """The saved tensors that are alive at once: one microbatch's, not the batch's."""
    critic, x = critics.conv(), critics.images(32)
    largest = {}
    for size in (None, 4):
        alive, peak = [0], [0]

        class Saved:
            def __init__(self, tensor, alive=alive, peak=peak):
                self.tensor, self.alive = tensor.detach(), alive  # the tensor itself may own this object
                alive[0] += tensor.numel()
                peak[0] = max(peak[0], alive[0])

            def __del__(self):
                self.alive[0] -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            gp.gradient_penalty(critic, x, kind="r1", microbatch=size).backward()
        largest[size] = peak[0]
    assert largest[4] < largest[None] / 4


def test_microbatch_refuses_what_it_cannot_do_exactly():
    x = critics.images()
    with pytest.raises(
        ValueError, match=r"microbatch: wanted None for a critic that mixes samples, got a critic whose 1"
    ):
        gp.gradient_penalty(critics.conv("batch"), x, kind="r1", microbatch=2)
    assert gp.gradient_penalty(critics.conv("batch").eval(), x, kind="r1", microbatch=2) > 0
    with pytest.raises(ValueError, match="microbatch: wanted None for axes='batch'"):
        gp.gradient_penalty(critics.conv(), x, kind="r1", axes="batch", microbatch=2)
    with pytest.raises(ValueError, match="microbatch: wanted a whole number >= 1, got 0"):
        gp.gradient_penalty(critics.conv(), x, kind="r1", microbatch=0)


def test_microbatch_second_derivative_raises():
    critic = critics.conv()
    value = gp.gradient_penalty(critic, critics.images(), kind="r1", microbatch=2)
    weight = critic[0].weight
    (grad,) = torch.autograd.grad(value, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="keeps first derivatives only"):
        torch.autograd.grad(grad.sum(), weight)


def test_second_derivative_in_the_parameters():
    """A Hessian-vector product of the penalty: three derivatives of the critic."""
    critic, x = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 1)).double(), torch.randn(4, 3).double()
    weight = critic[0].weight
    results = []
    for value in (gp.gradient_penalty(critic, x, kind="r1"), 5 * oracles.gradient_penalty(critic, x, "squared")):
        (grad,) = torch.autograd.grad(value, weight, create_graph=True)
        results.append(torch.autograd.grad(grad.sin().sum(), weight)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_value_without_gradient(context):
    critic, x = critics.conv(), critics.images()
    wanted = gp.gradient_penalty(critic, x, kind="r1")
    with context():
        got = gp.gradient_penalty(critic, x, kind="r1")
        scores, penalty = gp.score_and_penalty(critic, x)
        parts = gp.gradient_penalty(critic, x, kind="r1", microbatch=2)
    assert not got.requires_grad
    assert not scores.requires_grad
    for value in (got, penalty, parts):
        torch.testing.assert_close(value, wanted.detach())


def test_score_and_penalty_runs_the_critic_once():
    critic, calls = critics.conv(), []
    critic.register_forward_hook(lambda *_: calls.append(1))
    gp.score_and_penalty(critic, critics.images())
    assert len(calls) == 1


def test_batchnorm_statistics_move_once_per_forward():
    critic = critics.conv("batch")
    gp.gradient_penalty(critic, critics.images(), kind="r1").backward()
    assert critic[1].num_batches_tracked == 1


def test_inputs_are_left_alone():
    critic, real, fake = critics.conv(), critics.images(), critics.images().requires_grad_()
    value = gp.gradient_penalty(critic, real, fake)
    value.backward()
    assert fake.grad is None
    assert not real.requires_grad


def test_frozen_critic_still_has_a_penalty():
    critic = critics.conv().requires_grad_(False)
    assert gp.gradient_penalty(critic, critics.images(), kind="r1") > 0


@pytest.mark.parametrize("microbatch", [None, 2])
def test_scaler_recovers_what_float16_loses(microbatch):
    """Scores whose gradient underflows in float16 by a factor: without a scaler the penalty is 0."""
    critic = nn.Linear(4, 1, bias=False)
    nn.init.constant_(critic.weight, 1e-9)

    def half(x):  # the backward passes the gradient through float16, as autocast on a GPU would
        return critic(x.half().float()) * 1.0

    x = torch.randn(6, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    options = {"kind": "ls_gan_pg", "weight": 1.0, "microbatch": microbatch}
    assert gp.gradient_penalty(half, x, **options) == 0
    value = gp.gradient_penalty(half, x, scaler=scaler, **options)
    torch.testing.assert_close(value, torch.tensor(2e-9), rtol=1e-2, atol=0)
    (scaled,) = critics.parameter_gradients(scaler.scale(value), critic)
    torch.testing.assert_close(scaled / scaler.get_scale(), torch.full((1, 4), 0.5), rtol=1e-2, atol=0)


def test_disabled_scaler_changes_nothing():
    critic, x = critics.conv(), critics.images()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    wanted = gp.gradient_penalty(critic, x, kind="r1")
    critics.assert_same_gradients(gp.gradient_penalty(critic, x, kind="r1", scaler=scaler), wanted, critic)


def test_bfloat16_autocast_keeps_the_penalty_in_float32():
    critic = nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    x = torch.randn(16, 8)
    wanted = gp.gradient_penalty(critic, x, kind="r1")
    with torch.autocast("cpu", torch.bfloat16):
        value = gp.gradient_penalty(critic, x, kind="r1")
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=2e-2, atol=0)


def test_compiled_critic_is_unwrapped_with_a_warning():
    critic, x = critics.conv(), critics.images()
    compiled = torch.compile(critic, backend="eager")
    with pytest.warns(UserWarning, match="the penalty runs its uncompiled original"):
        value = gp.gradient_penalty(compiled, x, kind="r1")
    critics.assert_same_gradients(value, gp.gradient_penalty(critic, x, kind="r1"), critic)


R, F, CRITIC = critics.images(), critics.images(), critics.conv()
LINEAR = nn.Linear(3, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gp.gradient_penalty(CRITIC, R), ValueError, "fake: wanted a tensor, which kind 'coupled' needs"),
        (lambda: gp.gradient_penalty(CRITIC, R, kind="r2"), ValueError, "fake: wanted a tensor, which kind 'r2'"),
        (lambda: gp.gradient_penalty(CRITIC, None, F, kind="r1"), ValueError, "real: wanted a tensor"),
        (lambda: gp.gradient_penalty(CRITIC, R, F[:3]), ValueError, "fake: wanted the shape of real"),
        (lambda: gp.gradient_penalty(CRITIC, R, F.float()), ValueError, "fake: wanted the dtype of real"),
        (lambda: gp.gradient_penalty(CRITIC, R[:0], F[:0]), ValueError, "real: wanted a non-empty batch"),
        (lambda: gp.gradient_penalty(CRITIC, R.int(), F), TypeError, "real: wanted a floating-point tensor"),
        (lambda: gp.gradient_penalty(None, R, F), TypeError, "critic: wanted a callable, got NoneType"),
        (lambda: gp.gradient_penalty(CRITIC, R, F, kind="r3"), ValueError, "kind: wanted one of 'coupled', 'local'"),
        (lambda: gp.gradient_penalty(CRITIC, R, F, form="x"), ValueError, "form: wanted one of 'two_sided'"),
        (lambda: gp.gradient_penalty(CRITIC, R, F, norm="l3"), ValueError, "norm: wanted one of 'l2'"),
        (lambda: gp.gradient_penalty(CRITIC, R, F, axes="x"), ValueError, "axes: wanted one of 'sample'"),
        (lambda: gp.gradient_penalty(CRITIC, R, F, weight=-1.0), ValueError, "weight: wanted a finite number >= 0"),
        (lambda: gp.gradient_penalty(CRITIC, R, F, target=None), TypeError, "target: wanted a number"),
        (lambda: gp.gradient_penalty(CRITIC, R, F, scale=0.5), ValueError, "scale: wanted None for kind 'coupled'"),
        (lambda: gp.gradient_penalty(CRITIC, R, kind="r1", eps=torch.rand(5)), ValueError, "eps: wanted None for kind"),
        (lambda: gp.gradient_penalty(CRITIC, R, F, critic_args=F), TypeError, "critic_args: wanted a tuple or list"),
        (lambda: gp.gradient_penalty(CRITIC, R, F, critic_kwargs=3), TypeError, "critic_kwargs: wanted a mapping"),
        (lambda: gp.gradient_penalty(CRITIC, R, F, scaler=2.0), TypeError, "scaler: wanted a torch.amp.GradScaler"),
        (lambda: gp.gradient_penalty(CRITIC, R, F, generator=1), TypeError, "generator: wanted a torch.Generator"),
        (lambda: gp.gradient_penalty(lambda x: (x, x), R, F), TypeError, "critic: wanted it to return a tensor"),
        (lambda: gp.gradient_penalty(lambda x: x.sum(), R, F), ValueError, "critic: wanted scores whose first dim"),
        (lambda: gp.gradient_penalty(lambda x: x[:2], R, F), ValueError, "is the batch, 5, got"),
        (lambda: gp.gradient_penalty(lambda x: x.int(), R, F), TypeError, "critic: wanted floating-point scores"),
        (lambda: gp.gradient_penalty(lambda x: x.to("meta"), R, F), ValueError, "critic: wanted scores on the device"),
        (lambda: gp.gradient_penalty(lambda x: x.detach(), R, F), ValueError, "critic: wanted scores that depend on x"),
        (lambda: gp.gradient_penalty(lambda x: LINEAR(torch.ones(5, 3)), R, F), ValueError, "that do not"),
        (
            lambda: gp.score_and_penalty(CRITIC, R, kind="coupled"),
            ValueError,
            "kind: wanted one of 'r1', 'r2', 'ls_gan",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
