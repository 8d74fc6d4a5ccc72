"""Small language models, and samples of the words of a data set's description."""

import functools

import torch
import transformers
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

PAD, BEGIN, END = "<pad>", "<s>", "</s>"


@functools.cache
def description() -> str:
    return load_digits().DESCR


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Train a tokenizer of 120 pieces of words."""
    made = Tokenizer(models.BPE(unk_token=PAD))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.train_from_iterator([description()], trainers.BpeTrainer(vocab_size=120, special_tokens=[PAD, BEGIN, END]))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, bos_token=BEGIN, eos_token=END)


def samples(count: int, first: int = 0) -> list[dict[str, list[int]]]:
    """Return samples of 6 to 12 tokens, of which the first two are no labels."""
    ids = tokenizer()(description())["input_ids"]
    rows = [ids[12 * k : 12 * k + 6 + k % 7] for k in range(first, first + count)]
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100] * 2 + row[2:]} for row in rows]


def padded(rows: list[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    """Return samples as a batch."""
    length = max(len(row["input_ids"]) for row in rows)

    def column(name: str, fill: float) -> Tensor:
        fills = [[fill] * (length - len(row[name])) for row in rows]
        pairs = zip(rows, fills, strict=True)
        return torch.tensor([row[name] + more if side == "right" else more + row[name] for row, more in pairs])

    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100, "token_weights": 1.0}
    return {name: column(name, fills[name]) for name in rows[0]}


def model(kind: str = "llama", dropout: float = 0.0) -> torch.nn.Module:
    """Return a model of 10 to 20 thousand weights, the same each time."""
    torch.manual_seed(0)
    ids = dict(vocab_size=120, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "llama":
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**ids, **sizes, num_key_value_heads=1))
    if kind == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        sizes = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**ids, **sizes, **drops))
    sizes = dict(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0, dropout_rate=dropout)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**ids, **sizes))
