"""The results of forgetting facts as rows: python -m bench.facts OUT

Reads OUT/compare.json of `projgrad compare --scenario facts-LoRA facts-full --study --out OUT`, writes
bench/results/facts.csv: one row for each scenario, method, number of retain samples and seed. `python -m bench.readme`
makes the table of docs/facts.md from it. Rows of scenarios that OUT does not have stay.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from projgrad.evaluate import summarize, summarize_study
from projgrad.experiments.benchmark.report import read_csv, write_csv
from projgrad.experiments.comparison.methods import METHODS, TITLES
from projgrad.experiments.comparison.store import read_json

from .report import RESULTS

FILE = RESULTS / "facts.csv"
ABOUT = ("scenario", "table", "method", "n", "seed", "lr", "value", "steps", "seconds", "step_seconds")
SCORES = (
    "forget", "paraphrased", "retain", "test", "unseen", "tow", "probability_forget", "rouge_forget", "truth_forget",
    "extraction", "mia_auc", "forget_quality", "probability_retain", "rouge_retain", "truth_retain",
    "probability_world", "rouge_world", "truth_world", "utility", "perplexity", "distance",
)  # fmt: skip
COLUMNS = (*ABOUT, *SCORES, "preserved_norm", "residual", "stopped", "torch", "threads", "processor")
# Column of the table: title, factor, digits; where there are several seeds the SPREAD ones show their deviation, too.
SPREAD = ("forget", "paraphrased", "retain", "test", "tow", "utility")
SHOWN = {
    "lr": ("rate", 1, 1),
    "forget": ("forgotten facts right %", 100, 0),
    "paraphrased": ("in other words %", 100, 0),
    "retain": ("kept facts %", 100, 0),
    "test": ("world %", 100, 0),
    "tow": ("ToW", 1, 3),
    "probability_forget": ("probability, forget", 1, 3),
    "rouge_forget": ("ROUGE-L, forget", 1, 2),
    "extraction": ("extraction", 1, 2),
    "mia_auc": ("attack AUC", 1, 2),
    "forget_quality": ("log10 of forget quality", 1, 1),
    "utility": ("utility", 1, 3),
    "perplexity": ("perplexity", 1, 1),
    "step_seconds": ("s a step", 1, 1),
}


def rows_of(results: dict) -> Iterator[dict]:
    """Yield a row for every run of the finished scenarios that forget facts."""
    for name, scenario in results["scenarios"].items():
        if not name.startswith("facts") or scenario["skipped"]:
            continue
        made = {key: results["environment"].get(key) for key in ("torch", "threads", "processor")}
        for table in ("runs", "study"):
            for run in scenario[table]:
                flat = {"scenario": name, "table": table, **(run["setting"] or {}), **run, **run["scores"], **made}
                yield {key: flat.get(key) for key in COLUMNS}


def facts() -> str:
    """Return a table of every scenario in the file: means over the seeds, and standard deviations."""
    rows, lines = read_csv(FILE), []
    for name in dict.fromkeys(row["scenario"] for row in rows):
        mine = [row for row in rows if row["scenario"] == name]
        seeds = sorted({row["seed"] for row in mine})
        threads = _count(int(mine[0]["threads"]), "thread")
        heads = ["method", *(title for title, _, _ in SHOWN.values())]
        over = _count(len(seeds), "seed") if len(seeds) == 1 else f"means over {len(seeds)} seeds, ± standard deviation"
        lines += [
            f"`{name}`, {over}; torch {mine[0]['torch']}, {threads}:",
            "",
            "| " + " | ".join(heads) + " |",
            "|---" * len(heads) + "|",
        ]
        for title, values in _means(mine):
            cells = [
                _cell(values.get(key), factor, digits, key in SPREAD) for key, (_, factor, digits) in SHOWN.items()
            ]
            lines.append(f"| {' | '.join([title, *cells])} |")
        lines.append("")
    return "\n".join(lines[:-1])


def _means(rows: list[dict]) -> Iterator[tuple[str, dict[str, dict]]]:
    """Yield title and scores of every method, then of every number of retain samples in the study."""
    runs = [
        {"method": row["method"], "n": row["n"] and int(row["n"]), "seed": row["seed"], "table": row["table"]}
        | {"scores": {key: float(row[key]) if row[key] else None for key in (*SCORES, "lr", "step_seconds")}}
        for row in rows
    ]
    for run in runs:
        run["step_seconds"] = run["scores"].pop("step_seconds")
        if (p := run["scores"]["forget_quality"]) is not None:  # of p-values no mean over seeds means anything
            run["scores"]["forget_quality"] = math.log10(max(p, 1e-300))
    scenario = {table: [run for run in runs if run["table"] == table] for table in ("runs", "study")}
    means = summarize(scenario)
    for method in (method for method in TITLES if method in means):
        yield TITLES[method], means[method]
    for method, by_n in summarize_study(scenario).items():
        for n, row in by_n.items():
            yield f"{METHODS[method].title}, α = 0.5, n = {n}", row


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _cell(stats: dict | None, factor: float, digits: int, spread: bool) -> str:
    if stats is None:
        return ""
    cell = f"{factor * stats['mean']:.{digits}f}"
    return f"{cell} ± {factor * stats['std']:.{digits}f}" if spread and stats["std"] is not None else cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of `projgrad compare --out`")
    results = read_json(parser.parse_args().out / "compare.json")
    if results is None:
        parser.error("there is no compare.json in that folder")
    rows = list(rows_of(results))
    new = {row["scenario"] for row in rows}
    old = [row for row in read_csv(FILE) if row["scenario"] not in new] if FILE.exists() else []
    write_csv(FILE, [*old, *rows], COLUMNS)
    print(f"{len(rows)} rows in {FILE}")


if __name__ == "__main__":
    main()
