"""OrthoGrad by hand, on a model that is small enough to hold every per-sample gradient.

    python examples/orthograd_by_hand.py

`step` applies the update of `projgrad.OrthoGrad.step`, to rounding, but holds G: n times the memory of the model.
"""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import projgrad

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs [n, ...] and labels [n]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, forget: Batch, retain: Batch, alpha: float = 0.5) -> float:
    """Take one step: α · mean retain gradient - (1 - α) · u_perp. Return the preserved norm ‖u_perp‖ / ‖u‖."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(functional_call(model, params, (x,)), y)

    def loss_of_one(params: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss(params, x[None], y[None])  # a batch of one

    # One gradient for every retain sample, flattened: row j of G is the gradient of the loss of sample j.
    per_sample = vmap(grad(loss_of_one), in_dims=(None, 0, 0))(params, *retain)  # {name: [n, *shape]}
    G = torch.cat([g.flatten(1) for g in per_sample.values()], dim=1)  # [n, p]
    u = torch.cat([g.flatten() for g in grad(loss)(params, *forget).values()])  # [p], of the whole forget batch
    u_perp = projgrad.project_out(u, G)  # u - Gᵀ (G Gᵀ)⁺ G u: no row of G has an inner product with it
    update = alpha * G.mean(0) - (1 - alpha) * u_perp  # the minus makes it ascent on the forget loss
    for p, part in zip(model.parameters(), update.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad = part.view_as(p)
    optimizer.step()  # SGD without momentum: θ ← θ - lr · update
    return float(u_perp.norm() / u.norm())


def main() -> None:
    """Train on three blobs, then forget the third one."""
    torch.manual_seed(0)
    y = torch.arange(300) % 3
    x = torch.randn(300, 10) + 3 * nn.functional.one_hot(y, 10)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        adam.zero_grad()
        cross_entropy(model(x), y).backward()
        adam.step()
    forget, retain = (x[y == 2], y[y == 2]), (x[y != 2], y[y != 2])
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    for i in range(50):
        rows = torch.randperm(len(retain[1]))[:32]  # 32 retain samples are protected in this step
        preserved = step(model, sgd, forget, (retain[0][rows], retain[1][rows]))
        right = [float((model(x).argmax(1) == y).double().mean()) for x, y in (forget, retain)]
        print(f"step {i:2}: forget {right[0]:.0%} right, retain {right[1]:.0%} right, preserved norm {preserved:.2f}")
        if right[0] < 0.05:
            break  # ascent grows without bound


if __name__ == "__main__":
    main()
