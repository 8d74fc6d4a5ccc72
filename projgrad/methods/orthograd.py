"""OrthoGrad: ascend on the forget loss, orthogonally to the gradient of every retain sample."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..explicit import project_explicit
from ..tape.jobs import Outer
from ..tape.losses import check_shape, check_values
from ..tape.project import Projection
from ..tape.tape import per_sample
from .common import check_batch_norm, check_finite, clear, owned, scalar


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one step.

    rank: independent retain gradients that were projected out, summed over tensors with scope="per_tensor"; None with a
        custom projector.
    preserved_norm: ‖u_perp‖ / ‖u‖ over all parameters: near 1 the projection did nothing, near 0 nothing is left to
        forget with.
    residual: max_j |cos(g_j, u_perp)|, the largest over tensors with scope="per_tensor".
    refinements: times the result was projected again because the first answer left more than rounding.
    discrepancy: of the self-check: how far the per-sample gradients and plain autograd are apart, relative.
    forget_loss, retain_loss: before the step; the retain loss is the mean over samples.
    seconds: wall time of the whole step.
    skipped: a gradient scaler found NaN or Inf: nothing was updated but its scale.
    tensors: the same for every parameter, with scope="per_tensor"; empty otherwise.
    """

    rank: int | None
    preserved_norm: float
    residual: float
    refinements: int
    discrepancy: float
    forget_loss: float
    retain_loss: float
    seconds: float
    skipped: bool = False
    tensors: dict[str, Projection] = field(default_factory=dict)


