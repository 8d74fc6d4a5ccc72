"""Plans: what a step takes in every way, the largest n that fits, and both in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .steps import Cost, costs
from .subjects import Unknown, subject_of

WAYS = {
    "plain": "plain step",
    "global": "OrthoGrad, global",
    "per_tensor": "OrthoGrad, per tensor",
    "metric": "OrthoGrad, orthogonal after the optimizer",
    "explicit_qr": "all per-sample gradients with QR, as published",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CARDS = {"GPU with 16 GB": 16, "GPU with 24 GB": 24, "A100-40": 40, "GPU with 48 GB": 48, "H100-80": 80, "H200": 141}
MOST = 1 << 20  # samples
SPARE = 0.92  # of a card's GB that a program can have


def make_plan(
    config: str,
    n: int,
    tokens: int = 512,
    dtype: str = "float32",
    optimizer: str = "sgd",
    device: str = "cpu",
    lora: int = 0,
    loss: str = "chunked",
    memory: float | None = None,
    notify: Callable[[str], object] = lambda what: None,
) -> dict[str, Any]:
    """Return what a step with n forget and n retain samples takes, for every way; nothing is allocated.

    Args:
        config, tokens, lora, loss: see `subject_of`.
        dtype: of the weights, one of `DTYPES`. optimizer: one of `steps.OPTIMIZERS`. device: "cpu" or "cuda".
        memory: GB that there are: the result then has the largest n that fits, by way.
        notify: called with what is being looked at.

    Returns:
        By way `peak_bytes`, `first_step_bytes` and `flops`, as in `Cost`; "about": what was given, and the parameters.
    """
    subject, runs = subject_of(config, tokens, lora, loss), {}

    def look(ways: Iterable[str], n: int) -> dict[str, Cost]:
        try:
            tell = lambda way: notify(f"{WAYS[way]}, n = {n}")  # noqa: E731
            return costs(subject, ways, n, DTYPES[dtype], optimizer, device, tell, runs)
        except Unknown:
            raise
        except Exception as error:
            kind = type(error).__name__
            raise Unknown(f"{subject.title} cannot be run without its weights: {kind}: {error}") from error

    plan: dict[str, Any] = {way: found._asdict() for way, found in look(WAYS, n).items()}
    about = {"config": config, "title": subject.title, "n": n, "tokens": tokens, "dtype": dtype, "optimizer": optimizer}
    plan["about"] = about | {"device": device, "lora": lora, "loss": loss}
    if memory is not None:
        plan["about"]["memory_gb"] = memory
        for way in WAYS:
            plan[way]["largest_n"] = largest(lambda k, way=way: max(look([way], k)[way][:2]), n, memory * 1e9)
    return plan


def largest(peak: Callable[[int], int], n: int, limit: float) -> int:
    """Return the largest number of samples whose peak is within a limit, 0 if one is too many.

    The peak grows nearly linearly: a line through what is known says where to look, and halves where it does not help.
    """
    known: dict[int, int] = {}
    low, high, k = 0, MOST, max(1, min(n, MOST))  # low fits, and high is taken not to
    while True:
        width, known[k] = high - low, peak(k)
        low, high = (k, high) if known[k] <= limit else (low, k)
        if high - low <= 1:
            return low
        ends = sorted(known, key=lambda j: abs(known[j] - limit))[:2]
        slope = (known[ends[1]] - known[ends[0]]) / (ends[1] - ends[0]) if len(ends) == 2 else 0.0
        if slope > 0 and (high == MOST or high - low <= width / 2 or len(known) < 4):
            k = ends[0] + math.floor((limit - known[ends[0]]) / slope)
        else:
            k = 2 * k if high == MOST else (low + high) // 2
        k = min(max(k, low + 1), high - 1)


def sentence(plan: dict[str, Any]) -> str:
    """Return the plan in a plain sentence."""
    about, ours = plan["about"], plan["global"]
    need = max(ours["peak_bytes"], ours["first_step_bytes"]) / 1e9
    what = [f"{about['title'].split(', ')[0]}, n = {about['n']}", f"{about['tokens']} tokens", about["dtype"]]
    what += [about["optimizer"], *([f"LoRA rank {about['lora']}"] if about["lora"] else [])]
    fits = next((name for name, size in CARDS.items() if need <= SPARE * size), None)
    room = f", fits {'an ' if fits and fits[0] in 'AH' else 'a '}{fits}" if fits else ", more than one GPU has"
    room = room if about["device"] == "cuda" else ""
    if ours.get("largest_n") == 0:
        room += f", more than {about['memory_gb']:g} GB even for one sample"
    return (
        f"{', '.join(what)}: {need:.3g} GB{room}; the plain step needs {plan['plain']['peak_bytes'] / 1e9:.3g}, "
        f"explicit QR would need {plan['explicit_qr']['peak_bytes'] / 1e9:.3g}."
    )


def rows(plan: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    """Yield the cells of the table, of one way each."""
    plain = plan["plain"]
    for way, title in WAYS.items():
        one = plan[way]
        cells = [title, f"{one['peak_bytes'] / 1e9:.3g}", f"{one['first_step_bytes'] / 1e9:.3g}"]
        cells += [f"{one['peak_bytes'] / plain['peak_bytes']:.2f} x", f"{one['flops'] / 1e12:.3g}"]
        cells.append(f"{one['flops'] / plain['flops']:.2f} x" if plain["flops"] else "")
        yield (*cells, *([str(one["largest_n"])] if "largest_n" in one else []))
