"""What `UnlearningTrainer` and `UnlearningSteps` refuse or warn of, before anything is trained."""

import contextlib
import math
import warnings

import peft
import pytest
import transformers
from language import model, padded, tokenizer
from trainers import FORGET, RETAIN, assert_same, run, trainer

from projgrad.integrations.transformers import UnlearningSteps, UnlearningTrainer, sample_losses

pytestmark = [
    pytest.mark.same_without_extension,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument", "ignore:.*is_gradient_checkpointing"),
]


BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
if "group_by_length" in transformers.TrainingArguments.__dataclass_fields__:  # of earlier versions
    BY_LENGTH = {"group_by_length": True}
WRONG = {
    "method": (dict(method="orthogonal"), "method must be one of orthograd, pgu, feasible, grad_ascent"),
    "option": (dict(method_options={"beta": 1}), "method='orthograd' has no option beta; it has alpha, scope, "),
    "option_of_a_loss": (dict(method="npo", method_options={"gama": 1}), "no option gama; it has alpha, gamma, beta"),
    "no_options": (dict(method="finetune", method_options={"alpha": 1}), "no option alpha; it has none"),
    "range": (dict(method_options={"alpha": 2}), "alpha weighs the mean retain gradient and must be in"),
    "range_of_a_loss": (dict(method="npo", method_options={"beta": 0.0}), r"beta must be in \(0, inf\)"),
    "max_norm": (dict(method_options={"max_norm": 1.0}), "max_norm is max_grad_norm of the TrainingArguments"),
    "empty": (dict(data=([], RETAIN)), "forget_dataset is empty"),
    "many": (dict(n=25), "25 retain samples are asked for in a micro-batch, but retain_dataset has 24"),
    "unlabelled": (
        dict(data=(FORGET, [{"input_ids": [1, 2]}] * 9)),
        "samples of retain_dataset have no labels: the collator made input_ids",
    ),
    "cut": (
        dict(data=([FORGET[0], FORGET[1] | {"labels": [-100] * 7}], RETAIN)),
        "samples without any label other than -100, first tokens aside, which nothing predicts: 1. Leave them out",
    ),
    "none": (dict(n=0), "retain_batch_size must be an integer of at least 1; got 0"),
    "counted": (dict(include_num_input_tokens_seen="all"), "does not count the tokens of two batches"),
    "columns": (
        dict(data=([{"question": "Who?"}] * 9, RETAIN)),
        "samples of forget_dataset have none of the model's arguments; they have question",
    ),
    "smoothing": (
        dict(label_smoothing_factor=0.1),
        "label_smoothing_factor and compute_loss_func make no losses of samples",
    ),
    "lengths": (BY_LENGTH, "samples are drawn at random or in sequence"),
    "reentrant": (
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        "checkpointing with use_reentrant=True cannot give the gradients",
    ),
    "batch_size": (dict(auto_find_batch_size=True), "auto_find_batch_size changes one of two batch sizes"),
}


