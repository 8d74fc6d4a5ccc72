"""Parameters that are no layer's weight: scales, shifts, tokens, experts; and losses that use parameters themselves."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.case import make, register, regression
from zoo.functional import NT, NTD, W68, W88, D, Uses, add


def _broadcast_query(m, x):
    """A few learned queries look at every sample."""
    q = m.q.expand(len(x), -1, -1)  # [n, queries, d]
    return F.scaled_dot_product_attention(q, x @ m.k, x @ m.v)


def _class_token(m, x):
    x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions
    return torch.tanh(x @ m.w)


def _routed(m, x):
    """Every token goes to one of four experts by its own features; the last expert never gets one."""
    tokens = x.reshape(-1, x.shape[-1])
    gates = F.softmax(tokens @ m.router.mT, -1)  # [n t, 3]
    out = torch.zeros_like(tokens)
    for e in range(4):
        chosen = (gates.argmax(-1) == e).nonzero().squeeze(1)
        y = torch.tanh(tokens[chosen] @ m.up[e]) @ m.down[e] + m.b[e]
        out = out.index_add(0, chosen, y * gates[chosen, min(e, 2), None])
    return out.view_as(x)


def _softmax_mixture(m, x):
    """Layers weighted by a learned softmax, as in ELMo."""
    return (F.softmax(m.s, 0)[:, None, None] * torch.stack([x, x.cos(), x.square()], 1).flatten(2)[..., None]).sum(1)


def _indexed(m, x):
    """Weight rows chosen by the input, as in a lookup by hand."""
    return x * m.w[(x.sum(-1) > 0).long()]


add(
    {
        # free parameters
        "scale_and_shift": (lambda m, x: torch.tanh(x * m.s + m.b), dict(s=(8,), b=(8,)), NTD),
        "scale_and_shift_n_equals_t": (lambda m, x: torch.tanh(m.s * x + m.b), dict(s=(4, 8), b=(4, 1)), NT),
        "scale_n_equals_d": (lambda m, x: torch.tanh(x * m.s + m.b), dict(s=(6,), b=(6,)), (6, 6)),
        "in_place_scale_and_shift": (lambda m, x: torch.tanh(x.clone().mul_(m.s).add_(m.b)), dict(s=(8,), b=(8,)), NTD),
        "subtract_from_parameter": (lambda m, x: torch.tanh(m.b - x), dict(b=(3, 1)), NTD),
        "divide": (
            lambda m, x: torch.tanh(x / (2 + m.s.square())) - m.b / (2 + x.square()),
            dict(s=(8,), b=(3, 1)),
            NTD,
        ),
        "divide_by_parameter": (lambda m, x: torch.tanh(x / m.s), dict(s=(3, 1)), NTD),
        "power": (lambda m, x: (1 + x.square()) ** m.s, dict(s=(8,)), NTD),
        "temperature": (lambda m, x: F.log_softmax(x @ m.w * m.log_scale.exp(), -1), dict(w=(8, 6), log_scale=()), D),
        "scalar_gate": (lambda m, x: x + torch.tanh(m.gate) * torch.tanh(x @ m.w), dict(gate=(1,), w=W88), NTD),
        "layer_scale": (lambda m, x: x + m.s * F.linear(x, m.w).tanh(), dict(s=(8,), w=W88), NTD),
        "positions": (lambda m, x: torch.tanh((x + m.p) @ m.w), dict(p=(1, 3, 8), w=(8, 6)), NTD),
        "positions_sliced": (lambda m, x: torch.tanh(x + m.p[: x.shape[1]]), dict(p=(7, 8)), NTD),
        "positions_n_equals_t": (lambda m, x: torch.tanh(x + m.p), dict(p=(4, 8)), NT),
        "class_token": (_class_token, dict(token=(1, 1, 8), positions=(1, 4, 8), w=(8, 6)), NTD),
        "where": (lambda m, x: torch.where(x > 0, x, m.s * x).tanh(), dict(s=(8,)), NTD),
        "mask_token": (lambda m, x: torch.where(x[..., :1] > 0, x, m.s).tanh() @ m.w, dict(s=(8,), w=(8, 6)), NTD),
        "maximum": (lambda m, x: torch.maximum(x, m.s).tanh(), dict(s=(8,)), NTD),
        "addcmul": (lambda m, x: torch.addcmul(m.b, x, m.s, value=0.5).tanh(), dict(b=(8,), s=(8,)), NTD),
        "lerp": (lambda m, x: torch.lerp(x, x.roll(1, 1), m.s), dict(s=(8,)), NTD),
        "learned_queries": (_broadcast_query, dict(q=(1, 2, 8), k=W88, v=W88), NTD),
        "repeated_queries": (
            lambda m, x: F.scaled_dot_product_attention(m.q.repeat(len(x), 1, 1), x, x @ m.w),
            dict(q=(1, 2, 8), w=W88),
            NTD,
        ),
        "distances": (lambda m, x: torch.cdist(x, m.c).square(), dict(c=(4, 8)), D),
        "radial_basis": (lambda m, x: torch.exp(-(x[:, None] - m.c).square().sum(-1) / 8), dict(c=(4, 8)), D),
        "relative_bias": (
            lambda m, x: F.softmax(x @ x.mT / 3 + m.b[(torch.arange(3)[:, None] - torch.arange(3)).abs()], -1) @ m.w,
            dict(b=(3,), w=(3, 6)),
            NTD,
        ),
        "mixture": (_softmax_mixture, dict(s=(3,)), NTD),
        "norm_by_hand": (
            lambda m, x: m.s * (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + 1e-3).sqrt() + m.b,
            dict(s=(8,), b=(8,)),
            NTD,
        ),
        # routing and indexing
        "routed_experts": (_routed, dict(router=(3, 8), up=(4, 8, 6), down=(4, 6, 8), b=(4, 8)), (5, 4, 8)),
        "indexed_rows": (_indexed, dict(w=(2, 8)), NTD),
        # functional layers
        "layer_norm_functional": (
            lambda m, x: F.layer_norm(x, bias=m.b, weight=m.s, normalized_shape=(8,), eps=1e-3),
            dict(s=(8,), b=(8,)),
            NTD,
        ),
        "conv_functional": (
            lambda m, x: F.conv1d(bias=m.b, weight=m.w, input=x).tanh(),
            dict(w=(6, 4, 3), b=(6,)),
            (5, 4, 7),
        ),
        "prelu_functional": (lambda m, x: F.prelu(x, m.s) + torch.prelu(x.cos(), m.s), dict(s=(3,)), NTD),
        "checkpointed_function": (
            lambda m, x: checkpoint(lambda x: F.linear(x, m.w).tanh() * m.s, x, use_reentrant=False),
            dict(w=W68, s=(6,)),
            NTD,
        ),
        "checkpointed_derived_weight": (
            lambda m, x: checkpoint(lambda x: (F.linear(x, m.w) * -m.s.exp()).exp().sin(), x, use_reentrant=False),
            dict(w=W68, s=(6,)),
            NTD,
        ),
        "unused": (lambda m, x: torch.tanh(x @ m.w), dict(w=(8, 6), never=(7, 3)), D),
        "used_with_zero": (lambda m, x: torch.tanh(x @ m.w) + 0 * m.never.sum(), dict(w=(8, 6), never=(7, 3)), D),
        "detached": (lambda m, x: torch.tanh(x @ m.w) @ m.w.detach().mT, dict(w=(8, 6)), D),
    }
)


class Collections(nn.Module):
    """Parameters in a list and a dictionary, one of them twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList([torch.randn(8, 8) / 3 for _ in range(3)])
        self.named = nn.ParameterDict({"s": torch.ones(8), "b": torch.zeros(8)})
        self.again = self.layers[0]

    def forward(self, x):
        for w in self.layers:
            x = torch.tanh(x @ w * self.named["s"] + self.named["b"])
        return x @ self.again


