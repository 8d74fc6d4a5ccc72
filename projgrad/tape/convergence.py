"""How far conjugate gradients are from the exact result, from the numbers of their own iterations."""

from __future__ import annotations

import torch
from torch import Tensor


class Convergence:
    """Numbers of every iteration on some systems side by side, [l] each: ρ = ⟨s, z⟩, β, γ and what ‖r‖² lost."""

    def __init__(self) -> None:
        self.rho: list[Tensor] = []
        self.beta: list[Tensor] = []
        self.step: list[Tensor] = []
        self.gain: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.rho)

    def next_beta(self, rho: Tensor) -> Tensor:
        """Begin an iteration; return β, zeros in the first."""
        before = self.rho[-1] if self.rho else torch.zeros_like(rho)
        self.rho.append(rho)
        self.beta.append(torch.where(before > 0, rho / before, 0.0))
        return self.beta[-1]

    def add(self, step: Tensor, gain: Tensor) -> None:
        """End an iteration."""
        self.step.append(step)
        self.gain.append(gain.clamp_min(0))

    def left(self, size: Tensor, floor: Tensor) -> Tensor:
        """Estimate ‖r - exact result‖² [l] after the last iteration.

        It is the sum of all gains to come. The last gains give it as a geometric series. That is far too little on a
        plateau, where directions of small eigenvalues wait for their turn: so it is at least the ρ of the last
        iteration over the smallest eigenvalue seen, less the gain. It is at most ‖r‖² = `size`; gains below `floor`
        are rounding.
        """
        window = max(min(3, len(self) // 2), len(self) // 4)  # longer where convergence is slow
        if not window:
            return size
        gains = torch.stack(self.gain)
        late, early = gains[-window:].sum(0), gains[-2 * window : -window].sum(0)
        ratio = torch.where(early > 0, late / early.clamp_min(1e-300), 0.0).clamp_max(1.0)
        series = late * ratio / (1 - ratio).clamp_min(1e-12)  # of sums over `window` terms
        bound = self.rho[-1] / self.smallest_eigenvalue() - self.gain[-1]
        return torch.where(late <= floor, late, torch.minimum(torch.maximum(series, bound), size))

    def smallest_eigenvalue(self) -> Tensor:
        """Return the smallest Ritz value [l], of the tridiagonal matrix that Lanczos' method would have found."""
        step, beta = torch.stack(self.step, 1).cpu(), torch.stack(self.beta, 1).cpu()  # [l, k]
        used = (step > 0).cumprod(1).bool()  # a system that has ended has no more coefficients
        inverse = torch.where(used, 1 / step.where(used, 1), 1e300)
        diagonal = inverse.clone()
        diagonal[:, 1:] += torch.where(used[:, 1:], beta[:, 1:] * inverse[:, :-1], 0.0)
        beside = torch.where(used[:, 1:], beta[:, 1:].sqrt() * inverse[:, :-1], 0.0)
        diagonal = torch.where(used, diagonal, diagonal.where(used, 0).amax(1, keepdim=True).clamp_min(1.0))
        T = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        return torch.linalg.eigvalsh(T)[:, 0].clamp_min(1e-300).to(self.rho[0].device)
