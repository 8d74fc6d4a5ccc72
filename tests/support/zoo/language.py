"""Small language and speech models of transformers, from their configurations."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zoo.case import Case, make, next_token, padding_mask, register, to_ramp

VOCABULARY = 19
DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=12,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def pretrained(name: str, **config) -> torch.nn.Module:
    """A model of transformers by the name of its class, with random weights."""
    cls = getattr(pytest.importorskip("transformers"), name)
    return cls(cls.config_class(**config))


class Wide(TorchFunctionMode):
    """Keeps float64 where a model asks for float32: else the truth is no better than float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return Tensor.double(*args, **(kwargs or {}))
        args = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*args, **{k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()})


def in_float64(loss):
    @functools.wraps(loss)
    def wide(*args):
        with Wide():
            return loss(*args)

    return wide


def tokens(n: int, t: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (n, t))


@in_float64
def next_token_loss(model, ids, mask=None):
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return next_token(logits[:, -ids.shape[1] :], ids, mask)  # prompt tuning puts virtual tokens in front


def causal(model, n=3, t=5, lengths=None) -> Case:
    if lengths is None:
        return make(model, next_token_loss, tokens(n, t))
    return make(model, next_token_loss, tokens(len(lengths), max(lengths)), padding_mask(*lengths))


@in_float64
def hidden_loss(model, ids, mask=None):
    return to_ramp(model(input_ids=ids, attention_mask=mask).last_hidden_state)


@in_float64
def logits_loss(model, ids, mask=None):
    return to_ramp(model(input_ids=ids, attention_mask=mask).logits)


def encoder(model, loss=logits_loss, lengths=(5, 3, 4)) -> Case:
    return make(model, loss, tokens(len(lengths), max(lengths)), padding_mask(*lengths))


def gpt2(**options):
    return pretrained(
        "GPT2LMHeadModel",
        **dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=9, bos_token_id=1, eos_token_id=2),
        **options,
    )


def checkpointed():
    """Checkpointing is on in training mode only; there is no dropout."""
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return make(model, lambda m, ids: next_token_loss(m.train(), ids), tokens(3, 5))


def llama(**options):
    return pretrained("LlamaForCausalLM", **DECODER, num_key_value_heads=2, **options)


def mixtral(**options):
    return pretrained(
        "MixtralForCausalLM",
        **DECODER | dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2) | options,
    )


ENCODER = {k: v for k, v in DECODER.items() if k not in ("bos_token_id", "eos_token_id")}


def bert(name, **options):
    return pretrained(name, **ENCODER, **options)


def t5(**options):
    return pretrained(
        "T5ForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=6,
        decoder_start_token_id=0,
        **options,
    )


@in_float64
def translation_loss(model, source, mask, target):
    out = model(input_ids=source, attention_mask=mask, decoder_input_ids=target, use_cache=False)
    return next_token(out.logits, target)


