"""Running batches of samples through a model to read the second moments of its layers' inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..._torch_private import Dropout
from ..common import check_batch_norm
from .cache import Cache, sample_hashes, tensors_of
from .input_moments import InputMoments

Forward = Callable[[nn.Module, object], object]


def inputs_of(batch: object) -> object:
    """A batch without its labels: the first of a tuple or list."""
    return inputs_of(batch[0]) if isinstance(batch, (tuple, list)) and batch else batch


def run_model(model: nn.Module, batch: object) -> object:
    """What a batch is without a `forward` of the user's: a tensor, keywords, or either with labels behind it."""
    inputs = inputs_of(batch)
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    raise ValueError(
        f"a batch must be a tensor, a dictionary, or a tuple that begins with one; got {type(inputs).__name__}. "
        "Pass forward=, a function (model, batch), to PGU"
    )


def samples_of(batch: object, forward: Forward | None, check: bool, method: str) -> tuple[int, list[int]]:
    """How many samples a batch has, and their hashes if they are to be checked."""
    inputs = inputs_of(batch) if forward is None else batch
    tensors = tensors_of(inputs)
    sizes = [tuple(t.shape) for t in tensors]
    if not tensors or not all(sizes) or (check and len({shape[0] for shape in sizes}) > 1):
        raise ValueError(
            f"{method}: every tensor of a batch must hold its samples along dimension 0; got shapes {sizes}"
            + (". check_samples=False looks at the first one alone" if len(sizes) > 1 else "")
        )
    return sizes[0][0], sample_hashes(tensors) if check else []


def read_input_moments(
    model: nn.Module,
    batches: Iterable,
    weights: dict[str, nn.Parameter],
    forward: Forward | None,
    check: bool,
    method: str,
    cache: Cache | None = None,
) -> tuple[InputMoments, int, Counter[int] | None]:
    """Second moments, how many samples, and how often each hash. With a cache, they must be in it.

    Raises:
        ValueError: no samples, samples that the cache does not hold, a forward pass that is not the same every time.
        FloatingPointError: NaN or Inf in a layer's inputs.
    """
    check_batch_norm(model)
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{method}: call it outside torch.inference_mode(): the graph of the forward pass is looked at"
        )
    moments, n, samples = InputMoments(weights), 0, Counter()
    keep = False  # activations
    check = check and (cache is None or cache.samples is not None)
    for batch in batches:
        count, hashes = samples_of(batch, forward, check, method)
        for j, each in enumerate(hashes, n):
            samples[each] += 1
            if cache is not None and samples[each] > cache.samples[each]:
                raise ValueError(
                    f"{method}: sample {j} is not among the {cache.n} that are left of those fitted: it was not passed "
                    "to fit() in this form, or is forgotten already. check_samples=False passes over this"
                )
        n += count
        if cache is not None and n > cache.n:
            raise ValueError(f"{method}: {n} samples or more, but only {cache.n} are left of those that were fitted")
        with _repeatable(model):
            try:
                looked = _run(moments, model, batch, forward, keep)
            except Exception:
                if n > count or keep:
                    raise
                # It may run a backward pass of its own, such as for forces, which needs its activations.
                moments, keep = InputMoments(weights), True
                looked = _run(moments, model, batch, forward, keep)
        if not looked:
            raise ValueError(
                f"{method}: the forward pass makes no graph for autograd, so that a use of a weight could be missed: "
                "leave no_grad(), inference_mode() and detach() out of the model and of forward=. Activations are not "
                "kept"
            )
    if not n:
        raise ValueError(f"{method}: the batches hold no samples")
    for name, C in moments.moments.items():
        if not C.diagonal(dim1=1, dim2=2).isfinite().all():
            raise FloatingPointError(f"{method}: the inputs of {name} hold NaN or Inf, or their squares overflow")
    return moments, n, samples if check else None


def _run(moments: InputMoments, model: nn.Module, batch: object, forward: Forward | None, keep: bool) -> bool:
    """One forward pass with a graph, of which the activations are dropped at once; returns what `close` does."""
    kept = nullcontext() if keep else saved_tensors_hooks(lambda _: None, _dropped)
    with torch.enable_grad(), kept, moments:
        result = (forward or run_model)(model, batch)
    return moments.close(result)


def _dropped(_: None) -> Tensor:
    raise RuntimeError(
        "the forward pass runs a backward pass of its own, but that of the first batch did not, so that activations "
        "are not kept: begin with a batch that does"
    )


@contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """What is inside draws no random numbers."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    before = _generators(devices)
    yield
    if all(map(torch.equal, before, _generators(devices))):
        return
    active = (m for m in model.named_modules() if isinstance(m[1], Dropout) and m[1].training)
    first = next((f" ({name} is dropout in training mode)" for name, m in active if m.p), "")
    raise ValueError(
        f"the forward pass draws random numbers{first}, so that the inputs of its layers cannot be computed again. "
        "Call model.eval() before"
    )


def _generators(devices: set[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in sorted(devices, key=str))]