class OrthoGrad:
    """Unlearning steps whose forgetting part is orthogonal to every per-sample retain gradient.

    update = α mean_j(g_j) - (1 - α) u_perp,    u_perp = u - Gᵀ (G Gᵀ)⁺ G u

    with u the gradient of the forget loss and G (n, p) the per-sample gradients of the retain losses. The update is
    written to `.grad` and the optimizer steps.

    Args:
        model: its parameters that require gradients and belong to `optimizer` are updated.
        optimizer: any torch optimizer. The applied update is orthogonal only for SGD without momentum or weight decay;
            adaptive ones rescale it coordinate by coordinate.
        alpha: weight of the mean retain gradient, in [0, 1]; 0 is pure projected ascent.
        scope: "global" projects the concatenated gradient once. "per_tensor" projects every tensor on its own, as the
            published code does: it implies global orthogonality but removes up to n dimensions from *each* tensor, so
            a tensor with at most n elements (small biases, norm scales) is not updated by forgetting at all.
        ascend: True: the forget loss is an ordinary loss and is maximised. False: it is a forget objective to minimise
            (random labels, distillation to a neutral target).
        damping, rtol: see `projgrad.project_out`.
        max_norm: clip the norm of the whole update, or None.
        keep_output_gradients: with scope="global": make the update from the gradients at all layers' outputs, kept
            from the one backward pass over the retain batch; the graph is freed meanwhile, so that takes no more memory
            than plain training. Plain autograd checks all of it when the model's graph is new, and one tensor a step.
            False runs a second, ordinary backward pass for the update: more time, and every step checks every tensor.
        scaler: a `torch.amp.GradScaler`: losses are scaled, and its own rule decides on steps with NaN or Inf.
        projector: function (u (p,), G (n, p)) -> u_perp (p,) instead of projgrad's, such as `projgrad.projectors.qr`;
            with scope="per_tensor" called once for each tensor. All of G takes n times the memory of the parameters: a
            reference to compare with, without `damping`, `rtol`, `keep_output_gradients` and `scaler`.

    Raises:
        ValueError: alpha outside [0, 1], an unknown scope, no trainable parameter in the optimizer, a projector with
            damping, rtol or a scaler.

    Source: arXiv 2503.02312, section 3 and algorithm 1.

    Example:
        >>> model = torch.nn.Linear(8, 2)
        >>> unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.5)
        >>> x, y = torch.randn(4, 8), torch.tensor([0, 1, 0, 1])
        >>> loss = torch.nn.functional.cross_entropy
        >>> record = unlearner.step(lambda: loss(model(-x), y), lambda: loss(model(x), y, reduction="none"))
        >>> record.residual < 1e-6
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        alpha: float = 0.5,
        *,
        scope: str = "global",
        ascend: bool = True,
        damping: float = 0.0,
        rtol: float | None = None,
        max_norm: float | None = None,
        keep_output_gradients: bool = True,
        scaler: torch.amp.GradScaler | None = None,
        projector: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha weighs the mean retain gradient and must be in [0, 1]; got {alpha}")
        if scope not in ("global", "per_tensor"):
            raise ValueError(f"scope must be 'global' or 'per_tensor'; got {scope!r}")
        given = {"damping": damping, "rtol": rtol is not None, "scaler": scaler}
        unused = [name for name, value in given.items() if value]
        if projector is not None and unused:
            raise ValueError(f"projector replaces the whole projection: it cannot be used with {', '.join(unused)}")
        self.model, self.optimizer, self.alpha, self.scope = model, optimizer, alpha, scope
        self.sign = -1.0 if ascend else 1.0
        self.damping, self.rtol, self.max_norm = damping, rtol, max_norm
        self.keep_output_gradients, self.scaler, self.projector = keep_output_gradients, scaler, projector
        self._flat = False  # whether the factors of the forget gradient save work, as the step before found
        self._outer: dict[str, Outer] = {}
        owned(model, optimizer)

    def step(self, forget: Callable[[], Tensor], retain: Callable[[], Tensor]) -> StepRecord:
        """One update. An error before the optimizer steps leaves the model and the optimizer as they were, with every
        `.grad` set to None.

        Args:
            forget: returns the scalar forget loss.
            retain: returns the losses of the n retain samples, shape (n,): each one's gradient is protected. Sample j
                must depend on nothing that the other samples hold.

        Raises:
            ValueError: a loss of the wrong shape, batch norm in training mode (per-sample gradients do not exist),
                retain losses that share terms between samples.
            FloatingPointError: NaN or Inf in a loss or a gradient.
            ArithmeticError: the projection contradicts plain autograd.
        """
        start = time.perf_counter()
        check_batch_norm(self.model)
        params = owned(self.model, self.optimizer)
        clear(self.optimizer)
        skipped, done = False, None
        try:
            loss = self._forget(forget, params)
            forget_loss, retain_loss, done = self._retain(loss, retain, params)
        except FloatingPointError:
            clear(self.optimizer)
            if self.scaler is None:
                raise
            p = next(iter(params.values()))  # an infinite gradient makes the scaler skip this step and scale less
            p.grad = torch.full_like(p, float("inf"))
            forget_loss = retain_loss = float("nan")
            skipped = True
        except BaseException:
            clear(self.optimizer)
            raise
        try:
            self._apply(params)
        except BaseException:
            clear(self.optimizer)
            raise
        return StepRecord(
            rank=None if done is None or self.projector else done.rank,
            preserved_norm=done.preserved_norm if done else float("nan"),
            residual=done.residual if done else float("nan"),
            refinements=done.refinements if done else 0,
            discrepancy=done.discrepancy if done else 0.0,
            forget_loss=forget_loss,
            retain_loss=retain_loss,
            seconds=time.perf_counter() - start,
            skipped=skipped,
            tensors=done.tensors if done else {},
        )

    def _forget(self, forget: Callable[[], Tensor], params: dict[str, nn.Parameter]) -> Tensor:
        """p.grad = ± (1 - α) u; the loss, not looked at yet: the device may still be busy with it."""
        tape = per_sample(self.model, params) if self._flat else None
        with torch.enable_grad(), tape or nullcontext():
            loss = scalar(forget)
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        weight = self.sign * (1 - self.alpha)
        if tape is None:
            torch.autograd.backward(scaled, torch.full_like(scaled, weight), inputs=list(params.values()))
        else:
            self._outer = tape.accumulate_(scaled, weight)
        return loss.detach()

    def _retain(
        self, loss: Tensor, retain: Callable[[], Tensor], params: dict[str, nn.Parameter]
    ) -> tuple[float, float, Projection]:
        """p.grad = ± (1 - α) u_perp + α mean_j(g_j); both losses, and what was done."""
        if self.projector is not None:
            check_finite(float(loss))
            per_tensor = self.scope == "per_tensor"
            done = project_explicit(self.model, retain, params, self.projector, per_tensor=per_tensor, add=self.alpha)
            return float(loss), *done
        with per_sample(self.model, params) as tape, torch.enable_grad():
            losses = retain()
        check_shape(losses)
        seen: list[float] = []  # the forget loss and those of the retain samples
        tape.questions.ask(loss, lambda values: seen.append(check_finite(values[0])))
        tape.questions.ask(losses, lambda values: seen.extend(check_values(values)))
        if all(p.grad is None for p in params.values()):
            raise ValueError("forget() returned a loss that depends on no parameter that the optimizer holds")
        if self.scaler is not None:
            losses = self.scaler.scale(losses)
        add = torch.full((len(losses),), self.alpha / len(losses), dtype=torch.float64, device=losses.device)
        tape.outer, self._outer = self._outer, {}
        done = tape.project_(
            losses,
            self.scope,
            self.damping,
            self.rtol,
            keep_output_gradients=self.keep_output_gradients,
            add=add if self.alpha else None,
        )
        self._flat = tape.flat
        return seen[0], sum(seen[1:]) / len(seen[1:]), done

    def _apply(self, params: dict[str, nn.Parameter]) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(list(params.values()), self.max_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
