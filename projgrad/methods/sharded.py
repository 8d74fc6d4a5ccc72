"""Models whose parameters `fully_shard` (FSDP2) spreads over processes: what a step does with them.

In a forward pass the modules hold whole, plain parameters in the place of the shards that the optimizer holds. They are
always the same objects: these are followed. Autograd never meets the shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .._torch_private import reset_sharding
from ..recording.fixed import fixed_tensors
from ..tape.passes import Passes
from ..tape.processes import Processes
from ..tape.shards import Shards
from ..tape.spread import takes_one_pass
from ..tape.tape import Tape
from .closures import Closures
from .protocol import Closure
from .replicas import ReplicatedModel


class ShardedModel(ReplicatedModel):
    """A model of which every process holds shards, and the gradients of a step on it."""

    gathers_all = True  # whether all parameters were whole in the last step's passes over the retain samples

    def __init__(self, processes: Processes, model: nn.Module) -> None:
        super().__init__(processes, model)
        self._modules = sharding_modules(model)
        self._whole = whole_parameters(model, self._modules)

    @contextmanager
    def together(self) -> Iterator[None]:
        with super().together():
            for module in self._modules:  # a forward pass without a backward pass may have left whole parameters
                module.reshard()
            try:
                yield
            except BaseException:  # an interrupt by hand too
                for module in self._modules:
                    reset_sharding(module)
                for p in self._whole.values():
                    p.grad = None
                raise

    def begin(self, params: dict[str, nn.Parameter]) -> None:
        self.params, self.placement = params, Shards(self.processes, params)
        self.followed = {name: self._whole.get(name, p) for name, p in params.items()}

    def check_options(self, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None:
            raise ValueError("a gradient scaler is not supported with fully_shard: use bfloat16, which needs none")

    def check(self, states: Iterable[Mapping[str, object]]) -> None:
        """Do nothing: shards differ."""

    def tape(self) -> Tape:
        frozen = [p for name, p in self._whole.items() if name not in self.params]
        return Tape(self.followed, [*fixed_tensors(self.model, self.params.values()), *frozen], self.model)

    @contextmanager
    def reading(self, passes: Passes, losses: Tensor) -> Iterator[None]:
        """Make a context for backward passes over this process's samples, of one forward pass.

        Where every process runs one, parameters are gathered in it as in training. Else the number of passes may differ
        from one process to another: all parameters are gathered before, so that the passes exchange nothing.
        """
        alone = not len(losses)
        with self.processes.attempt():
            if alone and not losses.requires_grad:
                raise ValueError(
                    "with fully_shard a process without retain samples runs the model too, on an empty batch, and "
                    "returns its losses (0,) with their graph"
                )
            alone = alone or takes_one_pass(passes, losses, self._whole.values())
        self.gathers_all = not all(flag for (flag,) in self.processes.agree(alone))
        for module in self._modules if self.gathers_all else ():
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self._modules:
                module.set_reshard_after_backward(True, recurse=False)
                module.reshard()

    def check_made_inside(self, closures: Closures, losses: Tensor, retain: Closure, name: str = "retain") -> None:
        """Check it without calling the closure again, which one process cannot do alone."""
        closures.check_made_inside(losses, None, name)

    def visits(self, count: int) -> int:
        """Return the number of micro-batches of the process that has most: in their passes all exchange shards."""
        return max(theirs for (theirs,) in self.processes.agree(count))

    def read_nothing(self, losses: Tensor) -> None:
        """Run one backward pass of no losses: it ends the forward pass for `fully_shard`, which else waits for one."""
        torch.autograd.grad(losses, list(self.followed.values()), torch.zeros_like(losses), allow_unused=True)

    def backward(self, loss: Tensor, weight: float) -> None:
        """Add weight times the gradient of this process's loss to p.grad; of shards the mean over the processes."""
        for module in self._modules:  # else the gradients would stay where no optimizer sees them
            module.set_requires_gradient_sync(True, recurse=False)
        shards = [p for p in self.params.values() if isinstance(p, DTensor)]
        before = [p.grad for p in shards]
        for p in shards:
            p.grad = None
        torch.autograd.backward(loss, torch.full_like(loss, weight), inputs=list(self.followed.values()))
        used = [name for name, p in self.params.items() if p.grad is not None and isinstance(p, DTensor)]
        self.processes.same("which parameters forget() uses, and fully_shard mixes their gradients then", used)
        for p, grad in zip(shards, before, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else grad.add_(p.grad)

    def accumulate(self, loss: Tensor, weight: float) -> None:
        self.processes.agree()  # they exchange shards, and gradients of this micro-batch
        self.backward(loss, weight)

    def check_means(self, samples: int, micro_batches: int) -> None:
        """Check that all processes have equally many samples in a micro-batch, on average.

        Their gradients are in the same sums by now. Raises ValueError.
        """
        every = self.processes.agree(samples, micro_batches)
        for rank, (theirs, of) in enumerate(every):
            if theirs * every[0][1] != every[0][0] * of:
                raise ValueError(
                    "with fully_shard and one loss per sample all processes need equally many forget samples in a "
                    f"micro-batch, on average: process 0 has {every[0][0]} in {every[0][1]}, process {rank} has "
                    f'{theirs} in {of}. Return scalar losses, weighted, with forget_reduction="sum"'
                )

    def average(self) -> None:
        """Average the gradients of parameters that are no shards; `fully_shard` has averaged the others."""
        whole = {name: p for name, p in self.params.items() if not isinstance(p, DTensor)}
        for p in whole.values():
            if p.grad is not None:
                p.grad.div_(self.processes.size)
        self.sum_grads(whole)

    def clip(self, max_norm: float) -> float:
        names = [name for name, p in self.params.items() if p.grad is not None]
        scale = min(max_norm / (float(self.placement.norms(names).norm()) + 1e-6), 1.0)
        for name in names if scale < 1 else ():
            self.params[name].grad.mul_(scale)
        return scale


def sharding_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules to which `fully_shard` was applied, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def whole_parameters(model: nn.Module, modules: list[FSDPModule]) -> dict[str, nn.Parameter]:
    """Return the plain parameter that stands for every sharded one in a forward pass, by name.

    Raises ValueError where there is none: the parameter is sharded by something else.
    """
    sharded = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
    found: dict[str, nn.Parameter] = {}
    for module in modules:
        module.unshard()
        for name, p in model.named_parameters():
            if name in sharded and not isinstance(p, DTensor):
                found[name] = p
        module.reshard()
    missing = sorted(sharded - found.keys())
    if missing:
        raise ValueError(
            f"{missing[0]} stays a DTensor in the forward pass: tensor parallelism is not supported, only "
            "DistributedDataParallel and fully_shard (FSDP2)"
        )
    return found
