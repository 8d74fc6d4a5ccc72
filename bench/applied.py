"""Is what AdamW really applies orthogonal to every retain gradient? `python -m bench.applied --scenario news-LoRA`.

Unlearns a pretrained encoder with AdamW, once for metric="gradient" (project, then let AdamW rescale) and once for
metric="optimizer". After every step the forgetting part of the change is taken from the parameters themselves: the
change less what the retain part alone would have made with the diagonal E of docs/optimizer_metric.md, in float64. Its
largest cosine with a per-sample retain gradient, the largest change of a weight, the record's own number and the scores
at the end go to bench/results/applied.csv.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import projgrad
from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.experiments.comparison.methods import batches
from projgrad.experiments.comparison.run import train
from projgrad.experiments.scenarios import SCENARIOS
from projgrad.methods.optimizer_metric import MOMENTUM

from .report import RESULTS

METRICS = ("gradient", "optimizer")
ALPHA, DECAY = 0.5, 0.01
RATES = {"news-LoRA": 2e-3, "news-full": 1e-4}  # the method's own, not searched for either metric
COLUMNS = ("scenario", "metric", "scope", "seed", "lr", "alpha", "steps", "step", "cosine", "residual")
COLUMNS += ("largest_change", "preserved_norm", "forget", "retain", "test", "tow")


class Ruler:
    """Measures steps of AdamW: what the retain parts alone do is followed in float64.

    momenta: R of docs/optimizer_metric.md, by parameter.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        self.model, self.optimizer = model, optimizer
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.momenta = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.params.items()}

    def measured(
        self, step: Callable[[], object], forget: Callable[[], Tensor], losses: Callable[[], Tensor]
    ) -> tuple[object, float, float]:
        """Take a step; return its record, max_j |cos(g_j, forgetting part)|, and the largest change over lr."""
        names, params = list(self.params), list(self.params.values())
        mean = torch.autograd.grad(losses().mean(), params)
        ascent = torch.autograd.grad(forget(), params)
        before = [p.detach().clone() for p in params]
        states = [self.optimizer.state.get(p, {}) for p in params]
        M = [
            state["exp_avg"].double() - self.momenta[n] if state else 0.0
            for n, state in zip(names, states, strict=True)
        ]
        record = step()
        (group,) = self.optimizer.param_groups
        beta1, beta2 = group["betas"]
        change, largest = {}, 0.0
        with torch.no_grad():
            for k, (name, p, old) in enumerate(zip(names, params, before, strict=True)):
                state, R = self.optimizer.state[p], self.momenta[name]
                t = float(state["step"])
                R.lerp_(ALPHA * mean[k].double(), 1 - beta1)
                if MOMENTUM in state:  # as it was before the correction
                    M[k] = beta1 * M[k] - (1 - beta1) * (1 - ALPHA) * ascent[k].double()
                else:
                    M[k] = state["exp_avg"].double() - R
                root = (state["exp_avg_sq"].double() / (1 - beta2**t)).sqrt()
                longer = torch.maximum(M[k].abs(), R.abs()) / (1 - beta1**t)
                E = group["lr"] / (torch.maximum(root, least(beta1, beta2, t) * longer) + group["eps"])
                alone = -E * R / (1 - beta1**t) - group["lr"] * group["weight_decay"] * old.double()
                change[name] = (p.double() - old.double() - alone).to(p.dtype)
                largest = max(largest, float((p - old).abs().max()) / group["lr"])
        after = [p.detach().clone() for p in params]
        self._put(before)
        with projgrad.per_sample(self.model, self.params) as tape:
            at_start = losses()
        products, lengths = tape.dot(at_start, change), tape.gram(at_start).diagonal().sqrt()
        self._put(after)
        norm = sum(float(c.double().square().sum()) for c in change.values()) ** 0.5
        return record, float((products.abs() / lengths).max()) / norm, largest

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for p, value in zip(self.params.values(), values, strict=True):
            p.copy_(value)


def least(beta1: float, beta2: float, t: float) -> float:
    """Return the least √v̂ / |m̂| of Adam over all series of t gradients."""
    ages = torch.arange(t, dtype=torch.float64)
    first, second = (beta**ages / (beta**ages).sum() for beta in (beta1, beta2))
    return 0.999 * float((first**2 / second).sum()) ** -0.5


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
        record, cosine, largest = ruler.measured(lambda closures=closures: unlearner.step(*closures), *closures)
        decay.step()
        numbers = {"cosine": cosine, "largest_change": largest}
        yield {"step": step, "residual": record.residual, "preserved_norm": record.preserved_norm} | numbers


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
