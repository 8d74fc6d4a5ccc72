"""OrthoGrad: ascend on the forget loss, orthogonally to the gradient of every retain sample."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..explicit import ExplicitGradients
from ..projection import Projected, project


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one step.

    rank: independent retain gradients that were projected out, summed over tensors with scope="per_tensor"; None with a
        custom projector.
    preserved_norm: ‖u_perp‖ / ‖u‖ over all parameters: near 1 the projection did nothing, near 0 nothing is left to
        forget with.
    residual: max_j |cos(g_j, u_perp)|, the largest over tensors with scope="per_tensor".
    forget_loss, retain_loss: before the step; the retain loss is the mean over samples.
    seconds: wall time of the whole step.
    tensors: the first three for every parameter, with scope="per_tensor"; empty otherwise.
    """

    rank: int | None
    preserved_norm: float
    residual: float
    forget_loss: float
    retain_loss: float
    seconds: float
    tensors: dict[str, Projected] = field(default_factory=dict)


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
        chunk_size: samples differentiated at once; bounds the memory of the model's activations. None: all.
        max_bytes: bound on the explicit gradient matrix. Above it parameters are treated in groups, each recomputed for
            every pass (one group holds at least one tensor): slower, the same result. None: hold all of G.
        projector: function (u, G) -> u_perp instead of projgrad's, such as `projgrad.projectors.qr`; needs all of G.

    Raises:
        ValueError: alpha outside [0, 1], an unknown scope, no trainable parameter in the optimizer.

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
        chunk_size: int | None = None,
        max_bytes: int | None = None,
        projector: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha weighs the mean retain gradient and must be in [0, 1]; got {alpha}")
        if scope not in ("global", "per_tensor"):
            raise ValueError(f"scope must be 'global' or 'per_tensor'; got {scope!r}")
        if projector is not None and max_bytes is not None:
            raise ValueError("max_bytes needs projgrad's own projection: a custom projector is given all of G")
        self.model, self.optimizer, self.alpha, self.scope = model, optimizer, alpha, scope
        self.sign = -1.0 if ascend else 1.0
        self.damping, self.rtol, self.max_norm = damping, rtol, max_norm
        self.chunk_size, self.max_bytes, self.projector = chunk_size, max_bytes, projector
        self.parameters()

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is updated, by name: the model's parameters that require gradients now and belong to the optimizer."""
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad and id(p) in owned}
        if not found:
            raise ValueError("the optimizer holds no parameter of the model that requires a gradient")
        return found

    def step(self, forget: Callable[[], Tensor], retain: Callable[[], Tensor]) -> StepRecord:
        """One update. An error before the optimizer steps leaves the model, its `.grad` and the optimizer as they were.

        Args:
            forget: returns the scalar forget loss.
            retain: returns the losses of the n retain samples, shape (n,): each one's gradient is protected.

        Raises:
            ValueError: a loss of the wrong shape, or batch norm in training mode (per-sample gradients do not exist).
            FloatingPointError: NaN or Inf in a loss or a gradient.
            ArithmeticError: the projection left more of a retain gradient than rounding explains.
        """
        start = time.perf_counter()
        _check_batch_norm(self.model)
        params = self.parameters()
        with torch.enable_grad():
            loss = forget()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"forget() must return one scalar loss; got {got}")
        if not loss.requires_grad:
            raise ValueError("forget() returned a loss that does not depend on any trainable parameter")
        if not loss.isfinite():
            raise FloatingPointError(f"the forget loss is {loss.item()}; nothing was changed")
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()), allow_unused=True), strict=True))
        samples = ExplicitGradients(self.model, retain, params, self.chunk_size)
        means = dict(zip(params, samples.combine(torch.full_like(samples.losses, 1 / samples.n)), strict=True))
        # A parameter that neither loss uses gets no gradient, as in plain training; a zero one would let it decay.
        used = [name for name in params if grads[name] is not None or means[name] is not None]
        if not used:
            raise ValueError("neither loss depends on a parameter that the optimizer holds")
        u, mean = (
            {name: torch.zeros_like(params[name]) if some[name] is None else some[name] for name in used}
            for some in (grads, means)
        )
        _check_finite("forget", u)
        _check_finite("retain", mean)
        u_perp, done = project(
            u,
            samples,
            per_tensor=self.scope == "per_tensor",
            damping=self.damping,
            rtol=self.rtol,
            max_bytes=self.max_bytes,
            projector=self.projector,
        )
        _check_finite("projected forget", u_perp)
        update = {name: self.alpha * mean[name] + self.sign * (1 - self.alpha) * u_perp[name] for name in used}
        self._apply({params[name]: g for name, g in update.items()})
        before, after = _norm(u), _norm(u_perp)
        return StepRecord(
            rank=None if self.projector else sum(d.rank for d in done.values()),
            preserved_norm=after / before if before else 1.0,
            residual=max(d.residual for d in done.values()),
            forget_loss=float(loss.detach()),
            retain_loss=float(samples.losses.detach().mean()),
            seconds=time.perf_counter() - start,
            tensors=done if self.scope == "per_tensor" else {},
        )

    def _apply(self, update: dict[nn.Parameter, Tensor]) -> None:
        """Write the update to `.grad`, clip it, step. Every other parameter of the optimizer steps without a gradient:
        a stale one would move it. The old `.grad` come back if the optimizer refuses."""
        old = {p: p.grad for group in self.optimizer.param_groups for p in group["params"]}
        try:
            for p in old:
                p.grad = update.get(p)
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(list(update), self.max_norm)
            self.optimizer.step()
        except BaseException:
            for p, grad in old.items():
                p.grad = grad
            raise


def _norm(grads: dict[str, Tensor]) -> float:
    return float(torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt())


def _check_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} that uses batch statistics: the gradient of one "
                "sample then depends on the others, so there is nothing to project. Call model.eval() before step()"
            )


def _check_finite(what: str, grads: dict[str, Tensor]) -> None:
    for name, grad in grads.items():
        if grad.layout != torch.strided:
            raise ValueError(f"the {what} gradient of {name} is sparse: build the layer with sparse=False")
        if not grad.isfinite().all():
            raise FloatingPointError(f"the {what} gradient of {name} holds NaN or Inf; nothing was changed")
