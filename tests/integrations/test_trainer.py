"""`UnlearningTrainer` against loops written out: the same batches, losses, clipping and schedule."""

import contextlib
import copy
import math
import warnings

import peft
import pytest
import torch
import transformers
from accelerate.optimizer import patch_optimizer_step
from accelerate.state import AcceleratorState
from language import model, padded, samples, tokenizer
from torch.nn.functional import cross_entropy, logsigmoid

import projgrad
from projgrad.integrations.transformers import UnlearningSteps, UnlearningTrainer, sample_losses

pytestmark = [
    pytest.mark.same_without_extension,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument", "ignore:.*is_gradient_checkpointing"),
]
FORGET, RETAIN = samples(10), samples(24, 10)


def trainer(folder, net, method="orthograd", steps=4, collator=padded, data=(FORGET, RETAIN), **options):
    ours = {
        name: options.pop(name)
        for name in ("method_options", "losses", "eval_dataset", "processing_class", "callbacks", "optimizers")
        if name in options
    }
    n = options.pop("n", 5)
    settings = dict(
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        lr_scheduler_type="cosine",
        warmup_steps=1,
    )
    settings |= dict(report_to=[], use_cpu=True, disable_tqdm=True, max_steps=steps) | options
    args = transformers.TrainingArguments(str(folder), **settings)
    sides = dict(forget_dataset=data[0], retain_dataset=data[1], retain_batch_size=n)
    return UnlearningTrainer(net, args, collator, method=method, **sides, **ours)


def run(*args, resume=None, **options):
    made = trainer(*args, **options)
    with contextlib.redirect_stdout(None):
        made.train(resume_from_checkpoint=resume)
    return made


def logged(made, name):
    return [entry[name] for entry in made.state.log_history if name in entry]


