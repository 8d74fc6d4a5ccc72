"""Teach a small Llama who lives where, then forget four people with LoRA and AdamW, by ascent and by OrthoGrad."""

import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from projgrad.integrations.transformers import UnlearningTrainer, sample_losses

NAMES = ["Ada", "Bo", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hal", "Ida", "Jon", "Kim", "Lou", "Mia", "Ned", "Oda", "Al"]
WORDS = ["lives", "in", "Rome", "Oslo", "Lima", "Bern", "Riga", "Cairo", "Delhi", "Quito", *NAMES]


def fact(k: int) -> dict[str, torch.Tensor]:  # such as "Ada lives in Rome", of which the city alone is asked for
    words = [NAMES[k], "lives", "in", WORDS[2 + 3 * k % 8]]
    ids = torch.tensor([WORDS.index(word) for word in words])
    return {"input_ids": ids, "labels": torch.cat([torch.full((3,), -100), ids[3:]])}


def known(model: torch.nn.Module, facts: list[dict[str, torch.Tensor]]) -> float:  # mean probability of the city
    batch = {name: torch.stack([fact[name] for fact in facts]).to(model.device) for name in facts[0]}
    return float(sample_losses(model.eval(), batch).detach().neg().exp().mean())


def main(folder: str = "forget_facts") -> dict[str, list[float]]:
    set_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes))
    forget, retain = [fact(k) for k in range(4)], [fact(k) for k in range(4, 16)]
    options = dict(report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True)
    Trainer(
        base, TrainingArguments(folder, max_steps=150, learning_rate=3e-3, **options), train_dataset=forget + retain
    ).train()
    table = {"taught": [known(base, forget), known(base, retain)]}
    for method in "grad_ascent", "orthograd":
        model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        args = TrainingArguments(folder, max_steps=40, learning_rate=1e-2, per_device_train_batch_size=4, **options)
        sides = dict(forget_dataset=forget, retain_dataset=retain, retain_batch_size=12)
        UnlearningTrainer(model, args, method=method, **sides).train()
        table[method] = [known(model, forget), known(model, retain)]
    print("probability of the right city   forgotten people   the others")
    for name, row in table.items():
        print(f"{name:30}  {row[0]:16.1%}  {row[1]:11.1%}")
    return table


if __name__ == "__main__":
    main(*sys.argv[1:])
