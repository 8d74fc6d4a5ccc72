"""The model, and the unlearning methods under one interface: step(forget closure, retain closure)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import projectors
from ..methods.orthograd import OrthoGrad

MAX_NORM = 1.0  # every method's update is clipped to this norm: ascent alone grows without bound


def cnn(shape: tuple[int, int], classes: int) -> nn.Sequential:
    """A small convolutional network: 76,498 parameters on 8x8 digits, 264,864 on the 56x46 faces."""
    widths = (32, 64) if max(shape) <= 16 else (16, 32, 32)
    layers: list[nn.Module] = []
    for before, after in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features = widths[-1] * (shape[0] >> len(widths)) * (shape[1] >> len(widths))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 216), nn.ReLU(), nn.Linear(216, classes))


class Mean:
    """The baselines: update = w_r mean_j(g_j) - w_f u, clipped; a closure of weight 0 is never called."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, w_r: float, w_f: float) -> None:
        self.params, self.optimizer, self.w_r, self.w_f = list(model.parameters()), optimizer, w_r, w_f

    def step(self, forget: Callable[[], Tensor], retain: Callable[[], Tensor]) -> None:
        loss = self.w_r * retain().mean() if self.w_r else 0.0
        if self.w_f:
            loss = loss - self.w_f * forget()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()


def make(method: str, model: nn.Module, optimizer: torch.optim.Optimizer, alpha: float | None) -> Mean | OrthoGrad:
    """The named method on a model; alpha is used by NegGrad+ and OrthoGrad."""
    if method in BASELINES:
        return Mean(model, optimizer, *BASELINES[method](alpha))
    projector = {"orthograd-qr": projectors.qr, "orthograd": None}[method]
    return OrthoGrad(model, optimizer, alpha, max_norm=MAX_NORM, projector=projector)


BASELINES: dict[str, Callable[[float | None], tuple[float, float]]] = {
    "ascent": lambda _: (0.0, 1.0),
    "finetune": lambda _: (1.0, 0.0),
    "neggrad": lambda alpha: (alpha, 1 - alpha),
}
TITLES = {
    "original": "original",
    "retrained": "retrained",
    "ascent": "gradient ascent",
    "finetune": "fine-tuning",
    "neggrad": "NegGrad+",
    "orthograd-qr": "OrthoGrad, QR",
    "orthograd": "OrthoGrad, projgrad",
}
TUNED = ("ascent", "finetune", "neggrad", "orthograd")  # "orthograd-qr" is the same method: it takes its settings
