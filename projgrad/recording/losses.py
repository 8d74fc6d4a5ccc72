"""What losses of n samples, and what comes with them, must be like."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_losses(losses: Tensor) -> None:
    check_shape(losses)
    check_values(losses.tolist())


def check_shape(losses: Tensor) -> None:
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        got = _reshaped(losses) if isinstance(losses, Tensor) else instead(losses, "losses")
        raise ValueError(f"one loss per sample is needed, shape (n,); got {got}")
    if not len(losses):
        raise ValueError("there are no losses: without samples there is nothing to be orthogonal to")
    if losses.is_complex():
        raise ValueError(f"losses must be real; got {losses.dtype}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("per-sample gradients need a graph: call the tape outside torch.inference_mode()")
    if not losses.requires_grad:
        raise ValueError("the losses do not depend on any parameter that the tape follows")


def check_values(losses: list[float]) -> list[float]:
    bad = [j for j, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise FloatingPointError(f"NaN or Inf in the losses of samples {bad[:8]}; nothing was changed")
    return losses


def check_weights(name: str, weights: Tensor | None, losses: Tensor) -> None:
    """Check that there is one weight per loss, or None."""
    if weights is not None and not (isinstance(weights, Tensor) and weights.shape == losses.shape):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"{name} must be a tensor (n,) = {tuple(losses.shape)}, one per loss; got {got}")


def named(direction: Mapping[str, Tensor] | Sequence[Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a direction by name, one tensor like each parameter; without names they come in order."""
    if not isinstance(direction, Mapping):
        if len(direction) != len(parameters):
            raise ValueError(
                f"direction must have one tensor for each of the {len(parameters)} parameters; got {len(direction)}"
            )
        direction = dict(zip(parameters, direction, strict=True))
    for name, u in direction.items():
        if name not in parameters:
            raise ValueError(f"direction has {name!r}, which the tape does not follow")
        if u.shape != parameters[name].shape:
            shape = tuple(parameters[name].shape)
            raise ValueError(f"direction[{name!r}] must be {shape} like the parameter; got {tuple(u.shape)}")
    return dict(direction)


def instead(value: object, wanted: str) -> str:
    """Name what is no tensor, and say what to return in its place: a "loss", or "losses" of samples."""
    if hasattr(value, "logits") or (isinstance(value, Mapping) and "logits" in value):
        take = "take its `.loss`, or a cross entropy of its `.logits`"
        if wanted == "losses":
            take = "take its `.logits`, and of them one cross entropy per sample (its `.loss` is a mean over the batch)"
    elif isinstance(value, (int, float)):
        take = "return the tensor itself; .item() and float() cut it off from the parameters"
    elif value is None:
        take = "does the closure return anything?"
    else:
        take = f"return the tensor of the {wanted} alone"
    return f"{type(value).__name__}: {take}"


def _reshaped(losses: Tensor) -> str:
    """Name the shape that losses have, and say how they get one dimension, that of the samples."""
    shape = tuple(losses.shape)
    if not shape:
        return f"{shape}: use reduction='none'"
    if losses.ndim == 2 and shape[1] == 1:
        return f"{shape}: use losses.squeeze(1)"
    mean = "losses.mean(1)" if losses.ndim == 2 else "losses.flatten(1).mean(1)"
    return f"{shape}: make one number of each sample, such as {mean}, with the samples along dimension 0"
