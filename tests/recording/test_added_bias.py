"""A bias that `addmm` adds to a product of which nothing is trained: GPT-2 under bias tuning."""

import warnings

import torch

import projgrad


def test_the_bias_of_a_frozen_matrix_takes_no_backward_pass_per_sample():
    """Each of four samples is three rows, as transformers' Conv1D lays them out."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def losses(bias, x):
        return torch.addmm(bias, x.reshape(-1, 5), weight, beta=0.5).view(len(x), 3, 2).square().sum((1, 2))

    module = torch.nn.Module()
    module.bias = torch.nn.Parameter(bias.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with projgrad.per_sample(module) as tape:
            found = losses(module.bias, x)
        K = tape.gram(found)
    rows = torch.stack([torch.autograd.grad(losses(bias, x[j : j + 1]).sum(), bias)[0] for j in range(4)])
    torch.testing.assert_close(K, rows @ rows.mT)
