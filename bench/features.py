"""The rows of `bench.support`: every feature that models have, with a small model of it, a batch and losses."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from projgrad.experiments.benchmark import models

from .feature_models import (
    CLASSES,
    VOCABULARY,
    Batch,
    Built,
    Cube,
    Distances,
    Quantised,
    adapted_llama,
    adapters,
    add_in_place,
    attend,
    attend_packed,
    attention,
    bare,
    batch_norm,
    calls,
    centred,
    dropped,
    embedded,
    frozen,
    gpt2,
    half_narrow,
    heads,
    images,
    layers,
    low_rank,
    routed,
    sequences,
    tied,
    uses,
    vectors,
)


class Job(models.Job):
    """A model with its optimizer, and two batches of n samples."""

    def __init__(self, model: nn.Module, batch: Batch, n: int = 4) -> None:
        super().__init__(model, batch, n)
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4)


@dataclass(frozen=True)
class Feature:
    """One row of the matrix.

    whole: the loss of a sample depends on the rest of its batch. Then K of the losses as they are is the truth, to
    refuse is right too, and no projection is compared.
    limit: what K and the projection may be off, relative: 1e-8 in float64, more where a part of the model is coarser.
    needs: packages that it is built of.
    """

    title: str
    build: Callable[[], Built]
    whole: bool = False
    limit: float = 1e-8
    dtype: torch.dtype = torch.float64
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def job(self) -> Job:
        """Build the model and its batches, the same ones every time."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            torch.manual_seed(0)
            return Job(*self.build())
        finally:
            torch.set_default_dtype(before)


