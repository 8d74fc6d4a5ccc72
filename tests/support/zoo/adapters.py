"""Adapters of peft: the base is frozen."""

import pytest

from zoo.case import register
from zoo.language import causal, gpt2, llama


def adapted(base, config, lengths=(5, 3, 4), **options):
    peft = pytest.importorskip("peft")
    return causal(peft.get_peft_model(base, getattr(peft, config)(task_type="CAUSAL_LM", **options)), lengths=lengths)


GPT2 = dict(r=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
LLAMA = dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"])

ADAPTERS = {
    "lora_gpt2": lambda: adapted(gpt2(), "LoraConfig", **GPT2),
    "lora_gpt2_bias": lambda: adapted(gpt2(), "LoraConfig", **GPT2, bias="all"),
    "lora_llama": lambda: adapted(llama(), "LoraConfig", **LLAMA),
    "lora_llama_embedding": lambda: adapted(llama(), "LoraConfig", r=2, target_modules=["embed_tokens", "lm_head"]),
    "lora_llama_saved_head": lambda: adapted(llama(), "LoraConfig", **LLAMA, modules_to_save=["lm_head"]),
    "dora_llama": lambda: adapted(llama(), "LoraConfig", **LLAMA, use_dora=True),
    "dora_gpt2": lambda: adapted(gpt2(), "LoraConfig", **GPT2, use_dora=True),
    "ia3_llama": lambda: adapted(
        llama(), "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt_tuning": lambda: adapted(llama(), "PromptTuningConfig", num_virtual_tokens=2),
    "p_tuning": lambda: adapted(llama(), "PromptEncoderConfig", num_virtual_tokens=2, encoder_hidden_size=6),
    "prefix_tuning": lambda: adapted(gpt2(), "PrefixTuningConfig", num_virtual_tokens=2),
    "loha_llama": lambda: adapted(llama(), "LoHaConfig", r=2, target_modules=["q_proj", "v_proj"]),
    "vera_llama": lambda: adapted(llama(), "VeraConfig", r=4, target_modules=["q_proj"]),
    "oft_llama": lambda: adapted(llama(), "OFTConfig", oft_block_size=4, target_modules=["v_proj"]),
}
for _name, _build in ADAPTERS.items():
    register(_name, _build)
