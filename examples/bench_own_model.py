"""Your own model and batch for the benchmark: copy this, and run `projgrad bench bench_own_model.py:make`."""

import torch
from torch.nn.functional import cross_entropy


def make(n: int = 16):
    """Return the model, the two closures of a step and, if it is not SGD, the optimizer.

    n: retain samples. Leave the parameter out where your batch has a fixed size; with it `--n 8 32` works.
    """
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    forget_x, forget_y = torch.randn(8, 32), torch.randint(5, (8,))  # take them from your loader, once
    retain_x, retain_y = torch.randn(n, 32), torch.randint(5, (n,))

    def forget():
        return cross_entropy(model(forget_x), forget_y)

    def retain(part=slice(None)):  # `part` lets the benchmark take explicit gradients sample by sample
        return cross_entropy(model(retain_x[part]), retain_y[part], reduction="none")

    return model, forget, retain, optimizer
