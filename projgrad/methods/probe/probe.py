"""A look at a model and its data before anything is unlearned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from ... import _options
from ..protocol import Closure, SteppingOptimizer
from .report import Probe
from .subject import Subject
from .unchanged import Unchanged


def probe(
    model: nn.Module,
    forget: Closure,
    retain: Callable[[int], Tensor],
    *,
    sizes: Iterable[int] = (4, 8, 16, 32, 64),
    scopes: Iterable[str] = ("global", "per_tensor"),
    alpha: float = 0.5,
    ascend: bool = True,
    optimizer: SteppingOptimizer | None = None,
    tolerance: float = 0.1,
    rounds: int = 3,
) -> Probe:
    """Measure what steps of `OrthoGrad` would be like on a model and its data, before one is taken. Nothing changes.

    For every number n of retain samples and every scope: how much of the forget gradient the projection leaves, what it
    does to retain samples that are not among the n, up to which learning rate its promise holds, and what a step costs
    beside the same step without projection. And one sentence of advice.

    **The learning rate.** A projected step changes no protected loss to first order. To second order it changes loss j
    by η² uᵀ H_j u / 2 (here u = u_perp, H_j the Hessian), while the forget loss gains η ‖u_perp‖². `learning_rate` is
    where the one reaches a share of the other,

        mean_j |ℓ_j(θ + s η u_perp) - ℓ_j(θ)| = tolerance · η ‖u_perp‖²,    learning_rate = η / (1 - alpha)

    with s = 1, or -1 for ascend=False. Below it retain losses change by less than `tolerance` of that first-order gain,
    on average and in one step; a rate half as large halves that share. Where the forget loss itself gains only half of
    η ‖u_perp‖² at a smaller η, that η is taken, and `why` says "forgetting fades". Both are measured, with all higher
    orders, by forward passes at moved weights, about three to ten of each. α's part of the update lowers retain losses
    on purpose and is left out, but the same rate multiplies it. Rates are those of SGD without momentum; with clipping,
    and for other optimizers, look at `step_length`.

    Args:
        model: as for `OrthoGrad`.
        forget: returns the scalar forget loss, as for `OrthoGrad.step`.
        retain: a function of n that returns the losses (n,) of the first n retain samples, always of the same ones in
            the same order: `lambda n: cross_entropy(model(x[:n]), y[:n], reduction="none")`. Where it returns fewer,
            these are all that there are. Samples that step n does not protect are those of the largest n behind it.
        sizes: numbers of retain samples.
        scopes, alpha, ascend: of `OrthoGrad`; alpha in [0, 1).
        optimizer: limits the probe to the parameters that it holds, and weighs them by the learning rates of its groups
            where these differ: the rates found are then of the group with the largest. It takes no step.
        tolerance: in (0, 1], see above.
        rounds: of measuring time, each one step by scope and one without projection.

    Returns:
        A `Probe`: print it, or take its `rows`, `advice` and `to_dict()`.

    The closures are called often, each time from the same random state (torch, `random`, numpy's global one).
    Afterwards, also after an error or Ctrl-C, the model is what it was, bit for bit: parameters, buffers, `.grad`,
    modes, random states. The optimizer was not touched. Copies of the trained parameters and of all buffers lie in host
    memory meanwhile. What closures change elsewhere stays changed; of frozen parameters a warning says so, where it is
    noticed. A row takes about as long as ten of its steps.

    Raises as `OrthoGrad` and its `step`; TypeError for a retain that does not take n; ValueError for one that returns
    more than n losses.

    Example:
        >>> model, loss = torch.nn.Linear(8, 3), torch.nn.functional.cross_entropy
        >>> x, y = torch.randn(40, 8), torch.arange(40) % 3
        >>> probed = projgrad.probe(
        ...     model,
        ...     forget=lambda: loss(model(x[:8]), y[:8]),
        ...     retain=lambda n: loss(model(x[8:][:n]), y[8:][:n], reduction="none"),
        ...     sizes=(4, 16),
        ... )
        >>> [(row.samples, row.rank) for row in probed.rows if row.scope == "global"]
        [(4, 4), (16, 16)]
    """
    if not isinstance(sizes, Iterable) or isinstance(sizes, str):
        raise TypeError(f"sizes must be several numbers of retain samples, such as (4, 16); got {_options.kind(sizes)}")
    sizes = sorted({_options.check_integer("sizes, numbers of retain samples, each", n, 1) for n in sizes})
    scopes = list(dict.fromkeys([scopes] if isinstance(scopes, str) else scopes))
    for scope in scopes:
        _options.check_choice("scopes, each", scope, ("global", "per_tensor"))
    if not sizes or not scopes:
        raise ValueError("sizes and scopes need at least one entry each")
    alpha = _options.within("alpha weighs the mean retain gradient and", alpha, "[0, 1)")
    tolerance = _options.within("tolerance, a share of what the forget loss gains,", tolerance, "(0, 1]")
    _options.check_flag("ascend", ascend)
    _options.check_integer("rounds", rounds, 1)
    if not callable(forget) or isinstance(forget, nn.Module):
        raise TypeError(f"forget must be a function without arguments that returns a loss; got {_options.kind(forget)}")
    _check_retain(retain)
    subject = Subject(model, forget, retain, alpha, ascend, optimizer)
    with Unchanged(model, subject.params) as unchanged:
        return subject.probe(unchanged, sizes, scopes, tolerance, rounds)


def _check_retain(retain: object) -> None:
    if not callable(retain) or isinstance(retain, nn.Module):
        got = _options.kind(retain)
    else:
        try:
            inspect.signature(retain).bind(1)
            return
        except ValueError:  # it has no signature
            return
        except TypeError:
            got = "a function that does not take one argument"
    raise TypeError(
        "retain must be a function of n that returns the losses of the first n retain samples, such as "
        f'`lambda n: cross_entropy(model(x[:n]), y[:n], reduction="none")`; got {got}'
    )
