"""The projection of p.grad on the complement of the per-sample gradients of all processes of a group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .._torch_private import storage_id
from ..recording.graph import coarser
from ..recording.host_reads import HostReads
from ..recording.losses import check_shape, check_values
from .check import Checks, Measured, Outcome, Precision
from .consumers import part
from .crossing import Crossing
from .factors import ForgetFactors
from .gradient_access import FACTORS, Block, GradientAccess, KeptGradients, coarsest_factor
from .grouping import Group, grouped
from .passes import Passes
from .placement import Replicas
from .processes import Processes
from .project import check_squares, go_through, relative_rates
from .records import Projection
from .systems import Solver
from .verify import next_watched, verify


def kept_rules(passes: Passes, losses: Tensor) -> KeptGradients:
    """Return the rules of this process's samples, from one backward pass that frees the graph; see `Tape.project_`."""
    check_shape(losses)
    passes.recording.host_reads.defer(losses, check_values)
    with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
        passes.structure(losses)
        verify(passes, losses)
        return KeptGradients(passes, losses, {}, ForgetFactors(), next_watched(passes, losses))


def takes_one_pass(passes: Passes, losses: Tensor, weights: Iterable[Tensor]) -> bool:
    """Return whether `kept_rules` will run one backward pass and read no weight outside of it.

    The graph was met before, and nothing is left to be found or compared.
    """
    passes.recording.host_reads.flush()  # which rows of tables were read
    structure, sites, held = passes.known(losses), passes.recording.sites, {storage_id(w) for w in weights}
    if structure is None or structure.anchors != [] or structure.loops or not structure.compared.rules:
        return False
    sources = [source for site in sites for source in site.sources]
    if not all(len(s.names) == 1 and (s.whole or s.window or s.rows is not None) for s in sources):
        return False  # a weight is computed from others: its gradient is mapped back to them
    if any(site.saved.unpacks for site in sites):
        return False
    return not any(storage_id(t) in held for site in sites for t in site.saved.tensors)


