"""What a case of the zoo is, and the losses that most of them share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ZOO: dict[str, Callable[[], "Case"]] = {}


@dataclass(frozen=True)
class Case:
    """A model and its n losses: `loss(model, *inputs)` is (n,), the samples along dimension dims[k] of inputs[k]."""

    model: nn.Module
    loss: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    dims: tuple[int, ...]

    @property
    def n(self) -> int:
        return self.inputs[0].shape[self.dims[0]]

    def to(self, device: str) -> "Case":
        return replace(self, model=self.model.to(device), inputs=tuple(x.to(device) for x in self.inputs))

    def losses(self, model: nn.Module) -> Tensor:
        return self.loss(model, *self.inputs)

    def one(self, model: nn.Module, j: int) -> Tensor:
        """The loss of sample j from a batch of size one."""
        alone = (x.narrow(d, j, 1) for x, d in zip(self.inputs, self.dims, strict=True))
        return self.loss(model, *alone)[0]


def register(name: str, build: Callable[[], Case]) -> None:
    def seeded() -> Case:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            torch.manual_seed(0)
            case = build()
            _shake(case.model.double().eval())
        finally:
            torch.set_default_dtype(default)
        return case

    assert name not in ZOO, name
    ZOO[name] = seeded


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    """Registers a builder under its own name."""
    register(build.__name__, build)
    return build


def make(
    model: nn.Module, loss: Callable[..., Tensor], *inputs: Tensor, dims: int | Sequence[int] = 0, frozen: str = ""
) -> Case:
    """A case; the parameters whose names contain `frozen` are not trained."""
    for name, p in model.named_parameters():
        if frozen and frozen in name:
            p.requires_grad_(False)
    return Case(model, loss, inputs, (dims,) * len(inputs) if isinstance(dims, int) else tuple(dims))


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """No zero bias, no unit scale, no zero mean: what is forgotten must show."""
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.1, 0.4)


def to_ramp(y: Tensor, dim: int = 0) -> Tensor:
    """Mean squared distance of each sample's output to a fixed ramp (n,)."""
    y = y.movedim(dim, 0)
    y = y.reshape(len(y), -1)
    return (y - torch.linspace(-1, 1, y.shape[1], dtype=y.dtype, device=y.device)).square().mean(1)


def regression(model: nn.Module, *x: Tensor) -> Tensor:
    return to_ramp(model(*x))


def regression_dim1(model: nn.Module, *x: Tensor) -> Tensor:
    return to_ramp(model(*x), 1)


def next_token(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross entropy of each sequence's next tokens, padding left out (n,)."""
    losses = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")  # [n, t - 1]
    weights = torch.ones_like(losses) if mask is None else mask[:, 1:].to(losses.dtype)
    return (losses * weights).sum(1) / weights.sum(1)


def padding_mask(*lengths: int) -> Tensor:
    """1 where there is a token, right padded (n, t)."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
