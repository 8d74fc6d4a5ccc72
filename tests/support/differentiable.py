"""Every public op as a function of small float64 tensors, for all tests of derivatives."""

import torch

import projgrad


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


SUMS = torch.linspace(-10, 10, 21, dtype=torch.float64).view(3, 7)  # Σg of 4 samples, with s² = 2 / 3
# name -> (public function, inputs that require gradients)
FUNCTIONS = {
    "basis_project": (projgrad.basis_project, lambda: (double(3, 7), double(7, 2))),
    "basis_project_of_each": (projgrad.basis_project, lambda: (double(2, 3, 4), double(2, 4, 2))),
    "feasible": (lambda d: projgrad.feasible(d, -d.detach(), SUMS, SUMS.square() / 4 + 2, 4), lambda: (double(3, 7),)),
    "gram": (projgrad.gram, lambda: (double(3, 7), double(2, 7))),
    "gram_alone": (projgrad.gram, lambda: (double(3, 7),)),
    "gram_solve": (lambda A, b: projgrad.gram_solve(A @ A.mT, b), lambda: (double(2, 3, 7), double(2, 3))),
    "gram_solve_damped": (
        lambda A, b: projgrad.gram_solve(A @ A.mT, b, damping=0.2),
        lambda: (double(4, 2), double(4, 3)),
    ),
    "project_out": (projgrad.project_out, lambda: (double(7), double(3, 7))),
    "project_out_directions": (projgrad.project_out, lambda: (double(2, 7), double(3, 7))),
    "project_out_damped": (
        lambda u, G: projgrad.project_out(u, G, damping=0.2),
        lambda: (double(2, 4), double(6, 4)),
    ),
    "project_out_everything": (projgrad.project_out, lambda: (double(3), double(3, 3))),
}
