"""What a user does with `UnlearningTrainer`: scalers, collators, callbacks, evaluation, losses of ones own."""

import contextlib
import copy
import math

import pytest
import torch
import transformers
from accelerate.optimizer import patch_optimizer_step
from accelerate.state import AcceleratorState
from language import model, padded, tokenizer
from torch.nn.functional import cross_entropy
from trainers import FORGET, RETAIN, assert_same, logged, run, trainer

pytestmark = [
    pytest.mark.same_without_extension,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument", "ignore:.*is_gradient_checkpointing"),
]


class Scaled(transformers.TrainerCallback):
    """Makes accelerate do what it does with fp16 on a GPU: on a CPU it has no scaler."""

    def __init__(self, scale):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def on_train_begin(self, *_, optimizer=None, **__):
        accelerator = self.trainer.accelerator
        accelerator.scaler = optimizer.scaler = self.scaler
        accelerator.native_amp, AcceleratorState._shared_state["_mixed_precision"] = True, "fp16"
        optimizer._optimizer_original_step_method = optimizer.optimizer.step
        optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, optimizer.optimizer.step)


@pytest.mark.parametrize("method", ["orthograd", "npo"])
def test_a_gradient_scaler_changes_nothing_and_skips_what_overflows(tmp_path, method):
    found = []
    for scale in (None, 1024.0, 3e38):
        callback = Scaled(scale)
        made = trainer(tmp_path, model(), method, callbacks=[callback] if scale else [])
        callback.trainer = made
        with contextlib.redirect_stdout(None):
            made.train()
        AcceleratorState._shared_state["_mixed_precision"] = "no"
        found.append(made)
    plain, scaled, overflown = found
    assert_same(plain.model, scaled.model, 1e-6)
    assert logged(scaled, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)
    assert overflown.accelerator.scaler.get_scale() < 1e38 and all(
        p.isfinite().all() for p in overflown.model.parameters()
    )
    assert_same(overflown.model, model(), 0)
    assert "residual" not in overflown.state.log_history[0]


def test_sequence_to_sequence_and_a_collator_of_transformers(tmp_path):
    net = model("t5")
    collator = transformers.DataCollatorForSeq2Seq(tokenizer(), net)
    made = run(tmp_path, net, collator=collator, data=([s | {"question": "?"} for s in FORGET], RETAIN))
    assert max(logged(made, "residual")) < 1e-4


def test_the_default_collator_pads_labels(tmp_path):
    made = trainer(tmp_path, model(), collator=None, processing_class=tokenizer())
    batch = next(iter(made.get_train_dataloader()))
    assert (batch["forget"]["labels"] == -100).sum() > 6 and batch["retain"]["input_ids"].shape[0] == 5


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_default_collator_pads_weights_of_tokens(tmp_path, side):
    weighted = [row | {"token_weights": [1.0] * len(row["labels"])} for row in FORGET]
    pieces = copy.deepcopy(tokenizer())
    pieces.padding_side = side
    made = trainer(tmp_path, model(), collator=None, processing_class=pieces, data=(weighted, RETAIN))
    batch = next(iter(made.get_train_dataloader()))["forget"]
    assert torch.equal(batch["token_weights"] == 1, batch["attention_mask"] == 1)


def test_evaluation_callbacks_and_the_end(tmp_path):
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 3

    sets = {"forget": FORGET, "retain": RETAIN}
    made = run(
        tmp_path,
        model(),
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=2,
        steps=9,
        callbacks=[Watch()],
        gradient_accumulation_steps=2,
    )
    assert made.state.global_step == 3 and len(logged(made, "eval_forget_loss")) == 1
    assert len([logs for logs in seen if "residual" in logs]) == 3
    assert made.state.total_flos > 0
    with contextlib.redirect_stdout(None):
        made.train()  # from the first step again, with what is left of the model


def test_logs_tell_of_all_steps_since_the_last(tmp_path):
    each, pairs = run(tmp_path, model()), run(tmp_path, model(), logging_steps=2)
    for name in ("residual", "forget_loss", "preserved_norm"):
        whole = [logged(each, name)[k : k + 2] for k in (0, 2)]
        told = [max(two) if name == "residual" else sum(two) / 2 for two in whole]
        assert logged(pairs, name) == pytest.approx(told, rel=1e-6)


