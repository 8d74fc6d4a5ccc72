"""Whisper as CTranslate2 stores it, read into a transformers model; transcripts by greedy search."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
# A layer's name in the file, and in transformers: several where the file holds their weights in one matrix.
LAYERS = {
    "conv1": ["conv1"],
    "conv2": ["conv2"],
    "embeddings": ["embed_tokens"],
    "position_encodings": ["embed_positions"],
    "layer_norm": ["layer_norm"],
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
KINDS = {"weight": "weight", "gamma": "weight", "encodings": "weight", "bias": "bias", "beta": "bias"}


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Read the variables of a CTranslate2 `model.bin` by name; scalars are settings. Little-endian, read-only.

    Raises:
        ValueError: the file is cut short, or holds a type of number that is not known here.
    """
    data, at = path.read_bytes(), 0

    def number(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return data[at - size : at].rstrip(b"\0").decode()

    variables = {}
    try:
        number("I"), text(), number("I")  # version of the format, name and version of the architecture
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            dtype, size = np.dtype(DTYPES[number("B")]), number("I")
            variables[name] = np.frombuffer(data, dtype, size // dtype.itemsize, at).reshape(shape)
            at += size
    except (struct.error, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a whole CTranslate2 model of numbers known here: {error!r}") from error
    return variables


def read_whisper(path: Path, positions: int | None = None) -> nn.Module:
    """Read a CTranslate2 Whisper as a `transformers.WhisperForConditionalGeneration` in float32, in evaluation mode.

    Args:
        path: its `model.bin`.
        positions: keep the first ones of the encoder only: 50 a second of sound. Default: all.

    Raises:
        ValueError: a weight that has no place in the model, or is quantised; a bias where the model has none.
        RuntimeError: a weight of the model that the file does not hold, or of another shape.

    Source: the format as written by CTranslate2 (MIT), the names of transformers (Apache-2.0).
    """
    variables = read_ctranslate2(path)
    state = {}
    for name, value in variables.items():
        if value.ndim:
            state |= _translated(name, value)
    key = "model.encoder.embed_positions.weight"
    state[key] = state[key][:positions]
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model = new_whisper(
        vocab_size=len(state["proj_out.weight"]),
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        d_model=state[key].shape[1],
        max_source_positions=len(state[key]),
        max_target_positions=len(state["model.decoder.embed_positions.weight"]),
        **{
            f"{side}_{what}": value
            for side in ("encoder", "decoder")
            for what, value in (
                ("layers", len({k.split(".")[3] for k in state if k.startswith(f"model.{side}.layers.")})),
                ("attention_heads", int(variables[f"{side}/num_heads"])),
                ("ffn_dim", len(state[f"model.{side}.layers.0.fc1.weight"])),
            )
        },
    )
    model.load_state_dict(state)
    return model


def new_whisper(**sizes: int) -> nn.Module:
    """Make a Whisper with random weights, without dropout, in evaluation mode."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        return WhisperForConditionalGeneration(WhisperConfig(**sizes)).eval()


def _translated(name: str, value: np.ndarray) -> dict[str, Tensor]:
    """Return a variable of the file under the names of transformers."""
    match = re.fullmatch(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)", name)
    if match is None or match[3] not in LAYERS or match[4] not in KINDS:
        raise ValueError(f"{name} {value.shape} has no place in a Whisper model")
    if not np.issubdtype(value.dtype, np.floating):
        raise ValueError(f"{name} is {value.dtype}: only weights that are not quantised are read")
    side, layer, names, kind = match[1], match[2], LAYERS[match[3]], KINDS[match[4]]
    prefix = f"model.{side}." + (f"layers.{layer}." if layer else "")
    pieces = np.split(value.astype(np.float32), len(names))
    state = {f"{prefix}{n}.{kind}": torch.from_numpy(piece) for n, piece in zip(names, pieces, strict=True)}
    for key in [key for key in state if key.endswith("k_proj.bias")]:
        if state.pop(key).any():
            raise ValueError(f"{name} gives the keys a bias, which Whisper does not have")
    return state


@torch.no_grad()
def transcribe(model: nn.Module, features: Tensor, prefix: list[int], end: int, limit: int) -> Tensor:
    """Make greedy transcripts as token ids (n, t), t <= limit: up to and with the end token, then -100.

    Args:
        model: a Whisper.
        features: log-mel spectra (n, mels, frames).
        prefix: the decoder's first tokens, which the transcript leaves out.
        end: the token that ends a transcript.
        limit: largest number of tokens.
    """
    memory = model.get_encoder()(features).last_hidden_state  # [n, positions, d]
    tokens = torch.tensor(prefix, device=features.device).expand(len(features), -1)
    open_ = torch.ones(len(features), dtype=torch.bool, device=features.device)
    cache, columns = None, []
    while open_.any() and len(columns) < limit:
        made = model(encoder_outputs=(memory,), decoder_input_ids=tokens, past_key_values=cache, use_cache=True)
        tokens, cache = made.logits[:, -1:].argmax(-1), made.past_key_values
        columns.append(tokens[:, 0].where(open_, -100))
        open_ &= tokens[:, 0] != end
    return torch.stack(columns, 1)
