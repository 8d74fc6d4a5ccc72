"""A pretend GPU: tensors that say they are on a CUDA device while the CPU does the work, and where the host would wait.

To autograd and the dispatcher they are CPU tensors that wrap others; what Python code asks about devices is answered
with `DEVICE`. A CPU tensor that meets one of them is refused, as on a GPU.
"""

import contextlib
import functools
import traceback
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import cuda_products  # noqa: F401
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("cuda", 0)
FACTORIES = [
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "from_numpy", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
]
aten = torch.ops.aten
# The host reads what the device computed, or the size of the result depends on it.
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten.bincount,
    aten.equal,
    aten.repeat_interleave,
    aten._linalg_eigh,
    aten._linalg_svd,
    aten.linalg_cholesky,
    aten.linalg_qr,
    aten.linalg_lstsq,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
PROJECT = str(Path(__file__).parents[2] / "projgrad")


def is_cuda(device: object) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


class Pretend(Tensor):
    """A tensor on the pretend GPU; `inner` holds the numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = DEVICE, True, False

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        out = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        out.inner = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a pretend GPU that is not active")

    def cpu(self) -> Tensor:
        Gpu.active.waits("copy to the CPU")
        return ToHost.apply(self)

    def to(self, *args, **kwargs) -> Tensor:
        device = kwargs.pop("device", None)
        if args and isinstance(args[0], (str, torch.device)):
            device, *args = args
        elif args and isinstance(args[0], Tensor):
            device, args = args[0].device, [args[0].dtype, *args[1:]]
        out = Tensor.to(self, *args, **kwargs) if args or kwargs else self
        return out if device is None or is_cuda(device) else out.cpu()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        return self.cpu().numpy()


class ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.inner.clone()

    @staticmethod
    def backward(ctx, g):
        return Pretend(g)


class Gpu(TorchDispatchMode):
    """While active, tensors asked for on CUDA are pretend ones; `waited` counts where the host would wait for them.

    Raises:
        RuntimeError: a tensor on the CPU meets one on the pretend GPU.
    """

    active: "Gpu"

    def __init__(self) -> None:
        super().__init__()
        self.waited: Counter[str] = Counter()
        self.launched = 0
        self.placed = False  # whether Python code, not the inside of a torch function, makes a tensor
        self.floating: dict[int, weakref.ref] = {}  # made inside a torch function: wherever its other operands are
        self.patches = contextlib.ExitStack()

    def __enter__(self):
        Gpu.active = self
        for name in FACTORIES:
            self.patches.enter_context(mock.patch.object(torch, name, self._factory(getattr(torch, name))))
        self.patches.enter_context(mock.patch.object(torch.cuda, "_lazy_init", lambda: None))
        self.patches.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda device=None: None))
        self.patches.enter_context(mock.patch.object(torch.cuda, "get_rng_state", lambda device: torch.empty(0)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def _factory(self, function):
        @functools.wraps(function)
        def make(*args, **kwargs):
            data = function.__name__ in ("tensor", "as_tensor")  # these copy before anyone can step in
            device = kwargs.pop("device") if data and is_cuda(kwargs.get("device")) else None
            before, self.placed = self.placed, True
            try:
                out = function(*args, **kwargs)
            finally:
                self.placed = before
            return out if device is None else out.to(DEVICE)

        return make

    def waits(self, what: str) -> None:
        frames = [
            f for f in traceback.extract_stack() if f.filename.startswith(PROJECT) and "host_reads" not in f.filename
        ]
        where = "outside"
        if frames:
            where = f"{Path(frames[-1].filename).relative_to(PROJECT)}:{frames[-1].lineno}"
        self.waited[f"{where} {what}"] += 1

    def _floats(self, t: Tensor) -> bool:
        ref = self.floating.get(id(t))
        return ref is not None and ref() is t

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given: list[Tensor] = []
        inner_args, inner_kwargs = _inner(args, given), {k: _inner(v, given) for k, v in kwargs.items()}
        here = any(isinstance(t, Pretend) for t in given)
        made_here = is_cuda(kwargs.get("device"))
        if made_here:
            inner_kwargs["device"] = torch.device("cpu")
        if made_here and given and not here:
            self.waits("copy from the CPU")
        if here:
            self._look(func.overloadpacket, args, kwargs, given)
            self.launched += not func.is_view
        out = func(*inner_args, **inner_kwargs)
        if not here:
            if made_here:
                return _outer(out)
            if not (self.placed and not given) and all(map(self._floats, given)):
                for t in out if isinstance(out, (tuple, list)) else [out]:
                    if isinstance(t, Tensor):
                        self.floating[id(t)] = weakref.ref(t)
            return out
        if not (func.is_view or func._schema.is_mutable):
            return _outer(out)
        if func._schema.is_mutable and not isinstance(args[0], (Pretend, list, tuple)):
            return out  # written into a tensor on the CPU
        return return_and_correct_aliasing(func, args, kwargs, _outer(out))

    def _look(self, packet, args: tuple, kwargs: dict, given: list[Tensor]) -> None:
        """Refuse tensors on two devices, count what waits."""
        indices = [t for t in args[1] if isinstance(t, Tensor)] if packet in INDEXED else []
        for t in given:
            if isinstance(t, Pretend) or not t.ndim or self._floats(t):
                continue
            if packet in (aten.copy_, aten.copy, aten._foreach_copy_):
                self.waits("copy between devices")
            elif any(t is index for index in indices):  # a tensor on a GPU may be indexed from the CPU, by a copy
                self.waits(f"{packet.__name__} with indices from the CPU")
            else:
                raise RuntimeError(f"{packet}: a tensor on the CPU {tuple(t.shape)} meets one on {DEVICE}")
        if packet in WAITS and not (packet is aten.repeat_interleave and kwargs.get("output_size") is not None):
            self.waits(packet.__name__)
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.waits(f"{packet.__name__} with a mask")


def _inner(value, given: list[Tensor]):
    """What a call is given, unwrapped; all tensors in it are added to `given`."""
    if isinstance(value, Tensor):
        given.append(value)
        return value.inner if isinstance(value, Pretend) else value
    if isinstance(value, (tuple, list)):
        return type(value)(_inner(v, given) for v in value)
    return value


def _outer(value):
    if isinstance(value, Tensor):
        return Pretend(value)
    return type(value)(_outer(v) for v in value) if isinstance(value, (tuple, list)) else value


def to_device(module: nn.Module) -> nn.Module:
    """Parameters and buffers on the pretend GPU, ties kept."""
    made: dict[int, Tensor] = {}

    def moved(t: Tensor) -> Tensor:
        if id(t) not in made:
            new = Pretend(t.detach().clone())
            made[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
        return made[id(t)]

    for part in module.modules():
        for some in (part._parameters, part._buffers):
            for name, t in some.items():
                if t is not None:
                    some[name] = moved(t)
    return module


def values(t):
    """The numbers of tensors anywhere in a structure."""
    return tree_map_only(Pretend, lambda t: t.inner, t)
