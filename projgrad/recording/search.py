"""The search for the samples of a new graph: which entries grow by the weight of which loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._torch_private import version
from ..rules.layout import Layout, candidates, gather
from . import ownership
from .backward import backward
from .carry import of_torch
from .codes import Codes, Signatures, axes_of, changed, leading, matches, owners_of
from .recording import Recording
from .refusals import NESTED
from .sites import Site


class Search:
    """The search for the samples at every site of one graph, by backward passes whose losses are weighted.

    Attributes, once it has run, besides `Site.layout`:
        loops: parameters that need a loop over the losses, and why.
        anchors: sites, by index, whose layouts prove all others; None: nothing is proven.
    """

    def __init__(
        self,
        recording: Recording,
        losses: Tensor,
        nodes: list[Node],
        ends: Collection[int],
        coarsest: torch.dtype,
        foreign: bool,
    ) -> None:
        self.recording, self.losses, self.nodes, self.n, self.ends = recording, losses, nodes, len(losses), ends
        self.coarsest, self.foreign = coarsest, foreign
        self.loops: dict[str, str] = {}
        self.anchors: list[int] | None = []
        self.codes = Codes(self.n, losses, coarsest)
        self.signatures = Signatures()
        self.possible = {s: candidates(s.shape, s.axes, self.n) for s in recording.sites}
        located = (
            {} if recording.hooked else ownership.locate(losses.grad_fn, self.n, recording.site_of)[0]
        )  # a hook may do anything
        proven = {site: ownership.layout(at, site.shape, self.n) for site, at in located.items()}
        self.proven = {site: layout for site, layout in proven.items() if layout in self.possible.get(site, [])}
        # Along which dimensions entries are told apart.
        self.axes = {
            site: [self.proven[site].axis] if site in self.proven else axes_of(site, layouts)
            for site, layouts in self.possible.items()
        }
        self.last: Site | None = None  # of the forward pass

    def run(self) -> None:
        passes = [self._pass(self.codes.base, self.axes)]
        try:
            if self.foreign:
                self._repeat(passes[0])
            passes += [self._pass(w, self.axes) for w in self.codes.weights[1:]]
        except (ArithmeticError, ValueError):
            raise
        except Exception as error:
            raise ArithmeticError(
                f"a second backward pass through the graph failed where the first one did not ({error}): an operation "
                f"keeps nothing for it. {self._foreign_operations()}"
            ) from error
        mixed: list[Site] = []
        for site in self.recording.sites:
            made_before = [s for s in site.sources if s.site is not site and s.settled]
            if len(made_before) == len(site.sources) or site not in passes[0]:
                continue  # everything is accounted for where these sources were made, or no loss depends on it
            site.layout = self._layout(site, [p[site] for p in passes], bool(made_before))
            if site.layout is None and not site.derived:
                mixed.append(site)
        if mixed:
            self._explain(mixed, passes[0])
        for site in mixed:
            self.loops |= {name: self._mixture(site) for source in site.sources for name in sorted(source.names)}
        self.anchors = self._anchors()

    def _anchors(self) -> list[int] | None:
        if self.recording.hooked:
            return None
        used = {s: s.layout for s in self.recording.sites if s.layout is not None}
        if all(self.proven.get(site) == layout for site, layout in used.items()):
            return []
        given = {site: layout for site, layout in used.items() if layout.rows is None}
        located, needed = ownership.locate(self.losses.grad_fn, self.n, self.recording.site_of, given)
        for site, layout in used.items():
            if site not in located or ownership.layout(located[site], site.shape, self.n) != layout:
                return None
        return sorted(site.index for site in needed)

    def _mixture(self, site: Site) -> str:
        reason = f"the {self.n} losses are mixed in the output {tuple(site.shape)} of {site.name}"
        if site.shape and 1 < site.shape[0] < self.n and self.n % site.shape[0] == 0:
            reason += f" (if that is {site.shape[0]} samples, reduce the losses to one a sample)"
        return reason

    def _pass(self, w: Tensor, axes: dict[Site, Sequence[int]]) -> dict[Site, Tensor]:
        """Return the signatures of the gradient at every site, for losses weighted by w."""
        signatures: dict[Site, Tensor] = {}
        before = [(p.grad, _version(p.grad)) for p in self.recording.parameters.values()]

        def receive(site: Site, b: Tensor, saved) -> None:
            self.last = self.last or site
            if site in axes:
                signatures[site] = self.signatures.of(b, axes[site])

        backward(self.recording, self.losses, w, receive, self.ends)
        params = self.recording.parameters.values()
        if any(p.grad is not g or _version(g) != v for p, (g, v) in zip(params, before, strict=True)):
            for p, (g, v) in zip(params, before, strict=True):
                p.grad = g if _version(g) == v else None
            raise ValueError(NESTED)
        if signatures and not torch.stack([s.isfinite().all() for s in signatures.values()]).all():
            bad = next(s.name for s, value in signatures.items() if not value.isfinite().all())
            raise FloatingPointError(f"NaN or Inf in the gradient at {bad}; nothing was changed")
        return signatures

    def _layout(self, site: Site, passes: list[Tensor], made_before: bool) -> Layout | None:
        axes, n = self.axes[site], self.n
        if not axes:
            return None
        # The factors are a power of two apart, or have another sign: what is proven is only to be confirmed.
        found = owners_of(self.codes, site, passes, self.coarsest, 0.3 if site in self.proven else None)
        first = [self.proven[site]] if site in self.proven else []
        for layout in [*first, *self.possible[site]]:
            if layout.axis not in axes or (layout.axis in site.shared and not made_before):
                continue  # the samples would share one parameter's elements out among them
            if matches(found, axes, layout, site, n):
                return layout
        if site.derived or found.mixed.any():
            return None
        return self._anywhere(site, found.owner.view([site.shape[d] for d in axes]))

    def _anywhere(self, site: Site, owner: Tensor) -> Layout | None:
        """Return the layout of rows in no regular order (experts that pick tokens, sequences packed into one row)."""
        lead = len(leading(site))
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
        if any(changed(b, again[site], self.coarsest) for site, b in first.items()):
            raise ArithmeticError(
                "two backward passes through the same graph do not give the same gradients, so there are no per-sample "
                "gradients to protect: an operation changes what it saved, draws new random numbers when it is "
                f"recomputed, or a hook clips. {self._foreign_operations()}{self._vanishing()}"
            )

    def _vanishing(self) -> str:
        if self.coarsest != torch.float16:
            return ""
        return ". Or float16 gradients vanish there: scale the losses (torch.amp.GradScaler), or use bfloat16"

    def _foreign_operations(self) -> str:
        names = sorted({node.name() for node in self.nodes if not of_torch(node)})
        return f"Operations that are not torch's own: {', '.join(names) or 'none in the graph'}"

    def _explain(self, mixed: list[Site], first: dict[Site, Tensor]) -> None:
        """Refuse if what was found has a reason that a loop over the losses does not cure."""
        self._repeat(first)
        last = self.last
        if last in mixed and self.possible[last]:
            everywhere = {last: range(len(last.shape))}
            passes = [self._pass(w, everywhere)[last] for w in self.codes.weights]
            found = owners_of(self.codes, last, passes, self.coarsest)
            if (found.mixed & (found.size > found.faint * found.size.max())).any():
                raise ValueError(
                    f"the gradient at the last {last.name} mixes samples: the losses share terms (a mean over the "
                    "batch, a contrastive loss, batch statistics), so there is no gradient of one sample to protect. "
                    "Return one independent loss per sample, sample j along dimension 0"
                    f"{self._vanishing()}"
                )


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else version(grad)
