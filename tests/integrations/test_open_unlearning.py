"""The plug-in for open-unlearning, in a stand-in of the framework: its base classes, data set, collator and call."""

import contextlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from language import model, padded, samples

FOLDER = Path(__file__).parents[2] / "examples" / "open_unlearning"
pytestmark = pytest.mark.same_without_extension


class FinetuneTrainer(transformers.Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)


class UnlearnTrainer(FinetuneTrainer):
    pass


class ForgetRetain(torch.utils.data.Dataset):
    forget, retain = samples(8), samples(20, 8)

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, k):
        return {"forget": self.forget[k], "retain": self.retain[int(torch.randint(len(self.retain), ()))]}


def collate(items):  # also of nested samples, and with their numbers
    if "input_ids" not in items[0]:
        return {side: collate([item[side] for item in items]) for side in items[0]}
    return padded(items) | {"index": torch.arange(len(items))}


@pytest.fixture
def plugin(monkeypatch):
    for name in ("trainer", "trainer.unlearn", "trainer.unlearn.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["trainer.unlearn.base"].UnlearnTrainer = UnlearnTrainer
    spec = importlib.util.spec_from_file_location("plugin", FOLDER / "orthograd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configuration():
    """The lines of the configuration, without a YAML parser."""
    found, where = {}, []
    for line in (FOLDER / "OrthoGrad.yaml").read_text().splitlines():
        text = line.partition("#")[0].rstrip()
        if ":" not in text:
            continue
        name, _, value = text.strip().partition(":")
        where[len(text) - len(text.lstrip()) >> 1 :] = [name]
        found[".".join(where)] = value.strip()
    return found


def train(plugin, folder, steps=3, **method_args):
    named = configuration()
    assert named["handler"] == "OrthoGrad"
    args = transformers.TrainingArguments(
        str(folder),
        optim=named["args.optim"],
        remove_unused_columns=named["args.remove_unused_columns"] == "True",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={
            "use_reentrant": named["args.gradient_checkpointing_kwargs.use_reentrant"] == "True"
        },
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = plugin.OrthoGrad(
        model=model(), train_dataset=ForgetRetain(), eval_dataset=None, data_collator=collate, args=args, **method_args
    )
    with contextlib.redirect_stdout(None):
        trainer.train()
    return trainer


@pytest.mark.parametrize("retain_per_forget, micro", [(1, 2), (4, 8)])
def test_the_trainer_takes_the_frameworks_batches(plugin, tmp_path, retain_per_forget, micro):
    named, seen = configuration(), []
    options = {"alpha": float(named["method_args.options.alpha"]), "scope": named["method_args.options.scope"]}
    assert int(named["method_args.retain_per_forget"]) == 4
    step = plugin.OrthoGrad.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(tuple(len(inputs[side]["labels"]) for side in ("forget", "retain")))
        return step(self, model, inputs, *args, **kwargs)

    plugin.OrthoGrad.training_step = watched
    trainer = train(plugin, tmp_path, retain_per_forget=retain_per_forget, options=options)
    assert set(seen) == {(2, micro)}
    assert trainer.unlearning_method.unlearner.metric == "optimizer"
    residuals = [entry["residual"] for entry in trainer.state.log_history if "residual" in entry]
    assert len(residuals) == 3 and max(residuals) < 1e-3


def test_another_method_on_the_same_batches(plugin, tmp_path):
    trainer = train(plugin, tmp_path, method="graddiff", options={"gamma": 0.5})
    assert all("forget_loss" in entry for entry in trainer.state.log_history if "loss" in entry)
