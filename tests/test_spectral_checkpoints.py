"""Checkpoints of spectrally normalised models between the names of four libraries, against their own modules."""

import copy
import itertools

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy

import gpkernels as gp
from gpkernels.spectral.checkpoints import FORMATS, convert, recognise


class Rows(nn.Conv2d):
    """A convolution that keeps (1, rows) of u and (1,) of sigma, and no v, as BigGAN-PyTorch and mimicry do; in
    evaluation too it iterates, without keeping what it finds."""

    def __init__(self, names, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.names = names
        self.register_buffer(names[0], torch.randn(1, self.weight.shape[0]))
        self.register_buffer(names[1], torch.ones(1))

    def forward(self, x):
        w = self.weight.flatten(1)
        u, sigma = (getattr(self, name) for name in self.names)
        with torch.no_grad():
            v = nn.functional.normalize(u @ w)
            new = nn.functional.normalize(v @ w.t())
        found = new @ w @ v.t()
        if self.training:
            u.copy_(new)
            sigma.copy_(found.detach()[0])
        return self._conv_forward(x, self.weight / found, self.bias)


NAMES = {"biggan": ("u0", "sv0"), "mimicry": ("sn_u", "sn_sigma")}


def model(form):
    """The same critic in each library's terms, with a layer norm and an unnormalised layer to be left alone."""

    def conv(*args):
        if form in NAMES:
            return Rows(NAMES[form], *args)
        wrap = {"torch": parametrizations.spectral_norm, "torch-legacy": legacy, "ours": gp.spectral_norm}[form]
        return wrap(nn.Conv2d(*args))

    return nn.Sequential(
        conv(3, 5, 3), nn.BatchNorm2d(5), nn.LeakyReLU(), nn.Sequential(conv(5, 4, 3)), nn.Flatten(), nn.Linear(64, 1)
    )


def trained(form, steps=20):
    net = model(form)
    with torch.no_grad():
        for _ in range(steps):
            net(torch.randn(2, 3, 8, 8))
    return net


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(net):
    return net.eval()(images())


@pytest.mark.parametrize("source", FORMATS)
def test_loads_strictly_into_ours_and_gives_the_same_scores(source):
    net = trained(source, 400)
    state = net.state_dict()
    ours = model("ours")
    ours.load_state_dict(convert(state, "torch"), strict=True)
    wanted = outputs(net)
    torch.testing.assert_close(outputs(ours), wanted, rtol=1e-4, atol=1e-5)
    if source in NAMES:  # their evaluation iterates once more
        gp.spectral_norm_handle(ours).update()
        torch.testing.assert_close(outputs(ours), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", FORMATS)
def test_ours_loads_strictly_into_the_others(target):
    ours = model("ours")
    net = model(target)
    net.load_state_dict(convert(ours.state_dict(), target), strict=True)
    tolerance = 1e-2 if target in NAMES else 1e-6  # their evaluation iterates once more, from u after 15 iterations
    torch.testing.assert_close(outputs(net), outputs(ours), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FORMATS, FORMATS)))
