"""A step of OrthoGrad that several processes take together, each with some of the samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..recording.fixed import modules_of
from ..recording.losses import check_shape
from ..tape.processes import Processes
from ..tape.project import check_gradients
from ..tape.spread import SpreadGradients, kept_rules, project_spread_
from ..tape.spread_weighted import hold_spread
from .closures import Closures
from .common import distributed, is_sharded, learning_rates, loss_value, restore_shards, scalar_loss
from .forget_mask import digest, is_seen, seen
from .micro_batches import MicroBatchOptions, accumulate_forget
from .optimizer_metric import MetricStep
from .protocol import Closure, SteppingOptimizer
from .replicas import ReplicatedModel, wrappers
from .union import project_union, union_metric_step

PLAIN = (bool, int, float, str, tuple, type(None))  # settings of an optimizer that are compared


class StepOptions(Protocol):
    """What of an `OrthoGrad` a step depends on; see there."""

    optimizer: SteppingOptimizer
    alpha: float
    scope: str
    sign: float
    damping: float
    rtol: float | None
    max_norm: float | None
    scaler: torch.amp.GradScaler | None
    projector: Callable[[Tensor, Tensor], Tensor] | None
    keep_output_gradients: bool
    metric: str
    mask: Mapping[str, Tensor] | None
    checked_mask: Mapping[str, Tensor] | None
    micro: MicroBatchOptions


def spread_model(model: nn.Module, group: dist.ProcessGroup | None = None) -> ReplicatedModel | None:
    """Return how a model is spread over processes, None if it is in one alone.

    group: given by the caller; else that of the model's wrapper or its shards.
    Raises ValueError where parts of the model are spread in different ways, and for tensor parallelism.
    """
    if not distributed():
        if group is not None:
            raise ValueError("process_group was given, but torch.distributed is not initialised")
        if any(isinstance(module, DistributedDataParallel) for module in modules_of(model)):
            raise ValueError(
                "the model is in DistributedDataParallel, but torch.distributed is not initialised any more"
            )
        return None
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError("this process is not among those of process_group")
    sharded, device = restore_shards(model), next(model.parameters()).device
    meshes = {p.device_mesh for p in model.parameters() if is_sharded(p)}
    groups = [wrapper.process_group for _, wrapper in wrappers(model)] + [_group_of(mesh) for mesh in meshes]
    groups = groups if group is None else [group, *groups]
    if len({tuple(dist.get_process_group_ranks(one)) for one in groups}) > 1:
        raise ValueError("parts of the model are spread over other processes than others, or than process_group has")
    group = next(iter(groups), None)
    if sharded or meshes:
        from .sharded import ShardedModel

        return ShardedModel(Processes(group, device), model)
    if group is None or dist.get_world_size(group) < 2:
        return None
    return ReplicatedModel(Processes(group, device), model)


def _group_of(mesh: dist.DeviceMesh) -> dist.ProcessGroup:
    """Return all processes of a mesh as one group."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    raise ValueError("a mesh of several dimensions must have all processes, or the samples have no common group")


def spread_step(
    options: StepOptions,
    spread: ReplicatedModel,
    closures: Closures,
    forgets: Mapping[str, Closure],
    retains: Mapping[str, Closure],
) -> dict[str, Any]:
    """Set every p.grad to ± (1 - α) u_perp + α mean_j(g_j), on all processes; return the fields of the record.

    u is the mean of the processes' forget gradients, j goes over the samples of all of them. With metric="optimizer"
    one field is the `MetricStep` to finish.
    """
    processes, scaler = spread.processes, options.scaler
    spread.begin(closures.params)
    _check_alike(options, spread)
    several_forgets, several_retains = (
        max(some) > 1 for some in zip(*processes.agree(len(forgets), len(retains)), strict=True)
    )
    weight, scale = options.sign * (1 - options.alpha), (lambda loss: loss) if scaler is None else scaler.scale
    if several_forgets:
        with processes.attempt(), spread.running():
            loss = accumulate_forget(closures, forgets, weight, options.micro.forget_reduction, scale, spread)
            check_gradients(closures.params)
            loss = loss_value(loss)
    else:
        (forget,) = forgets.values()
        with processes.attempt(), closures.watch("forget"), spread.running():
            loss = scalar_loss(forget)
        processes.agree()
        with processes.attempt():
            spread.backward(scale(loss), weight)
            loss = loss_value(loss)
    spread.average()
    if several_retains:
        return _union_step(options, spread, closures, retains, loss)
    (retain,) = retains.values()
    n, tape = 0, spread.tape()
    with processes.attempt():
        with closures.watch("retain"), spread.running(), tape:
            losses = retain()
        n = _check_losses(losses, closures)
        if n and not tape.recording.sites:
            spread.check_made_inside(closures, losses, retain)
    counts = [count for (count,) in processes.agree(n)]
    _check_counts(counts)
    if all(p.grad is None for p in closures.params.values()):
        raise ValueError("forget() returned a loss that depends on no parameter that the optimizer holds")
    share, local, total = 1.0, None, sum(counts)
    if scaler is not None:  # as small as in their mean, which is what its scale has been found for
        share = 2.0 ** -math.ceil(math.log2(total))
    with spread.reading(tape.passes, losses), processes.attempt():
        value = float(losses.detach().double().sum()) if n else 0.0
        if n:
            local = kept_rules(tape.passes, scale(losses) * share if scaler else losses)
        else:
            spread.read_nothing(losses)
    processes.agree()
    rates = learning_rates(options.optimizer, closures.params)
    access = SpreadGradients(processes, spread.placement, closures.params, spread.followed, local, counts)
    add = torch.full((total,), options.alpha / total / share, dtype=torch.float64, device=processes.device)
    if options.metric == "optimizer":
        hold = functools.partial(hold_spread, access, options.scope, add)
        given = spread.clip, spread.placement.norms, processes.same
        mask = _laid_out(options.checked_mask, spread)
        fields = {"metric_step": MetricStep(options.optimizer, closures.params, hold, *given, mask=mask)}
    else:
        projection = project_spread_(access, options.scope, options.damping, options.rtol, add, rates)
        fields = {name: value for name, value in vars(projection).items() if name != "squares"}
    sums = torch.tensor([loss / processes.size, value / total], dtype=torch.float64, device=processes.device)
    forget_loss, retain_loss = processes.sum_(sums, "agreements").tolist()
    return fields | {"forget_loss": forget_loss, "retain_loss": retain_loss}


