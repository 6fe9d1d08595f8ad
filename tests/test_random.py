"""The random numbers: Philox against its published answers, the same words on every backend, right distributions."""

import oracles
import pytest
import scipy.stats
import torch

import gpkernels as gp
from gpkernels.ops import random

SEEDS = [(0, 0), (1, 2), (0x7FFFFFFFFFFFFFFF, 0x123456789ABCDEF), (-1, -5)]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_oracle_gives_the_known_answers_of_random123(counter, key, answer):
    counter, key, answer = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    assert oracles.philox4x32_10(counter, key) == answer


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 4, 7, 1001])
def test_reference_words_equal_the_oracle(seed, count):
    assert random.philox_words(torch.tensor(seed), count).tolist() == oracles.words(seed, count)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 40, 40), (1, 2, 150, 131)])
def test_eps_of_each_element_is_its_word(backend, device, seed, shape):
    """With real 1 and fake 0 the interpolate is eps itself."""
    from gpkernels import registry

    real, words = torch.ones(shape, device=device), torch.tensor(seed, device=device)
    impl = registry.choose("interpolate", real)
    eps = impl.forward(real, torch.zeros_like(real), None, words, True)
    wanted = torch.tensor([word >> 8 for word in oracles.words(seed, real.numel())], dtype=torch.float64) * 2.0**-24
    assert torch.equal(eps.cpu().double().flatten(), wanted)
    per_sample = impl.forward(real, torch.zeros_like(real), None, words, False)
    assert torch.equal(
        per_sample.cpu().double().flatten(1 if real.dim() > 1 else 0).reshape(shape[0], -1)[:, 0], wanted[: shape[0]]
    )


def test_uniform_never_reaches_one():
    assert (torch.tensor(0xFFFFFFFF) >> 8).float() * 2.0**-24 < 1


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_noise_has_its_distribution(backend, device, noise):
    """Kolmogorov-Smirnov on 10^5 draws; DRAGAN's published one-quadrant noise would fail it."""
    zero = torch.zeros(100, 1000, device=device)
    draws = gp.perturb(zero, scale=1.0, noise=noise).flatten().cpu().numpy()
    law = scipy.stats.norm() if noise == "normal" else scipy.stats.uniform(-1, 2)
    assert scipy.stats.kstest(draws, law.cdf).pvalue > 1e-3
    assert scipy.stats.pearsonr(draws[:-1], draws[1:]).pvalue > 1e-3


def test_eps_is_uniform_and_one_per_sample(backend, device):
    real = torch.ones(20000, 3, device=device)
    eps = gp.interpolate(real, torch.zeros_like(real)).cpu()
    assert torch.equal(eps, eps[:, :1].expand_as(eps))
    assert scipy.stats.kstest(eps[:, 0].numpy(), scipy.stats.uniform().cdf).pvalue > 1e-3


def test_manual_seed_and_generator_govern_the_draw(backend, device):
    real, fake = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device)
    torch.manual_seed(5)
    first, second = gp.interpolate(real, fake), gp.interpolate(real, fake)
    torch.manual_seed(5)
    assert torch.equal(gp.interpolate(real, fake), first)
    assert not torch.equal(first, second)
    draws = [gp.perturb(real, scale=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_same_numbers_on_every_backend():
    real, fake = torch.randn(3, 2, 17, 9), torch.randn(3, 2, 17, 9)
    results = []
    for name in ("reference", "cpu"):
        with gp.backend(name):
            results.append(
                gp.perturb(
                    gp.interpolate(real, fake, generator=torch.Generator().manual_seed(1)),
                    scale=0.5,
                    generator=torch.Generator().manual_seed(2),
                )
            )
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def test_numbers_follow_memory_order(backend, device):
    """A channels_last tensor gets the numbers that its memory, read in order, would get."""
    real = torch.ones(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    eps = gp.interpolate(real, torch.zeros_like(real), per_element=True, generator=torch.Generator().manual_seed(1))
    flat = torch.ones(2, 4 * 5 * 3, device=device)
    same = gp.interpolate(flat, torch.zeros_like(flat), per_element=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(eps.permute(0, 2, 3, 1).reshape(2, -1), same)
    assert eps.is_contiguous(memory_format=torch.channels_last)
