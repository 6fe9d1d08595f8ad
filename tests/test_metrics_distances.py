"""Distances between sets of features and images: closed forms, scipy, torchmetrics, loops written out."""

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.stats
import torch
from threads import one_thread  # noqa: F401
from torch import nn

from gpkernels import metrics
from gpkernels.metrics import distances, sliced


def normal(count, dimensions, seed=0, **options):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **options)


def covariance(dimensions, seed):
    factor = normal(dimensions, dimensions, seed)
    return factor @ factor.T / dimensions


def test_frechet_distance_of_independent_gaussians():
    """Diagonal covariances: ||m - m'||^2 + ||s - s'||^2."""
    mean, other = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.0, 2.0, 0.5])
    deviation, other_deviation = torch.tensor([1.0, 0.5, 3.0]), torch.tensor([2.0, 0.5, 0.0])
    got = metrics.gaussian_frechet(mean, deviation.square().diag(), other, other_deviation.square().diag())
    assert got == pytest.approx(17.25 + 10.0, rel=1e-12)


def test_frechet_distance_of_gaussians_on_lines():
    """Covariances a a^T and b b^T, of rank one: the trace of the root is |a.b|."""
    a, b = normal(2, 5)
    got = metrics.gaussian_frechet(torch.zeros(5), torch.outer(a, a), torch.zeros(5), torch.outer(b, b))
    assert got == pytest.approx((a @ a + b @ b - 2 * (a @ b).abs()).item(), rel=1e-6)


def test_frechet_distance_against_scipy():
    mean, other = normal(2, 6)
    first, second = covariance(6, 1), covariance(6, 2)
    root = scipy.linalg.sqrtm(first.numpy() @ second.numpy()).real
    wanted = (mean - other).square().sum() + first.trace() + second.trace() - 2 * np.trace(root)
    assert metrics.gaussian_frechet(mean, first, other, second) == pytest.approx(wanted.item(), rel=1e-9)


def test_frechet_distance_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = normal(80, 16).float(), normal(60, 16, 1).float() * 1.5 + 0.3
    theirs = FrechetInceptionDistance(feature=WithCount())
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert metrics.frechet_distance(real, fake) == pytest.approx(theirs.compute().item(), rel=1e-4)


class WithCount(nn.Identity):
    num_features = 16


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
@pytest.mark.parametrize("rows", [7, 1024])
def test_kid_is_that_of_torchmetrics(rows, monkeypatch):
    """One subset of everything leaves nothing to chance; blocks of rows change nothing."""
    from torchmetrics.image.kid import KernelInceptionDistance

    monkeypatch.setattr(distances, "_ROWS", rows)
    real, fake = normal(50, 16).float(), normal(50, 16, 1).float() * 1.2
    theirs = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=50)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    got = metrics.kid(real, fake, subsets=1, size=50)
    assert got.value == pytest.approx(theirs.compute()[0].item(), rel=1e-4)
    assert got[1:] == (0, 1, 50)


def kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def test_kid_of_a_subset_is_the_formula():
    real, fake, size = normal(9, 4), normal(13, 4, 1) + 0.5, 5
    got = metrics.kid(real, fake, subsets=4, size=size, seed=3)
    draws = torch.Generator().manual_seed(3)
    chosen = [[torch.randperm(len(x), generator=draws)[:size] for _ in range(4)] for x in (real, fake)]
    values = []
    for first, second in zip(*chosen, strict=True):
        x, y = real[first], fake[second]
        off = 1 - torch.eye(size, dtype=x.dtype)
        within = (kernel(x, x) * off + kernel(y, y) * off).sum() / (size * (size - 1))
        values.append((within - 2 * kernel(x, y).mean()).item())
    assert got.value == pytest.approx(np.mean(values), rel=1e-10)
    assert got.spread == pytest.approx(np.std(values), rel=1e-10)


