"""Batches of samples: how they are run through a model, and the second moments of its layers' inputs over them."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..._torch_private import Dropout
from ..common import check_batch_norm
from .cache import Cache
from .fingerprints import sample_hashes, tensors_of
from .input_moments import InputMoments

Forward = Callable[[nn.Module, object], object]


def inputs_of(batch: object) -> object:
    """Return a batch without its labels: the first of a tuple or list."""
    return inputs_of(batch[0]) if isinstance(batch, (tuple, list)) and batch else batch


def run_model(model: nn.Module, batch: object) -> object:
    """Run a model on a batch as is done without a `forward` of the user's; raises ValueError for another batch."""
    inputs = inputs_of(batch)
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    raise ValueError(
        f"a batch must be a tensor, a dictionary, or a tuple that begins with one; got {type(inputs).__name__}. "
        "Pass forward=, a function (model, batch), to PGU"
    )


def logits_and_labels(model: nn.Module, batch: object, forward: Forward | None) -> tuple[Tensor, Tensor]:
    """Run a model on a batch of (inputs, labels), or a dictionary with "labels"; raises ValueError for another one."""
    if isinstance(batch, Mapping) and "labels" in batch:
        labels = batch["labels"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        labels = batch[1]
    else:
        raise ValueError('run: a batch must be (inputs, labels), or a dictionary with "labels"')
    output = (forward or run_model)(model, batch)
    return getattr(output, "logits", output), labels


def samples_of(batch: object, forward: Forward | None, check_samples: bool, method: str) -> tuple[int, list[int]]:
    """Return how many samples a batch has, and their hashes if they are to be checked.

    Raises ValueError for a tensor that does not hold as many samples as the others along dimension 0.
    """
    tensors = tensors_of(inputs_of(batch) if forward is None else batch)
    shapes = [tuple(t.shape) for t in tensors]
    if not tensors or not all(shapes) or (check_samples and len({shape[0] for shape in shapes}) > 1):
        raise ValueError(
            f"{method}: every tensor of a batch must hold its samples along dimension 0; got shapes {shapes}"
            + (". check_samples=False looks at the first one alone" if len(shapes) > 1 else "")
        )
    return shapes[0][0], sample_hashes(tensors) if check_samples else []


def check_same_samples(cache: Cache, batches: Iterable, forward: Forward | None, path: str | os.PathLike) -> None:
    """Check that batches hold exactly the samples that are left in a cache; raises ValueError."""
    if cache.samples is None:
        raise ValueError(f"{path} was fitted with check_samples=False: it cannot be compared with data")
    given = Counter(each for batch in batches for each in samples_of(batch, forward, True, "load")[1])
    if given != cache.samples:
        raise ValueError(
            f"{path} belongs to other data: {(cache.samples - given).total()} of its {cache.n} samples are not "
            f"in `data`, {(given - cache.samples).total()} of `data` are not in it"
        )


def read_input_moments(
    model: nn.Module,
    batches: Iterable,
    weights: dict[str, nn.Parameter],
    forward: Forward | None,
    check_samples: bool,
    method: str,
    cache: Cache | None = None,
) -> tuple[InputMoments, int, Counter[int] | None]:
    """Return the second moments, how many samples there are, and how often each hash; raises as `PGU.fit`.

    method: named in messages. cache: holds the samples to take out; None where samples are fitted.
    """
    check_batch_norm(model)
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{method}: call it outside torch.inference_mode(): it needs the graph of the forward pass")
    moments, n, samples = InputMoments(weights), 0, Counter()
    keep_activations = False
    check_samples = check_samples and (cache is None or cache.samples is not None)
    for batch in batches:
        count, hashes = samples_of(batch, forward, check_samples, method)
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
                has_graph = _run(moments, model, batch, forward, keep_activations)
            except Exception:
                if n > count or keep_activations:
                    raise
                # It may run a backward pass of its own, such as for forces, which needs its activations.
                moments, keep_activations = InputMoments(weights), True
                has_graph = _run(moments, model, batch, forward, keep_activations)
        if not has_graph:
            raise ValueError(
                f"{method}: the forward pass makes no graph for autograd, so that a use of a weight could be missed: "
                "leave no_grad(), inference_mode() and detach() out of the model and of forward="
            )
    if not n:
        raise ValueError(f"{method}: the batches hold no samples")
    for name, C in moments.moments.items():
        if not C.diagonal(dim1=1, dim2=2).isfinite().all():
            raise FloatingPointError(f"{method}: the inputs of {name} hold NaN or Inf, or their squares overflow")
    return moments, n, samples if check_samples else None


def _run(
    moments: InputMoments, model: nn.Module, batch: object, forward: Forward | None, keep_activations: bool
) -> bool:
    """Run one forward pass with a graph, without its activations or with them; return what `moments.close` does."""
    saving = nullcontext() if keep_activations else saved_tensors_hooks(lambda _: None, _dropped)
    with torch.enable_grad(), saving, moments:
        result = (forward or run_model)(model, batch)
    return moments.close(result)


def _dropped(_: None) -> Tensor:
    raise RuntimeError(
        "the forward pass runs a backward pass of its own, but that of the first batch did not, so that activations "
        "are not kept: begin with a batch that does"
    )


@contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """Check that what is inside draws no random numbers; raises ValueError."""
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    before = _random_states(devices)
    yield
    if all(map(torch.equal, before, _random_states(devices))):
        return
    dropouts = (name for name, m in model.named_modules() if isinstance(m, Dropout) and m.training and m.p)
    blamed = next((f" ({name} is dropout in training mode)" for name in dropouts), "")
    raise ValueError(
        f"the forward pass draws random numbers{blamed}, so that the inputs of its layers cannot be computed again. "
        "Call model.eval() before"
    )


def _random_states(devices: list[torch.device]) -> list[Tensor]:
    """Return the states of the random generators of the CPU and these devices."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