@pytest.mark.parametrize("kind, refused", [("BartForCausalLM", True), ("BloomForCausalLM", False)])
def test_the_models_own_loss_is_compared(tmp_path, kind, refused):
    """Those of both are a mean over tokens, but Bart's labels are not shifted."""
    sizes = dict(vocab_size=120, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if refused:
        sizes |= dict(d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16)
    else:
        sizes |= dict(hidden_size=16, n_layer=1, n_head=2)
    net = getattr(transformers, kind)(getattr(transformers, kind.split("For")[0] + "Config")(**sizes))
    with pytest.raises(ValueError, match="a BartForCausalLM gives the first") if refused else contextlib.nullcontext():
        trainer(tmp_path, net)


COMPANY = {
    "left": ("gpt2", lambda rows: padded(rows, "left"), True),
    "left_rotary": ("llama", lambda rows: padded(rows, "left"), False),
    "right": ("gpt2", padded, False),
    "packed": ("llama", transformers.DataCollatorWithFlattening(), False),
    "packed_prompt": ("prompt", transformers.DataCollatorWithFlattening(), True),
}


@pytest.mark.parametrize("kind, collator, warns", COMPANY.values(), ids=COMPANY)
def test_losses_that_depend_on_company_are_told(tmp_path, kind, collator, warns):
    net = model("llama" if kind == "prompt" else kind)
    if kind == "prompt":
        net = peft.get_peft_model(net, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, net, collator=collator)
    assert any("depends on the samples beside it" in str(one.message) for one in caught) == warns


class Overridden(UnlearningTrainer):
    def compute_loss(self, *args, **options):
        return super().compute_loss(*args, **options)


class Mixed(UnlearningSteps, transformers.Trainer):
    pass


class Turned(transformers.Trainer, UnlearningSteps):
    pass


def test_other_trainers(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], remove_unused_columns=False)
    sides = dict(forget_dataset=FORGET, retain_dataset=RETAIN)
    with pytest.raises(ValueError, match=r"Overridden\.compute_loss is not called in a step"):
        Overridden(model(), args, padded, **sides)
    Overridden(model(), args, padded, **sides, losses=sample_losses)
    with pytest.raises(TypeError, match="UnlearningSteps has to come before the Trainer in the bases of Turned"):
        Turned(model(), args).unlearn_by("orthograd")
    with pytest.raises(RuntimeError, match="after the Trainer's own __init__"):
        Mixed.__new__(Mixed).unlearn_by("orthograd")
    with pytest.raises(ValueError, match="method='npo' reads all samples before the first step: use UnlearningTrainer"):
        Mixed(model(), args).unlearn_by("npo")
    mixed = Mixed(model(), args, padded, train_dataset=FORGET)
    with pytest.raises(RuntimeError, match="call unlearn_by before train"):
        mixed.train()
    mixed.unlearn_by("orthograd")
    with pytest.raises(ValueError, match=r"batches must be \{\"forget\": batch, \"retain\": batch\}; got input_ids"):
        mixed.train()
    args.remove_unused_columns = True
    with pytest.raises(ValueError, match="set remove_unused_columns=False"):
        Mixed(model(), args).unlearn_by("orthograd")
    with pytest.raises(ValueError, match="method='pgu' reads the model before it unlearns: give model, not model_init"):
        UnlearningTrainer(None, args, padded, **sides, method="pgu", model_init=lambda: model())


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model(), **options)


def test_losses_of_ones_own_go_with_smoothed_labels(tmp_path):
    """These are of evaluation then, as is an overridden `compute_loss`."""
    made = run(tmp_path, model(), losses=sample_losses, label_smoothing_factor=0.1, eval_dataset=FORGET, steps=1)
    plain = trainer(tmp_path, made.model, eval_dataset=FORGET)
    with contextlib.redirect_stdout(None):
        assert made.evaluate()["eval_loss"] != plain.evaluate()["eval_loss"]


def test_what_is_wrong_with_other_parts(tmp_path):
    bare = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match=r"the tokenizer has no pad token: set tokenizer\.pad_token"):
        trainer(tmp_path, model(), collator=None, processing_class=bare)
    adapters = peft.get_peft_model(model(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="second matrix of an adapter of rank r has only r of them"):
        trainer(tmp_path, adapters, "pgu")
    made = trainer(tmp_path, model(), optim="adafactor")
    with pytest.raises(ValueError, match=r'got a Adafactor.*take method_options=\{"metric": "gradient"\}'):
        made.train()
    assert (
        run(tmp_path, model(), optim="adafactor", method_options={"metric": "gradient"}, steps=1).state.global_step == 1
    )
    with pytest.raises(TypeError, match="takes forget_dataset and retain_dataset, no train_dataset"):
        UnlearningTrainer(model(), forget_dataset=FORGET, retain_dataset=RETAIN, train_dataset=RETAIN)
    with pytest.raises(TypeError, match="forget_dataset must have a length and items by number; got dict"):
        trainer(tmp_path, model(), data=({"train": FORGET}, RETAIN))


def test_a_loss_of_nan_changes_nothing(tmp_path):
    net = model()
    made = trainer(tmp_path, net, losses=lambda m, b: sample_losses(m, b) * math.nan)
    with pytest.raises(FloatingPointError, match="forget loss is nan"):
        made.train()
    assert_same(net, model(), 0)
