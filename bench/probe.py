"""What a probe says of problems whose outcome is known: `python -m bench.probe [--scenario NAME ...] [--seeds N ...]`.

Probes the original models of the comparison, one seed after the other, and keeps the rows in bench/results/probe.csv;
rows of the same scenario and seed are replaced. `probe_table` sets them beside the comparison's n-study.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch

import projgrad
from projgrad.experiments.benchmark.machine import environment
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.experiments.comparison.run import train
from projgrad.experiments.scenarios import SCENARIOS

from .report import RESULTS

SIZES = (4, 16, 64, 128, 256)
ABOUT = ("scenario", "seed", "plain_change", "verdict")
COLUMNS = (
    *ABOUT,
    "scope",
    "samples",
    "rank",
    "preserved_norm",
    "spill",
    "learning_rate",
    "step_length",
    "forget_change",
)


def measure(name: str, seed: int, scopes: list[str]) -> Iterator[dict]:
    """Yield a row for every number of retain samples and scope."""
    scenario = SCENARIOS[name]
    problem = scenario.load(seed)
    model = train(problem, [problem.retain, problem.forget], seed)
    order = torch.Generator().manual_seed(seed)
    forget, retain = (part[torch.randperm(len(part), generator=order)] for part in (problem.forget, problem.retain))
    forget = forget[: scenario.forget_batch]
    probed = projgrad.probe(
        model,
        lambda: problem.losses(model, forget).mean(),
        lambda n: problem.losses(model, retain[:n]),
        sizes=SIZES,
        scopes=scopes,
        rounds=1,
    )
    print(f"{name}, seed {seed}", probed, sep="\n", flush=True)
    about = {"scenario": name, "seed": seed, "plain_change": probed.plain_change, "verdict": probed.verdict}
    for row in probed.rows:
        yield about | {column: value for column, value in vars(row).items() if column in COLUMNS}


def probe_table() -> str:
    """Return the table of docs/probe.md: means over seeds, and what came of steps with as many samples."""
    rows = [row for row in read_csv(RESULTS / "probe.csv") if row["scope"] == "global"]
    studied = json.loads((RESULTS / "compare.json").read_text())["scenarios"]
    heads = ("scenario", "n", "kept", "spill", "length", "test accuracy %, α = 0.5", "forgotten ones known %")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, n in dict.fromkeys((row["scenario"], row["samples"]) for row in rows):
        some = [row for row in rows if (row["scenario"], row["samples"]) == (name, n)]
        study = [r for r in studied[name]["study"] if r["method"] == "orthograd" and str(r["n"]) == n]
        lengths = [float(row["step_length"]) for row in some if row["step_length"]]
        cells = [
            studied[name]["title"],
            n,
            f"{mean(float(row['preserved_norm']) for row in some):.2f}",
            f"{mean(float(row['spill']) for row in some):.2f}" if all(row["spill"] for row in some) else "",
            f"{min(lengths):.2g} to {max(lengths):.2g}" if lengths else "",
            *(f"{100 * mean(r['scores'][key] for r in study):.1f}" if study else "" for key in ("test", "forget")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = ", ".join(dict.fromkeys(row["seed"] for row in rows))
    about = f"Means over seeds {seeds}, of the length the smallest and largest; torch {rows[0]['torch']}:"
    return "\n".join([about, "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", nargs="+", choices=sorted(SCENARIOS), default=["digits-labels", "digits-class"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[5, 6, 7], help="those of the comparison: 5, 6, 7")
    parser.add_argument("--scopes", nargs="+", default=["global"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for probe.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about, path = environment(), args.out / "probe.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.scenario:
        for seed in args.seeds:
            new = [row | about for row in measure(name, seed, args.scopes)]
            old = read_csv(path) if path.exists() else []
            old = [row for row in old if (row["scenario"], row["seed"]) != (name, str(seed))]
            write_csv(path, old + new, [*COLUMNS, *about])


if __name__ == "__main__":
    main()
