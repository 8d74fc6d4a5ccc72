"""Weights used without a layer: products, views, shared and derived ones. One line each: function, shapes, input."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from zoo.case import make, next_token, register, regression, regression_dim1


class Uses(nn.Module):
    """f(module, *inputs) with the module's parameters of the given shapes."""

    def __init__(self, f, **shapes):
        super().__init__()
        self.f = f
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1] if shape else 1)))

    def forward(self, *inputs):
        return self.f(self, *inputs)


class Cube(torch.autograd.Function):
    """x Wᵀ with W cubed entry by entry: an operation that nobody can look into."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.pow(3).mT

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        rows = grad.flatten(0, -2).mT @ x.flatten(0, -2)
        return grad @ w.pow(3), 3 * w.square() * rows


def _rows(m, x):
    """(n, t, d) -> (n t, d): row j t + s is position s of sample j."""
    return F.linear(torch.tanh(F.linear(x.reshape(-1, x.shape[-1]), m.w)), m.v, m.b).view(*x.shape[:-1], -1)


def _packed(m, x):
    q, k, v = F.linear(x, m.w, m.b).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v)


def _packed_weight(m, x):
    q, k, v = (F.linear(x, w) for w in m.w.chunk(3))
    return F.scaled_dot_product_attention(q, k, v)


def _sliced_weight(m, x):
    d = x.shape[-1]
    q, k, v = (F.linear(x, m.w[a : a + d], m.b[a : a + d]) for a in range(0, 3 * d, d))
    return F.scaled_dot_product_attention(q, k, v)


def _hyper(m, x):
    """A weight made from two small ones before use."""
    return torch.tanh(F.linear(x, m.a @ m.b)) @ m.v


def _heads_in_batch(m, x):
    """A batch of n heads, as attention by bmm sees it."""
    x = x.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)  # [2 n, t, 4]
    return (m.v.mT @ torch.tanh(x @ m.w)).unflatten(0, (-1, 2))


def _unfolded(m, x):
    """A convolution by hand."""
    return torch.tanh(x.unfold(1, 3, 1).flatten(2) @ m.w)  # [n, t - 2, 3 d]


def _group(m, x):
    """Two positions share a weight, the samples in the middle dimension of a flattened batch."""
    return (x.flatten(0, 1).view(-1, 2, x.shape[-1]) * m.s).view_as(x) @ m.w


D, NTD, NT = (5, 8), (5, 3, 8), (4, 4, 8)  # inputs: n x d, n x t x d, and n = t
W68, W88 = (6, 8), (8, 8)

USES = {
    # matrix products
    "matmul": (lambda m, x: x @ m.w, dict(w=(8, 6)), D),
    "matmul_3d": (lambda m, x: torch.tanh(x @ m.w) @ m.v, dict(w=(8, 6), v=(6, 4)), NTD),
    "matmul_4d": (lambda m, x: torch.tanh(x @ m.w), dict(w=(8, 6)), (3, 2, 4, 8)),
    "matmul_vector": (lambda m, x: torch.tanh(x @ m.w), dict(w=(8,)), NTD),
    "matmul_n_equals_d": (lambda m, x: torch.tanh(x @ m.w), dict(w=(6, 6)), (6, 6)),
    "mv_of_flat": (lambda m, x: torch.tanh(torch.mv(x, m.w)), dict(w=(8,)), D),
    "mm": (lambda m, x: torch.mm(x, m.w.t()).tanh(), dict(w=W68), D),
    "matmul_left": (lambda m, x: torch.tanh(m.w @ x.mT), dict(w=W68), NTD),
    "matmul_left_n_equals_t": (lambda m, x: torch.tanh(m.w @ x.mT), dict(w=W88), (8, 8, 8)),
    "matmul_left_2d": (lambda m, x: torch.tanh(m.w @ x.mT).mT, dict(w=W68), D),
    "matmul_left_square": (lambda m, x: torch.tanh(m.w @ x.mT).mT, dict(w=(6, 6)), (6, 6)),
    "token_mixing": (lambda m, x: m.v @ torch.tanh(m.w @ x), dict(w=(6, 3), v=(4, 6)), NTD),
    "bmm_expanded": (lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)).tanh(), dict(w=(1, 8, 6)), NTD),
    "bmm_left_expanded": (lambda m, x: torch.bmm(m.w.expand(len(x), 4, 3), x).tanh(), dict(w=(4, 3)), NTD),
    "bmm_heads": (lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), dict(w=(3, 8, 6)), NTD),
    "matmul_heads": (lambda m, x: torch.tanh(x[:, None] @ m.w), dict(w=(2, 8, 6)), NTD),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2).tanh(), dict(w=(8, 6), b=(6,)), D),
    "addmm_full_input": (lambda m, x: torch.addmm(x @ m.v, x, m.w), dict(w=(8, 6), v=(8, 6)), D),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), -1, -1), alpha=2).tanh(),
        dict(w=(8, 6), b=(1, 1, 6)),
        NTD,
    ),
    "einsum": (lambda m, x: torch.einsum("ntd,od->nto", x, m.w).tanh(), dict(w=W68), NTD),
    "einsum_heads": (lambda m, x: torch.einsum("ntd,hde->nhte", x, m.w).tanh(), dict(w=(2, 8, 6)), NTD),
    "einsum_per_head": (lambda m, x: torch.einsum("bthd,hde->bthe", x, m.w).tanh(), dict(w=(3, 8, 6)), (5, 4, 3, 8)),
    "einsum_weight_first": (lambda m, x: torch.einsum("od,tnd->nto", m.w, x.transpose(0, 1)), dict(w=W68), NT),
    "einsum_bilinear": (lambda m, x: torch.einsum("nsd,de,nte->nst", x, m.w, x.cos()), dict(w=W88), NTD),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, ([1, 2], [0, 1])).tanh(), dict(w=(3, 8, 6)), NTD),
    "inner_gram": (lambda m, x: x @ (m.w.mT @ m.w), dict(w=W68), NTD),
    # one weight in several places
    "tied_autoencoder": (lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.w.t(), m.b), dict(w=W68, b=(8,)), D),
    "tied_autoencoder_3d": (lambda m, x: torch.tanh(x @ m.w) @ m.w.mT, dict(w=(8, 6)), NTD),
    "three_times": (lambda m, x: F.linear(F.linear(F.linear(x, m.w).tanh(), m.w).tanh(), m.w), dict(w=W88), D),
    "linear_and_decay": (lambda m, x: (x @ m.w).tanh() - 0.3 * m.w[0] * (x @ m.w), dict(w=W88), NTD),
    "two_kinds": (lambda m, x: F.conv1d(x.mT, m.w[..., None]).mT.tanh() @ m.w, dict(w=W88), NTD),
    # layouts
    "rows_sample_major": (_rows, dict(w=W68, v=(4, 6), b=(4,)), NTD),
    "rows_sample_major_n_equals_t": (_rows, dict(w=W68, v=(4, 6), b=(4,)), NT),
    "rows_from_4d": (_rows, dict(w=W68, v=(4, 6), b=(4,)), (3, 2, 2, 8)),
    "heads_merged_into_batch": (_heads_in_batch, dict(w=(4, 6), v=(3, 2)), NTD),
    "group_of_positions": (_group, dict(s=(1, 2, 8), w=(8, 6)), (5, 4, 8)),
    "unfolded_convolution": (_unfolded, dict(w=(24, 6)), (4, 7, 8)),
    # parts, views and functions of a weight
    "columns": (lambda m, x: F.linear(x[..., :5], m.w[:, :5], m.b).tanh(), dict(w=W68, b=(6,)), NTD),
    "packed_output": (_packed, dict(w=(24, 8), b=(24,)), NTD),
    "packed_weight": (_packed_weight, dict(w=(24, 8)), NTD),
    "packed_weight_sliced": (_sliced_weight, dict(w=(24, 8), b=(24,)), NTD),
    "every_other_row": (lambda m, x: F.linear(x, m.w[::2]).tanh(), dict(w=W68), NTD),
    "gathered_rows": (lambda m, x: F.linear(x, m.w[[0, 2, 2, 5]]).tanh(), dict(w=W68), NTD),
    "flat_vector": (lambda m, x: F.linear(x, m.w[:48].view(6, 8), m.w[48:]).tanh(), dict(w=(54,)), NTD),
    "concatenated": (lambda m, x: F.linear(x, torch.cat([m.a, m.b])).tanh(), dict(a=(2, 8), b=(4, 8)), NTD),
    "stacked": (lambda m, x: F.linear(x, torch.stack([m.a, m.b])).tanh(), dict(a=(8,), b=(8,)), NTD),
    "permuted_kernel": (lambda m, x: F.conv1d(x, m.w.permute(2, 1, 0)).tanh(), dict(w=(3, 4, 6)), (5, 4, 7)),
    "low_rank_product": (_hyper, dict(a=(6, 3), b=(3, 8), v=(6, 4)), NTD),
    "low_rank_sum": (lambda m, x: F.linear(x, m.w + 0.5 * m.b @ m.a).tanh(), dict(w=W68, b=(6, 2), a=(2, 8)), NTD),
    "masked_weight": (lambda m, x: F.linear(x, m.w.tril()).tanh(), dict(w=W68), NTD),
    "scaled_weight": (lambda m, x: F.linear(x, m.w * m.s / 3).tanh(), dict(w=W68, s=(6, 1)), NTD),
    "cosine_classifier": (lambda m, x: 5 * F.linear(F.normalize(x, dim=-1), F.normalize(m.w)), dict(w=W68), D),
    "standardised_kernel": (
        lambda m, x: F.conv1d(x, (m.w - m.w.mean((1, 2), True)) / m.w.std((1, 2), keepdim=True)).tanh(),
        dict(w=(6, 4, 3)),
        (5, 4, 7),
    ),
    "softplus_weight": (lambda m, x: F.linear(x, F.softplus(m.w)).tanh(), dict(w=W68), NTD),
    "cast_weight": (lambda m, x: F.linear(x, m.w.to(x.dtype), m.b.type_as(x)).tanh(), dict(w=W68, b=(6,)), NTD),
    "cloned_weight": (lambda m, x: F.linear(x, m.w.clone().contiguous()).tanh(), dict(w=W68), NTD),
    "opaque_function": (lambda m, x: torch.tanh(Cube.apply(x, m.w) + m.b), dict(w=W68, b=(6,)), NTD),
    "opaque_and_known": (lambda m, x: Cube.apply(x, m.w).tanh() + F.linear(x, m.w), dict(w=W68), NTD),
}


def add(uses):
    for name, (f, shapes, shape) in uses.items():
        register(name, lambda f=f, s=shapes, shape=shape: make(Uses(f, **s), regression, torch.randn(shape)))


add(USES)

# The sample is dimension 1 of input and output.
SEQUENCE_FIRST = {
    "sequence_first": (lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.v), dict(w=W68, v=(4, 6)), (3, 5, 8)),
    "sequence_first_n_equals_t": (lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.v), dict(w=W68, v=(4, 6)), NT),
    "sequence_first_positions": (lambda m, x: torch.tanh(x + m.p), dict(p=(4, 1, 8)), NT),
    "rows_time_major": (_rows, dict(w=W68, v=(4, 6), b=(4,)), (3, 5, 8)),
    "rows_time_major_n_equals_t": (_rows, dict(w=W68, v=(4, 6), b=(4,)), NT),
    "features_first": (lambda m, x: torch.tanh(m.w @ x), dict(w=W68), (8, 5)),
    "features_first_square": (lambda m, x: torch.tanh(m.w @ x), dict(w=(6, 6)), (6, 6)),
}
for _name, (_f, _shapes, _input) in SEQUENCE_FIRST.items():
    register(
        _name,
        lambda f=_f, shapes=_shapes, shape=_input: make(Uses(f, **shapes), regression_dim1, torch.randn(shape), dims=1),
    )


def _tied_language_model(m, ids):
    h = torch.tanh(F.embedding(ids, m.e) + m.p[: ids.shape[1]])
    return F.linear(h.cumsum(1), m.e)


register(
    "tied_language_model",
    lambda: make(
        Uses(_tied_language_model, e=(7, 8), p=(9, 8)),
        lambda m, ids: next_token(m(ids), ids),
        torch.randint(7, (4, 6)),
    ),
)
