"""What people bring to `UnlearningTrainer`: columns of trl, weights of 0, other optimizers, a forget set alone."""

import warnings

import pytest
import torch
import transformers
from language import model, padded, samples, tokenizer

import projgrad
from projgrad.integrations.transformers import UnlearningTrainer, sample_losses

pytestmark = [
    pytest.mark.same_without_extension,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),
]
FORGET, RETAIN = samples(4), samples(8, 10)


def trainer(folder, net, method="orthograd", collator=padded, data=(FORGET, RETAIN), options=None, **settings):
    settings = dict(per_device_train_batch_size=2, learning_rate=1e-2, max_steps=1, logging_steps=1) | settings
    args = transformers.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **settings
    )
    return UnlearningTrainer(
        net,
        args,
        collator,
        forget_dataset=data[0],
        retain_dataset=data[1],
        retain_batch_size=4,
        method=method,
        method_options=options or {},
    )


def without_labels(rows, **columns):
    return [{"input_ids": row["input_ids"]} | {name: make(row) for name, make in columns.items()} for row in rows]


def test_a_sample_whose_tokens_weigh_nothing_has_no_gradient(tmp_path):
    """Its loss is 0 / 0: over a tiny number in the place of 0 the check of the step overflowed."""
    net, batch = model().double(), padded(RETAIN[:4])
    batch["token_weights"] = torch.ones(batch["labels"].shape)
    batch["token_weights"][1] = 0
    unlearner = projgrad.OrthoGrad(net, torch.optim.SGD(net.parameters(), lr=0.1))
    forget = padded(FORGET)
    record = unlearner.step(lambda: sample_losses(net, forget).mean(), lambda: sample_losses(net, batch))
    assert record.rank == 3 and record.residual < 1e-8
    assert sample_losses(net, batch)[1] == 0


def test_weights_of_negative_sum_divide_as_others():
    net, batch = model(), padded(RETAIN[:2])
    batch["token_weights"] = torch.ones(batch["labels"].shape)
    plain = sample_losses(net, batch)
    batch["token_weights"] *= -1
    torch.testing.assert_close(sample_losses(net, batch), plain)


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"completion_mask": lambda row: [0, 0] + [1] * (len(row["labels"]) - 2)},
            "have completion_mask and no labels",
        ),
        ({"assistant_masks": lambda row: [1] * len(row["labels"])}, "have assistant_masks and no labels"),
        ({"labels": lambda row: row["labels"], "seq_lengths": lambda row: [2, 4]}, "their seq_lengths are dropped"),
    ],
)
def test_columns_that_would_be_dropped_though_they_say_what_counts(tmp_path, columns, message):
    data = without_labels(FORGET, **columns), without_labels(RETAIN, **columns)
    with pytest.raises(ValueError, match=f"samples of forget_dataset .*{message}"):
        trainer(tmp_path, model(), data=data)


def test_gradient_ascent_needs_no_retain_set(tmp_path):
    nets = model(), model()
    for net, retain in zip(nets, (None, RETAIN), strict=True):
        made = trainer(tmp_path, net, "grad_ascent", data=(FORGET, retain))
        made.train()
        assert made.state.log_history[0]["forget_loss"] > 0
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="method='orthograd' takes its steps on retain samples too: give retain_data"):
        trainer(tmp_path, model(), data=(FORGET, None))


@pytest.mark.parametrize("settings, warns", [({}, True), ({"optim": "sgd"}, False)])
def test_pgu_tells_of_optimizers_that_undo_it(tmp_path, settings, warns):
    made = trainer(tmp_path, model(), "pgu", options={"gamma": 0.5}, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.create_optimizer()
    assert any('method="pgu" projects the gradient' in str(w.message) for w in caught) == warns


def test_a_model_that_does_not_run_is_not_asked_for_losses(tmp_path):
    net = model("gpt2")  # of 32 positions
    long = [{"input_ids": [3] * 40, "labels": [3] * 40}] * 4
    with pytest.raises(ValueError, match=r"a GPT2LMHeadModel does not run on its first sample: .*input_ids, labels"):
        trainer(tmp_path, net, data=(long, RETAIN))


def test_masks_at_random_may_miss_the_first_sample(tmp_path):
    """The first batch of a masked language model had no label, and a loss of the user's own was asked for."""
    ids = dict(vocab_size=120, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    net = transformers.BertForMaskedLM(transformers.BertConfig(**ids, **sizes))
    calls = []

    def collate(rows):
        batch = padded(rows)
        calls.append(len(rows))
        return batch | {"labels": torch.full_like(batch["labels"], -100)} if len(calls) < 3 else batch

    trainer(tmp_path, net, collator=collate)
    with pytest.raises(ValueError, match=r"^no token of the first samples has a label other than -100"):
        trainer(tmp_path, net, collator=lambda rows: padded(rows) | {"labels": torch.full((len(rows), 12), -100)})


def test_frozen_models_are_refused_in_our_words(tmp_path):
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient: thaw some"):
        trainer(tmp_path, model().requires_grad_(False))


def test_optimizers_are_named_in_full(tmp_path):
    class AdamW(torch.optim.AdamW):  # as those of other packages are called
        def step(self, closure=None):
            return super().step(closure)

    net = model()
    with pytest.raises(ValueError, match=f"got a AdamW of {__name__}.*`diagonal"):
        projgrad.OrthoGrad(net, AdamW(net.parameters()), metric="optimizer")

    class Wrapper(torch.optim.Optimizer):  # as accelerate's
        def __init__(self, optimizer):
            self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

    with pytest.raises(ValueError, match=r"got a Wrapper of .*the one inside of it, `optimizer\.optimizer`"):
        projgrad.OrthoGrad(net, Wrapper(torch.optim.AdamW(net.parameters())), metric="optimizer")


def test_a_reason_is_given_once(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=120, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    config.pad_token_id, config.problem_type = tokenizer().pad_token_id, "single_label_classification"
    net = transformers.LlamaForSequenceClassification(config)
    rows = [{"input_ids": [3, 4, 5], "labels": 0}] * 4
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path, net, collator=None, data=(rows, rows))
    assert str(caught.value).lower().count("give `losses`") == 1