def _union_step(
    options: StepOptions,
    spread: ReplicatedModel,
    closures: Closures,
    retains: Mapping[str, Closure],
    loss: float,
) -> dict[str, Any]:
    """Do the same for the union of the micro-batches of all processes, once u is in every p.grad."""
    if options.damping or options.rtol is not None:
        raise ValueError("a retain set in micro-batches is solved without damping and rtol: leave them out")
    if all(p.grad is None for p in closures.params.values()):
        raise ValueError("forget() returned a loss that depends on no parameter that the optimizer holds")
    processes, scaler = spread.processes, options.scaler
    share = 1 / 16 if scaler else 1.0  # as small as in a mean, which is what its scale has been found for
    given = spread.model, closures, retains, options.micro
    common = {"scope": options.scope, "alpha": options.alpha / share, "spread": spread}
    if options.metric == "optimizer":
        factor = scaler.get_scale() * share if scaler else 1.0  # the same after the optimizer's step
        mask = _laid_out(options.checked_mask, spread)
        fields = union_metric_step(*given, **common, prepare=lambda losses: losses * factor, mask=mask)
    else:
        rates = learning_rates(options.optimizer, closures.params)
        prepare = lambda losses: scaler.scale(losses) * share if scaler else losses  # noqa: E731
        fields = project_union(*given, **common, rates=rates, prepare=prepare)
    mean = torch.tensor([loss / processes.size], dtype=torch.float64, device=processes.device)
    return fields | {"forget_loss": float(processes.sum_(mean, "agreements"))}


def _laid_out(mask: Mapping[str, Tensor] | None, spread: ReplicatedModel) -> dict[str, Tensor] | None:
    """Return a mask that every process holds whole, lying as the parameters do."""
    if mask is None:
        return None
    place = spread.placement
    return {name: place.laid_out(name, place.part(name, m)) for name, m in mask.items()}


def _check_alike(options: StepOptions, spread: ReplicatedModel) -> None:
    """Check that all processes take the same step on the same model; weights at the first step alone, a mask if it is
    another one than before."""
    processes = spread.processes
    if options.projector is not None or not options.keep_output_gradients:
        raise ValueError(
            "over several processes keep_output_gradients=False and a projector of yours are not supported: the "
            "projection is made of the rules of one backward pass on every process"
        )
    spread.check_options(options.scaler)
    described = [(name, tuple(p.shape), str(p.dtype)) for name, p in spread.params.items()]
    processes.same("the parameters of the model that the optimizer holds", described)
    numbers = [getattr(options, name) for name in ("alpha", "scope", "sign", "damping", "rtol", "max_norm", "metric")]
    numbers += [options.micro.tolerance, options.micro.max_passes, options.micro.forget_reduction]
    # The optimizer's settings too; a number on the device is not waited for.
    numbers.append(type(options.optimizer).__name__)
    for group in options.optimizer.param_groups:
        numbers.append(sorted((key, value) for key, value in group.items() if isinstance(value, PLAIN)))
    is_known = is_seen(options.mask or {}, spread.mask)
    numbers.append(is_known)
    processes.same("the options of the step or the learning rates", numbers)
    if not is_known:
        processes.same("the mask", digest(options.checked_mask or {}))
        spread.mask = seen(options.mask or {})
    if not spread.met:
        state = options.optimizer.state if options.metric == "optimizer" else {}  # of which the metric is made
        spread.check([state.get(p, {}) for p in spread.params.values()])
        spread.met = True


def _check_losses(losses: object, closures: Closures) -> int:
    """Return the number of this process's retain samples, which may be none."""
    if isinstance(losses, Tensor) and losses.shape == (0,):
        return 0
    check_shape(losses)
    changed = sorted({name for names in closures.changed.values() for name in names})
    if changed:
        raise ValueError(
            f"a closure changed {changed[0]} in place: every process would go on with other weights. Change weights "
            "between steps, on all processes alike"
        )
    return len(losses)


def _check_counts(counts: list[int]) -> None:
    if not sum(counts):
        raise ValueError("no process has a retain sample: there is nothing to be orthogonal to")
