"""The projection of p.grad on the complement of the per-sample gradients of all processes of a group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .._torch_private import storage_id
from ..recording.host_reads import HostReads
from ..recording.losses import check_shape, check_values
from .check import Checks, Measured, Outcome, Precision
from .consumers import part
from .crossing import Crossing
from .factors import ForgetFactors
from .gradient_access import Block, GradientAccess, KeptGradients
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
        half = {use.name for use in self._uses if use.rule.has_16bit_factor}
        every = processes.agree(*(name in half for name in self.crossing.used))
        self._half = {name for name, *flags in zip(self.crossing.used, *every, strict=True) if any(flags)}
        zero = torch.zeros(self.crossing.total, dtype=torch.float64, device=processes.device)
        self._row_squares, self._summed = zero, set()

    def blocks(self, per_tensor: bool) -> list[Block]:
        """Return the blocks to project: every tensor that some losses use, or all parameters in one."""
        if not per_tensor:
            return [Block("", self.parameters, has_16bit_factor=bool(self._half))]
        used = self.crossing.used
        return [Block(name, {name: self.parameters[name]}, has_16bit_factor=name in self._half) for name in used]

    def norms(self, blocks: Iterable[Block]) -> dict[str, Tensor]:
        names = {block.name: list(block.grads()) for block in blocks}
        every = [name for some in names.values() for name in some]
        if not every:
            return {}
        return dict(zip(names, self.placement.norms(every).split([len(some) for some in names.values()]), strict=True))

    def agreed(self, *numbers: Tensor) -> list[Tensor]:
        return self.processes.of_first(*numbers)

    def products(self, blocks: Sequence[Block], float64: bool) -> tuple[Tensor, Tensor]:
        self.processes.agree()
        places = {name: k for k, block in enumerate(blocks) for name in block.parameters}
        K = self.crossing.gram(places, self.rates, len(blocks), float64)
        v = self._dot(blocks, places, float64)
        self.processes.agree()
        flat = self.processes.sum_(torch.cat([K.flatten(), v.flatten()]), "K")
        K, v = flat[: K.numel()].view(K.shape), flat[K.numel() :].view(v.shape)
        new = [k for k, block in enumerate(blocks) if block.name not in self._summed]
        self._summed.update(block.name for block in blocks)
        if new:
            self._row_squares = self._row_squares + K[new].diagonal(dim1=1, dim2=2).sum(0)
        return K, v

    def dot(self, blocks: Sequence[Block], float64: bool) -> Tensor:
        self.processes.agree()
        places = {name: k for k, block in enumerate(blocks) for name in block.parameters}
        v = self._dot(blocks, places, float64)
        self.processes.agree()
        return self.processes.sum_(v, "K")

    def _dot(self, blocks: Sequence[Block], places: Mapping[str, int], float64: bool) -> Tensor:
        """Return v [l, n] of this process's samples, zero for those of others; an error is put off."""
        v = torch.zeros(len(blocks), self.crossing.total, dtype=torch.float64, device=self.processes.device)
        for names in self._rounds(places):
            us = self.placement.whole(names)
            with self.processes.attempt():
                for group in self._groups(names):
                    parts = [None if us[use.name] is None else part(use.source, us[use.name]) for use in group]
                    for use, one in zip(group, group.dot(parts, float64 or group[0].rule.cheap), strict=True):
                        v[places[use.name], self.crossing.own] += self.rate(use.name) * one
        return v

    def _rounds(self, places: Mapping[str, int]) -> Iterable[Sequence[str]]:
        return self.placement.rounds([name for name in self.crossing.used if name in places])

    def _groups(self, names: Sequence[str]) -> list[Group]:
        some = set(names)
        return grouped([use for use in self._uses if use.name in some])

    def apply(self, blocks: Sequence[Block], w: Tensor, max_abs: float, float64: bool = False) -> list[Outcome]:
        self.processes.agree()
        places = {name: k for k, block in enumerate(blocks) for name in block.parameters}
        rows = w[:, self.crossing.own].contiguous().unbind()
        for names in self._rounds(places):
            with self.processes.attempt():
                sums = self.placement.sums(names)
                for group in self._groups(names):
                    c = torch.stack([rows[places[use.name]] for use in group])
                    group.combine_([sums[use.name] for use in group], c, float64)
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
