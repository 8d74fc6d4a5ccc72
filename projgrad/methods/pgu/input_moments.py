"""Second moments of what enters every weight, read from the functions that a forward pass calls."""

import math
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..._torch_private import inside_transform
from ...ops.cost import chunk_bytes
from ...recording.functional.convolutions import geometry
from ...recording.torch_names import VIEWS, is_in_place, opened, tensors_in
from .uses import Uses

EMBEDDINGS = frozenset({"embedding", "embedding_bag"})
PROPERTIES = frozenset({"T", "mT", "data"})  # the same weight again
UNSEEN = "in a scripted or compiled module, another thread, a function of its own, or a gradient"
NUMBERS = frozenset({"numpy", "tolist", "__array__", "__dlpack__"})  # what follows is not seen


class View(NamedTuple):
    """How a weight is read as g matrices of outputs by inputs: `transposed` where it is stored inputs first."""

    groups: int
    transposed: bool

    def matrix(self, w: Tensor) -> Tensor:
        """Return a weight as matrices (g, o, i)."""
        m = w.reshape(self.groups, w.shape[0] // self.groups, -1)
        return m.mT if self.transposed else m

    def weight(self, m: Tensor, shape: torch.Size) -> Tensor:
        """Return matrices (g, o, i) as a weight of this shape."""
        return (m.mT if self.transposed else m).reshape(shape)


class Use(NamedTuple):
    """One use of a weight; the last `features` dimensions of x (g, positions..., features...) are one input row."""

    weight: Tensor
    view: View
    x: Tensor
    features: int = 1


class InputMoments(TorchFunctionMode):
    """A mode that adds up Σ x xᵀ over the rows x that meet each weight.

    A weight is known by identity, so functional code, adapters and tied weights are seen; several uses add up. Its
    transposition is followed, and blocks of its rows (packed attention), whose inputs are added to those of the whole.
    The forward pass makes a graph, from which `close` knows whether there are uses that no function showed.

    weights: those to watch, by name, all with two or more dimensions.
    moments: (g, i, i) float64, by name. views: how each of these weights is read.
    refused: why others have none: an operation that is no linear map of rows by the weight, as stored or transposed.
    eps: of the coarsest arithmetic that made an input. arithmetic: by name, in what its inputs were computed.
    """

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.weights = weights
        self.own = {id(p): (p, name, False) for name, p in weights.items()}
        self.aliases = self.own.copy()  # with the views of weights: each tensor, which weight it is, if transposed
        self.moments: dict[str, Tensor] = {}
        self.views: dict[str, View] = {}
        self.refused: dict[str, str] = {}
        self.arithmetic: dict[str, set[str]] = {}
        self.eps, self.convolved = 0.0, False
        self.uses = Uses(weights)

    def source(self, t: Tensor) -> tuple[str, bool] | None:
        """Return which weight a tensor is, and whether transposed; None if it is none."""
        alias = self.aliases.get(id(t))
        return None if alias is None else alias[1:]

    def __torch_function__(self, func, _, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        self.convolved |= name.startswith("conv")
        arguments = list(tensors_in(args, kwargs))
        used = {s[0] for t in arguments if (s := self.source(t)) is not None}
        self.uses.reach(arguments)
        inputs = [t.grad_fn for t in arguments if self.source(t) is None and t.grad_fn is not None]  # before the call
        if used and name in EMBEDDINGS:
            self._refuse(used, "embedding")
            return func(*args, **kwargs)
        use = self._use(name, args, kwargs) if used else None
        if use is not None:
            self._add(use, name)
            self._refuse(used - {self.source(use.weight)[0]}, f"it enters {name} other than as the weight")
        elif used and isinstance(func, types.FunctionType):  # written in Python, such as attention: look inside
            with self:
                return opened(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        outputs = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        self.uses.reach(outputs)
        if not used:
            return out
        if use is None and (
            is_in_place(name)  # x[:2] = w returns nothing
            or name in NUMBERS
            or not all(self._follow(t, func, args) for t in outputs)
        ):
            self._refuse(used, f"{name} is not a linear layer's use of it")
        if use is not None or outputs:
            self.uses.made_by(inputs, outputs, used, use is None)
        return out

    def close(self, result: object) -> bool:
        """End a forward pass with what it returned, and refuse weights with uses that were not seen.

        Returns whether they could be looked for: the uses made a graph, or there are none.
        """
        self.aliases = self.own.copy()
        unseen, in_graph = self.uses.unseen(result)
        has_graph = in_graph or not self.uses.hidden
        self.uses.clear()
        for name, node in unseen.items():
            self._refuse({name}, f"{node} uses it with inputs that cannot be seen: {UNSEEN}")
        return has_graph

    def _use(self, name: str, args: tuple, kwargs: dict) -> Use | None:
        """Return the use of a weight in a call, or None where it is no linear map of rows by the weight."""
        read = READERS.get(name)
        try:
            with torch.no_grad():
                use = read(self.source, *args, **kwargs) if read else None
        except TypeError:  # a call signature that the reader does not have
            return None
        if use is None or use.x.is_complex() or self.source(use.weight) is None or self.source(use.x) is not None:
            return None
        return use

    def _follow(self, out: Tensor, func: Callable, args: tuple) -> bool:
        """Return whether `out` is a weight seen again: as it is, transposed, or some of its rows."""
        if self.source(out) is not None:
            return True
        source = self.source(args[0]) if args and isinstance(args[0], Tensor) else None
        if source is None or not _keeps(func, args):
            return False
        w = self.weights[source[0]]
        for t, turned in ((out, False), (out.mT if out.ndim == 2 else out, True)):
            rows_alone = w.ndim == 2 or t.shape == w.shape
            if t.ndim == w.ndim and t.shape[1:] == w.shape[1:] and t.stride() == w.stride() and rows_alone:
                self.aliases[id(out)] = out, source[0], turned
                return True
        return False

    def _refuse(self, names: set[str], why: str) -> None:
        for name in names:
            self.refused.setdefault(name, why)
            self.moments.pop(name, None)

    def _add(self, use: Use, operation: str) -> None:
        name, turned = self.source(use.weight)
        if name in self.refused:
            return
        if inside_transform():
            self._refuse({name}, f"{operation} uses it inside a transformation of torch.func, such as vmap or grad")
            return
        view = View(use.view.groups, use.view.transposed != turned)
        w, x = self.weights[name], use.x
        i = view.matrix(w).shape[2]
        if self.views.setdefault(name, view) != view or math.prod(x.shape[x.ndim - use.features :]) != i:
            self._refuse({name}, f"{operation} multiplies other inputs with it than another use does")
            return
        if name not in self.moments:
            self.moments[name] = torch.zeros((view.groups, i, i), dtype=torch.float64, device=w.device)
        self.eps = max(self.eps, _eps(x, self.convolved))
        self.arithmetic.setdefault(name, set()).add(_arithmetic(x))
        for rows in _pieces(x.detach(), use.features, chunk_bytes(x.device.type)):
            self.moments[name].baddbmm_(rows.mT, rows)


def _keeps(func: Callable, args: tuple) -> bool:
    """Return whether the function gives its first argument seen another way, not other numbers."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in PROPERTIES
    if name == "__getitem__":
        keys = args[1] if type(args[1]) is tuple else args[1:]
        return all(isinstance(key, (slice, types.EllipsisType)) for key in keys)
    return name in VIEWS or name == "detach"


def _is_cast(x: Tensor) -> bool:
    """Return whether autocast casts this input of a product; it leaves float64 as it is."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if _is_cast(x) else x.dtype


def _float32_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch cannot tell, since it was set by backend (fp32_precision)
        return "unknown"


def _arithmetic(x: Tensor) -> str:
    """Return what the user chose for the products of a layer with this input, not what cuDNN makes of float32.

    So samples may be fitted on a GPU and deleted on a CPU, within the bounds of rounding.
    """
    dtype, arithmetic = (str(d).removeprefix("torch.") for d in (_product_dtype(x), x.dtype))
    if _is_cast(x):
        arithmetic += f" under autocast to {dtype}"
    if dtype == "float32" and (precision := _float32_precision()) != "highest":
        arithmetic += f" with float32_matmul_precision {precision}"
    return arithmetic


def _eps(x: Tensor, convolved: bool) -> float:
    """Return eps of the products that this input came from and goes into, convolutions among them or not."""
    dtype = _product_dtype(x)
    eps = torch.finfo(dtype).eps
    if dtype != torch.float32:
        return eps
    reduced = {"highest": eps, "high": 2.0**-10}.get(_float32_precision(), 2.0**-7)  # of "unknown" the coarsest
    # cuDNN's convolutions round float32 to ten bits unless told otherwise.
    rounded = x.is_cuda and convolved and torch.backends.cudnn.conv.fp32_precision not in ("ieee", "none")
    return max(reduced, 2.0**-10 if rounded else 0.0)


def _pieces(x: Tensor, features: int, budget: int) -> Iterator[Tensor]:
    """Yield x (g, positions..., features...) as rows (g, N, i) in float64, as many at a time as fit the budget."""
    i = math.prod(x.shape[x.ndim - features :])
    most = max(1, budget // max(1, 8 * x.shape[0] * i))
    for piece in _split(x, 1, x.ndim - features, most):
        count = math.prod(piece.shape[1 : x.ndim - features])
        yield piece.to(torch.float64, memory_format=torch.contiguous_format).reshape(x.shape[0], count, i)


def _split(x: Tensor, dim: int, end: int, most: int) -> Iterator[Tensor]:
    below = math.prod(x.shape[dim + 1 : end])
    if below <= most or dim == end - 1:
        yield from x.split(max(1, most // max(1, below)), dim)
    else:
        for one in x.split(1, dim):
            yield from _split(one, dim + 1, end, most)


# Readers: how a function's arguments make rows that a weight multiplies. `source` says what is a weight.
Source = Callable[[Tensor], object]


def _linear(source: Source, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    return Use(weight, View(1, False), input.reshape(1, -1, input.shape[-1]))


def _matmul(source: Source, input: Tensor, other: Tensor) -> Use | None:
    if source(other) is not None and other.ndim == 2:
        return Use(other, View(1, True), input.reshape(1, -1, input.shape[-1]))
    if source(input) is not None and input.ndim == 2:
        x = other.mT if other.ndim > 1 else other
        return Use(input, View(1, False), x.reshape(1, -1, x.shape[-1]))
    return None


def _addmm(source: Source, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta=1, alpha=1) -> Use | None:
    return _matmul(source, mat1, mat2)


def _convolution(dims: int) -> Callable[..., Use]:
    def read(source, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Use:
        kernel, steps, gaps, pad = geometry(weight, stride, padding, dilation)
        x = input if input.ndim == dims + 2 else input[None]
        x = F.pad(x, [p for pair in reversed(pad) for p in pair]).unflatten(1, (groups, -1))  # [n, g, c, *spatial]
        for axis, (k, s, d) in enumerate(zip(kernel, steps, gaps, strict=True), 3):
            x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]  # all patches, as a view [n, g, c, *positions, *kernel]
        order = [1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
        return Use(weight, View(groups, False), x.permute(order), 1 + dims)

    return read


def _transposed_convolution(dims: int) -> Callable[..., Use]:
    # A position's channels make a patch of the output: y = x W, patches added up.
    def read(source, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1) -> Use:
        x = input if input.ndim == dims + 2 else input[None]
        x = x.unflatten(1, (groups, -1))  # [n, g, c, *positions]
        return Use(weight, View(groups, True), x.permute(1, 0, *range(3, 3 + dims), 2))

    return read


READERS: dict[str, Callable[..., Use | None]] = {
    "linear": _linear,
    **{name: _matmul for name in ("matmul", "mm", "mv", "__matmul__")},
    "addmm": _addmm,
    **{f"conv{d}d": _convolution(d) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _transposed_convolution(d) for d in (1, 2, 3)},
}
