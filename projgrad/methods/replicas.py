"""Models of which every process holds a copy: what a step over several processes does with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from ..recording.fixed import fixed_tensors
from ..tape.passes import Passes
from ..tape.placement import Replicas
from ..tape.processes import Processes
from ..tape.project import check_gradients
from ..tape.tape import Tape
from .closures import Closures
from .common import clip_
from .forget_mask import Seen
from .protocol import Closure


class ReplicatedModel:
    """A model that every process holds whole, and the gradients of a step on it."""

    def __init__(self, processes: Processes, model: nn.Module) -> None:
        self.processes, self.model = processes, model
        self.met = False  # whether all processes were found to begin with the same weights
        self.mask: Seen = {}  # the one that they were last found to have alike

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make the context of one step: an error in it stops all processes."""
        with self.processes.together():
            yield

    def begin(self, params: dict[str, nn.Parameter]) -> None:
        """Take what a step updates, by name."""
        self.params, self.placement = params, Replicas(self.processes, params)
        self.followed = params  # what stands for them in a forward pass

    def check_options(self, scaler: torch.amp.GradScaler | None) -> None:
        """Check that a gradient scaler can be used; raises ValueError."""

    def check(self, states: Iterable[Mapping[str, object]]) -> None:
        """Check that all processes begin with the same weights, and states of the parameters; raises ValueError."""
        self.processes.same("the weights of the model", [_sum(p) for p in self.params.values()])
        sums = [sorted((key, _sum(t)) for key, t in state.items() if isinstance(t, Tensor)) for state in states]
        self.processes.same("the state of the optimizer", sums)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Make a context in which closures run the model, and no wrapper exchanges anything."""
        ids = set(map(id, self.params.values()))
        silenced: list[tuple[nn.Module, bool, bool]] = []

        def silence(module: nn.Module, _) -> None:
            if isinstance(module, DistributedDataParallel) and not ids.isdisjoint(map(id, module.parameters())):
                if module.static_graph or module.mixed_precision is not None:
                    raise ValueError(
                        "DistributedDataParallel with static_graph=True or mixed_precision is not supported: it "
                        "exchanges gradients behind the step's back. Build it without"
                    )
                silenced.append((module, module.require_backward_grad_sync, module.require_forward_param_sync))
                module.require_backward_grad_sync = module.require_forward_param_sync = False

        hook = register_module_forward_pre_hook(silence)
        try:
            yield
        finally:
            hook.remove()
            for module, backward, forward in reversed(silenced):
                module.require_backward_grad_sync, module.require_forward_param_sync = backward, forward

    def tape(self) -> Tape:
        """Return a tape for this process's samples."""
        return Tape(self.params, fixed_tensors(self.model, self.params.values()), self.model)

    def reading(self, passes: Passes, losses: Tensor) -> AbstractContextManager[None]:
        """Make a context for backward passes over this process's samples; losses: of them, perhaps (0,)."""
        return nullcontext()

    def check_made_inside(self, closures: Closures, losses: Tensor, retain: Closure, name: str = "retain") -> None:
        """Check that a closure made its forward pass itself; see `Closures`."""
        with self.running():
            closures.check_made_inside(losses, retain, name)

    def visits(self, count: int) -> int:
        """Return how many micro-batches this process goes through, of which it has `count`."""
        return count

    def read_nothing(self, losses: Tensor) -> None:
        """Do what a process without samples has to do in the place of backward passes; losses (0,)."""

    def backward(self, loss: Tensor, weight: float) -> None:
        """Add weight times the gradient of this process's loss to every p.grad, over the number of processes."""
        weights = torch.full_like(loss, weight / self.processes.size)
        torch.autograd.backward(loss, weights, inputs=list(self.params.values()))
        check_gradients(self.params)

    def accumulate(self, loss: Tensor, weight: float) -> None:
        """Add weight times the gradient of the loss of one of this process's micro-batches to every p.grad."""
        self.backward(loss, weight)

    def check_means(self, samples: int, micro_batches: int) -> None:
        """Check that p.grad can be made a mean over this process's samples; raises ValueError."""

    def average(self) -> None:
        """Replace every p.grad by the mean over the processes, once all of them have come so far."""
        self.sum_grads(self.params)

    def sum_grads(self, params: Mapping[str, nn.Parameter]) -> None:
        """Replace p.grad by the sum over the processes, where one of them has it."""
        every = self.processes.agree(*(p.grad is not None for p in params.values()))
        for p, *some in zip(params.values(), *every, strict=True):
            if any(some) and p.grad is None:
                p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
        self.processes.sum_all_([p.grad for p in params.values() if p.grad is not None], "forget gradient")

    def clip(self, max_norm: float) -> Tensor | float:
        """Scale all p.grad so that their norm is at most `max_norm`; return by what they were multiplied."""
        return clip_(list(self.params.values()), max_norm)


def wrappers(model: nn.Module) -> Iterable[tuple[str, DistributedDataParallel]]:
    """Yield every DistributedDataParallel in a model, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            yield name or "the model", module


def _sum(t: Tensor) -> int:
    """Return the sum of the bytes of a tensor."""
    return int(t.detach().contiguous().flatten().view(torch.uint8).sum(dtype=torch.int64))
