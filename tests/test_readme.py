"""The README says only what is true: its table row by row, its code, its commands."""

import re
from pathlib import Path

import critics
import numpy as np
import pytest
import torch

import gpkernels as gp
from benchmarks import readme
from gpkernels import cli, registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BACKENDS = ("reference", "cpu", "triton", "cuda")
OPS = {  # the ops that a public function runs on
    "interpolate": ("interpolate",),
    "perturb": ("perturb",),
    "grad_norm": ("grad_norm_penalty",),
    "grad_norm_penalty": ("grad_norm_penalty",),
    "pairwise_cost": ("pairwise_cost",),
    "gradient_penalty": ("interpolate", "perturb", "grad_norm_penalty"),
    "gradient_penalty(microbatch=n)": ("interpolate", "perturb", "grad_norm_penalty"),
    "score_and_penalty": ("grad_norm_penalty",),
    "spectral_norm": ("spectral_norm",),
    "spectral_norm_all": ("spectral_norm",),
    "spectral_normalize": ("spectral_norm",),
}


def normalised(wrap):
    """The weight of a layer, normalised by `wrap`, as a function of what it was, near one to which its u and v belong.

    Of another weight a read would take others."""

    def call(x):
        layer = torch.nn.Linear(2, 2, bias=False, dtype=x.dtype, device=x.device)
        wrap(layer)
        for vector in layer.buffers():
            vector.copy_(unit(x) / unit(x).norm())
        weight = 10 * torch.outer(unit(x), unit(x)) + x
        eye = torch.eye(2, dtype=x.dtype, device=x.device)
        return torch.func.functional_call(layer, {"parametrizations.weight.original": weight}, eye).pow(3).sum()

    return call


def unit(x):
    return torch.nn.functional.normalize(torch.arange(1, 3, dtype=x.dtype, device=x.device), dim=0)


CALLS = {  # a scalar function of x with derivatives of every order, through the public function
    "interpolate": lambda x: gp.interpolate(x, x.flip(0), generator=torch.Generator().manual_seed(1)).pow(5).sum(),
    "perturb": lambda x: (
        gp.perturb(x, scale=1.0, relative=True, generator=torch.Generator().manual_seed(1)).pow(5).sum()
    ),
    "grad_norm": lambda x: gp.grad_norm(x).sum(),
    "grad_norm_penalty": lambda x: gp.grad_norm_penalty(x),
    "pairwise_cost": lambda x: (
        gp.pairwise_cost(unit(x), -unit(x), x.sin().sum(1), x.cos().sum(1), slope=-0.5)[0].sin().sum()
    ),
    "spectral_norm": normalised(gp.spectral_norm),
    "spectral_norm_all": normalised(gp.spectral_norm_all),
    "spectral_normalize": lambda x: gp.spectral_normalize(x, unit(x), unit(x), n_power_iterations=0).pow(3).sum(),
}


def rows():
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0].startswith("`"):
            yield cells[0].strip("`"), cells[1:5], cells[5]


ROWS = list(rows())


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_table_names_every_public_function():
    assert [name for name, _, _ in ROWS] == list(OPS)
    helpers = {"backend", "why_not", "fast_double_backward", "graphed", "losses"}
    helpers |= {"convolution_norm", "singular_values", "spectral_norm_handle"}
    assert {name for name in gp.__all__ if name.islower() and not name.startswith("_")} - helpers <= set(OPS)


@pytest.mark.parametrize(("name", "backends", "order"), ROWS, ids=[row[0] for row in ROWS])
def test_table_backends_are_those_of_the_registry(name, backends, order):
    measured = list((ROOT / "benchmarks/results").glob("*NVIDIA*.csv"))
    wanted = ["yes", "yes", *(["yes"] * 2 if measured else ["no GPU yet"] * 2)]
    has = [all((op, backend) in registry._rows for op in OPS[name]) for backend in BACKENDS]
    assert backends == [word if there else "no" for word, there in zip(wanted, has, strict=True)]