register("collections", lambda: make(Collections(), regression, torch.randn(5, 8)))
register("collections_n_equals_d", lambda: make(Collections(), regression, torch.randn(8, 3, 8)))


def _penalised(model, x):
    """The loss itself uses a parameter: every sample carries a share of a penalty."""
    return regression(model, x) + 0.1 * model.w.square().sum()


def _loss_with_scale(model, x):
    """Gaussian likelihood with a learned variance, outside of the model's call."""
    return torch.exp(-model.log_scale) * regression(model, x) + model.log_scale


register("penalty", lambda: make(Uses(lambda m, x: torch.tanh(x @ m.w), w=(8, 6)), _penalised, torch.randn(5, 8)))
register(
    "learned_variance",
    lambda: make(Uses(lambda m, x: torch.tanh(x @ m.w), w=(8, 6), log_scale=()), _loss_with_scale, torch.randn(5, 8)),
)


def _in_pieces(model, x):
    """Two calls of the model, of two samples and the rest."""
    return torch.cat([regression(model, x[:2]), regression(model, x[2:])]) if len(x) > 1 else regression(model, x)


register("called_in_pieces", lambda: make(nn.Linear(8, 6), _in_pieces, torch.randn(5, 8)))
register(
    "called_twice",
    lambda: make(
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        lambda m, x: regression(m, m(x)) + regression(m, x),
        torch.randn(5, 8),
    ),
)
register(
    "two_views_of_a_sample",  # both views of a sample in one batch of 2 n, as in contrastive training
    lambda: make(
        nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)),
        lambda m, x: F.cosine_similarity(*m(torch.cat([x, x.roll(1, 1)])).chunk(2)),
        torch.randn(5, 8),
    ),
)
