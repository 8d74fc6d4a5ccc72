"""NPO and SimNPO against values worked out by hand, their limits and their gradients."""

import math

import pytest
import torch

from projgrad.methods.language_losses import npo_loss, simnpo_loss


def test_npo_is_the_logarithm_of_a_ratio_of_probabilities():
    log_probs, reference = (
        torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64).log(),
        torch.tensor([0.5, 0.5, 0.1], dtype=torch.float64).log(),
    )
    # 2/β log(1 + ratio^β): ratios 1/2, 1 and 9; β = 1/2
    want = [4 * math.log(1 + math.sqrt(0.5)), 4 * math.log(2), 4 * math.log(4)]
    assert torch.allclose(npo_loss(log_probs, reference, 0.5), torch.tensor(want, dtype=torch.float64), rtol=1e-14)


def test_npo_ascends_as_plain_ascent_at_first_and_stops_where_all_is_forgotten():
    log_probs = torch.tensor([-3.0, -203.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-3.0, -3.0], dtype=torch.float64, requires_grad=True)
    npo_loss(log_probs, reference, 0.1).sum().backward()
    # The slope 2 σ(β (log π - log π_ref)): 1, and 2 σ(-20)
    want = torch.tensor([1.0, 2 / (1 + math.exp(20))], dtype=torch.float64)
    assert torch.allclose(log_probs.grad, want, rtol=1e-12) and reference.grad is None


def test_simnpo_takes_the_mean_over_the_tokens_of_a_sequence():
    log_probs = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    # -2/β log σ(-β/|y| log π - γ); with β = 2, |y| = 2: σ(-log π) = 1/(1 + π); γ = 0
    losses = simnpo_loss(log_probs, torch.tensor([2, 2]), beta=2.0)
    assert torch.allclose(losses, torch.tensor([math.log(1.5), math.log(1.25)], dtype=torch.float64), rtol=1e-14)
    longer = simnpo_loss(log_probs * 5, torch.tensor([10, 10]), beta=2.0)
    assert torch.allclose(longer, losses, rtol=1e-14)
    margin = simnpo_loss(torch.zeros(1).double(), torch.tensor([3]), beta=1.0, gamma=1.0)
    assert margin.item() == pytest.approx(2 * math.log(1 + math.e))


def test_very_unlikely_sequences_stay_finite():
    log_probs = torch.tensor([-1e6, -1e-6], requires_grad=True)
    losses = npo_loss(log_probs, torch.tensor([-1.0, -1e6])) + simnpo_loss(log_probs, torch.tensor([4, 4]))
    losses.sum().backward()
    assert losses.isfinite().all() and log_probs.grad.isfinite().all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: npo_loss(x, x, 0.0), "beta must be positive and finite; got 0.0"),
        (lambda x: npo_loss(x, x[:1]), r"log_probs and reference_log_probs must both be \(n,\).*\(2,\) and \(1,\)"),
        (lambda x: simnpo_loss(x, x, beta=math.nan), "beta must be positive"),
        (lambda x: simnpo_loss(x, x, gamma=-1.0), "gamma must be at least 0; got -1.0"),
        (lambda x: simnpo_loss(x[None], x[None]), r"must both be \(n,\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2))