def test_round_trips(source, target):
    state = trained(source).state_dict()
    kept = copy.deepcopy(state)
    there = convert(state, target)
    assert recognise(there) == target
    back = convert(there, source)
    assert list(state) == list(kept)
    assert set(back) == set(state)
    assert set(model(target).state_dict()) == set(there)
    for key, value in state.items():
        assert torch.equal(value, kept[key])
        made_anew = key.endswith(("._v", "weight_v", "sv0", "sn_sigma")) and bool({source, target} & set(NAMES))
        if made_anew:  # v by a product where one of the two has none; sigma from u and v
            torch.testing.assert_close(back[key], value, rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(back[key], value), key


def test_rows_without_v_get_it_by_one_product():
    state = trained("biggan", 1).state_dict()
    v = convert(state, "torch")["0.parametrizations.weight.0._v"]
    w, u = state["0.weight"].flatten(1), state["0.u0"][0]
    torch.testing.assert_close(v, nn.functional.normalize(w.T @ u, dim=0))
    sigma = convert(convert(state, "torch"), "mimicry")["0.sn_sigma"]
    torch.testing.assert_close(sigma, (u @ w @ v).reshape(1))


@pytest.mark.parametrize("form", ["torch", "torch-legacy"])
def test_weights_of_other_names_and_transposed_layers(form):
    wrap = parametrizations.spectral_norm if form == "torch" else legacy
    cell = wrap(wrap(nn.GRUCell(3, 4), "weight_ih"), "weight_hh")
    net = nn.Sequential(wrap(nn.ConvTranspose2d(3, 7, 2)), cell)
    other = "torch-legacy" if form == "torch" else "torch"
    there = convert(net.state_dict(), other)
    for key, value in convert(there, form).items():
        assert torch.equal(value, net.state_dict()[key])
    with pytest.raises(ValueError, match="rows along the first dimension"):
        convert({k: v for k, v in net.state_dict().items() if k.startswith("0")}, "biggan")
    with pytest.raises(ValueError, match="the name 'weight'"):
        convert(cell.state_dict(), "mimicry")


def broken(form, change):
    state = dict(trained(form).state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("torch", lambda s: s.pop("0.parametrizations.weight.0._v"), "no 0.parametrizations.weight.0._v"),
        ("torch", lambda s: s.pop("0.parametrizations.weight.original"), "no 0.parametrizations.weight.original"),
        ("torch", lambda s: [s.pop(f"0.parametrizations.weight.0._{x}") for x in "uv"], "none of 0.parametrizations"),
        ("torch", lambda s: s.update({"9.parametrizations.bias.original": torch.ones(2)}), "none of 9.param"),
        ("torch-legacy", lambda s: s.pop("0.weight_v"), "no 0.weight_v"),
        ("torch-legacy", lambda s: [s.pop(f"0.weight_{x}") for x in "uv"], "none of 0.weight_orig"),
        ("biggan", lambda s: s.pop("3.0.sv0"), "no 3.0.sv0"),
        ("biggan", lambda s: s.update({"0.u1": s["0.u0"]}), "one singular value"),
        ("mimicry", lambda s: s.update({"0.sn_u": s["0.sn_u"][0]}), r"0.weight: wanted u of shape \(1, 5\)"),
        ("torch", lambda s: s.update({"0.parametrizations.weight.0._u": torch.ones(6)}), "as many elements"),
        ("torch", lambda s: s.update(trained("mimicry").state_dict()), "wanted one of the formats"),
        ("torch", lambda s: s.update({"0.weight_u": torch.ones(1), "0.weight": torch.ones(1)}), "stay apart"),
    ],
)
def test_keys_that_do_not_fit(form, change, message):
    state = broken(form, change)
    with pytest.raises(ValueError, match=message):
        convert(state, "biggan" if "apart" in message else "torch-legacy" if form == "torch" else "torch")


def test_wrong_arguments():
    state = trained("torch").state_dict()
    with pytest.raises(ValueError, match="target: wanted one of 'torch'"):
        convert(state, "keras")
    with pytest.raises(ValueError, match="source: wanted one of"):
        convert(state, "torch", source="keras")
    with pytest.raises(ValueError, match="state_dict: wanted one format, 'biggan', got 'torch' in it"):
        convert(state, "torch", source="biggan")
    with pytest.raises(ValueError, match="wanted one of the formats"):
        convert(nn.Linear(2, 2).state_dict(), "torch")
    with pytest.raises(ValueError, match="wanted weights in the names of 'torch'"):
        convert(nn.Linear(2, 2).state_dict(), "torch", source="torch")
    with pytest.raises(TypeError, match="state_dict: wanted a mapping"):
        convert([1], "torch")


@pytest.mark.parametrize("norm", ["matrix", "convolution"])
def test_weights_without_u_and_v_are_refused(norm):
    more = {"norm": norm, "input_shape": (5, 5)} if norm == "convolution" else {}
    other = gp.spectral_norm(nn.Conv2d(2, 2, 3), **more) if more else gp.spectral_norm(nn.LayerNorm(4))
    state = nn.Sequential(gp.spectral_norm(nn.Linear(3, 3)), other).state_dict()
    with pytest.raises(ValueError, match=r"u and v of every weight, got none of 1\.param"):
        convert(state, "torch-legacy")
    assert list(convert(state, "torch")) == list(state)


def test_other_parametrizations_and_metadata_are_kept():
    net = nn.Sequential(
        gp.spectral_norm(nn.Linear(3, 3)),
        parametrizations.orthogonal(nn.Linear(3, 3), use_trivialization=True),
        parametrizations.weight_norm(nn.Linear(3, 3)),
    )
    nn.utils.prune.identity(legacy_pruned := nn.Linear(2, 2), "weight")
    state = net.state_dict()
    there = convert(state, "torch-legacy")
    assert {k for k in state if k[0] in "12"} < set(there)
    assert there._metadata == state._metadata
    there.update({f"3.{k}": v for k, v in legacy_pruned.state_dict().items()})
    assert {"3.weight_orig", "3.weight_mask"} < set(convert(there, "torch"))


def test_other_keys_that_end_alike_are_left_alone():
    state = {**trained("torch").state_dict(), "path_u": torch.ones(1), "u0": torch.ones(1), "path.sn_v": torch.ones(1)}
    assert recognise(state) == "torch"
    there = convert(state, "torch-legacy")
    assert {"path_u", "u0", "path.sn_v"} < set(there)
