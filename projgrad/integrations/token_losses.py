"""One loss per sample of a model of transformers; of language models from tokens padded, masked, weighted or packed."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from .label_losses import CLASSIFIERS, POSITIONS, SINGLE, SPANS, class_sums, span_sums

Batch = Mapping[str, Any]
IGNORED = -100  # a label that does not count
UNSHIFTED = ("ForMaskedLM", "ForTokenClassification")  # kinds of losses in transformers: a label is of its own token
SHIFTED = (None, "ForCausalLM", "ForConditionalGeneration", "CsmForConditionalGeneration")
MEANS = (*SHIFTED, *UNSHIFTED, *CLASSIFIERS, SPANS)
ROWS = 1024  # of logits that are float32 at a time


class TokenSums(NamedTuple):
    """Of every sample: the weighted sum of its tokens' losses, and the sum of their weights, [n] each."""

    losses: Tensor
    weights: Tensor


def sample_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of every sample, (n,): the mean over the sample's own labelled tokens.

    For causal models, whose labels are shifted here; for sequence-to-sequence models, masked ones and classifiers of
    tokens, whose labels are not. Padding and prompts are labelled -100 and do not count; a sample without any label
    has loss 0, and so has one whose weights are all 0. Logits are turned into float32 a thousand rows at a time. A few
    models shift in their own way (BartForCausalLM, XLNet): compare with `model(**batch).loss` of one sample.

    Also for classifiers and regressions, by `config.problem_type` as in transformers (of several labels or numbers a
    sample: their mean), and for answers marked in a text, the mean of start and end; a position outside of the text
    counts 0.

    Args:
        model: one of transformers, also as peft or DistributedDataParallel wrap it.
        batch: its inputs, and "labels" (n, t), (n,) or (n, k), or "start_positions" and "end_positions" (n,). Perhaps
            "token_weights" (n, t), weights of the labels in the mean. With "position_ids" and without "attention_mask"
            rows may be packed: where positions do not go on by one, another sample begins, as in transformers' own
            masks. Then n counts samples with a label, in order.

    Raises:
        ValueError: no labels, or none other than -100; labels that are not of the shape of the logits; a model whose
            loss is none of these.
    """
    sums = token_sums(model, batch)
    return sums.losses / sums.weights.masked_fill(sums.weights == 0, 1)  # over a tiny number gradients overflow


def token_sums(model: nn.Module, batch: Batch) -> TokenSums:
    """Return the sums whose quotients `sample_losses` are; it has the arguments and errors."""
    kind = _kind(model)
    if kind not in MEANS:
        raise ValueError(f"the loss of a {type(_inner(model)).__name__} ({kind}) is no mean over tokens: give `losses`")
    if missing := [name for name in answers_of(model) if batch.get(name) is None]:
        raise ValueError(
            f"the batch has no {' and '.join(missing)}, only {', '.join(batch)}: the collator must make them"
        )
    if kind == SPANS:
        outputs = outputs_of(model, batch)
        return TokenSums(*span_sums(outputs.start_logits, outputs.end_logits, batch))
    labels, shifts = counted_labels(model, batch), shifts_labels(model)
    if not counts(labels):
        raise ValueError(f"no token of the batch has a label other than {uncounted(model)}: were the answers cut off?")
    logits = outputs_of(model, batch).logits
    if labels.ndim == 1 or kind in CLASSIFIERS:
        problem = getattr(_inner(model).config, "problem_type", None) if kind in CLASSIFIERS else SINGLE
        return TokenSums(*class_sums(logits, labels, problem))
    if not _is_pair(model) and "input_ids" in batch and batch["input_ids"].shape == labels.shape:
        logits = logits[:, -labels.shape[1] :]  # virtual tokens of a learned prompt come before
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for logits of {tuple(logits.shape)}: a label needs a row of logits"
        )
    owners = None if _is_pair(model) else _owners(batch)
    weights = batch.get("token_weights")
    weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights.float()
    weights = weights.masked_fill(labels == IGNORED, 0)
    if shifts:
        labels, weights = pad(labels[:, 1:], (0, 1), value=IGNORED), pad(weights[:, 1:], (0, 1))
    losses = _losses(logits.flatten(0, 1), labels.flatten()).view_as(labels) * weights
    if owners is None:
        return TokenSums(losses.sum(1), weights.sum(1))
    n = int(owners[-1, -1]) + 1
    sums = [t.new_zeros(n).index_add(0, owners.flatten(), t.flatten()) for t in (losses, weights)]
    labelled = sums[1] != 0  # padding behind the packed samples may look like others
    return TokenSums(*(t[labelled] for t in sums))


def outputs_of(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch without its own loss, which is a mean over samples; return its outputs."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "token_weights", *POSITIONS)}
    if _is_pair(model) and batch["labels"].ndim > 1 and "decoder_input_ids" not in inputs:
        make = getattr(_inner(model), "prepare_decoder_input_ids_from_labels", None)
        # Models without such a method do it in their forward pass.
        inputs |= {"labels": batch["labels"]} if make is None else {"decoder_input_ids": make(labels=batch["labels"])}
    if "use_cache" in inspect.signature(forward_of(model)).parameters:
        inputs["use_cache"] = False  # transformers' masks do not keep packed samples apart with a cache
    return model(**inputs)


def answers_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of what a batch must have, besides inputs, for losses of its samples."""
    return POSITIONS if _kind(model) == SPANS else ("labels",)


