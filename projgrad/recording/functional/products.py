"""Linear layers and products with a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, functional

from ... import _torch_private as private
from ...rules.layout import Layout
from ...rules.product import Grouped, Product
from ...rules.rule import Rows, Rule
from ..recording import Recorder
from .elementwise import fold


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, tape: Recorder) -> Tensor:
    """`torch.nn.functional.linear`: input (..., i), weight (o, i), bias (o,)."""
    call = tape.call("linear", input, weight, bias)
    y = private.linear(input, weight, bias)

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        p, rules = layout.positions(b, n), []
        if call.follows(weight):
            q = layout.positions(saved[0], n)
            rules.append(Product(p, q, p.shape[2:], q.shape[2:], (0, 1)))
        if call.follows(bias):
            rules.append(Rows(p.sum(1)))
        return rules

    saved = [input] if call.follows(weight) else []
    return call.note(y, make, [weight, bias] if weight.ndim == 2 else [], range(y.ndim - 1), saved, bool(saved))


def contract(y: Tensor, x: Tensor, sx: str, weight: Tensor, sw: str, sy: str, call, extra=None) -> Tensor:
    """Note y = einsum(sx, sw -> sy), one letter a dimension. `extra`: (what is added to y, its factor, y's)."""
    positions = [s for s in sy if s in sx and s not in sw]
    left = [s for s in sw if s in sy and s not in sx]
    right = [s for s in sw if s in sx and s not in sy]
    groups = [s for s in sw if s in sx and s in sy]
    lost = set(sw) - set(left + right + groups) or set(sx) - set(positions + right + groups)
    claimed = [] if lost or len(set(sx)) < len(sx) or len(set(sw)) < len(sw) else [weight]
    added, beta, alpha = extra or (None, 1, 1)
    order = [sw.index(s) for s in groups + left + right]
    sizes = [*zip(sx, x.shape, strict=True), *zip(sw, weight.shape, strict=True)]
    shape = dict(sizes)
    if any(shape[s] != size for s, size in sizes):  # size 1 against another: broadcasting
        claimed = []
    left_sizes, right_sizes = [shape[s] for s in left], [shape[s] for s in right]

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule | None]:
        rules: list[Rule | None] = []
        if claimed and call.follows(weight) and sy[layout.axis] in groups:
            rules.append(None)  # a parameter spread over the samples before: nothing more comes from here
        elif claimed and call.follows(weight):
            where = layout._replace(axis=positions.index(sy[layout.axis]))
            p = b.permute([sy.index(s) for s in positions + groups + left])
            q = saved[0].permute([sx.index(s) for s in positions + groups + right])
            count = math.prod(shape[s] for s in groups)
            p, q = (where.split(f, n) for f in (p, q))
            t = math.prod(p.shape[1 : 1 + len(positions)])
            p = p.reshape(n, t, count, math.prod(left_sizes))
            p = p if alpha == 1 else p * alpha
            q = q.reshape(n, t, count, math.prod(right_sizes))
            if groups:
                rules.append(Grouped(p, q, [shape[s] for s in groups], left_sizes, right_sizes, order))
            else:
                rules.append(Product(p[:, :, 0], q[:, :, 0], left_sizes, right_sizes, order))
        if call.follows(added):
            g = fold(layout.split(b, n), added.shape)
            rules.append(Rows(g if beta == 1 else g * beta))
        return rules

    shared = [sy.index(s) for s in groups] if call.spread(weight) else []
    axes = [sy.index(s) for s in positions] + shared
    if call.follows(added):  # it may not be spread along the samples
        axes = [a for a in axes if a - len(sy) + added.ndim < 0 or added.shape[a - len(sy) + added.ndim] == 1]
    saved = [x] if claimed and call.follows(weight) else []
    return call.note(y, make, [*claimed, added], axes, saved, bool(saved), shared)


def matmul(input: Tensor, other: Tensor, *, tape: Recorder) -> Tensor:
    """`torch.matmul` with a parameter on either side."""
    call = tape.call("matmul", input, other)
    y = private.builtins.matmul(input, other)
    return _note_matmul(call, y, input, other)


