"""Who is compared on which input. `python -m bench.contenders CASE/NAME` prints the extra memory of one, in MB."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import projgrad
from projgrad import projectors
from projgrad.experiments.comparison.memory import peak_memory


def plain_project_out(u: Tensor, G: Tensor) -> Tensor:
    """The Gram route as one would write it down."""
    return u - torch.linalg.solve(G @ G.mT, G @ u) @ G


def lstsq_project_out(u: Tensor, G: Tensor) -> Tensor:
    return u - torch.linalg.lstsq(G.mT, u[:, None]).solution[:, 0] @ G


def plain_gram(u: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    return G @ G.mT, G @ u


def pseudo_inverse_solve(K: Tensor, b: Tensor) -> Tensor:
    """What rank detection costs with an eigendecomposition."""
    values, vectors = torch.linalg.eigh(K)
    inverse = torch.where(values > 64 * torch.finfo(K.dtype).eps * values[..., -1:], 1 / values, 0)
    return (vectors @ (inverse[..., None] * (vectors.mT @ b[..., None])))[..., 0]


@dataclass(frozen=True)
class Case:
    """One input. `size` is (n, p), or (systems, n) for gram_solve; `targets`: how many times our time each should take,
    at least; `megabytes`: what ours may need beyond its inputs and its result."""

    op: str
    size: tuple[int, int]
    contenders: dict[str, Callable]
    targets: dict[str, float]
    megabytes: float | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.size[0]}x{self.size[1]}"

    def inputs(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        if self.op == "gram_solve":
            systems, n = self.size
            A = torch.randn(systems, n, 2 * n)
            return A @ A.mT, torch.randn(systems, n)
        G = torch.randn(self.size)
        return torch.randn(self.size[1]), G


PROJECT = {
    "projgrad": projgrad.project_out,
    "plain Gram": plain_project_out,
    "QR": projectors.qr,
    "lstsq": lstsq_project_out,
}
GRAM = {"projgrad": lambda u, G: projgrad.gram(G, u), "plain Gram": plain_gram}
SOLVE = {
    "projgrad": projgrad.gram_solve,
    "linalg.solve": torch.linalg.solve,
    "eigh pseudo-inverse": pseudo_inverse_solve,
}
CASES = [
    Case("project_out", (8, 2_000_000), PROJECT, {"QR": 4, "plain Gram": 1.5}, 16),
    Case("project_out", (32, 2_000_000), PROJECT, {"QR": 12, "plain Gram": 1.3}, 16),
    Case("project_out", (128, 500_000), PROJECT, {"QR": 12, "plain Gram": 1.2}, 16),
    Case("gram", (8, 2_000_000), GRAM, {}),
    Case("gram", (32, 2_000_000), GRAM, {}),
    Case("gram", (128, 500_000), GRAM, {}),
    Case("gram_solve", (200, 64), SOLVE, {"eigh pseudo-inverse": 5, "linalg.solve": 1}),
]


def main() -> None:
    name, contender = sys.argv[1].split("/")
    case = next(case for case in CASES if case.name == name)
    call = case.contenders[contender]
    inputs = case.inputs()
    call(
        *(t[:2] if case.op == "gram_solve" else t[..., :256].contiguous() for t in inputs)
    )  # loads what is loaded once
    with peak_memory() as peak:
        result = call(*inputs)
    if peak.bytes is None:
        raise SystemExit("peak memory is measured on Linux only")
    results = result if isinstance(result, tuple) else (result,)
    print((peak.bytes - sum(t.numel() * t.element_size() for t in results)) / 1e6)


if __name__ == "__main__":
    main()
