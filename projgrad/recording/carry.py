"""How one operation carries the samples from its output to its inputs, as its backward pass meets them.

A rule may go by the operation, by shapes and by the dimensions along which it works, and by nothing else: another graph
with the same of these must have the same answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch.autograd.graph import Node

from .._torch_private import is_parallel_node, saved

Shape = Sequence[int]

# Attributes of a node that say along which dimensions it works. The fingerprint of a graph holds them, and a proof
# may read no others: it would not be noticed when they change.
SHAPED = re.compile(
    "_saved_.*(dim|size|shape|shift|start|end|split|stride|train|perm|axis|offset|diagonal|repeat|pad$)"
)


class Along(NamedTuple):
    """Entry i along dimension `dim` belongs to sample (i // inner) % n."""

    dim: int
    inner: int = 1


class Op(NamedTuple):
    """One operation as its backward pass sees it.

    at: where the samples lie in its output, of shape `out`. inputs: the shapes of its inputs, None for constants.
    """

    node: Node
    at: Along
    out: Shape
    inputs: Sequence[Shape | None]
    n: int

    def dims(self, name: str, ndim: int) -> tuple[int, ...]:
        """Return the dimensions that an attribute names, of a tensor with `ndim` of them, none negative."""
        assert SHAPED.match(name), name
        value = getattr(self.node, name)
        values = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
        signed = (d - 2**64 if d >= 2**63 else d for d in values)  # autograd keeps some of them without a sign
        return tuple(d % max(ndim, 1) for d in signed)


Where = Sequence["Along | None"]  # for every input; None: not proven
Rule = Callable[[Op], Where]


def carry(op: Op) -> Where:
    """Return where the samples lie in every input, None where that is not proven."""
    rule = _first_alike if len(op.inputs) == 1 and is_parallel_node(op.node) else CARRIED.get(_name(op.node))
    if rule is None:
        return [None] * len(op.inputs)
    where = rule(op)
    where = [*where, *[None] * (len(op.inputs) - len(where))]
    return [there if _fits(op, there, shape) else None for there, shape in zip(where, op.inputs, strict=True)]


def _fits(op: Op, there: Along | None, shape: Shape | None) -> bool:
    """Return whether the samples can lie there: a last guard that no rule below has to repeat."""
    if there is None or shape is None or not 0 <= there.dim < len(shape):
        return False
    return shape[there.dim] > 0 and shape[there.dim] % (op.n * there.inner) == 0


def of_torch(node: Node) -> bool:
    """Return whether a node is one of torch's own operations."""
    if NUMBER.search(node.name()) or node.name().startswith("torch::autograd"):
        return True
    return is_parallel_node(node)


def _name(node: Node) -> str:
    return NUMBER.sub("", node.name())


NUMBER = re.compile(r"Backward\d+$")  # of torch's own operations; those of others have no number


def _aligned(op: Op) -> Where:
    """Carry to all inputs, whose dimensions correspond from the right; one broadcast over the samples has none."""
    return [None if shape is None else _align(op, shape) for shape in op.inputs]


def _align(op: Op, shape: Shape) -> Along | None:
    dim = op.at.dim - len(op.out) + len(shape)
    return Along(dim, op.at.inner) if dim >= 0 and shape[dim] == op.out[op.at.dim] else None


def _same(op: Op, shape: Shape | None, dim: int | None = None) -> Along | None:
    """Return the same dimension of the input, or the one given, if it is as long there."""
    dim = op.at.dim if dim is None else dim
    if shape is None or not 0 <= dim < len(shape) or shape[dim] != op.out[op.at.dim]:
        return None
    return Along(dim, op.at.inner)


def _first_alike(op: Op) -> Where:
    """Carry to the first input, which has the shape of the output."""
    return [_same(op, op.inputs[0])]


def _reshaped(op: Op) -> Where:
    """Carry to the same entries in the same order, in another shape."""
    (shape,) = op.inputs
    if shape is None or math.prod(shape) != math.prod(op.out):
        return [None]
    inner = op.at.inner * math.prod(op.out[op.at.dim + 1 :])
    for dim in range(len(shape)):
        below = math.prod(shape[dim + 1 :])
        if below <= inner and inner % max(below, 1) == 0 and shape[dim] % (op.n * (inner // max(below, 1))) == 0:
            return [Along(dim, inner // max(below, 1))]
    return [None]


def _transposed(op: Op) -> Where:
    (a,), (b,) = (op.dims(f"_saved_dim{k}", len(op.out)) for k in (0, 1))
    return [Along({a: b, b: a}.get(op.at.dim, op.at.dim), op.at.inner)]


def _along(attribute: str) -> Rule:
    """Make the rule of an operation that works along the dimensions an attribute names, and treats all others alike."""

    def carry(op: Op) -> Where:
        dims = op.dims(attribute, len(op.out))
        return [None if op.at.dim in dims or not dims else _same(op, shape) for shape in op.inputs]

    return carry


def _first_along(attribute: str) -> Rule:
    """Carry to the first input alone."""
    return lambda op: _along(attribute)(op)[:1]


def _reduced(op: Op) -> Where:
    """Carry through a sum, a norm or a maximum over some dimensions, kept with size 1 or not."""
    shape = op.inputs[0]
    if shape is None or not len(op.out):
        return [None]
    dims = op.dims("_saved_dim", len(shape)) or tuple(range(len(shape)))
    if len(op.out) == len(shape):
        return [None if op.at.dim in dims else _same(op, shape)]
    kept = [d for d in range(len(shape)) if d not in dims]
    return [_same(op, shape, kept[op.at.dim])] if len(kept) == len(op.out) else [None]


def _inserted(op: Op) -> Where:
    """Carry to an input with one dimension more: an index into it was chosen."""
    (dim,) = op.dims("_saved_dim", len(op.out) + 1)
    return [Along(op.at.dim + (op.at.dim >= dim), op.at.inner)]


def _stacked(op: Op) -> Where:
    (dim,) = op.dims("_saved_dim", len(op.out))
    if op.at.dim == dim:
        return [None] * len(op.inputs)
    return [Along(op.at.dim - (op.at.dim > dim), op.at.inner)] * len(op.inputs)


def _unfolded(op: Op) -> Where:
    """Carry through windows along one dimension, laid along a new last one."""
    (dim,) = op.dims("_saved_dimension", len(op.out) - 1)
    return [None if op.at.dim in (dim, len(op.out) - 1) else _same(op, op.inputs[0])]


def _repeated(op: Op) -> Where:
    repeats = saved(op.node, "repeats")
    return [_align(op, op.inputs[0]) if op.inputs[0] is not None and repeats[op.at.dim] == 1 else None]


def _padded(op: Op) -> Where:
    pads, first = saved(op.node, "pad"), 2 * (len(op.out) - 1 - op.at.dim)  # in pairs, from the last dimension on
    return [None if any(pads[first : first + 2]) else _same(op, op.inputs[0])]


def _rolled(op: Op) -> Where:
    dims = op.dims("_saved_dims", len(op.out))
    return [_same(op, op.inputs[0]) if dims and op.at.dim not in dims else None]


def _of_matrices(left: int) -> Rule:
    """Carry through a product [..., i, k] [..., k, o] of inputs `left` and `left + 1`; what is added comes before."""

    def carry(op: Op) -> Where:
        rows, ndim = op.at.dim, len(op.out)
        where: list[Along | None] = [None] * (left + 2)
        if left and op.inputs[0] is not None:
            where[0] = _align(op, op.inputs[0])
        if rows < ndim - 1:
            where[left] = op.at
        if rows < ndim - 2 or rows == ndim - 1:
            where[left + 1] = op.at
        return where

    return carry


def _leading(last: int) -> Rule:
    """Carry to the first input along all dimensions but the last few, which are treated together."""
    return lambda op: [_same(op, op.inputs[0]) if op.at.dim < len(op.out) - last else None]


def _batch(op: Op) -> Where:
    """Carry to the first input of layers with the samples along dimension 0."""
    shape = op.inputs[0]
    return [_same(op, shape) if op.at.dim == 0 and shape is not None and len(shape) == len(op.out) else None]


def _normalised(op: Op) -> Where:
    """Carry through layer norms, over the last dimensions."""
    return _leading(len(saved(op.node, "normalized_shape")))(op)


def _batch_normalised(op: Op) -> Where:
    """Carry along channels, and with running statistics along samples too."""
    alike = op.at.dim == 1 or (op.at.dim == 0 and not saved(op.node, "training"))
    return [_same(op, op.inputs[0]) if alike else None]


def _attended(op: Op) -> Where:
    """Carry to queries, keys and values [n, heads, t, d]: batch entries and heads are treated alike."""
    return [_same(op, shape) if op.at.dim < len(op.out) - 2 else None for shape in op.inputs[:3]]


_TABLE: list[tuple[Rule, str]] = [
    (
        _aligned,
        "Abs Acos Acosh Add Addcdiv Addcmul Alias Asin Asinh Atan Atan2 Atanh BinaryCrossEntropy "
        "BinaryCrossEntropyWithLogits Celu Ceil Clamp ClampMax ClampMin Clone Copysign Cos Cosh Digamma Div Elu "
        "Erf Erfc Erfinv Exp Exp2 Expand Expm1 Floor Fmax Fmin Fmod Frac Gelu Hardshrink Hardsigmoid Hardswish "
        "Hardtanh HuberLoss Hypot I0 LeakyRelu Lerp Lgamma LiftFresh Log Log10 Log1P Log2 LogSigmoid Logaddexp "
        "Logaddexp2 Logit MaskedFill Maximum Minimum Mish MseLoss Mul NanToNum NativeDropout Neg Polygamma Pow "
        "PreluKernel Reciprocal Relu Remainder Round Rsqrt RreluWithNoise Rsub Sgn Sigmoid Sign Silu Sin Sinc Sinh "
        "SmoothL1Loss SoftMarginLoss Softplus Softshrink SpecialXlog1Py Sqrt Sub Tan Tanh Threshold ToCopy Tril Triu "
        "Trunc Where Xlogy",
    ),
    (_reshaped, "Flatten Reshape ReshapeAlias Squeeze Unsqueeze UnsafeView View"),
    (
        _along("_saved_dim"),
        "Cat Cumprod Cumsum Logcumsumexp LogSoftmax SafeSoftmax Softmax Sort Split SplitWithSizes Topk",
    ),
    (_first_alike, "Slice"),  # of the samples, only a slice that is all of them has their number
    (_first_along("_saved_dim"), "Gather Glu IndexSelect"),
    (_rolled, "Flip Roll"),
    (_reduced, "Amax Amin Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Nansum Norm Prod Std Sum Var"),
    (lambda op: [Along(op.dims("_saved_dims", len(op.out))[op.at.dim], op.at.inner)], "Permute"),
    (_transposed, "Transpose"),
    (lambda op: [Along(len(op.out) - 1 - op.at.dim, op.at.inner)], "T"),
    (_inserted, "Select Unbind"),
    (_stacked, "Stack"),
    (_unfolded, "Unfold"),
    (_repeated, "Repeat"),
    (_padded, "ConstantPadNd"),
    (_of_matrices(0), "Mm Bmm"),
    (_of_matrices(1), "Addmm Baddbmm"),
    (lambda op: [op.at], "Mv"),
    (_leading(1), "Linear"),
    (_normalised, "NativeLayerNorm FusedRmsNorm"),
    (_batch_normalised, "NativeBatchNorm CudnnBatchNorm"),
    (
        _batch,
        "AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D AvgPool2D AvgPool3D Convolution "
        "CudnnConvolution MaxPool2DWithIndices MaxPool3DWithIndices NativeGroupNorm PixelShuffle PixelUnshuffle "
        "ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D "
        "UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D "
        "UpsampleTrilinear3D",
    ),
    (
        _attended,
        "ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention ScaledDotProductFlashAttention "
        "ScaledDotProductFlashAttentionForCpu ScaledDotProductFusedAttentionOverrideable",
    ),
    # Classes lie along dimension 1 of the input.
    (lambda op: [_same(op, op.inputs[0], op.at.dim + (op.at.dim >= 1))], "NllLoss NllLoss2D"),
]
CARRIED = {name: rule for rule, names in _TABLE for name in names.split()}
