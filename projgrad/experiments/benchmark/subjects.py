"""What a step is measured on: a built-in model, or a user's own model and batch by `module:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import itertools
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._torch_private import BatchNorm
from ...methods.common import trainable_parameters
from . import models
from .contenders import has_parameter, takes_slices

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


class Refused(ValueError):
    """Why a model cannot be measured, in one line."""


class BuiltIn(NamedTuple):
    """A model of `models`; sizes, small: arguments of `build`. The small one runs first, to load code."""

    title: str
    build: Callable[..., tuple[nn.Module, models.Batch]]
    sizes: tuple[int, ...]
    small: tuple[int, ...]
    n: int


BUILT_IN = {
    "mlp": BuiltIn("MLP 784-1024-1024-10", models.mlp, (784, 1024, 1024, 10), (16, 16, 10), 64),
    "conv": BuiltIn("4 conv + group norm + fc, 32 x 32", models.conv_net, (3, 64, 128, 256, 256), (3, 8, 8), 64),
    "decoder": BuiltIn(
        "decoder d = 256, 4 layers, 64 tokens, vocabulary 1000", models.decoder, (256, 4, 64, 1000), (16, 1, 8, 20), 32
    ),
    "encoder": BuiltIn("encoder d = 256, 4 blocks, 64 tokens", models.encoder, (256, 4, 64), (16, 1, 8), 32),
}


@dataclass
class OwnJob:
    """What a user's function returned, with the number of its retain samples."""

    model: nn.Module
    forget: Callable[[], Tensor]
    retain: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    n: int


def built_in(name: str, n: int, dtype: torch.dtype, device: str, small: bool = False) -> models.Job:
    """Return the job of a built-in model."""
    model = BUILT_IN[name]
    torch.manual_seed(0)
    job = models.Job(*model.build(*(model.small if small else model.sizes)), 4 if small else n)
    job.model.to(device, dtype)
    job.samples = tuple(
        tuple(x.to(device, dtype if x.is_floating_point() else None) for x in batch) for batch in job.samples
    )
    return job


def is_own(name: str) -> bool:
    return ":" in name


def source(name: str) -> str:
    """Return eight digits that change with the file of a user's function; empty for what is built in or not found."""
    if not is_own(name):
        return ""
    where = name.rpartition(":")[0]
    places = [Path(where)]
    if not where.endswith(".py"):
        modules = [Path(base, *where.split(".")) for base in ("", *sys.path)]
        places = [file for module in modules for file in (module / "__init__.py", module.with_suffix(".py"))]
    path = next(filter(Path.is_file, places), None)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8] if path else ""


def own(name: str, n: int | None, dtype: str | None, device: str | None) -> OwnJob:
    """Call a user's function and check what it returns.

    name: `module:function`, or `file.py:function`. The function is called without arguments, or with `n` where it has
    a parameter of that name. It returns (model, forget, retain) or (model, forget, retain, optimizer): the closures of
    `OrthoGrad.step`. Without an optimizer it is SGD.

    Raises Refused.
    """
    function = _function(name)
    takes_n = has_parameter(function, "n")
    if n is not None and not takes_n:
        raise Refused(f"--n is given, but {name} has no parameter n")
    given = {} if n is None else {"n": n}
    _check_arguments(name, function, given)
    torch.manual_seed(0)
    try:
        result = function(**given)
    except SystemExit as error:
        raise Refused(f"{name} ended its process: sys.exit({error.code!r})") from error
    except Exception as error:
        raise Refused(f"{name} raised {described(error)}") from error
    if not isinstance(result, tuple) or len(result) not in (3, 4):
        got = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
        raise Refused(f"{name} must return (model, forget, retain) or (model, forget, retain, optimizer); got {got}")
    model, forget, retain, *rest = result
    if not isinstance(model, nn.Module):
        raise Refused(f"the first value of {name} must be a torch.nn.Module; got {type(model).__name__}")
    for what, closure in (("forget", forget), ("retain", retain)):
        if not callable(closure) or isinstance(closure, nn.Module):
            hint = ": lists of closures, micro-batches, are not measured" if isinstance(closure, (list, tuple)) else ""
            raise Refused(f"{what} of {name} must be a function without arguments; got {type(closure).__name__}{hint}")
    if not any(p.requires_grad for p in model.parameters()):
        raise Refused(f"no parameter of the model of {name} requires a gradient: there is nothing to train")
    if not rest:
        rest = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], models.LEARNING_RATE)]
    try:
        params = trainable_parameters(model, rest[0])
    except (TypeError, ValueError) as error:
        raise Refused(f"{name}: {error}") from error
    _check_place(name, model, dtype, device)
    losses = _called(name, "forget", forget)
    if losses.numel() != 1:
        shape = tuple(losses.shape)
        raise Refused(f"forget of {name} must return one loss, such as a mean; got a tensor of shape {shape}")
    losses = _called(name, "retain", retain)
    if losses.ndim != 1:
        hint = ', for example with reduction="none"' if losses.ndim == 0 else ""
        raise Refused(
            f"retain of {name} must return one loss of every sample, shape (n,){hint}; got {tuple(losses.shape)}"
        )
    if len(losses) < 2:
        raise Refused(f"retain of {name} returned the loss of one sample: a benchmark needs at least 2")
    device_of = next(iter(params.values())).device
    if losses.device != device_of:
        raise Refused(f"the model of {name} is on {device_of}, the losses of retain are on {losses.device}")
    job = OwnJob(model, forget, retain, rest[0], len(losses))
    _check_slices(name, job, losses)
    return job


