"""The proof of where the samples are: what it says of every operation in its table, against the gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from projgrad.recording import carry, ownership
from projgrad.recording.graph import ordered

pytestmark = [pytest.mark.same_without_extension, pytest.mark.usefixtures("float64")]

N = 3  # samples


def rows(*shape):
    return torch.randn(*shape).requires_grad_()


def words(text):
    return text.split()


# One graph for each operation: a function, and leaves. Dimension 0 of its result is that of the samples. About which
# leaves anything is proven is up to the table; that it is true is not.

m = torch.rand(N, 4) > 0.5
index = torch.tensor([[0, 2], [1, 1], [3, 0]])
image = lambda: rows(N, 2, 4, 4)  # noqa: E731

UNARY = [
    "abs",
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "ceil",
    "cos",
    "cosh",
    "digamma",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "frac",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "logit",
    "neg",
    "reciprocal",
    "round",
    "rsqrt",
    "sgn",
    "sigmoid",
    "sign",
    "sin",
    "sinc",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
    "trunc",
    "nan_to_num",
]
BINARY = [
    "add",
    "atan2",
    "copysign",
    "div",
    "fmax",
    "fmin",
    "hypot",
    "logaddexp",
    "logaddexp2",
    "maximum",
    "minimum",
    "mul",
    "pow",
    "rsub",
    "sub",
    "xlogy",
]
ACTIVATIONS = [
    "celu",
    "elu",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "logsigmoid",
    "mish",
    "relu",
    "silu",
    "softplus",
    "softshrink",
]

GRAPHS = {
    **{name: lambda name=name: (getattr(torch, name), [rows(N, 4)]) for name in UNARY},
    **{name: lambda name=name: (getattr(torch, name), [rows(N, 4), rows(N, 4)]) for name in BINARY},
    **{f"{name}_bias": lambda name=name: (getattr(torch, name), [rows(N, 4), rows(4)]) for name in BINARY},
    **{f"{name}_over": lambda name=name: (getattr(torch, name), [rows(N, 4), rows(1, 4)]) for name in BINARY},
    **{f"{name}_square": lambda name=name: (getattr(torch, name), [rows(N, N), rows(N)]) for name in BINARY},
    **{name: lambda name=name: (getattr(F, name), [rows(N, 4)]) for name in ACTIVATIONS},
    "fmod": lambda: (lambda x: torch.fmod(x, 0.3), [rows(N, 4)]),
    "remainder": lambda: (lambda x: torch.remainder(x, 0.3), [rows(N, 4)]),
    "i0": lambda: (torch.special.i0, [rows(N, 4)]),
    "polygamma": lambda: (lambda x: torch.polygamma(1, x.abs() + 1), [rows(N, 4)]),
    "xlog1py": lambda: (torch.special.xlog1py, [rows(N, 4), rows(N, 4)]),
    "rrelu": lambda: (lambda x: F.rrelu(x, training=True), [rows(N, 4)]),
    "dropout": lambda: (lambda x: torch.native_dropout(x, 0.5, True)[0], [rows(N, 4)]),
    "threshold": lambda: (lambda x: F.threshold(x, 0.1, 0.0), [rows(N, 4)]),
    "clamp": lambda: (lambda x: x.clamp(-1, 1), [rows(N, 4)]),
    "clamp_min": lambda: (lambda x: x.clamp_min(-1), [rows(N, 4)]),
    "clamp_max": lambda: (lambda x: x.clamp_max(1), [rows(N, 4)]),
    "lerp": lambda: (torch.lerp, [rows(N, 4), rows(N, 4), rows(4)]),
    "addcmul": lambda: (torch.addcmul, [rows(N, 4), rows(N, 4), rows(1, 4)]),
    "addcdiv": lambda: (torch.addcdiv, [rows(N, 4), rows(N, 4), rows(4)]),
    "prelu": lambda: (F.prelu, [rows(N, 4), rows(4)]),
    "where": lambda: (lambda x, y: torch.where(m, x, y), [rows(N, 4), rows(N, 4)]),
    "where_flipped": lambda: (lambda x: torch.where(m, x, x.flip(0)), [rows(N, 4)]),
    "masked_fill": lambda: (lambda x: x.masked_fill(m, 0.0), [rows(N, 4)]),
    "mask_over_rows": lambda: (lambda x: m * x, [rows(4)]),
    "mask_over_square": lambda: (lambda x: torch.rand(N, N) * x, [rows(N)]),
    "expand_square": lambda: (lambda x: x.expand(N, N), [rows(N)]),
    "matrix_square": lambda: (lambda x: torch.rand(N, N) @ x, [rows(N, N)]),
    "tril": lambda: (torch.tril, [rows(N, 4)]),
    "triu": lambda: (torch.triu, [rows(N, 4)]),
    "to": lambda: (lambda x: x.float().double(), [rows(N, 4)]),
    "clone": lambda: (torch.clone, [rows(N, 4)]),
    "alias": lambda: (torch.ops.aten.alias, [rows(N, 4)]),
    "expand": lambda: (lambda x: x.expand(N, 4, 5), [rows(N, 4, 1)]),
    "expand_over": lambda: (lambda x: x.expand(N, 4), [rows(1, 4)]),
    "view": lambda: (lambda x: x.view(N, 2, 2), [rows(N * 4)]),
    "view_wrong": lambda: (lambda x: x.view(N, 4), [rows(4, N)]),
    "unsafe_view": lambda: (lambda x: torch.ops.aten._unsafe_view(x, [N, 4]), [rows(N, 2, 2)]),
    "reshape": lambda: (lambda x: x.mT.reshape(N, 4), [rows(N, 2, 2)]),
    "flatten": lambda: (lambda x: x.flatten(0, 1).unflatten(0, (N, 2)), [rows(N, 2, 2)]),
    "squeeze": lambda: (lambda x: x.squeeze(0), [rows(1, N, 4)]),
    "unsqueeze": lambda: (lambda x: x.unsqueeze(1), [rows(N, 4)]),
    "cat": lambda: (lambda x, y: torch.cat([x, y], 1), [rows(N, 4), rows(N, 2)]),
    "cat_rows": lambda: (lambda x, y: torch.cat([x, y]), [rows(1, 4), rows(2, 4)]),
    "cumprod": lambda: (lambda x: x.cumprod(1), [rows(N, 4)]),
    "cumsum": lambda: (lambda x: x.cumsum(1), [rows(N, 4)]),
    "cumsum_rows": lambda: (lambda x: x.cumsum(0), [rows(N, 4)]),
    "logcumsumexp": lambda: (lambda x: x.logcumsumexp(1), [rows(N, 4)]),
    "log_softmax": lambda: (lambda x: x.log_softmax(-1), [rows(N, 4)]),
    "softmax": lambda: (lambda x: x.softmax(1), [rows(N, 4)]),
    "softmax_rows": lambda: (lambda x: x.softmax(0), [rows(N, 4)]),
    "safe_softmax": lambda: (lambda x: torch.ops.aten._safe_softmax(x, -1), [rows(N, 4)]),
    "sort": lambda: (lambda x: x.sort(1).values, [rows(N, 4)]),
    "sort_rows": lambda: (lambda x: x.sort(0).values, [rows(N, 4)]),
    "split": lambda: (lambda x: x.split(2, 1)[1], [rows(N, 4)]),
    "split_rows": lambda: (lambda x: x.split(N)[1], [rows(2 * N, 4)]),
    "split_with_sizes": lambda: (lambda x: x.split([1, 3], 1)[1], [rows(N, 4)]),
    "topk": lambda: (lambda x: x.topk(2, 1).values, [rows(N, 4)]),
    "topk_rows": lambda: (lambda x: x.topk(N, 0).values, [rows(N, 4)]),
    "slice": lambda: (lambda x: x[:, 1:3], [rows(N, 4)]),
    "slice_rows": lambda: (lambda x: x[1 : N + 1], [rows(2 * N, 4)]),
    "gather": lambda: (lambda x: x.gather(1, index), [rows(N, 4)]),
    "gather_rows": lambda: (lambda x: x.gather(0, torch.tensor([[2, 1, 0, 0]] * N)), [rows(N, 4)]),
    "glu": lambda: (lambda x: F.glu(x, 1), [rows(N, 4)]),
    "index_select": lambda: (lambda x: x.index_select(1, torch.tensor([3, 0])), [rows(N, 4)]),
    "index_select_rows": lambda: (lambda x: x.index_select(0, torch.tensor([1, 0, 2])), [rows(N, 4)]),
    "index": lambda: (lambda x: x[torch.tensor([1, 0, 2])], [rows(N, 4)]),
    "flip": lambda: (lambda x: x.flip(1), [rows(N, 4)]),
    "flip_rows": lambda: (lambda x: x.flip(0), [rows(N, 4)]),
    "roll": lambda: (lambda x: x.roll(1, 1), [rows(N, 4)]),
    "roll_rows": lambda: (lambda x: x.roll(1, 0), [rows(N, 4)]),
    "roll_flat": lambda: (lambda x: x.roll(1), [rows(N, 4)]),
    **{
        name: lambda name=name: (lambda x: getattr(torch, name)(x, 1), [rows(N, 4)])
        for name in ["amax", "amin", "logsumexp", "mean", "nansum", "prod", "std", "sum", "var"]
    },
    **{
        name: lambda name=name: (lambda x: getattr(torch, name)(x, 1).values, [rows(N, 4)])
        for name in ["max", "min", "median", "mode"]
    },
    "kthvalue": lambda: (lambda x: x.kthvalue(2, 1).values, [rows(N, 4)]),
    "sum_two": lambda: (lambda x: x.sum((0, 2), keepdim=False), [rows(2, N, 4)]),
    "sum_kept": lambda: (lambda x: x.sum(-1, keepdim=True), [rows(N, 4)]),
    "sum_rows": lambda: (lambda x: x.sum(0), [rows(4, N)]),
    "vector_norm": lambda: (lambda x: torch.linalg.vector_norm(x, dim=1), [rows(N, 4)]),
    "norm": lambda: (lambda x: torch.ops.aten.norm.ScalarOpt_dim(x, 2, [1]), [rows(N, 4)]),
    "permute": lambda: (lambda x: x.permute(2, 0, 1), [rows(4, 2, N)]),
    "transpose": lambda: (lambda x: x.transpose(0, 2), [rows(4, 2, N)]),
    "t": lambda: (lambda x: x.t(), [rows(4, N)]),
    "select": lambda: (lambda x: x[1], [rows(2, N, 4)]),
    "select_inner": lambda: (lambda x: x[:, 1], [rows(N, 2, 4)]),
    "unbind": lambda: (lambda x: x.unbind(1)[1], [rows(N, 2, 4)]),
    "stack": lambda: (lambda x, y: torch.stack([x, y], 1), [rows(N, 4), rows(N, 4)]),
    "stack_rows": lambda: (lambda x: torch.stack([x[2], x[0], x[1]]), [rows(N, 4)]),
    "unfold": lambda: (lambda x: x.unfold(1, 2, 1), [rows(N, 4)]),
    "unfold_rows": lambda: (lambda x: x.unfold(0, 2, 1), [rows(N + 1, 4)]),
    "repeat": lambda: (lambda x: x.repeat(1, 2), [rows(N, 4)]),
    "repeat_rows": lambda: (lambda x: x.repeat(N, 1), [rows(1, 4)]),
    "pad": lambda: (lambda x: F.pad(x, (1, 2)), [rows(N, 4)]),
    "pad_rows": lambda: (lambda x: F.pad(x, (0, 0, 1, -1)), [rows(N, 4)]),
    "mm": lambda: (torch.mm, [rows(N, 4), rows(4, 5)]),
    "mm_rows": lambda: (lambda x: torch.randperm(N)[:, None].eq(torch.arange(N)).double() @ x, [rows(N, 4)]),
    "bmm": lambda: (torch.bmm, [rows(N, 2, 4), rows(N, 4, 5)]),
    "bmm_second": lambda: (lambda x, y: torch.bmm(x, y).transpose(0, 2), [rows(2, 2, 4), rows(2, 4, N)]),
    "addmm": lambda: (torch.addmm, [rows(N, 5), rows(N, 4), rows(4, 5)]),
    "addmm_bias": lambda: (torch.addmm, [rows(5), rows(N, 4), rows(4, 5)]),
    "baddbmm": lambda: (torch.baddbmm, [rows(N, 2, 5), rows(N, 2, 4), rows(N, 4, 5)]),
    "mv": lambda: (torch.mv, [rows(N, 4), rows(4)]),
    "mv_rows": lambda: (lambda x: torch.eye(N) @ x, [rows(N)]),
    "layer_norm": lambda: (lambda x, w: F.layer_norm(x, (4,), w), [rows(N, 2, 4), rows(4)]),
    "layer_norm_rows": lambda: (lambda x: F.layer_norm(x, (N, 4)), [rows(N, 4)]),
    "rms_norm": lambda: (lambda x, w: F.rms_norm(x, (4,), w), [rows(N, 2, 4), rows(4)]),
    "batch_norm": lambda: (lambda x, w: F.batch_norm(x, torch.zeros(4), torch.ones(4), w), [rows(N, 4), rows(4)]),
    "batch_norm_trains": lambda: (lambda x: F.batch_norm(x, None, None, training=True), [rows(N, 4)]),
    "instance_norm": lambda: (F.instance_norm, [image()]),
    "group_norm": lambda: (lambda x, w: F.group_norm(x, 2, w), [image(), rows(2)]),
    "conv2d": lambda: (F.conv2d, [image(), rows(5, 2, 3, 3), rows(5)]),
    "conv_of_rows": lambda: (lambda x, w: F.conv2d(x[None], w, groups=N)[0], [rows(N, 4, 4), rows(N, 1, 3, 3)]),
    "conv_over_rows": lambda: (lambda x, w: F.conv1d(x[None], w)[0], [rows(N, 6), rows(N, N, 3)]),
    "adaptive_avg_pool2d": lambda: (lambda x: F.adaptive_avg_pool2d(x, 2), [image()]),
    "adaptive_avg_pool3d": lambda: (lambda x: F.adaptive_avg_pool3d(x, 2), [rows(N, 2, 4, 4, 4)]),
    "adaptive_max_pool2d": lambda: (lambda x: F.adaptive_max_pool2d(x, 2), [image()]),
    "adaptive_max_pool3d": lambda: (lambda x: F.adaptive_max_pool3d(x, 2), [rows(N, 2, 4, 4, 4)]),
    "avg_pool2d": lambda: (lambda x: F.avg_pool2d(x, 2), [image()]),
    "avg_pool3d": lambda: (lambda x: F.avg_pool3d(x, 2), [rows(N, 2, 4, 4, 4)]),
    "max_pool2d": lambda: (lambda x: F.max_pool2d(x, 2), [image()]),
    "max_pool3d": lambda: (lambda x: F.max_pool3d(x, 2), [rows(N, 2, 4, 4, 4)]),
    "pool_over_rows": lambda: (lambda x: F.max_pool2d(x[None, None], (3, 1), 1, (1, 0))[0, 0], [rows(N, 4)]),
    "pixel_shuffle": lambda: (lambda x: F.pixel_shuffle(x, 2), [rows(N, 4, 2, 2)]),
    "pixel_unshuffle": lambda: (lambda x: F.pixel_unshuffle(x, 2), [image()]),
    **{
        f"{mode}_pad{d}d": lambda mode=mode, d=d: (lambda x: F.pad(x, (1, 1) * d, mode), [rows(N, 2, *[4] * d)])
        for mode in ("reflect", "replicate")
        for d in (1, 2, 3)
    },
    **{
        f"{mode}{d}d": lambda mode=mode, d=d: (
            lambda x: F.interpolate(x, scale_factor=2, mode=mode),
            [rows(N, 2, *[3] * d)],
        )
        for mode, d in (("nearest", 1), ("nearest", 2), ("nearest", 3), ("linear", 1), ("bilinear", 2))
    },
    "trilinear": lambda: (lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), [rows(N, 2, 3, 3, 3)]),
    "bicubic": lambda: (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), [image()]),
    "attention": lambda: (F.scaled_dot_product_attention, [rows(N, 2, 5, 4) for _ in range(3)]),
    "attention_of_rows": lambda: (
        lambda q, k: F.scaled_dot_product_attention(q, k, k)[0, 0],
        [rows(1, 1, N, 4), rows(1, 1, N, 4)],
    ),
    "nll": lambda: (lambda x: F.nll_loss(x, torch.tensor([0, 3, 1]), reduction="none"), [rows(N, 4)]),
    "nll2d": lambda: (lambda x: F.nll_loss(x, torch.ones(N, 2, 2).long(), reduction="none"), [rows(N, 4, 2, 2)]),
    "nll2d_rows": lambda: (
        lambda x: F.nll_loss(x, torch.ones(2, N, 2).long(), reduction="none").transpose(0, 1),
        [rows(2, 4, N, 2)],
    ),
    **{
        name: lambda name=name: (lambda x: getattr(F, name)(x, torch.rand(N, 4), reduction="none"), [rows(N, 4)])
        for name in ["mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy_with_logits"]
    },
    "binary_cross_entropy": lambda: (
        lambda x: F.binary_cross_entropy(x.sigmoid(), torch.rand(N, 4), reduction="none"),
        [rows(N, 4)],
    ),
    "centred": lambda: (lambda x: x - x.mean(0), [rows(N, 4)]),
}

POSITIVE = [
    "log",
    "log10",
    "log2",
    "log1p",
    "lgamma",
    "digamma",
    "sqrt",
    "rsqrt",
    "acosh",
    "logit",
    "acos",
    "asin",
    "erfinv",
    "atanh",
    "xlogy",
    "pow",
]

# Where the samples are mixed, reordered, spread over or picked by numbers: nothing may be proven.
NOT_PROVEN = {
    "where_flipped", "mask_over_rows", "mask_over_square", "expand_square", "matrix_square", "expand_over",
    "view_wrong", "cat_rows", "cumsum_rows",
    "softmax_rows", "sort_rows", "split_rows",
    "topk_rows", "slice_rows", "gather_rows", "index_select_rows", "index", "flip_rows", "roll_rows", "roll_flat",
    "stack_rows", "unfold_rows", "repeat_rows", "pad_rows", "mm_rows", "mv_rows", "layer_norm_rows",
    "batch_norm_trains", "conv_of_rows", "conv_over_rows", "pool_over_rows", "attention_of_rows", "centred",
}  # fmt: skip


def graph(name):
    torch.manual_seed(0)
    function, leaves = GRAPHS[name]()
    base = name.removesuffix("_bias").removesuffix("_over").removesuffix("_square")
    if base in POSITIVE:
        with torch.no_grad():
            for x in leaves:
                x.uniform_(1.1, 1.9) if base == "acosh" else x.uniform_(0.1, 0.9)
    y = function(*leaves)
    losses = (y.reshape(len(y), -1) * torch.rand(y.numel() // len(y))).sum(1)
    assert len(losses) == N or name in NOT_PROVEN
    return losses[:N], leaves


def trainable_parameters(shape, at, n):
    """[*shape]: the sample of every entry, by what a proof says."""
    i = torch.arange(shape[at.dim]) // at.inner % n
    return i.view([-1 if d == at.dim else 1 for d in range(len(shape))]).expand(shape)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_operation_carries_the_samples_as_it_says(name):
    losses, leaves = graph(name)
    proven = dict(_proven(losses))
    grads = torch.autograd.grad(losses, leaves, torch.eye(N), is_grads_batched=True, materialize_grads=True)
    for x, g in zip(leaves, grads, strict=True):
        at = proven.get(id(x))
        if at is not None:
            owner = trainable_parameters(x.shape, at, N)
            for j in range(N):
                assert not g[j][owner != j].any(), (at, j)
    batched = [x for x in leaves if id(x) in proven]
    assert bool(batched) == (name not in NOT_PROVEN)


def _proven(losses):
    """(id of leaf, where its samples are) for all leaves about which something is proven."""
    known, _ = ownership.carried(losses.grad_fn, len(losses), {})
    for node, at in known.items():
        if at is not None and hasattr(node, "variable"):
            yield id(node.variable), at


def test_every_operation_of_the_table_is_met():
    met = set()
    for name in GRAPHS:
        losses, _ = graph(name)
        met |= {carry._name(node) for node in ordered(losses.grad_fn)}
    on_a_gpu = {name for name in carry.CARRIED if "Cudnn" in name or "Efficient" in name or "Attention" in name}
    others = {
        "FusedRmsNorm",
        "Reshape",
        "Flatten",
        "ReshapeAlias",
        "LiftFresh",
        "Linear",
    }  # of other builds and layouts of torch
    assert carry.CARRIED.keys() - met - on_a_gpu - others == set()


def test_a_proof_reads_only_what_the_fingerprint_holds():
    import inspect
    import re

    attributes = set(re.findall(r"_saved_\w+", inspect.getsource(carry)))
    assert {a for a in attributes if not carry.SHAPED.match(a)} <= {"_saved_"}


@pytest.mark.parametrize("seed", range(40))
def test_chains_of_reshapes_keep_the_owner_of_every_entry(seed):
    """Views, transposes, flattened and split dimensions in any order, against the indices themselves."""
    generator = torch.Generator().manual_seed(seed)
    pick = lambda k: int(torch.randint(k, (1,), generator=generator))  # noqa: E731
    x = rows(N, 2, 2, N)
    y = x
    for _ in range(6):
        kind = pick(4)
        d = pick(y.ndim)
        if kind == 0:
            y = y.transpose(d, pick(y.ndim))
        elif kind == 1 and y.ndim > 1:
            d = min(d, y.ndim - 2)
            y = y.flatten(d, d + 1)
        elif kind == 2 and y.shape[d] % 2 == 0:
            y = y.unflatten(d, [(2, y.shape[d] // 2), (y.shape[d] // 2, 2)][pick(2)])
        elif kind == 3 and y.shape[d] % N == 0:
            y = y.unflatten(d, [(N, y.shape[d] // N), (y.shape[d] // N, N)][pick(2)])
    axes = [d for d in range(y.ndim) if y.shape[d] % N == 0]
    d = axes[pick(len(axes))] if axes else 0
    k = y.shape[d] // N
    if k == 0 or not axes:
        return
    y = y.unflatten(d, (N, k)) if pick(2) else y.unflatten(d, (k, N)).transpose(d, d + 1)
    y = y.movedim(d, 0)
    losses = (y.reshape(N, -1) * torch.rand(y.numel() // N)).sum(1)
    proven = dict(_proven(losses))
    if id(x) in proven:
        grads = torch.autograd.grad(losses, x, torch.eye(N), is_grads_batched=True)[0]
        owner = trainable_parameters(x.shape, proven[id(x)], N)
        for j in range(N):
            assert not grads[j][owner != j].any()


def test_unknown_operations_prove_nothing():
    class Known(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    x = rows(N, 4)
    assert not dict(_proven(Known.apply(x).sum(1)))
    assert dict(_proven(nn.functional.relu(x).sum(1)))
