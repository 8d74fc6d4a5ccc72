"""The tape against a loop of batches of one, on every model of the zoo, in float64."""

import functools

import oracle
import pytest
import torch
from cases import DEVICES
from oracle import random_direction, trained
from steps import ERROR
from zoo import ZOO

import projgrad

EPS = torch.finfo(torch.float64).eps


@functools.cache
def _built(name, device):
    case = ZOO[name]().to(device)
    return case, oracle.gradients(case)


@pytest.fixture(scope="module", params=[(name, device) for name in ZOO for device in DEVICES], ids="-".join)
def built(request):
    """A case and its per-sample gradients; made once for all tests of the case."""
    yield _built(*request.param)
    _built.cache_clear()


def record(case):
    with projgrad.per_sample(case.model) as tape:
        losses = case.losses(case.model)
    return tape, losses


def placed(case, tensors):
    """The same on the device of the model; the truth stays on the CPU."""
    device = case.inputs[0].device
    return {name: t.to(device) for name, t in tensors.items()}


def check_tensors(found, expected, sizes):
    """Entry by entry, relative to the largest entry of each tensor's size; far below the largest of all is rounding."""
    assert found.keys() == expected.keys()
    floor = 1e-6 * oracle.largest(sizes)
    wrong = []
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = (found[name].cpu() - value).abs().max().item()
        scale = max(sizes[name].abs().max().item(), floor)
        if not error <= ERROR * scale:
            wrong.append(f"{name}: error {error:.1e} of {scale:.1e}")
    assert not wrong, "\n".join(wrong)


def test_losses_of_a_batch_equal_the_loop_of_single_samples(built):
    """The losses are those of batches of one, and so is the gradient of any combination of them."""
    case, G = built
    losses = case.losses(case.model)
    assert losses.shape == (case.n,) and losses.dtype == torch.float64
    expected = torch.stack([case.one(case.model, j) for j in range(case.n)])
    assert (losses - expected).abs().max() <= 1e-10 * expected.abs().max()
    weights = torch.randn(case.n, dtype=torch.float64)
    params = trained(case.model)
    grads = torch.autograd.grad(
        losses, list(params.values()), weights.to(losses.device), allow_unused=True, materialize_grads=True
    )
    check_tensors(dict(zip(params, grads, strict=True)), _weighted(weights, G), G)


def _weighted(weights, G):
    return {name: torch.tensordot(weights, g, 1) for name, g in G.items()}


def test_gram_equals_the_loop_of_single_samples(built):
    case, G = built
    tape, losses = record(case)
    K, expected = tape.gram(losses).cpu(), oracle.gram(G)
    assert K.shape == expected.shape and K.dtype == torch.float64
    assert (K - expected).abs().max() <= ERROR * expected.abs().max()


def test_dot_equals_the_loop_of_single_samples(built):
    case, G = built
    direction = random_direction(case)
    tape, losses = record(case)
    found = tape.dot(losses, placed(case, direction)).cpu()
    u = torch.cat([direction[name].flatten() for name in G])
    expected = oracle.matrix(G) @ u
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= ERROR * expected.abs().max()


def test_rows_equal_the_loop_of_single_samples(built):
    case, G = built
    tape, losses = record(case)
    check_tensors(tape.rows(losses), G, G)


def test_combine_equals_the_loop_of_single_samples(built):
    case, G = built
    weights = torch.randn(case.n, dtype=torch.float64)
    tape, losses = record(case)
    check_tensors(tape.combine(losses, weights.to(losses.device)), _weighted(weights, G), G)


def test_moments_equal_the_loop_of_single_samples(built):
    case, G = built
    tape, losses = record(case)
    first, second = tape.moments(losses)
    check_tensors(first, {name: g.sum(0) for name, g in G.items()}, G)
    squares = {name: g.square() for name, g in G.items()}
    check_tensors(second, {name: g.sum(0) for name, g in squares.items()}, squares)


def bound(rows, floor):
    """How far two solutions may differ, relative to ‖u‖: a Gram matrix squares the condition. None: no answer is right.

    Rows at rounding level (the key bias of an attention has no gradient) span an arbitrary space.
    """
    lengths = rows.norm(dim=1)
    rows, lengths = rows[lengths > 0], lengths[lengths > 0]
    if not len(rows):
        return ERROR
    if lengths.min() < floor:
        return None
    s = torch.linalg.svdvals(rows / lengths[:, None]) / len(rows) ** 0.5
    s = s[s > 4 * max(rows.shape) * EPS * s.max()]
    error = 16 * len(rows) * EPS * (s.max() / s.min()).item() ** 2
    return max(ERROR, error) if error < 1e-4 else None


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_project_equals_the_svd_of_the_loop(built, scope):
    case, G = built
    u = random_direction(case)
    params = trained(case.model)
    tape, losses = record(case)
    for name, p in params.items():
        p.grad = u[name].to(p.device, copy=True)
    try:
        tape.project_(losses, scope=scope)
        found = {name: p.grad.cpu() for name, p in params.items()}
    finally:
        for p in params.values():
            p.grad = None
    expected = oracle.project(u, G, scope)
    floor = 1e-10 * oracle.matrix(G).norm(dim=1).max()
    groups = {"all parameters": list(G)} if scope == "global" else {name: [name] for name in G}
    wrong, compared = [], 0
    for group, names in groups.items():
        allowed = bound(torch.cat([G[name].reshape(case.n, -1) for name in names], 1), floor)
        if allowed is None:
            continue
        compared += 1
        error = sum((found[name] - expected[name]).norm() ** 2 for name in names) ** 0.5
        size = sum(u[name].norm() ** 2 for name in names) ** 0.5
        if not error <= allowed * size:
            wrong.append(f"{group}: error {error:.1e} of {size:.1e}")
    assert not wrong, "\n".join(wrong)
    assert compared >= len(groups) / 2
