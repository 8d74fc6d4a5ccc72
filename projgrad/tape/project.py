"""The projection of p.grad on the tape: products, solve, correction, refinement, and the check of all of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .. import _options
from ..ops.numerics import finfo
from ..ops.refinement import TAPE_PASSES, starts_in_float64
from ..recording.host_reads import HostReads, lengths
from ..recording.losses import check_shape, check_weights
from .check import Checks
from .factors import ForgetFactors
from .gradient_access import Block, KeptGradients, TwoPasses
from .passes import Passes
from .records import Projection
from .systems import COMBINED, PROJECTION, RETAIN_TERM, Correct, Erase, Look, Replay, Solve, Solver, Steps
from .verify import next_watched, verify

RESIDUAL = 1e-6  # max_j |cos(g_j, result)| that float32 promises; above it the result is projected again


def project_(
    passes: Passes,
    losses: Tensor,
    scope: str = "global",
    damping: float = 0.0,
    rtol: float | None = None,
    keep_output_gradients: bool = True,
    add: Tensor | None = None,
    rates: Mapping[str, float] | None = None,
    factors: ForgetFactors | None = None,
) -> Projection:
    """Project every p.grad in place; see `Tape.project_`. factors: of p.grad, where known."""
    _options.check_choice("scope", scope, ("global", "per_tensor"))
    damping, rtol = _options.check_solver("", damping, rtol)
    check_shape(losses)
    check_weights("add", add, losses)
    parameters, reads = passes.recording.parameters, passes.recording.host_reads
    factors = ForgetFactors() if factors is None else factors
    check_gradients(parameters)
    rates = {} if scope == "per_tensor" else relative_rates(rates or {}, parameters)
    squares = _defer_squares(parameters, factors, reads)
    structure = passes.structure(losses, wait=False)
    # A second pass with other weights would round too differently in 16 bits.
    keep = keep_output_gradients or structure.coarsest.itemsize == 2 or scope == "per_tensor"
    add = torch.zeros(len(losses), dtype=torch.float64, device=losses.device) if add is None else add.double()
    with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
        try:
            per_tensor = scope == "per_tensor"
            if factors or (keep and not structure.compared.rules):
                reads.flush()  # else together with the numbers of the solution
            if keep:
                verify(passes, losses)
                access = KeptGradients(passes, losses, rates, factors, next_watched(passes, losses))
                blocks = access.blocks(per_tensor)
            else:
                access = TwoPasses(passes, losses, rates, factors)
                blocks = [Block("", parameters)]
            solver = Solver(access, reads, Checks(reads.script), damping, rtol, add)
            return go_through(solver, blocks, squares, parameters, per_tensor)
        except BaseException:
            for p in parameters.values():
                p.grad = None  # half-made: nothing that an optimizer should see
            raise


def go_through(
    solver: Solver,
    blocks: Sequence[Block],
    squares: Mapping[str, float],
    parameters: Mapping[str, Tensor],
    per_tensor: bool,
) -> Projection:
    """Project all blocks and check what came of it; squares: ‖p.grad‖² by parameter, once a system is solved."""
    if solver.reads.script is not None:
        replay = Replay(solver)
        again = lambda reads: go_through(replay.start(reads), blocks, squares, parameters, per_tensor)  # noqa: E731
        solver.reads.script.again = again
    steps = {block.name: steps_of(block, solver, squares) for block in blocks}
    done = solver.run(steps, blocks)
    solver.reads.flush()  # if there was nothing to solve
    check_squares(squares)  # also of tensors that the losses do not use
    solver.check_watched()
    solver.checks.flush()
    for name, projection in done.items():
        projection.discrepancy = solver.checks.worst[name]
    return of_all(done, squares, parameters) if per_tensor else done[""]


def check_gradients(parameters: Mapping[str, Tensor]) -> None:
    """Make every p.grad contiguous; refuse sparse ones."""
    for name, p in parameters.items():
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(f"the gradient of {name} is sparse: build the layer with sparse=False")
        if not p.grad.is_contiguous():
            p.grad = p.grad.contiguous()


def relative_rates(rates: Mapping[str, float], parameters: Collection[str]) -> dict[str, float]:
    """Return the rates over the largest; none if all are the same."""
    for name, rate in rates.items():
        if name not in parameters or not (rate >= 0 and math.isfinite(rate)):
            raise ValueError(f"rates must be finite, not negative, and of followed parameters; got {name!r}: {rate}")
    largest = max((rates.get(name, 1.0) for name in parameters), default=0.0)
    relative = {name: rates.get(name, 1.0) / largest for name in parameters} if largest else {}
    return {} if len(set(relative.values())) <= 1 else relative


def _defer_squares(parameters: Mapping[str, Tensor], factors: ForgetFactors, reads: HostReads) -> dict[str, float]:
    """Return a dictionary that holds ‖p.grad‖² by name once the host reads are flushed.

    Factors whose product is not p.grad are dropped then: something else was accumulated too.
    """
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    squares: dict[str, float] = {}
    if grads:
        reads.defer(
            lengths(list(grads.values())),
            lambda norms: squares.update((name, norm * norm) for name, norm in zip(grads, norms, strict=True)),
        )

    def compare(products: list[float]) -> None:
        for name, square in zip(list(factors), products, strict=True):
            if not abs(square - squares.get(name, 0.0)) <= 1e-4 * squares.get(name, 0.0):
                del factors[name]

    if factors:
        reads.defer(torch.stack([factored.squared_norm() for factored in factors.values()]), compare)
    return squares


def check_squares(squares: Mapping[str, float]) -> None:
    """Check that every ‖p.grad‖² is a number."""
    if not all(map(math.isfinite, squares.values())):
        raise FloatingPointError("NaN or Inf in the gradient to project; nothing was changed")


def steps_of(block: Block, solver: Solver, squares: Mapping[str, float]) -> Steps:
    """Project p.grad, repeat while the residual exceeds rounding, then add Gᵀ add.

    squares: ‖p.grad‖² by parameter, once a system is solved.
    """
    rtol, n, rates = solver.rtol, len(solver.add), solver.rates
    plain = not solver.damping and rtol is None
    float64 = starts_in_float64(n, block.dtype, rtol)

    def predicted_norm() -> float:
        """Return ‖u - Gᵀ x‖ as the products have it."""
        # In this order NaN stays NaN.
        return max(u2 + 2 * solved.projection.product + solved.projection.squared_norm, 0.0) ** 0.5

    solved = yield Solve(float64)
    check_squares({name: squares.get(name, 0.0) for name in block.parameters})
    u2 = block.square = sum(rates.get(name, 1.0) * squares.get(name, 0.0) for name in block.parameters)
    if not solved.finite:
        solver.check_finite(block.name)
    eps = finfo(block.dtype).eps / 2
    limit = RESIDUAL if block.dtype != torch.float64 else 64 * finfo(torch.float64).eps
    noise = 16 * n * eps * (u2**0.5 + solved.projection.weighted_norms)  # a result this short has no direction
    after = predicted_norm()
    if plain and not float64 and solved.rank < solved.used and solved.residual / (max(after, noise) or 1.0) > limit:
        float64 = True  # rows that look dependent in float32 and are not
        solved = yield Solve(True)
        after = predicted_norm()
    coarse = finfo(block.stored).eps / 2  # what p.grad is rounded to
    rounding = coarse * (u2**0.5 + solved.spread) if plain else 0.0
    residual = (solved.residual + rounding) / (max(after, noise) or 1.0)
    rank, refinements, before = solved.rank, 0, float("inf")
    if plain and rank >= block.numel():  # nothing is orthogonal to that many
        yield Erase()
        if solved.retain_term.max_abs:
            yield Correct(RETAIN_TERM, solved.retain_term._replace(product=0.0), False, u2)
        return _projection(rank, u2, 0.0, 0.0, refinements)
    if not plain or block.has_16bit_factor or residual <= limit or not u2:
        if solved.combined.max_abs != 0:
            yield Correct(COMBINED, solved.combined, False, u2)
        return _projection(rank, u2, after, residual, 0)
    applied_in_float64 = False
    while True:
        if solved.projection.max_abs != 0:
            yield Correct(PROJECTION, solved.projection, applied_in_float64, u2)
        left = yield Look(float64)
        block.square, after = left.square, left.square**0.5
        residual = left.cosine / (max(after, noise) or 1.0)
        # Whatever is this small beside p.grad has no direction left; more passes only shuffle rounding.
        if residual <= limit / 2 or residual > before / 2 or refinements == TAPE_PASSES:
            break
        solved = yield Solve(True, left.v if float64 else None)
        float64 = applied_in_float64 = True
        rank, before = max(rank, solved.rank), residual
        if rank >= block.numel():
            yield Erase()
            if solved.retain_term.max_abs:
                yield Correct(RETAIN_TERM, solved.retain_term._replace(product=0.0), False, u2)
            return _projection(rank, u2, 0.0, 0.0, refinements)
        refinements += 1
    if solved.retain_term.max_abs != 0:
        yield Correct(RETAIN_TERM, solved.retain_term._replace(product=left.product), False, u2)
    return _projection(rank, u2, after, residual, refinements)


def _projection(rank: int, u2: float, after: float, residual: float, refinements: int) -> Projection:
    preserved = after / u2**0.5 if u2 else 1.0
    return Projection(rank, preserved, min(residual, 1.0), refinements, 0.0, (u2, after**2))


def of_all(
    tensors: dict[str, Projection], squares: Mapping[str, float], parameters: Mapping[str, Tensor]
) -> Projection:
    """Return the record of projections tensor by tensor; squares: ‖p.grad‖² of all, used by the losses or not."""
    for name, p in parameters.items():
        if name not in tensors and p.grad is not None:  # the losses do not use it
            tensors[name] = _projection(0, squares[name], squares[name] ** 0.5, 0.0, 0)
    before, after = (sum(t.squares[k] for t in tensors.values()) for k in (0, 1))
    return Projection(
        rank=sum(t.rank for t in tensors.values()),
        preserved_norm=(after / before) ** 0.5 if before else 1.0,
        residual=max((t.residual for t in tensors.values()), default=0.0),
        refinements=max((t.refinements for t in tensors.values()), default=0),
        discrepancy=max((t.discrepancy for t in tensors.values()), default=0.0),
        squares=(before, after),
        tensors={name: tensors[name] for name in parameters if name in tensors},
    )
