"""Independent references: the formulas in plain torch and plain Python, sharing no code with the package."""

import torch

KEY_STEP = (0x9E3779B9, 0xBB67AE85)


def philox4x32_10(counter, key):
    """Philox4x32-10 in integers, from the definition in Salmon et al., SC 2011."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(word + step) & 0xFFFFFFFF for word, step in zip(k, KEY_STEP, strict=True)]
    return c


def words(seed, count):
    """The first `count` words of the stream that the two int64 of `seed` identify."""
    key, stream = (int(word) & 0xFFFFFFFFFFFFFFFF for word in seed)
    result = []
    for block in range(-(-count // 4)):
        counter = (block & 0xFFFFFFFF, block >> 32, stream & 0xFFFFFFFF, stream >> 32)
        result += philox4x32_10(counter, (key & 0xFFFFFFFF, key >> 32))
    return result[:count]


def norms(grad, norm, axes):
    order = {"l2": 2, "l1": 1, "linf": float("inf")}[norm]
    if axes == "pixel":
        return torch.linalg.vector_norm(grad, order, dim=1)
    if axes == "batch":
        return torch.linalg.vector_norm(grad, order).reshape(1)
    return torch.linalg.vector_norm(grad.reshape(len(grad), -1), order, dim=1)


def of_form(n, form, target):
    return {
        "two_sided": lambda: (n - target) ** 2,
        "one_sided": lambda: torch.relu(n - target) ** 2,
        "one_sided_linear": lambda: torch.relu(n - target),
        "maximum": lambda: torch.maximum(n, torch.full_like(n, target)),
        "linear": lambda: n,
        "squared": lambda: n**2,
    }[form]()


def penalty(grad, form, target, norm, axes, reduction):
    value = of_form(norms(grad, norm, axes), form, target)
    return {"mean": value.mean, "sum": value.sum, "none": lambda: value}[reduction]()


def relative_error(got, wanted):
    """||got - wanted|| / ||wanted||, absolute where wanted is 0."""
    scale = wanted.double().norm().clamp_min(1e-30)
    if wanted.double().norm() == 0:
        scale = torch.ones(())
    return ((got.double() - wanted.double()).norm() / scale).item()


def gradient_penalty(critic, x, form="two_sided", target=1.0, norm="l2", axes="sample"):
    """The usual snippet: autograd.grad with create_graph at x, then a norm."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return penalty(grad, form, target, norm, axes, "mean")
