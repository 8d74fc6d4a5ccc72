"""The tape: products with the per-sample gradients of a model, made inside ordinary backward passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from .._torch_private import enter, is_active
from ..recording.interception import Interception
from ..recording.losses import check_losses, check_weights, named
from ..recording.recording import Call, Recording
from ..recording.structure import Structure
from .consumers import Moments, Products
from .explain import Explain, Explanation
from .explicit import project_explicit, rows
from .factors import ForgetFactors, accumulate_
from .passes import Passes
from .project import project_
from .records import Projection
from .verify import verify

_known: weakref.WeakKeyDictionary[nn.Module, dict[int, Structure]] = weakref.WeakKeyDictionary()


class Tape:
    """Per-sample gradients g_j = ∂ℓ_j/∂θ of losses computed while the tape is active, never held all at once.

    Sample j is index j of the losses (n,); where the samples are inside the model is found from the gradients. Every
    method raises ValueError for losses of another shape, and RuntimeError once `project_` has freed their graph.

    Args:
        parameters: what to follow, by name.
        buffers: other tensors that do not depend on the samples.
        model: what is found out about its graphs is kept for its next tapes.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], buffers: Iterable[Tensor] = (), model: nn.Module | None = None
    ) -> None:
        self.recording = Recording(parameters, buffers)
        self.passes = Passes(self.recording, {} if model is None else _known.setdefault(model, {}))
        self._interception = Interception(self.recording)

    def __enter__(self) -> Tape:
        if is_active(self._interception):
            raise RuntimeError("this tape is already recording")
        enter(self._interception)
        return self

    def __exit__(self, *error: object) -> None:
        self._interception.__exit__(*error)

    def call(self, name: str, *tensors: object) -> Call:
        """Begin the call of a drop-in function; see `projgrad.functional`."""
        return self.recording.call(name, *tensors)

    def gram(self, losses: Tensor, *, retain_graph: bool = True) -> Tensor:
        """Return K = G Gᵀ (n, n) in float64, without weight gradients; retain_graph=False frees the graph after it."""
        verify(self.passes, losses)
        products = Products()
        self.passes.run(losses, products, retain_graph)
        return products.K

    def dot(self, losses: Tensor, direction: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """Return G u (n,) in float64; u: one tensor per parameter, by name or in order."""
        verify(self.passes, losses)
        products = Products(named(direction, self.recording.parameters), gram=False)
        self.passes.run(losses, products)
        return products.v

    def combine(self, losses: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return Σ_j w_j g_j by name, from one ordinary backward pass; weights (n,)."""
        check_losses(losses)
        check_weights("weights", weights, losses)
        return self.passes.combine(losses, weights)

    def moments(self, losses: Tensor, weights: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return Σ_j w_j g_j and Σ_j (w_j g_j)² by name, float32 or better; weights (n,), 1 if None."""
        verify(self.passes, losses)
        check_weights("weights", weights, losses)
        moments = Moments(self.recording.parameters)
        self.passes.run(losses, moments, weights=weights)
        return moments.first, moments.second

    def rows(self, losses: Tensor) -> dict[str, Tensor]:
        """Return every g_j in full, (n, *p.shape) by name, float32 or better: n times the memory of the parameters."""
        return rows(self.passes, losses)

    def explain(self, losses: Tensor) -> Explanation:
        """Return what each parameter costs: uses, rule, route, predicted bytes and flops, bytes really in use.

        One backward pass. Print it for a table; it is a list of named tuples.
        """
        explain = Explain(self.recording)
        self.passes.run(losses, explain)
        return explain.lines

    def accumulate_(self, loss: Tensor, weight: float) -> ForgetFactors:
        """Add weight * ∂loss/∂p to every p.grad by plain autograd; return its factors, where they are shorter."""
        return accumulate_(self.recording, loss, weight)

    def project_(
        self,
        losses: Tensor,
        scope: str = "global",
        damping: float = 0.0,
        rtol: float | None = None,
        *,
        keep_output_gradients: bool = True,
        add: Tensor | None = None,
        rates: Mapping[str, float] | None = None,
        factors: ForgetFactors | None = None,
    ) -> Projection:
        """Set p.grad to p.grad - Gᵀ c with G (p.grad - Gᵀ c) = 0; no other buffer has the parameters' size.

        Args:
            losses: (n,).
            scope: "global" projects the concatenated gradient, "per_tensor" every tensor on its own, in one backward
                pass: it removes up to n dimensions from *each* tensor, so one of at most n elements becomes zero.
            damping, rtol: see `projgrad.project_out`.
            keep_output_gradients: with scope="global", keep what the backward pass finds at every layer and make Gᵀ c
                from that; the graph is freed. False makes it in a second backward pass, by plain autograd, which so
                checks every tensor each time, not only when the graph is new, and keeps the graph.
            add: (n,), w: also add Σ_j w_j g_j, in the same pass.
            rates: by what every parameter's gradient will be multiplied, by name, where that differs (learning rates
                of parameter groups). With scope="global" the multiplied result is then orthogonal, Σ_p rate_p G_p
                (p.grad - G_pᵀ c) = 0, and lengths in the record weigh every parameter by its rate.
            factors: of p.grad, from `accumulate_`.

        Raises:
            ValueError: an unknown scope; see also `per_sample`.
            FloatingPointError: NaN or Inf in p.grad, a loss or a per-sample gradient; p.grad are left or set to None.
            ArithmeticError: the result contradicts plain autograd: a rule misread the model. p.grad are set to None.
        """
        return project_(self.passes, losses, scope, damping, rtol, keep_output_gradients, add, rates, factors)

    def project_with_(
        self,
        losses: Tensor,
        projector: Callable[[Tensor, Tensor], Tensor],
        scope: str = "global",
        *,
        add: Tensor | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> Projection:
        """Set p.grad to projector(p.grad, G), with all of G in memory; see `project_` and `OrthoGrad`."""
        return project_explicit(self.passes, losses, projector, scope, add, rates or {})