class SpreadGradients(GradientAccess):
    """Products with the per-sample gradients of all processes, and the correction of p.grad on each of them.

    parameters: what p.grad belongs to, by name. followed: what stands for them in a forward pass.
    local: the rules of this process's samples, None where it has none. counts: samples of every process.
    """

    def __init__(
        self,
        processes: Processes,
        placement: Replicas,
        parameters: Mapping[str, Tensor],
        followed: Mapping[str, Tensor],
        local: KeptGradients | None,
        counts: Sequence[int],
    ) -> None:
        self.processes, self.placement, self.parameters = processes, placement, parameters
        self.local, self.rates, self.factors = local, {}, ForgetFactors()
        self._uses = [] if local is None else local.uses
        self.crossing = Crossing(processes, list(parameters), followed, self._uses, counts)
        used = self.crossing.used
        own = (coarsest_factor(use for use in self._uses if use.name == name) for name in used)
        every = processes.agree(*map(FACTORS.index, own))
        self._factors = {name: FACTORS[max(some)] for name, *some in zip(used, *every, strict=True)}
        zero = torch.zeros(self.crossing.total, dtype=torch.float64, device=processes.device)
        self._row_squares, self._summed = zero, set()

    def blocks(self, per_tensor: bool) -> list[Block]:
        """Return the blocks to project: every tensor that some losses use, or all parameters in one."""
        if not per_tensor:
            return [Block("", self.parameters, factors=coarser(FACTORS[0], *self._factors.values()))]
        return [Block(name, {name: self.parameters[name]}, factors=factors) for name, factors in self._factors.items()]

    def norms(self, blocks: Iterable[Block]) -> dict[str, Tensor]:
        names = {block.name: list(block.grads()) for block in blocks}
        every = [name for some in names.values() for name in some]
        if not every:
            return {}
        return dict(zip(names, self.placement.norms(every).split([len(some) for some in names.values()]), strict=True))

    def agreed(self, *numbers: Tensor) -> list[Tensor]:
        return self.processes.of_first(*numbers)

    def products(self, blocks: Sequence[Block], float64: bool) -> tuple[Tensor, Tensor]:
        K, v = self.products_with(_grads(blocks), _places(blocks), len(blocks), float64)
        new = [k for k, block in enumerate(blocks) if block.name not in self._summed]
        self._summed.update(block.name for block in blocks)
        if new:
            self._row_squares = self._row_squares + K[new].diagonal(dim1=1, dim2=2).sum(0)
        return K, v

    def row_lengths(self, blocks: Sequence[Block]) -> Tensor:
        """Return ‖g_j‖ [l, n] of the samples of all processes."""
        places = _places(blocks)
        squares = torch.zeros(len(blocks), self.crossing.total, dtype=torch.float64, device=self.processes.device)
        with self.processes.attempt():
            for group in self._groups(self.used(places)):
                K, _ = group.gram([None] * len(group), group[0].rule.cheap)
                for use, one in zip(group, K, strict=True):
                    squares[places[use.name], self.crossing.own] += one.diagonal()
        self.processes.agree()
        self._row_squares = self._row_squares + self.processes.sum_(squares, "agreements").sum(0)
        return squares.clamp_min(0).sqrt()

    def dot(self, blocks: Sequence[Block], float64: bool) -> Tensor:
        return self.dot_with(_grads(blocks), _places(blocks), len(blocks), float64)

    def products_with(
        self,
        us: Mapping[str, Tensor | None],
        places: Mapping[str, int],
        count: int,
        float64: bool,
        diagonal: Callable[[str], Tensor | float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return K = G Gᵀ [count, n, n], or G D Gᵀ, see `Crossing.gram`, and v = G u [count, n]; see `dot_with`."""
        self.processes.agree()
        K = self.crossing.gram(places, self.rates, count, float64, diagonal)
        v = self._dot(us, places, count, float64)
        self.processes.agree()
        flat = self.processes.sum_(torch.cat([K.flatten(), v.flatten()]), "K")
        return flat[: K.numel()].view(K.shape), flat[K.numel() :].view(v.shape)

    def dot_with(self, us: Mapping[str, Tensor | None], places: Mapping[str, int], count: int, float64: bool) -> Tensor:
        """Return v = G u [count, n].

        us: u of every parameter, lying as it does, None for zero. places: row of v to which a parameter adds.
        """
        self.processes.agree()
        v = self._dot(us, places, count, float64)
        self.processes.agree()
        return self.processes.sum_(v, "K")

    def _dot(self, us: Mapping[str, Tensor | None], places: Mapping[str, int], count: int, float64: bool) -> Tensor:
        """Return v [count, n] of this process's samples, zero for those of others; an error is put off."""
        v = torch.zeros(count, self.crossing.total, dtype=torch.float64, device=self.processes.device)
        for names in self.placement.rounds(self.used(places)):
            some = self.placement.whole({name: us[name] for name in names}, "forget gradient")
            with self.processes.attempt():
                for group in self._groups(names):
                    parts = [None if some[use.name] is None else part(use.source, some[use.name]) for use in group]
                    for use, one in zip(group, group.dot(parts, float64 or group[0].rule.cheap), strict=True):
                        v[places[use.name], self.crossing.own] += self.rate(use.name) * one
        return v

    def used(self, names: Collection[str]) -> list[str]:
        """Return those of some parameters that a process uses, in the same order everywhere."""
        return [name for name in self.crossing.used if name in names]

    def _groups(self, names: Sequence[str]) -> list[Group]:
        some = set(names)
        return grouped([use for use in self._uses if use.name in some])

    def combine_(self, sums: Mapping[str, Tensor], w: Tensor, places: Mapping[str, int], float64: bool) -> None:
        """Add Gᵀ w of this process's samples to whole tensors, w [l, n]; places: the row of w of every parameter."""
        rows = w[:, self.crossing.own].contiguous().unbind()
        for group in self._groups(list(sums)):
            c = torch.stack([rows[places[use.name]] for use in group])
            group.combine_([sums[use.name] for use in group], c, float64)

    def apply(self, blocks: Sequence[Block], w: Tensor, max_abs: float, float64: bool = False) -> list[Outcome]:
        self.processes.agree()
        places = _places(blocks)
        for names in self.placement.rounds(self.used(places)):
            with self.processes.attempt():
                sums = self.placement.sums(names)
                self.combine_(sums, w, places, float64)
            self.processes.agree()
            self.placement.add_(sums)
        norms = self.norms(blocks)
        return [Outcome(square=Measured(norms[block.name], self.square_of(block))) for block in blocks]

    def watched_numbers(self) -> tuple[str, Tensor, Precision] | None:
        if self.local is None or not self.local.watch:
            return None
        rules = [use.rule for use in self._uses if use.name == self.local.watch]
        self.local.watched = sum((rule.gram(None)[0] for rule in rules), self.local.watched)
        self.local.row_squares = self._row_squares[self.crossing.own]
        return self.local.watched_numbers()


def _places(blocks: Sequence[Block]) -> dict[str, int]:
    """Return the index of the block of every parameter."""
    return {name: k for k, block in enumerate(blocks) for name in block.parameters}


def _grads(blocks: Sequence[Block]) -> dict[str, Tensor | None]:
    """Return p.grad of every parameter."""
    return {name: p.grad for block in blocks for name, p in block.parameters.items()}


def project_spread_(
    access: SpreadGradients, scope: str, damping: float, rtol: float | None, add: Tensor, rates: Mapping[str, float]
) -> Projection:
    """Project every p.grad in place, see `Tape.project_`; add [n]: over the samples of all processes."""
    parameters, per_tensor = access.parameters, scope == "per_tensor"
    access.rates = {} if per_tensor else relative_rates(rates, parameters)
    names = [name for name, p in parameters.items() if p.grad is not None]
    blocks = access.blocks(per_tensor)
    with torch.no_grad(), torch.autocast(access.processes.device.type, enabled=False):
        squares = {name: norm * norm for name, norm in zip(names, access.placement.norms(names).tolist(), strict=True)}
        check_squares(squares)
        solver = Solver(access, HostReads(), Checks(), damping, rtol, add)
        projection = go_through(solver, blocks, squares, parameters, per_tensor)
    access.processes.agree()
    return projection