def _note_matmul(call, y: Tensor, input: Tensor, other: Tensor, extra=None) -> Tensor:
    if input.ndim > 1 and other.ndim == 2 and call.follows(other) and not call.follows(input):
        return _note_layer(call, y, input, other, *(extra or (None, 1, 1)))
    batch = [chr(ord("A") + d) for d in range(max(input.ndim, other.ndim, 2) - 2)]  # right-aligned
    s1 = "".join(batch[len(batch) - (input.ndim - 2) :] if input.ndim > 2 else "") + ("ic"[2 - min(input.ndim, 2) :])
    s2 = "".join(batch[len(batch) - (other.ndim - 2) :] if other.ndim > 2 else "") + ("co" if other.ndim > 1 else "c")
    sy = "".join(batch) + ("i" if input.ndim > 1 else "") + ("o" if other.ndim > 1 else "")
    is_right = call.follows(other) or not call.follows(input)  # neither: of addmm's added bias, samples lie along input
    (x, sx), (weight, sw) = ((input, s1), (other, s2)) if is_right else ((other, s2), (input, s1))
    for tensor, letters in ((x, sx), (weight, sw)):
        if any(s.isupper() and tensor.shape[d] == 1 != y.shape[sy.index(s)] for d, s in enumerate(letters)):
            return call.note(y, None, [], (), [])  # broadcast batches of size 1
    return contract(y, x, sx, weight, sw, sy, call, extra)


def _note_layer(call, y: Tensor, x: Tensor, weight: Tensor, added: Tensor | None, beta: float, alpha: float) -> Tensor:
    """Note y = alpha x W + beta added, W [i, o]: a linear layer whose weight is stored the other way round."""

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        p, q = layout.positions(b, n), layout.positions(saved[0], n)
        rules: list[Rule] = [Product(p if alpha == 1 else p * alpha, q, p.shape[2:], q.shape[2:], (1, 0))]
        if call.follows(added):
            g = fold(layout.split(b, n), added.shape)
            rules.append(Rows(g if beta == 1 else g * beta))
        return rules

    return call.note(y, make, [weight, added], _not_along(added if call.follows(added) else None, y), [x], True)


def _not_along(added: Tensor | None, y: Tensor) -> list[int]:
    """Return the dimensions of y but the last that a tensor which is added does not have: it is not spread there."""
    lead = y.ndim - (0 if added is None else added.ndim)
    return [a for a in range(y.ndim - 1) if a < lead or added is None or added.shape[a - lead] == 1]


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, tape: Recorder) -> Tensor:
    """`torch.addmm` and `torch.baddbmm`."""
    call = tape.call("addmm", input, mat1, mat2)
    function = private.builtins.addmm if mat1.ndim == 2 else private.builtins.baddbmm
    y = function(input, mat1, mat2, beta=beta, alpha=alpha)
    return _note_matmul(call, y, mat1, mat2, (input, beta, alpha))


def einsum(equation: str, *operands: Tensor, tape: Recorder) -> Tensor:
    """`torch.einsum` of two operands, one of them a parameter."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    call = tape.call("einsum", *operands)
    y = functional.einsum(equation, *operands)
    sides = _subscripts(equation, operands)
    if len(operands) != 2 or sides is None or len(sides[2]) != y.ndim:
        return call.note(y, None, [], (), [])
    (x, sx), (weight, sw) = zip(operands, sides[:2], strict=True)
    if not call.follows(weight):
        x, sx, weight, sw = weight, sw, x, sx
    return contract(y, x, sx, weight, sw, sides[2], call)


def _subscripts(equation: str, operands: Sequence[Tensor]) -> list[str] | None:
    """Return the letters of operands and result, the ellipsis spelled out; None where that is not simple."""
    if "->" not in equation or equation.count(",") != 1:
        return None
    left, out = equation.replace(" ", "").split("->")
    terms = left.split(",")
    hidden = [o.ndim - len(t.replace("...", "")) if "..." in t else 0 for t, o in zip(terms, operands, strict=True)]
    letters = "".join(chr(ord("À") + d) for d in range(max(hidden)))
    spelled = [t.replace("...", letters[len(letters) - h :]) for t, h in zip(terms, hidden, strict=True)]
    return [*spelled, out.replace("...", letters)]


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None, *, tape: Recorder) -> Tensor:
    """`torch.nn.functional.bilinear`: y_o = x₁ᵀ W_o x₂ + b_o, weight (o, i, i₂)."""
    call = tape.call("bilinear", input1, input2, weight, bias)
    y = private.builtins.bilinear(input1, input2, weight, bias)

    def make(b: Tensor, saved: Sequence[Tensor], layout: Layout, n: int) -> list[Rule]:
        p, x1, x2 = (layout.split(f, n).flatten(1, -2) for f in (b, *saved))
        rules: list[Rule] = []
        if call.follows(weight):
            q = torch.einsum("nti,ntj->ntij", x1, x2)
            rules.append(Product(p, q, p.shape[2:], q.shape[2:], (0, 1, 2)))
        if call.follows(bias):
            rules.append(Rows(p.sum(1)))
        return rules

    return call.note(y, make, [weight, bias], range(y.ndim - 1), [input1, input2])
