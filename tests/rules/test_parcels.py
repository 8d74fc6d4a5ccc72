"""Rules that are taken apart into factors and joined with those of other samples."""

import pytest
import torch
from zoo import ZOO

import projgrad
from projgrad.rules.parcels import in_line, pack, unpack
from projgrad.tape.consumers import CollectRules

# Linear layers, tables, both tied, convolutions with and without groups, products in groups, scales.
CASES = ["mlp", "embedding_padding_idx", "tied_language_model", "llama_tied", "tied_autoencoder", "conv2d_groups"]
CASES += ["conv2d_same", "conv_transpose1d_groups", "layer_norm", "einsum_per_head", "embedding_bag_mean", "lora_gpt2"]


def rules(case, samples):
    """The rules of some samples, by parameter."""
    inputs = [x.narrow(d, samples.start, len(samples)) for x, d in zip(case.inputs, case.dims, strict=True)]
    with projgrad.per_sample(case.model) as tape:
        losses = case.loss(case.model, *inputs)
    found = CollectRules()
    tape.passes.run(losses, found)
    return {name: [rule for _, rule in pieces] for name, pieces in found.pieces.items()}


@pytest.mark.parametrize("name", CASES)
def test_joined_rules_are_those_of_all_samples(name):
    pytest.importorskip("transformers")
    case = ZOO[name]()
    first, second, both = rules(case, range(2)), rules(case, range(2, case.n)), rules(case, range(case.n))
    assert both
    for parameter, whole in both.items():
        for one, other, rule in zip(first[parameter], second[parameter], whole, strict=True):
            parcels = [pack(one), pack(other)]
            assert parcels[0].kind == parcels[1].kind
            hash(parcels[0].kind)  # what processes compare
            pairs = zip(*(parcel.tensors for parcel in parcels), strict=True)
            joint = [in_line(pair, fill) for pair, fill in zip(pairs, parcels[0].fills, strict=True)]
            torch.testing.assert_close(unpack(parcels[0].kind, joint).gram(None)[0], rule.gram(None)[0])
            assert type(unpack(parcels[0].kind, joint)) is type(rule)