def test_micro_batches_of_an_interrupted_step_are_forgotten(tmp_path):
    class Interrupt(transformers.TrainerCallback):
        left = 2

        def on_substep_end(self, *_, **__):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    made = trainer(tmp_path, model(), gradient_accumulation_steps=3, callbacks=[Interrupt()], steps=1)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    seen, write = [], made.unlearning_method.write_gradients
    made.unlearning_method.write_gradients = lambda *args: seen.append(len(args[2].forgets)) or write(*args)
    with contextlib.redirect_stdout(None):
        made.train()
    assert seen == [3]
    assert_same(made.model, run(tmp_path, model(), gradient_accumulation_steps=3, steps=1).model, 0)


def test_the_reference_of_npo_is_from_before_all_training(tmp_path):
    made = run(tmp_path, model(), "npo", warmup_steps=0)
    with contextlib.redirect_stdout(None):
        made.train()
    first, again = made.state.log_history[0], 20 * math.log(2)  # of a model that is its own reference
    assert first["forget_loss"] < again - 0.1, first


def test_losses_of_ones_own(tmp_path):
    def losses(net, batch):
        batch.pop("attention_mask", None)  # of a copy
        return net(**batch).logits.square().mean((1, 2))

    data = [[{"input_ids": [k, 5, 6], "attention_mask": [1, 1, 1]} for k in range(m)] for m in (6, 8)]
    made = run(tmp_path, model(), collator=padded, data=data, losses=losses, n=3, warmup_steps=0)
    assert set(logged(made, "rank")) == {3}
    with pytest.raises(ValueError, match="method='npo' is made of the losses of tokens: leave out `losses`"):
        trainer(tmp_path, model(), "npo", losses=losses)


def test_an_optimizer_without_momentum_needs_no_metric_of_its_own(tmp_path):
    made = run(tmp_path, model(), optim="sgd", steps=1)
    assert made.unlearning_method.unlearner.metric == "gradient"
    net = model()
    momentum = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
    made = run(tmp_path, net, optimizers=(momentum, None), steps=1)
    assert made.unlearning_method.unlearner.metric == "optimizer"


def test_packed_rows_in_a_trainer(tmp_path):
    """Also for NPO, which has the probabilities of each sample from before: at rate 0 they stay what they were."""
    for method in ("orthograd", "npo"):
        made = run(tmp_path, model(), method, collator=transformers.DataCollatorWithFlattening(), learning_rate=0.0)
        assert logged(made, "retain_loss")
    assert logged(made, "forget_loss") == pytest.approx([20 * math.log(2)] * 4, rel=1e-5)


@pytest.mark.parametrize("method", ["orthograd", "pgu", "feasible", "npo"])
def test_a_compiled_model_takes_the_same_steps(tmp_path, method):
    made = []
    for compiled in (False, True):
        options = dict(torch_compile=compiled, torch_compile_backend="eager" if compiled else None)
        if method == "pgu":
            options |= dict(method_options={"gamma": 0.5}, optim="sgd")
        evaluated = dict(eval_dataset=FORGET, eval_strategy="steps", eval_steps=1)
        made.append(run(tmp_path, model("gpt2"), method, steps=2, **evaluated, **options))
        assert isinstance(made[-1].model_wrapped, torch._dynamo.OptimizedModule) == compiled
    assert_same(made[0].model, made[1].model, 0)
    for name in ("loss", "grad_norm", "eval_loss"):
        assert logged(made[0], name) == logged(made[1], name)


@pytest.mark.parametrize("method", ["orthograd", "graddiff"])
@pytest.mark.parametrize("is_made_anew", [False, True])
def test_batch_norm_uses_its_running_statistics(tmp_path, method, is_made_anew):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    data = [[{"x": [float(k), 1.0, 2.0, 3.0], "y": k % 3} for k in range(m)] for m in (6, 9)]
    made = run(
        tmp_path,
        None if is_made_anew else Net(),
        method,
        model_init=Net if is_made_anew else None,
        collator=lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in ("x", "y")},
        data=data,
        losses=lambda net, batch: cross_entropy(net(batch["x"]), batch["y"], reduction="none"),
        remove_unused_columns=False,
        n=3,
        warmup_steps=0,
    )
    assert method == "graddiff" or set(logged(made, "rank")) == {3}
    assert made.model.norm.num_batches_tracked == 0
