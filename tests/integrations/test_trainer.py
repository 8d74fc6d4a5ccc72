"""`UnlearningTrainer` against loops written out: the same batches, losses, clipping and schedule."""

import contextlib

import peft
import pytest
import torch
import transformers
from language import model, padded
from torch.nn.functional import cross_entropy, logsigmoid
from trainers import RETAIN, assert_same, logged, run, trainer

import projgrad
from projgrad.integrations.transformers import sample_losses

pytestmark = [
    pytest.mark.same_without_extension,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument", "ignore:.*is_gradient_checkpointing"),
]


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


def test_from_weights_alone_a_run_begins_anew(tmp_path):
    """As in transformers: rates and the optimizer, and with it what was forgotten so far, of its momentum."""
    options = dict(steps=6, save_strategy="steps", save_steps=3, save_only_model=True)
    run(tmp_path, model(), **options)
    made = run(tmp_path, model(), **options, resume=str(tmp_path / "checkpoint-3"))
    assert made.state.global_step == 6
    rates, residuals = logged(made, "learning_rate"), logged(made, "residual")
    assert rates[3:] == rates[:3] and len(residuals) == 6 and max(residuals) < 1e-4


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


def test_gradient_checkpointing_changes_nothing(tmp_path):
    assert_same(run(tmp_path, model()).model, run(tmp_path, model(), gradient_checkpointing=True).model, 1e-5)
