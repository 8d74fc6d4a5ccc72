"""What the names of torch's functions say about them, and how to look inside those written in Python."""

import functools
import inspect
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names that torch uses twice, for a Python function and for a builtin with other arguments: which of them is meant.
PYTHON = names("embedding layer_norm group_norm instance_norm batch_norm rms_norm")

# Functions that treat every sample alike; elementwise ones broadcast from the right, the others have samples first.
ALIGNED = names(
    "div true_divide __truediv__ pow __pow__ where maximum minimum fmax fmin lerp addcmul addcdiv clamp clamp_min "
    "clamp_max max min atan2 hypot xlogy logaddexp copysign masked_fill"
)
FIRST = names("prelu scaled_dot_product_attention")
SPREAD = names("expand expand_as broadcast_to repeat tile")
FACTORIES = names("arange zeros ones full eye linspace logspace empty tril_indices triu_indices scalar_tensor")
BROADCAST = names("add __add__ __radd__ sub __sub__ mul __mul__ __rmul__")
VIEWS = names(
    "t T mT transpose permute view reshape unsqueeze squeeze flatten unflatten chunk split split_with_sizes "
    "__getitem__ narrow select unbind movedim moveaxis swapaxes swapdims view_as tensor_split"
)
COPIES = names("to float half double bfloat16 type type_as contiguous clone")
GRAD_FN = Tensor.grad_fn.__get__
BACKWARD = frozenset((torch.autograd.grad, torch.autograd.backward, Tensor.backward))


@functools.cache
def is_in_place(name: str) -> bool:
    """Return whether a torch function of this name changes its first argument."""
    if name.startswith("__"):
        return (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")) or name == "__setitem__"
    return name.endswith("_") and name != "requires_grad_"


def tensors_in(args: tuple, kwargs: dict) -> list[Tensor]:
    """Return the tensors among arguments, lists and tuples of them included."""
    tensors = []
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, Tensor):
            tensors.append(a)
        elif isinstance(a, (tuple, list)):
            tensors += tensors_in(tuple(a), {})
    return tensors


@functools.cache
def opened(func: types.FunctionType) -> Callable:
    """Return the body of a torch function written in Python, without the check that sends it back to the mode."""
    inner = getattr(func, "__wrapped__", None)
    if inner is not None:
        return inner
    no = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False
    )
    inside = types.FunctionType(
        func.__code__, {**func.__globals__, **no}, func.__name__, func.__defaults__, func.__closure__
    )
    inside.__kwdefaults__ = func.__kwdefaults__
    return inside


def is_wrapper(func: Callable) -> bool:
    """Return whether a function is somebody's that took the place of one of torch's, such as F.layer_norm."""
    return isinstance(func, types.FunctionType) and not func.__globals__.get("__name__", "").startswith("torch")


_bodies: dict[types.CodeType, types.FunctionType] = {}


def behind(wrapper: types.FunctionType) -> types.FunctionType:
    """Return the function that asks the mode, for a call that carries the name of a wrapper around it.

    The wrapper has been run: a function of torch that is written in Python finds it under its own name.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not handle_torch_function.__code__:
        frame = frame.f_back
    body = None if frame is None else frame.f_back.f_code
    if body is None or body is wrapper.__code__ or body.co_freevars:
        return wrapper
    return _bodies.setdefault(body, types.FunctionType(body, frame.f_back.f_globals, body.co_name))
