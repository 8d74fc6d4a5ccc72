"""What the names of torch's functions say about them, and how to look inside those written in Python."""

import functools
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


def opened(func: types.FunctionType) -> Callable:
    """Return the body of a torch function written in Python, without the check that sends it back to the mode."""
    inner = getattr(func, "__wrapped__", None)
    if inner is not None:
        return inner
    no = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False
    )
    # What it calls is looked up anew: somebody may have replaced it.
    inside = types.FunctionType(
        func.__code__, {**func.__globals__, **no}, func.__name__, func.__defaults__, func.__closure__
    )
    inside.__kwdefaults__ = func.__kwdefaults__
    return inside


MAKERS = "torch._dynamo", "torch.utils", "torch.amp", "torch.compiler"  # modules of torch that wrap others' functions


def is_wrapper(func: Callable) -> bool:
    """Return whether a function is somebody's that took the place of one of torch's, such as F.layer_norm."""
    if not isinstance(func, types.FunctionType):
        return False
    home = func.__globals__.get("__name__", "")
    return not home.startswith("torch") or home.startswith(MAKERS)


_bodies: dict[types.CodeType, types.FunctionType] = {}


def behind(func: types.FunctionType, caller: types.FrameType) -> Callable:
    """Return the function of torch that asks a mode: `func`, or the one in whose place that is.

    torch looks its functions up by their names to ask in their name, and finds wrappers, which have been run.

    caller: of the mode's `__torch_function__`.
    """
    if caller.f_code is handle_torch_function.__code__:  # a function written in Python
        body = caller.f_back.f_code
        if body is func.__code__ or body.co_freevars or not (is_wrapper(func) or body.co_name == func.__name__):
            return func
        return _bodies.setdefault(body, types.FunctionType(body, caller.f_back.f_globals, body.co_name))
    name = next((name for name, value in vars(Tensor).items() if value is func), None) if is_wrapper(func) else None
    return func if name is None else getattr(Tensor.__base__, name)
