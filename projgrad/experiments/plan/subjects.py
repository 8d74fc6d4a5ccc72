"""What a plan is made for: a model and the losses of a batch, from a configuration or a function, without weights."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shapes by the names that their makers gave them; everything else from `transformers` by its type.
SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "Llama-3.2-1B": ("llama", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}),
    "Llama-3.2-3B": ("llama", {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}),
    "Llama-3.1-8B": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
    "SmolLM2-135M": ("llama", {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
}
LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 5e5, "max_position_embeddings": 131072}
SHAPES["Llama-3.2-1B"][1].update(LLAMA3, num_attention_heads=32, head_dim=64, tie_word_embeddings=True)
SHAPES["Llama-3.2-3B"][1].update(LLAMA3, num_attention_heads=24, head_dim=128, tie_word_embeddings=True)
SHAPES["Llama-3.1-8B"][1].update(LLAMA3, num_attention_heads=32)
SHAPES["SmolLM2-135M"][1].update(
    vocab_size=49152,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
for _kind, _options in SHAPES.values():
    if _kind == "gpt2":
        _options.update(vocab_size=50257, n_positions=1024)

Losses = Callable[[], Tensor]
ROWS = 1024  # of logits that are float32 at a time, with loss="chunked"


class Subject(NamedTuple):
    """What is planned for.

    title: for people. make: returns the model. losses: of the model and n samples, a function that runs it and returns
    their losses (n,).
    """

    title: str
    make: Callable[[], nn.Module]
    losses: Callable[[nn.Module, int], Losses]


class Unknown(ValueError):
    """A configuration that is not there or cannot be used."""


def subject_of(config: str, tokens: int, lora: int = 0, loss: str = "chunked") -> Subject:
    """Find what a configuration names.

    Args:
        config: a file or folder with a transformers configuration, the name of one, or `module:function`. The function
            is called without arguments and returns a model and a function of n. That one returns a function which runs
            the model on n samples and returns their losses (n,).
        tokens: of a sample, for transformers.
        lora: rank of adapters; 0: none, all weights are trained.
        loss: of transformers' models. "chunked": some rows of logits at a time in float32. "float32": all of them, as
            these models compute it.

    Raises:
        Unknown: nothing of this name; tokens beyond what the model can take; a model of another kind.
        ImportError: transformers or peft is not installed.
    """
    if ":" in config and not Path(config).exists():
        return _from_function(config, lora)
    try:
        import transformers
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise ImportError("a transformers configuration needs transformers: pip install 'projgrad[hf]'") from error

    found = _configuration(config)
    limit = getattr(found, "max_position_embeddings", None) or getattr(found, "n_positions", None)
    if limit and tokens > limit:
        raise Unknown(f"{config} takes {limit} tokens at most; got {tokens}")
    is_pair = bool(getattr(found, "is_encoder_decoder", False))
    kinds = transformers.AutoModelForSeq2SeqLM if is_pair else transformers.AutoModelForCausalLM
    kind = "SEQ_TO_SEQ_CAUSAL" if is_pair else "CAUSAL"
    if found.model_type not in getattr(modeling_auto, f"MODEL_FOR_{kind}_LM_MAPPING_NAMES"):
        raise Unknown(f"{config} is a {found.model_type}, which is no language model that generates text")

    def make() -> nn.Module:
        return _adapted(kinds.from_config(found).train(), lora)

    def losses(model: nn.Module, n: int) -> Losses:
        ids = torch.zeros(n, tokens + (not is_pair), dtype=torch.long)
        inputs = {"input_ids": ids, "decoder_input_ids": ids} if is_pair else {"input_ids": ids[:, :-1]}
        labels = (ids if is_pair else ids[:, 1:]).flatten()

        def run() -> Tensor:
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
            if loss == "chunked":
                return Chunked.apply(logits).view(n, -1).mean(1)
            return F.cross_entropy(logits.float(), labels, reduction="none").view(n, -1).mean(1)

        return run

    return Subject(f"{Path(config).name}, {tokens} tokens", make, losses)


def _configuration(config: str):
    """Return the transformers configuration of a file, folder, name or type."""
    import transformers

    path = Path(config)
    if path.exists():
        try:
            content = json.loads((path / "config.json" if path.is_dir() else path).read_text())
            if not isinstance(content, dict) or "model_type" not in content:
                raise ValueError("it has no model_type, such as llama")
            return transformers.AutoConfig.from_pretrained(path.parent if path.name == "config.json" else path)
        except Exception as error:  # of transformers, of huggingface_hub, of json
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise Unknown(f"{config} is no transformers configuration: {lines[0]}") from error
    name = config.rpartition("/")[2]
    if name in SHAPES:
        kind, options = SHAPES[name]
        return transformers.AutoConfig.for_model(kind, **options)
    try:
        return transformers.AutoConfig.from_pretrained(config, local_files_only=True)
    except (OSError, ValueError):
        pass
    try:
        return transformers.AutoConfig.for_model(config)
    except ValueError as error:
        known = ", ".join([*SHAPES, "gpt2"])
        raise Unknown(
            f"no configuration named {config}: give a config.json, a folder with one, a name such as {known}, or "
            "module:function"
        ) from error


def _from_function(config: str, lora: int) -> Subject:
    module, _, name = config.partition(":")
    sys.path.insert(0, "")  # as `python -m` does: modules of the folder that the command runs in
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise Unknown(f"{config}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    _check_arguments(config, function)
    made: list[Callable[[int], Losses]] = []

    def make() -> nn.Module:
        result = function()
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
            raise Unknown(f"{config}() must return a model and a function of n; got {type(result).__name__}")
        made.append(result[1])
        return _adapted(result[0], lora)

    return Subject(config, make, lambda model, n: made[-1](n))


def _check_arguments(config: str, function: Callable[..., object]) -> None:
    if not callable(function):
        raise Unknown(f"{config} is no function; got {type(function).__name__}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise Unknown(f"{config} is called without arguments, but: {error}") from error
    except ValueError:  # what is written in C tells nothing
        pass


def _adapted(model: nn.Module, rank: int) -> nn.Module:
    """Return the model with LoRA adapters on all its linear layers, the rest frozen; rank 0: as it is."""
    if not rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'projgrad[hf]'") from error
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))


class Chunked(torch.autograd.Function):
    """What a cross-entropy holds that makes float32 of some rows at a time: the logits, and later their gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        logits[:ROWS].float().logsumexp(1)
        return logits.new_empty(len(logits), dtype=torch.float32)

    @staticmethod
    def backward(ctx, weights: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        out = torch.empty_like(logits)
        (logits[:ROWS].float() - 1).exp_()
        return out
