"""What the tape says to arguments that cannot be meant, and to calls at the wrong time."""

import pytest
import torch
from torch import nn

import projgrad

N = 6


def recorded():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(N, 5)
    with projgrad.per_sample(model) as tape:
        losses = model(x).square().sum(1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model, tape, losses


CALLS = {
    "add to a global projection": lambda tape, losses, w: tape.project_(losses, add=w),
    "add to a projection per tensor": lambda tape, losses, w: tape.project_(losses, "per_tensor", add=w),
    "add beside a projector": lambda tape, losses, w: tape.project_with_(losses, projgrad.projectors.qr, add=w),
    "weights of a sum": lambda tape, losses, w: tape.combine(losses, w),
    "weights of moments": lambda tape, losses, w: tape.moments(losses, w),
}


@pytest.mark.parametrize(
    "weights", [torch.ones(1), torch.ones(()), torch.ones(7), torch.ones(N, 1), [1.0] * N], ids=str
)
@pytest.mark.parametrize("call", CALLS)
def test_weights_are_one_number_per_loss(call, weights):
    model, tape, losses = recorded()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"must be a tensor \(n,\) = \(6,\), one per loss; got "):
        CALLS[call](tape, losses, weights)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "free",
    [
        lambda tape, losses: losses.sum().backward(),
        lambda tape, losses: tape.project_(losses),
        lambda tape, losses: tape.gram(losses, retain_graph=False),
    ],
)
def test_a_graph_that_was_freed_is_named(free):
    _, tape, losses = recorded()
    free(tape, losses)
    with pytest.raises(RuntimeError, match=r"graph of the losses was freed.*keep_output_gradients=False"):
        tape.gram(losses)


def test_gram_that_frees_the_graph_is_the_same():
    _, tape, losses = recorded()
    K = tape.gram(losses)
    torch.testing.assert_close(tape.gram(losses, retain_graph=False), K)
    assert not any(site.saved.tensors for site in tape.recording.sites)


def test_inference_mode_is_named():
    _, tape, losses = recorded()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside torch\.inference_mode"):
        tape.gram(losses)


def test_parameters_have_names():
    with pytest.raises(TypeError, match="parameters must be a dictionary of tensors by name; got list"):
        projgrad.Tape([torch.ones(3, requires_grad=True)])


def test_a_direction_has_a_tensor_for_every_parameter():
    _, tape, losses = recorded()
    with pytest.raises(ValueError, match="direction must have one tensor for each of the 4 parameters; got 1"):
        tape.dot(losses, [torch.ones(4, 5)])


def test_a_loop_over_single_samples_gets_no_advice_on_reducing_losses():
    layer, x = nn.Linear(5, 1), torch.randn(N, 5)
    with projgrad.per_sample(layer) as tape:
        losses = torch.stack([layer(row)[0] for row in x])
    with pytest.warns(UserWarning) as caught:
        K = tape.gram(losses)
    assert not any("reduce the losses" in str(w.message) for w in caught)
    torch.testing.assert_close(K, ((x @ x.mT) + 1).double(), rtol=1e-5, atol=1e-5)


def test_a_projector_that_leaves_rounding_alone_has_a_residual_of_rounding():
    """A tensor of fewer elements than samples is projected to zero: what is left of it has no direction."""
    model, x, y = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5)), torch.randn(5, 20), torch.arange(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unlearner = projgrad.OrthoGrad(model, optimizer, scope="per_tensor", projector=projgrad.projectors.qr)
    loss = nn.functional.cross_entropy
    record = unlearner.step(lambda: loss(model(-x), y), lambda: loss(model(x), y, reduction="none"))
    assert record.residual < 1e-5


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_a_gradient_whose_square_overflows_is_named(scope):
    model, x = nn.Linear(5, 3).double(), torch.randn(N, 5, dtype=torch.float64)
    with projgrad.per_sample(model) as tape:
        losses = model(x).square().sum(1)
    model.weight.grad = torch.full_like(model.weight, 1e200)
    with pytest.raises(FloatingPointError, match="NaN or Inf in the gradient to project"):
        tape.project_(losses, scope)