def test_kid_is_unbiased_and_its_spread_is_that_of_the_subsets():
    """Of one distribution: zero within the standard error of independent draws; the Frechet distance is far above."""
    values = [metrics.kid(normal(40, 8, seed), normal(40, 8, seed + 100)).value for seed in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5
    got = metrics.kid(normal(40, 8), normal(40, 8, 1))
    assert (got.size, got.subsets) == (20, 100)
    assert got.spread > 0
    assert metrics.kid(normal(40, 8), normal(40, 8, 1)) == got != metrics.kid(normal(40, 8), normal(40, 8, 1), seed=1)
    assert metrics.frechet_distance(normal(40, 8), normal(40, 8, 1)) > 0.5


def test_precision_and_recall_by_loops():
    real, fake, k = normal(30, 3), normal(25, 3, 1) * 0.7 + 1.0, 2

    def share(points, centres):
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = sorted(np.linalg.norm(centre - other) for j, other in enumerate(centres) if j != i)
                if np.linalg.norm(point - centre) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    wanted = share(fake.numpy(), real.numpy()), share(real.numpy(), fake.numpy())
    assert tuple(metrics.precision_recall(real, fake, k=k)) == pytest.approx(wanted)
    assert 0 < wanted[1] < wanted[0] < 1


def test_precision_and_recall_tell_lost_variety_from_lost_quality():
    real = torch.cat([normal(60, 4), normal(60, 4, 1) + 50])
    assert tuple(metrics.precision_recall(real, real)) == (1, 1)
    precision, recall = metrics.precision_recall(real, normal(60, 4, 2))  # one of two modes
    assert precision > 0.8
    assert recall < 0.5
    precision, recall = metrics.precision_recall(real, torch.cat([real, normal(120, 4, 3) - 500]))
    assert precision == 0.5
    assert recall == 1


def test_wasserstein_distance_in_one_dimension_is_scipys():
    for count, other in ((50, 50), (40, 63), (1, 9)):
        x, y = normal(3, count), normal(3, other, 1).exp()
        wanted = [scipy.stats.wasserstein_distance(a, b) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
        assert sliced.wasserstein(x, y).tolist() == pytest.approx(wanted, rel=1e-9)
        assert metrics.sliced_wasserstein(x[0][:, None], y[0][:, None]) == pytest.approx(wanted[0], rel=1e-9)


def test_sliced_distance_of_a_shift():
    """Moved by v, the samples' projection on t moves by v.t, on average |v|/2 in 3-D."""
    x, v = normal(40, 3), torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64)
    assert metrics.sliced_wasserstein(x, x + v, directions=20_000) == pytest.approx(2.5, rel=0.02)
    assert metrics.sliced_wasserstein(x, x[torch.randperm(40)]) == 0
    assert metrics.sliced_wasserstein(x, x + v, seed=1) == metrics.sliced_wasserstein(x, x + v, seed=1)
    assert metrics.sliced_wasserstein(x, x + v, seed=1) != metrics.sliced_wasserstein(x, x + v, seed=2)


def test_pyramid_is_scipys_and_adds_up():
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    levels = sliced.laplacian_pyramid(images)
    assert [level.shape[2] for level in levels] == [64, 32, 16]
    again = levels[2]
    for level in levels[1::-1]:
        again = level + sliced.enlarge(again)
    torch.testing.assert_close(again, images)
    line = np.array([1, 4, 6, 4, 1]) / 16
    blurred = scipy.ndimage.convolve(images[0, 0].numpy(), np.outer(line, line), mode="mirror")
    smaller = torch.from_numpy(blurred[::2, ::2])
    torch.testing.assert_close(images[0, 0] - sliced.enlarge(smaller[None, None])[0, 0], levels[0][0, 0])
    flat = sliced.laplacian_pyramid(torch.full((1, 1, 32, 32), 0.7))
    torch.testing.assert_close(flat[0], torch.zeros(1, 1, 32, 32), atol=1e-6, rtol=0)


def test_pyramid_distance_sees_texture_and_not_contrast():
    """Patches are normalised per set; of equal sets only the choice of patches differs."""
    x = torch.rand(60, 1, 32, 32)
    same = metrics.pyramid_wasserstein(x, x)
    assert list(same) == [32, 16]
    contrast = metrics.pyramid_wasserstein(x, 0.3 * x - 0.5)
    assert contrast == pytest.approx(same, rel=1e-3)
    smooth = metrics.pyramid_wasserstein(x, torch.nn.functional.avg_pool2d(x, 3, 1, 1))
    assert smooth[32] > 3 * same[32]


def test_patches_are_squares_of_the_image():
    """In an image of 100 row + column, patches differ from their corner by the same, up to the normalisation."""
    ramp = (100 * torch.arange(16.0)[:, None] + torch.arange(16.0)).expand(3, 1, 16, 16)
    patches = sliced._patches(ramp, 50, torch.Generator().manual_seed(0)).view(150, 7, 7)
    assert patches.mean().item() == pytest.approx(0, abs=1e-5)
    assert patches.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    offsets = patches - patches[:, :1, :1]
    torch.testing.assert_close(offsets, offsets[:1].expand_as(offsets), atol=1e-5, rtol=1e-5)
    assert (offsets[0, 1, 0] / offsets[0, 0, 1]).item() == pytest.approx(100, rel=1e-3)
    assert len(patches[:, 0, 0].unique()) > 50


def test_reconstruction_error_of_a_linear_generator_is_least_squares():
    weight, images = normal(3, 48).float() / 7, normal(5, 48, 1).float().view(5, 3, 4, 4)
    residual = images.flatten(1) - images.flatten(1) @ torch.linalg.pinv(weight) @ weight
    got = metrics.minimum_reconstruction_error(lambda z: (z @ weight).view(-1, 3, 4, 4), images, 3, lr=0.5)
    torch.testing.assert_close(got, residual.norm(dim=1), rtol=1e-3, atol=0)
    assert (got >= residual.norm(dim=1) - 1e-5).all()


def test_reconstruction_takes_the_best_start_and_the_image_s_own_label():
    """tanh(8 z) holds on to the side it starts on; the label says where the image is."""
    images = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1, 1)

    def stuck(z):
        return torch.tanh(8 * z).view(-1, 1, 1, 1)

    one = metrics.minimum_reconstruction_error(stuck, images, 1, starts=1, steps=1, lr=0.0)
    many = metrics.minimum_reconstruction_error(stuck, images, 1, starts=20, steps=1, lr=0.0)
    assert one.max() > 1.5
    assert many.max() < 0.1

    def conditional(z, y):
        return (0 * z + y[:, None]).view(-1, 1, 1, 1)

    labels = torch.tensor([1, -1, 2, -1])
    got = metrics.minimum_reconstruction_error(conditional, images, 1, labels=labels, steps=1)
    assert got.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(("z", "reach"), [("uniform", (0.99, 1.0)), ("normal", (2.5, 6.0))])
