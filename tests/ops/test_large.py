"""More than 2³¹ elements, and elements more than 2³¹ places apart: indices have 64 bits all the way."""

import os

import numpy as np
import pytest
import torch

import projgrad

FAR = 1 << 31
close = torch.testing.assert_close
LARGE = pytest.mark.skipif(not os.environ.get("PROJGRAD_LARGE"), reason="5 GB; PROJGRAD_LARGE=1 runs it")


def zeros(*shape):
    """Zeros in bfloat16, in memory only where they are written."""
    return torch.from_numpy(np.zeros(shape, dtype="int16")).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("along", ["rows", "columns"])
def test_elements_far_apart(along, dtype):
    """The pages in between are never touched."""
    values = torch.randn(3, 40).to(dtype)
    strides = (FAR + 5, 1) if along == "rows" else (1, FAR // 39 + 5)
    space = torch.from_numpy(np.empty(2 * (FAR + 5) + 40, dtype=f"int{8 * dtype.itemsize}")).view(dtype)
    G = space.as_strided((3, 40), strides)
    G.copy_(values)
    u = torch.randn(40).to(dtype)
    close(projgrad.gram(G), projgrad.gram(values))
    close(projgrad.gram(values, G)[1], projgrad.gram(values))
    close(projgrad.project_out(u, G), projgrad.project_out(u, values))
    close(projgrad.project_out(G, u[None]), projgrad.project_out(values, u[None]))
    assert torch.equal(G, values)
    d, ones = G[:, 0] if along == "rows" else G[0], torch.ones(3 if along == "rows" else 40)
    kept = projgrad.feasible(d, -d, d.float() * -3, ones * 9, 3)
    same = d.clone()
    assert torch.equal(kept, projgrad.feasible(same, -same, same.float() * -3, ones * 9, 3))


@LARGE
@pytest.mark.slow
def test_gram_of_one_number_over_and_over():
    """Expanded: no memory."""
    p = FAR + 77
    G = torch.tensor([[1.0], [-2.0]]).expand(2, p)
    assert projgrad.gram(G).tolist() == [[p, -2 * p], [-2 * p, 4 * p]]


@LARGE
@pytest.mark.slow
@pytest.mark.parametrize("n, p", [(1, FAR + 77), (2, FAR // 2 + 77)])
def test_project_out_of_more_than_2_to_31_elements(n, p):
    """Only the last columns of G are not zero: nothing may be lost there."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        G, u = zeros(n, p), torch.ones(1, dtype=torch.bfloat16).expand(p)
        G[:, -8:] = torch.tensor([[1.0, -1.0], [1.0, 1.0]])[:n].repeat(1, 4)
        G[0, 0] = 4
        out, info = projgrad.project_out(u, G, return_info=True)
        expected = projgrad.project_out(torch.ones(10), torch.cat([G[:, :2], G[:, -8:]], 1).float())
        torch.testing.assert_close(torch.cat([out[:2], out[-8:]]).float(), expected, rtol=1e-2, atol=1e-2)
        assert out[2:-8].amax() == out[2:-8].amin() == 1 and info.rank == n
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


@LARGE
@pytest.mark.slow
def test_feasible_of_more_than_2_to_31_elements():
    """Only the first and the last coordinate move; both are kept."""
    p = FAR + 77
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        d, against, squares = zeros(p), zeros(p), zeros(p)
        d[0] = d[-1] = 1
        against[0] = against[-1] = -1
        kept = projgrad.feasible(d, against, against, squares, 3)
        assert kept[0] == kept[-1] == 1 and kept[1:-1].amax() == kept[1:-1].amin() == 0
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