def shifts_labels(model: nn.Module) -> bool:
    """Return whether a label is what the token before it predicts."""
    return not _is_pair(model) and _kind(model) in SHIFTED


def uncounted(model: nn.Module) -> str:
    """Return the words of messages for the labels that do not count."""
    return f"{IGNORED}, first tokens aside, which nothing predicts" if shifts_labels(model) else str(IGNORED)


def counted_labels(model: nn.Module, batch: Batch) -> Tensor:
    """Return the labels of a batch; where they are shifted, -100 at a sample's first token, which nothing predicts."""
    labels, positions = batch["labels"], batch.get("position_ids")
    labels = labels if labels.is_floating_point() else labels.long()
    if labels.ndim != 2 or not shifts_labels(model):
        return labels
    labels = torch.cat([torch.full_like(labels[:, :1], IGNORED), labels[:, 1:]], 1)
    owners = _owners(batch) if positions is not None and positions.shape == labels.shape else None
    return labels if owners is None else labels.masked_fill(owners.diff(prepend=owners[:, :1]) != 0, IGNORED)


def counts(labels: Tensor) -> bool:
    """Return whether any label counts; numbers all do."""
    return labels.is_floating_point() or bool((labels != IGNORED).any())


def forward_of(model: nn.Module) -> Callable[..., object]:
    """Return the forward method whose arguments a batch may name: that of the model inside all wrappers."""
    inner = _inner(model)
    return inner.get_base_model().forward if hasattr(inner, "get_base_model") else inner.forward


def _is_pair(model: nn.Module) -> bool:
    """Return whether a model has a decoder of its own for the labels, which are not shifted then."""
    whole = _kind(model) in (*CLASSIFIERS, SPANS)  # which give the decoder their inputs
    return not whole and bool(getattr(_inner(model).config, "is_encoder_decoder", False))


def _kind(model: nn.Module) -> str | None:
    """Return what transformers calls the kind of a model's loss."""
    return getattr(_inner(model), "loss_type", None)


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and torch.compile; inside peft there is still its own forward."""
    while hasattr(model, "_orig_mod") or not hasattr(model, "config"):  # the first has the attributes of what is inside
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise ValueError(f"{type(model).__name__} has no config: losses of its samples need a function of your own")
        model = inner
    return model


def _owners(batch: Batch) -> Tensor | None:
    """Return the number of the sample that every token belongs to, [rows, t]; None if a row is a sample."""
    positions = batch.get("position_ids")
    if positions is None or batch.get("attention_mask") is not None:
        return None
    begins = positions.diff(prepend=positions[:, :1] - 1) != 1
    begins[:, 0] = True
    if int(begins.sum()) == len(begins):
        return None
    return (begins.flatten().cumsum(0) - 1).view_as(begins)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of every row of logits [m, vocabulary], in float32; no float32 logits are kept."""

    def part(rows: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(rows.float(), targets, ignore_index=IGNORED, reduction="none")

    if not logits.requires_grad:
        return torch.cat(list(map(part, logits.split(ROWS), labels.split(ROWS))))
    pieces = zip(logits.split(ROWS), labels.split(ROWS), strict=True)
    return torch.cat([checkpoint(part, *piece, use_reentrant=False) for piece in pieces])
