"""How the sites of one forward pass are to be read: where each holds the samples, and what no site accounts for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..rules.layout import Codes, Layout, Signatures, candidates, gather
from . import ownership
from .carry import of_torch
from .graph import audit, coarsest_of, nodes_of
from .recording import Site, Source
from .refusals import NESTED

if TYPE_CHECKING:
    from torch.autograd.graph import Node

    from ..tape.tape import Tape


@dataclass
class Compared:
    """What of a graph has been compared with plain autograd: all rules, once; `turns` parameters since, one a step."""

    rules: bool = False
    turns: int = 0


@dataclass
class Structure:
    """How to read the sites of a forward pass.

    layouts: per site; None: the site is not used. loops: parameters that need a loop over the losses, and why.
    anchors: sites, by index, whose layouts prove all others, for every forward pass with the same graph: to be
        confirmed each time; none where the graph alone is the proof. None: nothing is proven, all is found anew.
    foreign: whether there are nodes in the graph that are not torch's own, or hooks, which may do anything.
    coarsest: the floating-point type with the fewest digits that lies between the losses and the parameters.
    """

    layouts: list[Layout | None]
    loops: dict[str, str] = field(default_factory=dict)
    anchors: list[int] | None = field(default_factory=list)
    coarsest: torch.dtype = torch.float64
    foreign: bool = False
    compared: Compared = field(default_factory=Compared)

    @property
    def lasting(self) -> bool:
        """Whether it may serve another forward pass with the same graph, once its anchors are confirmed."""
        return self.anchors is not None


def inspect(tape: Tape, losses: Tensor) -> Structure:
    """The structure of the tape's forward pass, from two or more backward passes without weight gradients.

    Where the operations of the graph prove where the samples are, the passes only confirm it. Elsewhere they decide:
    weighting sample j by w_j scales what belongs to sample j by w_j and nothing else.

    Raises:
        ValueError: the losses share terms between samples.
        ArithmeticError: a second backward pass is not what the first one was.
        FloatingPointError: NaN or Inf in a gradient.
    """
    n, sites = len(losses), tape.sites
    nodes = nodes_of(losses)
    foreign = tape.hooked or not all(map(of_torch, nodes))
    structure = Structure([None] * len(sites), coarsest=coarsest_of(losses, nodes), foreign=foreign)
    if n == 1:
        for site in sites:
            one = candidates(site.shape, site.axes, 1)
            structure.layouts[site.index] = one[0] if one else None
    else:
        _Search(tape, losses, structure, nodes).run()
    for site, layout in zip(sites, structure.layouts, strict=True):
        site.active = layout is not None
    for name in audit(tape, losses):
        reason = tape.unknown.get(name, "an operation that torch functions do not show")
        structure.loops.setdefault(name, f"no rule covers {reason}")
    return structure


def confirm(tape: Tape, losses: Tensor, structure: Structure, taps: dict[int, Node]) -> bool:
    """Whether a known structure holds for this graph: the samples are at its anchors where they were.

    Two backward passes, which end at the anchors.
    """
    if not structure.lasting:
        return False
    if not structure.anchors:
        return True
    n, sites = len(losses), [tape.sites[index] for index in structure.anchors]
    codes, signatures = Codes(n, losses, structure.coarsest), Signatures()
    edges = [GradientEdge(taps[site.index], 0) for site in sites]
    axes = [_axes(site, [structure.layouts[site.index]]) for site in sites]

    def signs(w: Tensor) -> list[Tensor]:
        with tape._again():
            grads = torch.autograd.grad(losses, edges, w, retain_graph=True)
        return [signatures.of(b, some) for b, some in zip(grads, axes, strict=True)]

    passes = [signs(codes.base)]
    if structure.foreign:
        again = signs(2 * codes.base)
        if any(_changed(*pair, structure.coarsest) for pair in zip(passes[0], again, strict=True)):
            return False
    passes += [signs(w) for w in codes.weights[1:]]
    for site, some, *found in zip(sites, axes, *passes, strict=True):
        owner, mixed = _owners(codes, site, found, structure.coarsest)
        if mixed.any() or not _match(owner, some, structure.layouts[site.index], site, n):
            return False
    return True


class _Search:
    """The search for the samples at every site of one graph."""

    def __init__(self, tape: Tape, losses: Tensor, structure: Structure, nodes: list[Node]) -> None:
        self.tape, self.losses, self.structure, self.nodes, self.n = tape, losses, structure, nodes, len(losses)
        self.codes = Codes(self.n, losses, structure.coarsest)
        self.signatures = Signatures()
        self.possible = {s: candidates(s.shape, s.axes, self.n) for s in tape.sites}
        self.proven: dict[Site, Layout] = {}
        located = {} if tape.hooked else ownership.locate(losses.grad_fn, self.n)[0]  # a hook may do anything
        for site, at in located.items():
            layout = ownership.layout(at, site.shape, self.n)
            if layout in self.possible.get(site, []):
                self.proven[site] = layout
        # Along which dimensions entries are told apart.
        self.axes = {s: [self.proven[s].axis] if s in self.proven else _axes(s, self.possible[s]) for s in tape.sites}
        self.last: Site | None = None  # of the forward pass

    def run(self) -> None:
        structure = self.structure
        passes = [self._pass(self.codes.base, self.axes)]
        try:
            if structure.foreign:
                self._repeat(passes[0])
            passes += [self._pass(w, self.axes) for w in self.codes.weights[1:]]
        except (ArithmeticError, ValueError):
            raise
        except Exception as error:
            raise ArithmeticError(
                f"a second backward pass through the graph failed where the first one did not ({error}): an operation "
                f"keeps nothing for it. {self._foreign()}"
            ) from error
        mixed: list[Site] = []
        for site in self.tape.sites:
            made_before = [s for s in site.sources if s.site is not site and _settled(s, structure)]
            if len(made_before) == len(site.sources) or site not in passes[0]:
                continue  # everything is accounted for where these sources were made, or no loss depends on it
            layout = self._layout(site, [p[site] for p in passes], bool(made_before))
            if layout is None:
                if not site.derived:
                    mixed.append(site)
                continue
            structure.layouts[site.index] = layout
        if mixed:
            self._explain(mixed, passes[0])
        for site in mixed:
            for source in site.sources:
                for name in source.names:
                    structure.loops[name] = self._mixture(site)
        structure.anchors = self._anchors()

    def _anchors(self) -> list[int] | None:
        if self.tape.hooked:
            return None
        used = {s: layout for s in self.tape.sites if (layout := self.structure.layouts[s.index]) is not None}
        if all(self.proven.get(site) == layout for site, layout in used.items()):
            return []
        given = {site: layout for site, layout in used.items() if layout.rows is None}
        found, needed = ownership.locate(self.losses.grad_fn, self.n, given)
        for site, layout in used.items():
            if site not in found or ownership.layout(found[site], site.shape, self.n) != layout:
                return None
        return sorted(site.index for site in needed)

    def _mixture(self, site: Site) -> str:
        reason = f"the {self.n} losses are mixed in the output {tuple(site.shape)} of {site.name}"
        if site.shape and site.shape[0] and self.n > site.shape[0] and self.n % site.shape[0] == 0:
            reason += f" (if that is {site.shape[0]} samples, reduce the losses to one a sample)"
        return reason

    def _pass(self, w: Tensor, axes: dict[Site, Sequence[int]]) -> dict[Site, Tensor]:
        """Signatures of the gradient at every site, for losses weighted by w."""
        found: dict[Site, Tensor] = {}
        before = [(p.grad, _version(p.grad)) for p in self.tape.parameters.values()]

        def receive(site: Site, b: Tensor, saved) -> None:
            self.last = self.last or site
            if site in axes:
                found[site] = self.signatures.of(b, axes[site])

        self.tape.backward(self.losses, w, receive)
        params = self.tape.parameters.values()
        if any(p.grad is not g or _version(g) != v for p, (g, v) in zip(params, before, strict=True)):
            for p, (g, v) in zip(params, before, strict=True):
                p.grad = g if _version(g) == v else None
            raise ValueError(NESTED)
        if found and not torch.stack([s.isfinite().all() for s in found.values()]).all():
            bad = next(s.name for s, value in found.items() if not value.isfinite().all())
            raise FloatingPointError(f"NaN or Inf in the gradient at {bad}; nothing was changed")
        return found

    def _layout(self, site: Site, passes: list[Tensor], made_before: bool) -> Layout | None:
        axes, n = self.axes[site], self.n
        if not axes:
            return None
        # The factors are a power of two apart, or have another sign: what is proven is only to be confirmed.
        owner, mixed = _owners(self.codes, site, passes, self.structure.coarsest, 0.3 if site in self.proven else None)
        if mixed.any():
            return None
        first = [self.proven[site]] if site in self.proven else []
        for layout in [*first, *self.possible[site]]:
            if layout.axis not in axes or (layout.axis in site.shared and not made_before):
                continue  # the samples would share one parameter's elements out among them
            if _match(owner, axes, layout, site, n):
                return layout
        return None if site.derived else self._anywhere(site, owner.view([site.shape[d] for d in axes]))

    def _anywhere(self, site: Site, owner: Tensor) -> Layout | None:
        """Rows in no regular order (experts that pick tokens, sequences packed into one row)."""
        lead = len(_leading(site))
        if not lead or set(range(lead)) & set(site.shared):
            return None
        for count in range(1, lead + 1):
            rows = owner.flatten(0, count - 1).unsqueeze(-1).flatten(1)  # [indices of the leading dimensions, others]
            whose = rows.amax(1)
            if ((rows == whose[:, None]) | (rows < 0)).all():
                return gather(whose, self.n, tuple(site.shape[:count]))
        return None

    def _repeat(self, first: dict[Site, Tensor]) -> None:
        """Refuse a graph whose next backward pass, with twice the weights, does not give twice as much."""
        again = self._pass(2 * self.codes.base, self.axes)
        if any(_changed(b, again[site], self.structure.coarsest) for site, b in first.items()):
            raise ArithmeticError(
                "two backward passes through the same graph do not give the same gradients, so there are no per-sample "
                "gradients to protect: an operation changes what it saved, draws new random numbers when it is "
                f"recomputed, or a hook clips. {self._foreign()}"
            )

    def _foreign(self) -> str:
        names = sorted({node.name() for node in self.nodes if not of_torch(node)})
        return f"Operations that are not torch's own: {', '.join(names) or 'none in the graph'}"

    def _explain(self, mixed: list[Site], first: dict[Site, Tensor]) -> None:
        """Refuse if what was found has a reason that a loop over the losses does not cure."""
        self._repeat(first)
        last = self.last
        if last in mixed and self.possible[last]:
            everywhere = {last: range(len(last.shape))}
            passes = [self._pass(w, everywhere)[last] for w in self.codes.weights]
            if _owners(self.codes, last, passes, self.structure.coarsest)[1].any():
                raise ValueError(
                    f"the gradient at the last {last.name} mixes samples: the losses share terms (a mean over the "
                    "batch, a contrastive loss, batch statistics), so there is no gradient of one sample to protect. "
                    "Return one independent loss per sample, sample j along dimension 0"
                )


def _axes(site: Site, layouts: Sequence[Layout]) -> list[int]:
    """The dimensions along which entries are told apart."""
    return sorted({layout.axis for layout in layouts} | _leading(site))


def _owners(
    codes: Codes, site: Site, passes: Sequence[Tensor], coarsest: torch.dtype, tolerance: float | None = None
) -> tuple[Tensor, Tensor]:
    """See `Codes.owners`. On the CPU nothing rounds differently in another pass, unless float16 runs out of digits."""
    first, limits = passes[0], torch.finfo(passes[0].dtype)
    exact = {torch.float64: 1e-12}.get(coarsest, 1e-6)
    noise = first.new_tensor(limits.tiny / limits.eps, dtype=torch.float64)
    if coarsest == torch.float16:  # 64 times its smallest number, in every entry
        noise = noise + 64 * 2.0**-24 * (math.prod(site.shape) / max(1, len(first))) ** 0.5
    if first.is_cuda and first.numel():  # sums in no fixed order
        exact = {torch.float64: 1e-10, torch.float32: 1e-4}.get(coarsest, 1e-2)
        noise = noise.maximum(16 * torch.finfo(coarsest).eps * first.abs().max())
    return codes.owners(passes, exact if tolerance is None else tolerance, noise)


def _changed(once: Tensor, twice: Tensor, coarsest: torch.dtype) -> bool:
    """Whether a pass with twice the weights did not give twice as much."""
    tolerance = 0.1 if coarsest.itemsize == 2 else 1e-3
    return not bool((twice - 2 * once).norm() <= tolerance * (twice.norm() + 2 * once.norm()))


def _match(owner: Tensor, axes: Sequence[int], layout: Layout, site: Site, n: int) -> bool:
    """Whether the owners [indices along `axes`] are those of a layout; what is nobody's may be anybody's."""
    expected = layout.owner(site.shape[layout.axis], n, owner.device)
    expected = expected.view([-1 if d == layout.axis else 1 for d in axes])
    owner = owner.view([site.shape[d] for d in axes])
    return bool(((owner == expected) | (owner < 0)).all())


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else grad._version


def _leading(site: Site) -> set[int]:
    """The leading dimensions that may hold samples in no regular order."""
    axes, lead = set(site.axes), 0
    while lead in axes:
        lead += 1
    return set(range(lead))


def _settled(source: Source, structure: Structure) -> bool:
    if source.site is not None and structure.layouts[source.site.index] is not None:
        return True
    return bool(source.parents) and all(_settled(p, structure) for p in source.parents)


def announce(loops: dict[str, str]) -> None:
    for name, reason in loops.items():
        warnings.warn(
            f"{reason} with parameter {name}: its per-sample gradients come from one backward pass per sample, exact "
            "and slow",
            stacklevel=4,
        )
