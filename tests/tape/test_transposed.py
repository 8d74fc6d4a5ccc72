"""A parameter used as it is and transposed, in calls of every kind: cross terms between both uses count."""

import pytest
import torch
from torch.nn import functional as F

import projgrad

pytestmark = pytest.mark.usefixtures("float64")

N, T, D = 5, 3, 8
USES = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: x @ w,
    "expanded": lambda x, w: x.bmm(w.expand(N, D, D)),
    "repeated": lambda x, w: x.bmm(w.repeat(N, 1, 1)),
    "table": lambda x, w: F.embedding(x.argsort(-1)[..., 0], w),
    "index": lambda x, w: w[x.argsort(-1)[..., 0]],
    "scale": lambda x, w: (x[..., None] * w).sum(-2),
    "added": lambda x, w: (x[..., None] + w).square().sum(-2),
    "row": lambda x, w: x * w[0],
    "grouped": lambda x, w: torch.einsum("nti,ij->ntij", x, w).sum(2),
    "where": lambda x, w: torch.where(x[..., None] > 0, w, 2 * w).sum(-2),
}


@pytest.mark.parametrize("turned", USES)
@pytest.mark.parametrize("plain", ["linear", "expanded", "table", "scale"])
def test_both_ways_round(plain, turned):
    w, x = torch.nn.Parameter(torch.randn(D, D)), torch.randn(N, T, D)
    losses = lambda: (USES[plain](x, w) + USES[turned](x, w.t())).square().sum((1, 2))  # noqa: E731
    G = torch.stack([torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses()])
    with projgrad.Tape({"w": w}) as tape:
        own = losses()
    assert (tape.gram(own) - G.flatten(1) @ G.flatten(1).T).norm() < 1e-12 * G.norm() ** 2
    assert (tape.rows(own)["w"] - G).norm() < 1e-12 * G.norm()
    assert (tape.moments(own)[1]["w"] - G.square().sum(0)).norm() < 1e-12 * G.norm() ** 2
