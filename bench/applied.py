"""Is what AdamW really applies orthogonal to every retain gradient? `python -m bench.applied --scenario news-LoRA`.

Unlearns a pretrained encoder with AdamW, once for metric="gradient" (project, then let AdamW rescale) and once for
metric="optimizer". After every step the forgetting part of the change is taken from the parameters themselves: the
change less what the retain part alone would have made with the same diagonal, in float64. Its largest cosine with a
per-sample retain gradient, the record's own number and the scores at the end go to bench/results/applied.csv.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import projgrad
from projgrad.experiments.comparison.methods import batches
from projgrad.experiments.comparison.run import train
from projgrad.experiments.scenarios import SCENARIOS

from .machine import environment
from .report import RESULTS, read_csv, write_csv

METRICS = ("gradient", "optimizer")
ALPHA, DECAY = 0.5, 0.01
RATES = {"news-LoRA": 2e-3, "news-full": 1e-4}  # the method's own, not searched for either metric
COLUMNS = ("scenario", "metric", "scope", "seed", "lr", "alpha", "steps", "step", "cosine", "residual")
COLUMNS += ("preserved_norm", "forget", "retain", "test", "tow")


class Ruler:
    """Measures steps of AdamW: what the retain parts alone do is followed in float64."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        self.model, self.optimizer = model, optimizer
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.momenta = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.params.items()}

    def measured(self, step: Callable[[], object], losses: Callable[[], Tensor]) -> tuple[object, float]:
        """Take a step; return its record and max_j |cos(g_j, forgetting part of the change)|."""
        names, params = list(self.params), list(self.params.values())
        mean = torch.autograd.grad(losses().mean(), params)
        before = [p.detach().clone() for p in params]
        record = step()
        (group,) = self.optimizer.param_groups
        beta1, beta2 = group["betas"]
        change = {}
        with torch.no_grad():
            for name, p, old, g in zip(names, params, before, mean, strict=True):
                state, M = self.optimizer.state[p], self.momenta[name]
                t = float(state["step"])
                M.lerp_(ALPHA * g.double(), 1 - beta1)
                D = group["lr"] / ((state["exp_avg_sq"].double() / (1 - beta2**t)).sqrt() + group["eps"])
                alone = -D * M / (1 - beta1**t) - group["lr"] * group["weight_decay"] * old.double()
                change[name] = (p.double() - old.double() - alone).to(p.dtype)
        after = [p.detach().clone() for p in params]
        self._put(before)
        with projgrad.per_sample(self.model, self.params) as tape:
            at_start = losses()
        products, lengths = tape.dot(at_start, change), tape.gram(at_start).diagonal().sqrt()
        self._put(after)
        norm = sum(float(c.double().square().sum()) for c in change.values()) ** 0.5
        return record, float((products.abs() / lengths).max()) / norm

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for p, value in zip(self.params.values(), values, strict=True):
            p.copy_(value)


def unlearn(problem, model: nn.Module, metric: str, options: dict, seed: int, batch: int) -> Iterator[dict]:
    """Yield a row for every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options["lr"], weight_decay=DECAY)
    steps = options["steps"]
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, max(1, steps - 1))
    unlearner = projgrad.OrthoGrad(model, optimizer, ALPHA, scope=options["scope"], metric=metric)
    ruler = Ruler(model, optimizer)
    generators = [torch.Generator().manual_seed(1000 * k + seed) for k in (1, 2)]
    forget, retain = batches(problem.forget, batch, generators[0]), batches(problem.retain, options["n"], generators[1])
    for step in range(1, steps + 1):
        some, others = next(forget), next(retain)

        def losses(part=others) -> Tensor:
            return problem.losses(model, part)

        closures = (lambda part=some: problem.losses(model, part).mean()), losses
        record, cosine = ruler.measured(lambda closures=closures: unlearner.step(*closures), losses)
        decay.step()
        yield {"step": step, "cosine": cosine, "residual": record.residual, "preserved_norm": record.preserved_norm}


def measure(args: argparse.Namespace) -> Iterator[dict]:
    """Yield a row for every step of every metric and seed, and one with the scores of each run."""
    scenario = SCENARIOS[args.scenario]
    options = {"lr": args.lr or RATES[args.scenario], "steps": args.steps, "scope": args.scope, "n": scenario.n}
    for seed in args.seeds:
        problem = scenario.load(seed)
        original = train(problem, [problem.retain, problem.forget], seed)
        retrained = train(problem, [problem.retain], seed)
        for metric in args.metrics:
            about = {"scenario": args.scenario, "metric": metric, "seed": seed, "alpha": ALPHA, **options}
            model = copy.deepcopy(original)
            for row in unlearn(problem, model, metric, options, seed, scenario.forget_batch):
                print(f"{metric} seed {seed} step {row['step']}: cosine {row['cosine']:.1e}", flush=True)
                yield about | row
            scores = projgrad.evaluate.scores(problem, model, retrained=retrained)
            print({key: scores[key] for key in ("forget", "retain", "test", "tow")}, flush=True)
            yield about | {"step": "end"} | {key: scores[key] for key in ("forget", "retain", "test", "tow")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", choices=sorted(RATES), default="news-LoRA")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS)
    parser.add_argument("--scope", choices=("global", "per_tensor"), default="global")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--lr", type=float, help=f"at the first step; by default {RATES}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for applied.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about, path = environment(), args.out / "applied.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    for row in measure(args):
        key = [str(row[name]) for name in ("scenario", "metric", "scope", "seed", "lr", "steps", "step")]
        rows = read_csv(path) if path.exists() else []
        rows = [
            r
            for r in rows
            if [r[name] for name in ("scenario", "metric", "scope", "seed", "lr", "steps", "step")] != key
        ]
        write_csv(path, [*rows, {name: row.get(name, "") for name in COLUMNS} | about], [*COLUMNS, *about])


if __name__ == "__main__":
    main()