@pytest.mark.parametrize("name", [name for name, _, order in ROWS if order == "any"])
def test_order_any_holds_at_the_fourth_derivative(backend, device, name):
    """gradgradcheck of the second derivative: orders three and four."""
    x = torch.randn(2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def second(x):
        (first,) = torch.autograd.grad(CALLS[name](x), x, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(second, (x,))


@pytest.mark.parametrize("name", [name for name, _, order in ROWS if order == "any the critic has"])
def test_penalties_have_the_orders_of_the_critic(backend, device, name):
    """Second and third derivative of a penalty in the parameters of a smooth critic."""
    x = torch.randn(3, 2, dtype=torch.float64, device=device)
    weight = torch.randn(2, dtype=torch.float64, device=device, requires_grad=True)

    def first(weight):
        def critic(x):
            return torch.sin(x @ weight)

        value = getattr(gp, name)(critic, x, kind="r1")
        value = sum(v.sum() for v in value) if isinstance(value, tuple) else value
        return torch.autograd.grad(value, weight, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(first, (weight,))


def test_order_one_means_that_the_second_raises():
    assert [name for name, _, order in ROWS if order == "1"] == ["gradient_penalty(microbatch=n)"]
    critic = critics.conv()
    value = gp.gradient_penalty(critic, critics.images(), kind="r1", microbatch=2)
    (first,) = torch.autograd.grad(value, critic[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), critic[0].weight)


def test_before_and_after_agree():
    """The two snippets of the first screen, run as printed, from the same eps."""
    before, after = code_blocks("python")[:2]
    critic, real, fake = critics.conv(), critics.images(), critics.images()
    eps = torch.rand(5, 1, 1, 1, dtype=torch.float64)
    after = after.replace("weight=10.0)", "weight=10.0, eps=eps)")
    before = before.replace(before.splitlines()[0], "")
    assert len(before.splitlines()) + len(after.splitlines()) <= 14
    grads = []
    for snippet in (before, after):
        critic.zero_grad()
        exec(snippet, {"torch": torch, "critic": critic, "real": real, "fake": fake, "eps": eps})
        grads.append([p.grad.clone() for p in critic.parameters()])
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_penalty_examples_run():
    for snippet in code_blocks("python")[2:]:
        if "gpkernels.training" in snippet:
            continue
        critic, real, fake = critics.conv(), critics.images(), critics.images()
        exec(snippet, {"torch": torch, "gp": gp, "critic": critic, "real": real, "fake": fake})


def test_the_trainer_example_runs(tmp_path, monkeypatch, capsys):
    """With the reader's nets and images, and fewer steps."""
    monkeypatch.chdir(tmp_path)
    (snippet,) = (code for code in code_blocks("python") if "gpkernels.training" in code)

    class MyGenerator(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Linear(64, 3 * 32 * 32), torch.nn.Tanh(), torch.nn.Unflatten(1, (3, 32, 32)))

    class MyCritic(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 1))

    pixels = np.random.default_rng(0).integers(0, 256, (80, 3, 32, 32), np.uint8)
    given = {"gp": gp, "pixels": pixels, "MyGenerator": MyGenerator, "MyCritic": MyCritic}
    exec(snippet.replace('"steps": 1000', '"steps": 2'), given)
    assert given["step"] == 2
    assert (tmp_path / "runs/mine/report.html").stat().st_size > 10_000


def test_numbers_are_those_of_the_result_files():
    for page in readme.PAGES:
        text = page.read_text()
        assert readme.with_tables(text) == text, "run python -m benchmarks.readme"
    markers = re.findall(r"<!-- (\w+): written by", "".join(page.read_text() for page in readme.PAGES))
    assert sorted(markers) == sorted(readme.TABLES)


def test_commands_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
    parser = cli._parser()
    for line in re.findall(r"^gpkernels .*$", "\n".join(code_blocks("sh")), re.M):
        parser.parse_args(line.partition("#")[0].split()[1:])
    for name in re.findall(r"`((?:gpkernels|tests|csrc|\.ci)/[\w./]+\w)(?:::\w+)?`", README):
        assert (ROOT / name).exists(), name
