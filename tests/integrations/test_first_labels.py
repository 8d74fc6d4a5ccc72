"""Samples whose only label is of their first token: where labels are shifted, nothing predicts it."""

import pytest
import torch
import transformers
from language import model, padded, samples
from trainers import FORGET, RETAIN, trainer

from projgrad.integrations.sample_checks import check_columns
from projgrad.integrations.token_losses import sample_losses

pytestmark = [pytest.mark.same_without_extension, pytest.mark.filterwarnings("ignore:'pin_memory' argument")]
IDS = [7, 8, 9, 10, 11, 12]


def row(*labelled, **columns):
    """Return a sample of six tokens with labels at the positions given."""
    return {"input_ids": IDS, "labels": [k if j in labelled else -100 for j, k in enumerate(IDS)]} | columns


UNPREDICTED = {
    "alone": row(0),
    "packed": row(0, 3, position_ids=[0, 1, 2, 0, 1, 2]),
    "padded_on_the_left": row(2, attention_mask=[0, 0, 1, 1, 1, 1]),
    "one_token": {"input_ids": [7], "labels": [7]},
}
PREDICTED = {
    "second": row(1),
    "packed": row(0, 4, position_ids=[0, 1, 2, 0, 1, 2]),
    "padded_on_the_left": row(3, attention_mask=[0, 0, 1, 1, 1, 1]),
    "padded_on_the_right": row(3, attention_mask=[1, 1, 1, 1, 0, 0]),
    "text": {"input_ids": IDS, "labels": "Rome"},  # of which a collator makes labels
    "rows": {"input_ids": IDS, "labels": [[7], [8, 9]]},
}


def bert(kind):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=120)
    return getattr(transformers, kind)(transformers.BertConfig(**sizes))


def tensors(sample):
    return {name: torch.tensor(values) for name, values in sample.items()}


@pytest.mark.parametrize("make", [dict, tensors])
@pytest.mark.parametrize("name", UNPREDICTED)
def test_a_sample_of_which_nothing_is_predicted_is_named(name, make):
    data = [make(row(1, 2)), make(UNPREDICTED[name])]
    message = "forget_dataset has samples .* first tokens aside, which nothing predicts: 1. Leave them out"
    with pytest.raises(ValueError, match=message):
        check_columns("forget_dataset", data, None, model())


@pytest.mark.parametrize("name", PREDICTED)
def test_what_another_token_predicts_is_taken(name):
    check_columns("forget_dataset", [PREDICTED[name]], None, model())


@pytest.mark.parametrize("name", UNPREDICTED)
@pytest.mark.parametrize(
    "net", ["t5", "BertForTokenClassification", "BertForMaskedLM", "BertForSequenceClassification"]
)
def test_models_that_do_not_shift_take_them(name, net):
    check_columns("forget_dataset", [UNPREDICTED[name]], None, model(net) if net == "t5" else bert(net))


def test_a_trainer_refuses_them(tmp_path):
    with pytest.raises(ValueError, match=r"retain_dataset has samples .* first tokens aside.*: 24\. Leave"):
        trainer(tmp_path, model(), data=(FORGET, [*RETAIN, row(0, attention_mask=[1] * 6)]))

    def collate(rows):  # makes labels: the data set has none
        batch = padded(rows)
        return batch | {"labels": batch["input_ids"].where(torch.arange(batch["input_ids"].shape[1]) == 0, -100)}

    bare = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in FORGET]
    with pytest.raises(ValueError, match=r"no token of the first samples has a label .*, first tokens aside, which"):
        trainer(tmp_path, model(), collator=collate, data=(bare, RETAIN))


@pytest.mark.parametrize("name", ["alone", "packed"])
def test_a_batch_of_them_has_no_losses(name):
    batch = {key: torch.tensor([values]) for key, values in UNPREDICTED[name].items()}
    with pytest.raises(ValueError, match="no token of the batch has a label other than -100, first tokens aside"):
        sample_losses(model(), batch)
    together = padded([*samples(1), row(0, attention_mask=[1] * 6)])
    assert sample_losses(model(), together)[1] == 0  # as of a sample without any label