def test_reconstruction_starts_from_the_distribution_of_z(z, reach):
    """The farthest of 5000 starts to either side, which lr 0 does not move: images of 9 and -9 tell it."""
    images = torch.tensor([9.0, -9.0]).view(2, 1, 1, 1)
    options = {"starts": 5000, "steps": 1, "lr": 0.0, "z": z}
    got = metrics.minimum_reconstruction_error(lambda z: z.view(-1, 1, 1, 1), images, 1, **options)
    assert all(reach[0] <= 9 - error <= reach[1] for error in got.tolist())
    with pytest.raises(ValueError, match="z: wanted one of 'normal', 'uniform', got 'cauchy'"):
        metrics.minimum_reconstruction_error(torch.sin, images, 1, z="cauchy")


def test_reconstruction_repeats_whatever_the_batch():
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4))).requires_grad_(False)
    images = torch.rand(7, 1, 4, 4)
    runs = [metrics.minimum_reconstruction_error(net, images, 4, batch=batch) for batch in (1, 6, 64)]
    torch.testing.assert_close(runs[0], runs[1])
    torch.testing.assert_close(runs[0], runs[2])
    longer = metrics.minimum_reconstruction_error(net, images, 4, steps=200)
    assert (longer <= runs[2]).all()


ONE = normal(20, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.frechet_distance(ONE[:4], ONE), "real: wanted at least 5 samples, one more than there are"),
        (lambda: metrics.frechet_distance(ONE, ONE[:, :3]), "fake: wanted 4 features, as real has, got 3"),
        (lambda: metrics.frechet_distance(ONE[0], ONE), r"real: wanted features of shape \(N, D\)"),
        (lambda: metrics.kid(ONE, ONE[:1]), "fake: wanted at least 2 samples, got 1"),
        (lambda: metrics.kid(ONE, ONE[:9], size=10), "size: wanted 2 to 9, the smaller set, got 10"),
        (lambda: metrics.kid(ONE, ONE, subsets=0), "subsets: wanted a whole number >= 1, got 0"),
        (lambda: metrics.precision_recall(ONE, ONE[:4]), "fake: wanted at least 5 samples for k = 3, got 4"),
        (lambda: metrics.sliced_wasserstein(ONE, ONE[:, :3]), r"fake: wanted samples of shape \(4,\)"),
        (lambda: metrics.pyramid_wasserstein(ONE, ONE), "real: wanted square images of 16, 32, 64"),
        (lambda: metrics.pyramid_wasserstein(*[torch.rand(2, 1, 48, 48)] * 2), "real: wanted square images of 16, 32"),
        (
            lambda: metrics.minimum_reconstruction_error(lambda z: z[:, :, None, None], torch.rand(2, 3, 1, 1), 4),
            r"images: wanted the generator's shape \(4, 1, 1\), got \(3, 1, 1\)",
        ),
        (
            lambda: metrics.minimum_reconstruction_error(torch.zeros_like, torch.rand(2, 3), 3),
            "generator: wanted images with a gradient to z, got images without one",
        ),
        (
            lambda: metrics.minimum_reconstruction_error(print, ONE, 4, labels=torch.zeros(3)),
            r"labels: wanted shape \(20,\), got \(3,\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
