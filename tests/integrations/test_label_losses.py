"""Losses of classifiers, regressions and answers marked in a text: those of transformers, and a Trainer with them."""

import warnings

import pytest
import torch
import transformers
from language import padded, samples, tokenizer
from trainers import logged, run, trainer

from projgrad.integrations.token_losses import sample_losses

pytestmark = [pytest.mark.same_without_extension, pytest.mark.filterwarnings("ignore:'pin_memory' argument")]
TEXTS = [{name: row[name] + [end] for name, end in (("input_ids", 2), ("attention_mask", 1))} for row in samples(14)]
HEADS = {  # problem: options of a configuration, and what the collator is given beside a text
    "classes": (dict(num_labels=3), lambda k: {"labels": k % 3}),
    "several_labels": (dict(num_labels=3), lambda k: {"labels": [1.0, float(k % 2), 0.0]}),
    "a_number": (dict(num_labels=1), lambda k: {"labels": k / 7 - 0.5}),
    "the_number_that_is_ignored": (dict(num_labels=1), lambda k: {"labels": -100.0}),
    "numbers": (dict(num_labels=2, problem_type="regression"), lambda k: {"labels": [k / 7, 0.5]}),
    "answers": ({}, lambda k: {"start_positions": k % 3, "end_positions": 3 + k % 3}),
}


def classifier(family, problem):
    """Return a small model with the head that a problem needs, the same each time."""
    torch.manual_seed(0)
    ids = dict(vocab_size=120, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    if family == "Bart":
        names = [f"{side}_{name}" for side in ("encoder", "decoder") for name in ("layers", "attention_heads")]
        sizes = dict(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_start_token_id=2)
        sizes |= {name: 1 for name in names}
    kind = f"{family}For{'QuestionAnswering' if problem == 'answers' else 'SequenceClassification'}"
    config = getattr(transformers, f"{family}Config")(**ids, **sizes, **HEADS[problem][0])
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("problem", HEADS)
@pytest.mark.parametrize("family", ["Bert", "Llama", "Bart"])
def test_heads_have_the_loss_of_transformers(family, problem):
    """Of each sample alone, and of the batch as their mean."""
    net, columns = classifier(family, problem), [HEADS[problem][1](k) for k in range(5)]
    batch = padded(TEXTS[:5]) | {name: torch.tensor([column[name] for column in columns]) for name in columns[0]}
    losses = sample_losses(net, batch)
    alone = [net(**{name: t[k : k + 1] for name, t in batch.items()}).loss for k in range(5)]
    torch.testing.assert_close(losses, torch.stack(alone))
    torch.testing.assert_close(losses.mean(), net(**batch).loss)


@pytest.mark.parametrize("problem", HEADS)
@pytest.mark.parametrize("method", ["orthograd", "npo"])
def test_a_tokenizer_is_all_that_heads_need(tmp_path, problem, method):
    """The default collator padded labels of samples as if they were tokens: an integer has no length."""
    data = [row | HEADS[problem][1](k) for k, row in enumerate(TEXTS)]
    options = dict(collator=None, processing_class=tokenizer(), data=(data[:6], data[6:]), steps=1, warmup_steps=0)
    made = run(tmp_path, classifier("Bert", problem), method, **options)
    assert logged(made, "forget_loss")
    assert method == "npo" or logged(made, "rank") == [5]


@pytest.mark.parametrize("length, warns", [(20, False), (None, True)])
def test_answers_are_sought_in_the_padding_too(tmp_path, length, warns):
    """As transformers does, so that the loss of a short text depends on how long the others are."""
    pad = transformers.DataCollatorWithPadding(tokenizer(), "max_length" if length else True, max_length=length)
    data = [row | HEADS["answers"][1](k) for k, row in enumerate(TEXTS)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, classifier("Bert", "answers"), collator=pad, data=(data[:6], data[6:]))
    assert any("where answers might be as well: pad all samples to one l" in str(w.message) for w in caught) == warns


def test_pgu_takes_models_without_logits(tmp_path):
    data = [row | HEADS["answers"][1](k) for k, row in enumerate(TEXTS)]
    options = dict(collator=None, processing_class=tokenizer(), data=(data[:6], data[6:]), optim="sgd")
    made = run(tmp_path, classifier("Bert", "answers"), "pgu", method_options={"gamma": 0.5}, **options)
    assert logged(made, "forget_loss")


def test_a_position_outside_of_the_text_counts_nothing():
    net, batch = classifier("Bert", "answers"), padded(TEXTS[:2])
    inside = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    outside = inside | {"start_positions": torch.tensor([1, 99])}
    logits = net(**batch).end_logits
    assert sample_losses(net, batch | inside)[0] == sample_losses(net, batch | outside)[0]
    expected = torch.nn.functional.cross_entropy(logits[1:], torch.tensor([4])) / 2
    torch.testing.assert_close(sample_losses(net, batch | outside)[1], expected)


def test_samples_without_answers_are_told(tmp_path):
    options = dict(collator=None, processing_class=tokenizer(), data=(TEXTS[:6], TEXTS[6:]))
    with pytest.raises(
        ValueError, match="have no start_positions and end_positions: the collator made input_ids, atte"
    ):
        trainer(tmp_path, classifier("Bert", "answers"), **options)
    with pytest.raises(ValueError, match=r"have no labels: the collator made input_ids, attention_mask of the first"):
        trainer(tmp_path, classifier("Bert", "classes"), **options)