def _check_arguments(name: str, function: Callable[..., object], given: dict[str, int]) -> None:
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise Refused(f"{name} cannot be called: {error}; it is given n alone, and that with --n") from error
    except ValueError:  # what is written in C tells nothing
        pass


def _function(name: str) -> Callable[..., object]:
    module, _, attribute = name.rpartition(":")
    if module.endswith(".py") and not Path(module).is_file():
        raise Refused(f"{name}: there is no file {module}")
    sys.path.insert(0, "")  # as `python -m` does: modules of the folder that the command runs in
    try:
        found = _file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = f"no module {error.name}" if error.name else str(error)
        raise Refused(f"{name}: {missing}; give module:function, or file.py:function") from error
    except Exception as error:
        raise Refused(f"{name}: importing it raised {described(error)}") from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise Refused(f"{name}: {module} has no function {attribute!r}")
    return function


def _file(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.resolve().parent))  # what the file imports beside itself
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _check_place(name: str, model: nn.Module, dtype: str | None, device: str | None) -> None:
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    devices = sorted({str(x.device).removesuffix(":0") for x in tensors})
    if len(devices) > 1:
        raise Refused(f"the model of {name} is on {' and '.join(devices)}: a benchmark needs one device")
    if device == "cuda" and devices[0].startswith("cuda:"):
        hint = f"CUDA_VISIBLE_DEVICES={devices[0].removeprefix('cuda:')} makes that one the first"
        raise Refused(f"the model of {name} is on {devices[0]}, and the first GPU is measured; {hint}")
    if device and devices != [device]:
        raise Refused(f"the model of {name} is on {devices[0]}, but --device is {device}")
    if dtype and (found := dtype_of(model)) != dtype:
        raise Refused(f"the model of {name} is in {found}, but --dtype is {dtype}")


def dtype_of(model: nn.Module) -> str:
    """Return the dtype of the first parameter that is trained."""
    return str(next(p for p in model.parameters() if p.requires_grad).dtype).removeprefix("torch.")


def _called(name: str, what: str, closure: Callable[..., Tensor]) -> Tensor:
    try:
        torch.manual_seed(0)
        losses = closure()
    except Exception as error:
        raise Refused(f"{what} of {name} raised {described(error)}") from error
    if not isinstance(losses, Tensor):
        raise Refused(f"{what} of {name} must return a tensor; got {type(losses).__name__}")
    if not losses.requires_grad:
        raise Refused(f"what {what} of {name} returns has no gradient: it must run the model, outside torch.no_grad()")
    if bad := int((~losses.detach().isfinite()).sum()):
        raise Refused(f"{what} of {name} returns NaN or infinite losses: {bad} of {losses.numel()}")
    return losses.detach()


def _check_slices(name: str, job: OwnJob, losses: Tensor) -> None:
    """Check that `retain` asked for one sample returns the loss that it has in the whole batch."""
    if not takes_slices(job.retain) or changes(job):
        return
    try:
        last = job.retain(part=slice(job.n - 1, job.n)).detach()
    except Exception as error:
        why = _others_matter(job.model) or f"raised {described(error)}"
        raise Refused(f"retain(part=slice({job.n - 1}, {job.n})) of {name} {why}") from error
    tolerance = 16 * torch.finfo(losses.dtype).eps ** 0.5
    if last.shape != (1,) or not torch.allclose(last, losses[-1:], rtol=tolerance, atol=tolerance):
        why = _others_matter(job.model) or f"is not what retain()[{job.n - 1}:] is"
        raise Refused(f"retain(part=slice({job.n - 1}, {job.n})) of {name} {why}")


def _others_matter(model: nn.Module) -> str:
    if not any(isinstance(m, BatchNorm) and (m.training or m.running_mean is None) for m in model.modules()):
        return ""
    return "cannot be compared: batch norm in training mode makes a loss depend on the other samples; use model.eval()"


def changes(job: object) -> bool:
    """Return whether the losses differ from call to call: with the random numbers, or with another batch."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(job.retain().detach())
    return not torch.equal(*found)


def described(error: BaseException) -> str:
    """Return the kind, text and place of an error in one line."""
    text = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[0] if text else ''}{place}"[:300]