def by_hand(made, net, step, accumulation=1, steps=4, clip=1.0):
    """The loop of transformers written out: step(forget batches, retain batches) sets `.grad`."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 1, steps)
    net.train()
    found, taken = [], 0
    while taken < steps:
        made.state.global_step = taken
        batches = list(made.get_train_dataloader())
        for k in range(0, len(batches), accumulation):
            window = batches[k : k + accumulation]
            found.append(step(optimizer, [b["forget"] for b in window], [b["retain"] for b in window]))
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if (taken := taken + 1) == steps:
                break
    return found


def assert_same(a, b, tolerance=1e-6):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind, accumulation", [("llama", 1), ("gpt2", 1), ("gpt2", 4)])
def test_orthograd_in_a_trainer_is_orthograd_in_a_loop(tmp_path, kind, accumulation):
    made = run(tmp_path, model(kind), method_options={"alpha": 0.7}, gradient_accumulation_steps=accumulation)
    net, unlearners = model(kind), []

    def step(optimizer, forgets, retains):
        if not unlearners:
            unlearners.append(projgrad.OrthoGrad(net, optimizer, alpha=0.7, metric="optimizer"))
        forget = [lambda b=b: sample_losses(net, b) for b in forgets]
        retain = [lambda b=b: sample_losses(net, b) for b in retains]
        return unlearners[0].backward(forget if len(forget) > 1 else lambda: forget[0]().mean(), retain)

    records = by_hand(made, net, step, accumulation)
    assert_same(made.model, net, 0)
    for name in ("forget_loss", "retain_loss", "preserved_norm", "residual"):
        assert logged(made, name) == [getattr(record, name) for record in records]
    assert max(logged(made, "residual")) < 1e-4 and min(logged(made, "preserved_norm")[1:]) > 0.5
    assert logged(made, "loss") == pytest.approx(
        [0.7 * r.retain_loss - 0.3 * r.forget_loss for r in records], rel=1e-5, abs=1e-4
    )
    if accumulation == 1:
        assert (
            logged(made, "rank") == [0, 5, 5, 5] and "iterations" not in made.state.log_history[0]
        )  # the first rate of a warmup is 0


def test_what_adamw_applies_is_orthogonal(tmp_path):
    """Measured on the weights: alpha=0 leaves the forgetting part alone; the gradient metric does not do it."""
    found = {}
    for metric in ("optimizer", "gradient"):
        net = model().double()
        options = {"alpha": 0.0, "metric": metric}
        made = trainer(tmp_path, net, method_options=options, steps=1, n=4, warmup_steps=0, weight_decay=0.0)
        before = [p.detach().clone() for p in net.parameters()]
        (batch, *_) = made.get_train_dataloader()
        losses = sample_losses(net, batch["retain"])
        rows = [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss in losses]
        with contextlib.redirect_stdout(None):
            made.train()
        change = torch.cat([(p - q).detach().flatten() for p, q in zip(net.parameters(), before, strict=True)])
        flat = [torch.cat([g.flatten() for g in row]) for row in rows]
        found[metric] = max(abs(float(torch.cosine_similarity(change, g, dim=0))) for g in flat)
    assert found["optimizer"] < 1e-6 < 1e-2 < found["gradient"], found


def npo(sums, reference, beta=0.1):
    return -2 / beta * logsigmoid(-beta * (-sums - reference)).mean()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", ["grad_ascent", "finetune", "neggrad", "graddiff", "npo", "simnpo"])
def test_plain_objectives(tmp_path, method, accumulation):
    made = run(tmp_path, model(), method, gradient_accumulation_steps=accumulation)
    net, start = model(), model().eval()

    def nll(net, batch):  # of each sample, summed and counted
        inputs = {name: t for name, t in batch.items() if name != "labels"}
        target = batch["labels"][:, 1:]
        losses = cross_entropy(net(**inputs).logits[:, :-1].mT, target, reduction="none", ignore_index=-100)
        return losses.sum(1), (target != -100).sum(1)

    def objective(forget, retain):
        f, r = ((lambda sums, counts: sums / counts)(*nll(net, batch)).mean() for batch in (forget, retain))
        if method == "npo":
            return npo(nll(net, forget)[0], -nll(start, forget)[0].detach()) + r
        if method == "simnpo":
            return -2 * 0.125 * logsigmoid((lambda sums, counts: sums / counts)(*nll(net, forget))).mean() + r
        return {"grad_ascent": -f, "finetune": r, "neggrad": 0.95 * r - 0.05 * f, "graddiff": r - f}[method]

    def step(optimizer, forgets, retains):
        losses = [objective(*pair) / len(forgets) for pair in zip(forgets, retains, strict=True)]
        for loss in losses:
            loss.backward()
        return sum(map(float, losses))

    losses = by_hand(made, net, step, accumulation)
    assert logged(made, "loss") == pytest.approx(losses, rel=1e-4, abs=1e-4)
    assert_same(made.model, net, 2e-5)


def test_pgu(tmp_path):
    """The inputs of the retain set, a sample at a time, are protected: padding is no input of theirs."""
    made = run(tmp_path, model(), "pgu", method_options={"gamma": 0.5}, gradient_accumulation_steps=2)
    net = model()
    pgu = projgrad.PGU(net, torch.optim.SGD(net.parameters(), lr=1.0), 0.5, forward=lambda m, b: m(b["input_ids"]))
    pgu.check_samples = False
    pgu.fit([padded([sample]) for sample in RETAIN])

    def step(optimizer, forgets, _):
        pgu.optimizer = optimizer
        for batch in forgets:
            (-sample_losses(net, batch).mean() / len(forgets)).backward()
        return pgu.project_()

    records = by_hand(made, net, step, 2)
    assert_same(made.model, net, 1e-5)
    assert logged(made, "preserved_norm") == pytest.approx([r.preserved_norm for r in records], rel=1e-3)


def test_feasible_updates(tmp_path):
    made = run(tmp_path, model(), "feasible", method_options={"delta": 0.1}, gradient_accumulation_steps=2)
    net, methods = model(), []

    def step(optimizer, forgets, retains):
        if not methods:
            ascent = projgrad.baselines.NegGradPlus(net, optimizer, alpha=0.0, max_norm=1.0)
            methods.append(projgrad.FeasibleUpdates(net, ascent, delta=0.1))
        forget, retain = (
            lambda side=side: torch.cat([sample_losses(net, b) for b in side]) for side in (forgets, retains)
        )
        record = methods[0].step(lambda: forget().mean(), retain)
        optimizer.zero_grad()
        return record

    records = by_hand(made, net, step, 2)
    assert_same(made.model, net, 0)
    assert logged(made, "kept") == [record.kept for record in records] and not logged(made, "grad_norm")


@pytest.mark.parametrize("method", ["orthograd", "pgu", "feasible", "npo"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, method):
    """Bit for bit: weights, and what is logged; with dropout, accumulation, epochs that end inside and outside."""
    options = dict(method=method, steps=6, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1)
    kind = "llama" if method == "pgu" else "gpt2"
    whole = run(tmp_path / "a", model(kind, 0.1), **options)
    for first in (2, 3) if method == "orthograd" else (3,):
        again = run(tmp_path / "b", model(kind, 0.1), **options, resume=str(tmp_path / "a" / f"checkpoint-{first}"))
        assert_same(whole.model, again.model, 0)
        assert logged(again, "loss") == logged(whole, "loss")


def test_adapters_on_a_16_bit_base(tmp_path):
    def net():
        base = model().bfloat16()
        return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))

    torch.manual_seed(1)
    made = run(tmp_path, net(), bf16=True, steps=6, save_strategy="steps", save_steps=3)
    assert made.optimizer.state_dict()["state"] and {p.dtype for p in made.model.parameters() if p.requires_grad} == {
        torch.float32
    }
    assert max(logged(made, "residual")) < 1e-3 and logged(made, "rank") == [0, *[5] * 5]
    for p, q in zip(made.model.parameters(), net().parameters(), strict=True):
        assert p.requires_grad or torch.equal(p, q)
    torch.manual_seed(1)
    again = run(tmp_path, net(), bf16=True, steps=6, resume=str(tmp_path / "checkpoint-3"))
    assert_same(made.model, again.model, 0)


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


def test_gradient_checkpointing_changes_nothing(tmp_path):
    assert_same(run(tmp_path, model()).model, run(tmp_path, model(), gradient_checkpointing=True).model, 1e-5)


def test_sequence_to_sequence_and_a_collator_of_transformers(tmp_path):
    net = model("t5")
    collator = transformers.DataCollatorForSeq2Seq(tokenizer(), net)
    made = run(tmp_path, net, collator=collator, data=([s | {"question": "?"} for s in FORGET], RETAIN))
    assert max(logged(made, "residual")) < 1e-4


def test_the_default_collator_pads_labels(tmp_path):
    made = trainer(tmp_path, model(), collator=None, processing_class=tokenizer())
    batch = next(iter(made.get_train_dataloader()))
    assert (batch["forget"]["labels"] == -100).sum() > 6 and batch["retain"]["input_ids"].shape[0] == 5


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
        "forget_dataset has samples without any label other than -100: 1. Leave them out",
    ),
    "compiled": (dict(torch_compile=True), "set torch_compile=False"),
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


def test_packed_rows_in_a_trainer(tmp_path):
    """Also for NPO, which has the probabilities of each sample from before: at rate 0 they stay what they were."""
    for method in ("orthograd", "npo"):
        made = run(tmp_path, model(), method, collator=transformers.DataCollatorWithFlattening(), learning_rate=0.0)
        assert logged(made, "retain_loss")
    assert logged(made, "forget_loss") == pytest.approx([20 * math.log(2)] * 4, rel=1e-5)


def test_batch_norm_uses_its_running_statistics(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    data = [[{"x": [float(k), 1.0, 2.0, 3.0], "y": k % 3} for k in range(m)] for m in (6, 9)]
    made = run(
        tmp_path,
        Net(),
        collator=lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in ("x", "y")},
        data=data,
        losses=lambda net, batch: cross_entropy(net(batch["x"]), batch["y"], reduction="none"),
        remove_unused_columns=False,
        n=3,
        warmup_steps=0,
    )
    assert set(logged(made, "rank")) == {3}


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


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_default_collator_pads_weights_of_tokens(tmp_path, side):
    weighted = [row | {"token_weights": [1.0] * len(row["labels"])} for row in FORGET]
    pieces = copy.deepcopy(tokenizer())
    pieces.padding_side = side
    made = trainer(tmp_path, model(), collator=None, processing_class=pieces, data=(weighted, RETAIN))
    batch = next(iter(made.get_train_dataloader()))["forget"]
    assert torch.equal(batch["token_weights"] == 1, batch["attention_mask"] == 1)


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model(), **options)


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