def whisper():
    return pretrained(
        "WhisperForConditionalGeneration",
        vocab_size=VOCABULARY,
        num_mel_bins=6,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=5,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


@in_float64
def speech_loss(model, features, target):
    return next_token(model(input_features=features, decoder_input_ids=target, use_cache=False).logits, target)


def wav2vec2(norm):
    model = pretrained(
        "Wav2Vec2Model",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(6, 8),
        conv_stride=(2, 2),
        conv_kernel=(4, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        conv_bias=norm == "layer",
    )
    return make(model, lambda m, x: to_ramp(m(x).last_hidden_state), torch.randn(3, 31))


LANGUAGE: dict[str, Callable[[], Case]] = {
    "gpt2": lambda: causal(gpt2()),
    "gpt2_eager": lambda: causal(gpt2(attn_implementation="eager"), n=4, t=4),
    "gpt2_padded": lambda: causal(gpt2(), lengths=(6, 3, 5, 2)),
    "gpt2_frozen_embedding": lambda: make(gpt2(), next_token_loss, tokens(3, 5), frozen="wte"),
    "gpt2_checkpointed": checkpointed,
    "llama_grouped_queries": lambda: causal(llama()),
    "llama_tied": lambda: causal(llama(tie_word_embeddings=True, attention_bias=True), n=5, t=5),
    "llama_padded_eager": lambda: causal(llama(attn_implementation="eager"), lengths=(6, 3, 5)),
    "mistral_sliding_window": lambda: causal(
        pretrained("MistralForCausalLM", **DECODER, num_key_value_heads=2, head_dim=4, sliding_window=3), n=4, t=6
    ),
    "mixtral_batched_experts": lambda: causal(mixtral(experts_implementation="batched_mm")),
    "mixtral_eager_experts": lambda: causal(mixtral(experts_implementation="eager", num_local_experts=9), n=2, t=4),
    "qwen2": lambda: causal(pretrained("Qwen2ForCausalLM", **DECODER, num_key_value_heads=2), n=4),
    "qwen3": lambda: causal(pretrained("Qwen3ForCausalLM", **DECODER, num_key_value_heads=2, head_dim=6), n=4),
    "gemma2": lambda: causal(pretrained("Gemma2ForCausalLM", **DECODER, num_key_value_heads=2, head_dim=4), n=4),
    "phi": lambda: causal(pretrained("PhiForCausalLM", **DECODER, partial_rotary_factor=0.5), n=4),
    "gpt_neox": lambda: causal(pretrained("GPTNeoXForCausalLM", **DECODER), n=4),
    "opt": lambda: causal(
        pretrained(
            "OPTForCausalLM",
            **{k: v for k, v in DECODER.items() if k != "intermediate_size"},
            ffn_dim=24,
            word_embed_proj_dim=12,
        ),
        lengths=(5, 4, 3, 5),
    ),
    "bloom": lambda: causal(
        pretrained("BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=4), lengths=(5, 3, 4, 5)
    ),
    "falcon_multi_query": lambda: causal(
        pretrained(
            "FalconForCausalLM", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4
        ),
        n=4,
    ),
    "mamba": lambda: causal(
        pretrained(
            "MambaForCausalLM",
            **dict(vocab_size=VOCABULARY, hidden_size=12, state_size=4, num_hidden_layers=2, time_step_rank=3),
        ),
        n=3,
        t=5,
    ),
    "t5": lambda: make(t5(), translation_loss, tokens(3, 6), padding_mask(6, 4, 5), tokens(3, 4)),
    "t5_gated_untied": lambda: make(
        t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        translation_loss,
        tokens(4, 4),
        padding_mask(4, 2, 3, 4),
        tokens(4, 5),
    ),
    "bart": lambda: make(
        pretrained(
            "BartForConditionalGeneration",
            **dict(vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=12),
            **dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=20),
            **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2),
        ),
        translation_loss,
        tokens(3, 5),
        padding_mask(5, 3, 4),
        tokens(3, 4),
    ),
    "whisper": lambda: make(whisper(), speech_loss, torch.randn(3, 6, 10), tokens(3, 4)),
    "wav2vec2_group_norm": lambda: wav2vec2("group"),
    "wav2vec2_layer_norm": lambda: wav2vec2("layer"),
    "bert_masked": lambda: encoder(bert("BertForMaskedLM")),
    "bert_classifier": lambda: encoder(bert("BertForSequenceClassification", num_labels=3), lengths=(4, 2, 3, 4)),
    "roberta_eager": lambda: encoder(
        bert("RobertaForSequenceClassification", num_labels=3, attn_implementation="eager"), lengths=(5, 3, 4, 2)
    ),
    "distilbert": lambda: encoder(
        pretrained(
            "DistilBertForSequenceClassification",
            **dict(vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=12),
        )
    ),
    "albert_shared_layers": lambda: encoder(bert("AlbertForMaskedLM", embedding_size=8)),
    "electra": lambda: encoder(bert("ElectraForPreTraining", embedding_size=8)),
    "deberta": lambda: encoder(
        bert(
            "DebertaV2ForSequenceClassification",
            **dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4, share_att_key=True),
        )
    ),
    "convbert": lambda: encoder(
        bert("ConvBertForSequenceClassification", embedding_size=8, conv_kernel_size=3, head_ratio=2)
    ),
    "clip_text": lambda: encoder(
        pretrained("CLIPTextModel", **DECODER | dict(num_attention_heads=2)), hidden_loss, lengths=(5, 4, 3)
    ),
    "fnet": lambda: make(
        pretrained("FNetForMaskedLM", **{k: v for k, v in ENCODER.items() if k != "num_attention_heads"}),
        lambda m, ids: to_ramp(m(input_ids=ids).logits),
        tokens(3, 5),
    ),
}
for _name, _build in LANGUAGE.items():
    register(_name, _build)
