"""An `UnlearningTrainer` of a small language model, what it logged, and models that are the same."""

import contextlib

import torch
import transformers
from language import padded, samples

from projgrad.integrations.transformers import UnlearningTrainer

FORGET, RETAIN = samples(10), samples(24, 10)
OURS = "method_options", "losses", "eval_dataset", "processing_class", "callbacks", "optimizers", "model_init"


def trainer(folder, net, method="orthograd", steps=4, collator=padded, data=(FORGET, RETAIN), **options):
    ours = {name: options.pop(name) for name in OURS if name in options}
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


def assert_same(a, b, tolerance=1e-6):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
