"""The weights by which a gradient says whose it is."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from projgrad.recording.codes import Codes, matches
from projgrad.rules.layout import Layout, gather

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def passes(codes, shares):
    """Signatures [r, 1] in every pass, for the shares of the samples in every entry [r, n]."""
    return [(shares * w.double()).sum(1, keepdim=True) for w in codes.weights]


def owners(codes, shares):
    return codes.owners(passes(codes, shares), 1e-10, torch.tensor(1e-300))[:2]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 31, 36, 37, 96, 97, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sample_is_known_by_its_factors(dtype, n):
    codes = Codes(n, torch.zeros(n, dtype=torch.float64), dtype)
    owner, mixed = owners(codes, torch.eye(n, dtype=torch.float64) * torch.randn(n, 1, dtype=torch.float64))
    assert owner.tolist() == list(range(n)) and not mixed.any()
    assert len({tuple(f[j].item() for f in codes.factors) for j in range(n)}) == n
    if dtype == torch.float16:
        assert all(w.abs().min() >= 0.18 and w.abs().max() <= 1 for w in codes.weights)
    for f in codes.factors:
        assert (f.abs().log2() == f.abs().log2().round()).all()  # scaling by them does not round


@pytest.mark.parametrize("n", [2, 3, 6, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_share_of_another_sample_shows(dtype, n):
    codes = Codes(n, torch.zeros(n, dtype=torch.float64), dtype)
    for a, b in itertools.permutations(range(min(n, 6)), 2):
        for share in (1.0, -1.0, 0.5, 1e-6):
            shares = torch.zeros(1, n, dtype=torch.float64)
            shares[0, a], shares[0, b] = 1.0, share
            owner, mixed = owners(codes, shares)
            assert mixed.all() and owner.tolist() == [-1]


@pytest.mark.parametrize("n", [2, 3, 5, 32])
def test_what_cancels_in_one_pass_shows_in_another(n):
    """Also what was found only with these weights in mind."""
    codes = Codes(n, torch.zeros(n, dtype=torch.float64), torch.float32)
    for j in range(1, n):
        shares = torch.zeros(1, n, dtype=torch.float64)
        shares[0, 0], shares[0, j] = codes.base[j], -codes.base[0]
        assert not passes(codes, shares)[0].any()
        assert owners(codes, shares)[1].all()
    centred = torch.eye(n, dtype=torch.float64) - 1 / n
    assert owners(codes, centred)[1].all()


def test_nothing_belongs_to_nobody():
    codes = Codes(4, torch.zeros(4, dtype=torch.float64), torch.float32)
    owner, mixed = owners(codes, torch.zeros(3, 4, dtype=torch.float64))
    assert owner.tolist() == [-1] * 3 and not mixed.any()


@pytest.mark.parametrize("owner", [[0, 1, 2], [2, 2, -1, 0], [1, -1, 1, 1, 0, 2], [-1, -1, -1]])
def test_rows_of_a_sample_are_split_out_of_any_order(owner):
    """Split, and what every entry belongs to; also over two leading dimensions."""
    owner = torch.tensor(owner)
    layout = gather(owner, 3)
    assert layout.owner(len(owner), 3, owner.device).tolist() == owner.tolist()
    x = torch.randn(len(owner), 2)
    two = Layout(rows=layout.rows, lead=(1, len(owner)))
    for j in range(3):
        expected = x[owner == j]
        for found in (layout.split(x, 3)[j], two.split(x[None], 3)[j][:, 0]):
            assert torch.equal(found[: len(expected)], expected) and not found[len(expected) :].any()
        if len(expected):
            filled = layout.split(x, 3, fill=None)[j]
            assert torch.equal(filled[len(expected) :], expected[:1].expand(len(filled) - len(expected), 2))


def found_owners(sizes, mixing, noise, faint):
    """Owners of n samples with t rows each, sizes [n, t]: some are partly another sample's, some noise in each pass."""
    n, t = sizes.shape
    codes = Codes(n, torch.zeros(n, dtype=torch.float64), torch.bfloat16)
    shares = torch.eye(n, dtype=torch.float64)[:, None] * sizes[..., None] + mixing[..., None] / n
    random = torch.Generator().manual_seed(0)
    signatures = [
        ((shares * w.double()).sum(-1) + noise * torch.randn(n, t, generator=random).double()).view(-1, 1)
        for w in codes.weights
    ]
    return codes.owners(signatures, 1e-2, torch.tensor(1e-300))._replace(faint=faint)


@pytest.mark.parametrize("axes", [[0, 1], [1, 0]])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_rows_of_mere_rounding_may_be_anybodys(scale, axes):
    """Where attention's terms cancel the gradient is rounding: no weight of a loss scales it."""
    sizes = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.7, 1.0]], dtype=torch.float64)
    sizes[1] *= scale
    nothing, site = torch.zeros(2, 3, dtype=torch.float64), SimpleNamespace(shape=(2, 3))
    layout = Layout()
    if axes == [1, 0]:
        site.shape, layout = (3, 2), Layout(1)

    def right(mixing, noise, faint):
        found = found_owners(sizes.where(noise == 0, 0), mixing, noise, faint)
        if axes == [1, 0]:
            found = found._replace(**{k: getattr(found, k).view(2, 3).mT.flatten() for k in ("owner", "mixed", "size")})
        return matches(found, [0, 1], layout, site, 2)

    noise = nothing.clone()
    noise[:, 0] = 1e-3 * sizes[:, 1]
    assert right(nothing, nothing, 0.0) and right(nothing, noise, 2.0**-7) and not right(nothing, noise, 0.0)
    for j in (0, 1):  # beside the largest row of its own sample
        mixing = nothing.clone()
        mixing[j, 1] = 0.2 * sizes[j, 1]
        assert not right(mixing, nothing, 2.0**-7)
        noise = nothing.clone()
        noise[j, 0] = 0.1 * sizes[j, 1]
        assert not right(nothing, noise, 2.0**-7)
