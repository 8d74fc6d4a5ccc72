"""Losses of samples against transformers' own loss of each sample alone."""

import itertools

import peft
import pytest
import torch
import transformers
from language import model, padded, samples
from torch.nn.functional import cross_entropy

import projgrad
from projgrad.integrations.pairs import columns_of
from projgrad.integrations.token_losses import ROWS, sample_losses, token_sums

pytestmark = pytest.mark.same_without_extension


def alone(net, rows):
    return torch.stack([net(**padded([row])).loss for row in rows])


@pytest.mark.parametrize("kind, side", [*itertools.product(("llama", "gpt2"), ("right", "left")), ("t5", "right")])
def test_the_mean_over_a_samples_own_tokens(kind, side):
    net, rows = model(kind).double(), samples(5)
    batch = padded(rows, side)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    torch.testing.assert_close(sample_losses(net, batch), alone(net, rows).float(), rtol=2e-6, atol=1e-6)


def test_weights_of_tokens():
    net, rows = model(), samples(3)
    for row in rows:
        row["token_weights"] = [float(k % 3) for k in range(len(row["labels"]))]
    batch = padded(rows)
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for j, row in enumerate(rows):
        target, w = torch.tensor(row["labels"][2:]), torch.tensor(row["token_weights"][2:])
        losses = cross_entropy(logits[j, 1 : len(target) + 1], target, reduction="none")
        torch.testing.assert_close(sample_losses(net, batch)[j], (w * losses).sum() / w.sum())


def test_a_sample_without_labels_has_loss_zero():
    net, rows = model(), samples(3)
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    losses = sample_losses(net, padded(rows))
    assert losses[1] == 0 and losses[0] > 0 and losses[2] > 0


@pytest.mark.parametrize("shape", [(1, 4), (2, 2)], ids=["one_row", "two_rows"])
def test_packed_samples_are_those_of_a_padded_batch(shape):
    """Also as rows to project out: what is in the same row is another sample."""
    net, rows = model().double(), samples(4)
    for row in rows:
        row["labels"] = list(row["input_ids"])  # nothing but their own borders keeps packed samples apart
    width = max(sum(len(rows[r * shape[1] + k]["input_ids"]) for k in range(shape[1])) for r in range(shape[0]))
    packed = {"input_ids": [], "labels": [], "position_ids": []}
    for r in range(shape[0]):
        own = rows[r * shape[1] : (r + 1) * shape[1]]
        more = [0] * (width - sum(len(row["input_ids"]) for row in own))
        packed["input_ids"].append([x for row in own for x in row["input_ids"]] + more)
        packed["labels"].append([x for row in own for x in row["labels"]] + [-100 for _ in more])
        packed["position_ids"].append([k for row in own for k in range(len(row["labels"]))] + more)
    packed = {name: torch.tensor(values) for name, values in packed.items()}
    torch.testing.assert_close(sample_losses(net, packed), sample_losses(net, padded(rows)))
    torch.testing.assert_close(token_sums(net, packed).weights, token_sums(net, padded(rows)).weights)
    found = []
    for batch in (packed, padded(rows)):
        net.zero_grad()
        sample_losses(net, padded(samples(2, 9))).mean().backward()
        with projgrad.per_sample(net) as tape:
            losses = sample_losses(net, batch)
        assert tape.project_(losses).rank == 4
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5 * float(found[1].abs().max()))


def test_a_compiled_model_has_the_arguments_of_the_one_inside():
    """Of `use_cache` too: with a cache, transformers does not keep packed samples apart."""
    net, packed = model(), transformers.DataCollatorWithFlattening()(samples(4))
    compiled = torch.compile(net, backend="eager")
    torch.testing.assert_close(sample_losses(compiled, packed), sample_losses(net, packed))
    assert columns_of(compiled) == columns_of(net)


def test_logits_in_slices():
    net = model().double()
    ids = torch.randint(3, 120, (90, 25))
    batch = {"input_ids": ids, "labels": ids}
    assert ids.numel() > 2 * ROWS
    losses = sample_losses(net, batch)
    expected = cross_entropy(net(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(losses, expected.float())
    for a, b in zip(*(torch.autograd.grad(x.sum(), net.parameters()) for x in (losses, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_virtual_tokens_of_a_learned_prompt_come_before():
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    net, rows = peft.get_peft_model(model(), config), samples(3)
    torch.testing.assert_close(sample_losses(net, padded(rows)), alone(net, rows))


def bert(**options):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=120)
    return transformers.BertConfig(**sizes, **options)


@pytest.mark.parametrize("kind", ["BertForTokenClassification", "BertForMaskedLM"])
def test_labels_of_their_own_tokens(kind):
    net, rows = getattr(transformers, kind)(bert(num_labels=120)).eval(), samples(3)
    torch.testing.assert_close(sample_losses(net, padded(rows)), alone(net, rows))


def test_a_decoder_whose_model_makes_its_inputs():
    ids = dict(vocab_size=120, pad_token_id=0, decoder_start_token_id=1, bos_token_id=1, eos_token_id=2)
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = transformers.WhisperConfig(**ids, **sizes, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=8)
    net = transformers.WhisperForConditionalGeneration(config).eval()
    batch = {"input_features": torch.randn(1, 80, 16), "labels": padded(samples(1))["labels"]}
    torch.testing.assert_close(sample_losses(net, batch)[0], net(**batch).loss)


def test_batches_that_have_no_losses():
    net, batch = model(), padded(samples(2))
    with pytest.raises(ValueError, match="no token of the batch has a label other than -100"):
        sample_losses(net, batch | {"labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(ValueError, match="has no labels, only input_ids, attention_mask"):
        sample_losses(net, {name: t for name, t in batch.items() if name != "labels"})
    with pytest.raises(ValueError, match=r"labels of shape \(2, 3\) for logits of"):
        sample_losses(net, batch | {"labels": batch["labels"][:, :3].clamp_min(1)})
    with pytest.raises(
        ValueError, match=r"the loss of a Wav2Vec2ForCTC \(ForCTC\) is no mean over tokens: give `losses`"
    ):
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        sample_losses(transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**sizes)), batch)
    with pytest.raises(ValueError, match=r"labels torch.float32 for logits of \(2, 1\) are of no classifier"):
        net = transformers.BertForMultipleChoice(bert())
        sample_losses(net, {"input_ids": torch.ones(2, 1, 3, dtype=torch.long), "labels": torch.ones(2)})
    with pytest.raises(ValueError, match="has no start_positions and end_positions, only input_ids"):
        sample_losses(transformers.BertForQuestionAnswering(bert()), batch)
    with pytest.raises(ValueError, match=r"labels of shape \(2, 2\) for logits of \(2, 3\)"):
        net = transformers.BertForSequenceClassification(bert(num_labels=3))
        sample_losses(net, batch | {"labels": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="Linear has no config"):
        sample_losses(torch.nn.Linear(2, 2), batch)