FEATURES = {
    "linear": Feature("linear layers", lambda: layers(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES))),
    "conv1d": Feature(
        "convolution, 1 d, dilated",
        lambda: layers(nn.Conv1d(2, 4, 2, dilation=2), nn.Flatten(), nn.Linear(16, CLASSES), shape=(2, 6)),
    ),
    "conv2d": Feature("convolution, 2 d", lambda: images(nn.Conv2d(2, 4, 3, padding=1, stride=2), 4)),
    "grouped conv": Feature("convolution in groups", lambda: images(nn.Conv2d(4, 6, 3, groups=2), 6)),
    "transposed conv": Feature("transposed convolution", lambda: images(nn.ConvTranspose2d(2, 4, 2, stride=2), 4)),
    "batch norm, eval": Feature("batch norm, evaluation mode", lambda: batch_norm(False)),
    "batch norm, train": Feature("batch norm, training mode", lambda: batch_norm(True), whole=True),
    "layer norm": Feature(
        "layer norm", lambda: layers(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, CLASSES))
    ),
    "RMS norm": Feature("RMS norm", lambda: layers(nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, CLASSES))),
    "group norm": Feature("group norm", lambda: images(nn.Conv2d(2, 4, 3), 4, nn.GroupNorm(2, 4))),
    "instance norm": Feature("instance norm", lambda: images(nn.Conv2d(2, 4, 3), 4, nn.InstanceNorm2d(4, affine=True))),
    "embedding": Feature("embedding", embedded),
    "sparse embedding": Feature("embedding with sparse gradients", lambda: embedded(sparse=True)),
    "tied embedding": Feature("embedding tied to the head", tied),
    "embedding bag": Feature(
        "embedding bag",
        lambda: (
            nn.Sequential(nn.EmbeddingBag(VOCABULARY, 6), nn.Linear(6, CLASSES)),
            lambda n: (torch.randint(VOCABULARY, (n, 3)), torch.randint(CLASSES, (n,))),
        ),
    ),
    "LSTM": Feature(
        "LSTM",
        lambda: calls(
            lambda m, x: m.head(m.rnn(x)[0]),
            sequences(),
            rnn=nn.LSTM(6, 4, batch_first=True),
            head=nn.Linear(4, CLASSES),
        ),
    ),
    "GRU": Feature(
        "GRU, time before samples",
        lambda: calls(
            lambda m, x: m.head(m.rnn(x.transpose(0, 1))[0].transpose(0, 1)),
            sequences(),
            rnn=nn.GRU(6, 4),
            head=nn.Linear(4, CLASSES),
        ),
    ),
    "attention": Feature("nn.TransformerEncoderLayer", attention),
    "sdpa": Feature("F.scaled_dot_product_attention", lambda: calls(attend, sequences(), **heads())),
    "functional": Feature(
        "F.linear with a parameter",
        lambda: uses(lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.v), w=(7, 6), b=(7,), v=(CLASSES, 7)),
    ),
    "bare": Feature(
        "class token, positions, scale",
        lambda: uses(bare, vectors(3, 6), token=(1, 1, 6), positions=(1, 4, 6), scale=(6,), shift=(6,), w=(6, CLASSES)),
    ),
    "einsum": Feature(
        "einsum with a parameter",
        lambda: uses(lambda m, x: torch.einsum("ntd,hdc->nthc", x, m.w).tanh().sum(2), w=(2, 6, CLASSES)),
    ),
    "weight norm": Feature(
        "weight norm (parametrization)",
        lambda: layers(parametrizations.weight_norm(nn.Linear(6, 7)), nn.Tanh(), nn.Linear(7, CLASSES)),
    ),
    "shared layer": Feature(
        "one layer used twice",
        lambda: calls(
            lambda m, x: m.head(m.inner(m.inner(x).tanh()).tanh()), inner=nn.Linear(6, 6), head=nn.Linear(6, CLASSES)
        ),
    ),
    "frozen": Feature(
        "a frozen part",
        lambda: layers(frozen(nn.Linear(6, 7)), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, CLASSES)),
    ),
    "LoRA": Feature("LoRA by hand", lambda: calls(low_rank, **adapters(frozen(nn.Linear(6, 6))))),
    "quantised base": Feature("LoRA on an 8-bit base", lambda: calls(low_rank, **adapters(Quantised(6, 6)))),
    "checkpoint": Feature(
        "checkpointing",
        lambda: calls(
            lambda m, x: m.head(checkpoint(m.inner, x, use_reentrant=False)),
            inner=nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
            head=nn.Linear(6, CLASSES),
        ),
    ),
    "in place": Feature(
        "operations in place", lambda: calls(add_in_place, inner=nn.Linear(6, 6), head=nn.Linear(6, CLASSES))
    ),
    "dropout": Feature(
        "dropout, seed fixed", lambda: calls(dropped, inner=nn.Linear(6, 6), head=nn.Linear(6, CLASSES)), whole=True
    ),
    "mixing": Feature(
        "losses that share terms between samples",
        lambda: calls(centred, inner=nn.Linear(6, 6), head=nn.Linear(6, CLASSES)),
        whole=True,
    ),
    "experts": Feature(
        "mixture of experts, routed",
        lambda: calls(
            routed,
            sequences(),
            router=nn.Linear(6, 2),
            first=nn.Linear(6, 6),
            second=nn.Linear(6, 6),
            head=nn.Linear(6, CLASSES),
        ),
    ),
    "two dtypes": Feature(
        "bfloat16 and float32 in one model",
        lambda: calls(half_narrow, inner=nn.Linear(6, 6).bfloat16(), norm=nn.LayerNorm(6), head=nn.Linear(6, CLASSES)),
        dtype=torch.float32,
        limit=5e-2,
    ),
    "packed": Feature("samples packed in one row", lambda: calls(attend_packed, sequences(), **heads())),
    "wrapper": Feature(
        "nn.DataParallel around the model",
        lambda: (nn.DataParallel(layers(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES))[0]), vectors(6)),
    ),
    "compiled": Feature(
        "a part under torch.compile",
        lambda: calls(
            lambda m, x: m.head(m.inner(x)),
            inner=torch.compile(nn.Sequential(nn.Linear(6, 7), nn.Tanh()), backend="aot_eager"),
            head=nn.Linear(7, CLASSES),
        ),
    ),
    "function": Feature(
        "custom autograd.Function",
        lambda: uses(lambda m, x: Cube.apply(x, m.w).tanh() @ m.v, w=(6, 6), v=(6, CLASSES)),
    ),
    "module": Feature(
        "custom module",
        lambda: calls(lambda m, x: m.head(m.inner(x)), inner=Distances(6, 4), head=nn.Linear(4, CLASSES)),
    ),
    "GPT-2": Feature("GPT-2 of transformers", gpt2, needs=("transformers",)),
    "Llama, LoRA": Feature(
        "Llama of transformers, LoRA of peft",
        adapted_llama,
        dtype=torch.float32,
        limit=1e-4,
        needs=("transformers", "peft"),
    ),
}
