"""Write the measured tables into the README from the files under bench/results: `python -m bench.readme`."""

import csv
import json
import re
from pathlib import Path

from projgrad.compare.methods import TITLES
from projgrad.evaluate import verdict
from projgrad.evaluate.tables import caption, columns
from projgrad.scenarios import FAST

from .gpu_readme import gpu
from .report import RESULTS
from .steps import SUMMARY, summary

COLUMNS = {  # of the comparison's table that the README has room for, and their titles here
    "method": "method",
    "forget %": None,
    "retain %": "retain %",
    "test %": "test %",
    "MIA AUC": "MIA AUC",
    "ToW": "ToW",
    "ms/step": "ms/step",
    "peak MiB": "peak MiB",
}
README = Path(__file__).parent.parent / "README.md"


def flat() -> str:
    with (RESULTS / "flat_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["projgrad", "plain Gram", "QR", "lstsq"]
    lines = [
        f"Projection of one float32 vector, median milliseconds (extra memory in MB), {rows[0]['threads']} threads, "
        f"{rows[0]['device']}, torch {rows[0]['torch']}; `make bench` measures it on your machine:",
        "",
        "| n x p | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for size in dict.fromkeys(row["size"] for row in rows if row["op"] == "project_out"):
        found = {row["contender"]: row for row in rows if row["op"] == "project_out" and row["size"] == size}
        cells = [f"{_ms(found[name])} ({float(found[name]['extra_mb']):.0f})" for name in names]
        cells = [f"**{cells[0]}**", *(f"{c}, {_times(found[n])} x" for n, c in zip(names[1:], cells[1:], strict=True))]
        n, p = size.split("x")
        lines.append(f"| {n} x {int(p):,} | " + " | ".join(cells) + " |")
    solve = {row["contender"]: row for row in rows if row["op"] == "gram_solve"}
    lines += ["", "Two hundred Gram systems of n = 64, with rank detection: " + ", ".join(_solver(solve)) + "."]
    return "\n".join(lines)


def _ms(row: dict) -> str:
    return f"{float(row['ms']):.3g}"


def _times(row: dict) -> str:
    return f"{float(row['times_ours']):.1f}"


def _solver(rows: dict[str, dict]) -> list[str]:
    titles = {"projgrad": "`gram_solve`", "linalg.solve": "`torch.linalg.solve` (none)"}
    return [
        f"{titles.get(name, name)} {_ms(row)} ms" + (f" ({_times(row)} x)" if name != "projgrad" else "")
        for name, row in rows.items()
    ]


def compare() -> str:
    """A table and a verdict for every scenario of the fast preset, and where the others are."""
    results = json.loads((RESULTS / "compare.json").read_text())["scenarios"]
    lines = ["![Forget and test accuracy of every method](bench/results/overview.png)", ""]
    for name in FAST:
        scenario = results[name]
        shown = [column for column in columns(scenario, TITLES) if column.title in COLUMNS]
        titles = [COLUMNS[column.title] or scenario["forget_title"] + " %" for column in shown]
        lines += [f"**{scenario['title'].capitalize()}** (`{name}`): {caption(scenario)}", ""]
        lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        rows = zip(*(column.cells for column in shown), strict=True)
        lines += ["| " + " | ".join(cell.replace("±", " ± ") for cell in cells) + " |" for cells in rows]
        lines += ["", verdict(scenario, TITLES), ""]
    for name in FAST[:1] + FAST[2:]:
        lines.append(f"![{results[name]['title']}: accuracy and cost against n](bench/results/{name}-study.png)")
    return "\n".join(lines)


def steps() -> str:
    with (RESULTS / "steps_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = [
        f"Whole steps in float32 on {rows[0]['threads']} threads, {rows[0]['device']}, torch {rows[0]['torch']}, with "
        "targets in parentheses. Plain is the same two batches without projection, for K alone one forward and "
        "backward pass; memory is the peak above the loaded model (the first step inspects the model); vmap is "
        "`vmap(grad)` and QR, for K alone "
        "`vmap(grad)` and a product; `python -m bench.steps` measures it on your machine:",
        "",
        "| " + " | ".join(SUMMARY) + " |",
        "|---|" + "---|" * (len(SUMMARY) - 1),
    ]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in summary(rows)])


def written(text: str) -> str:
    """`text` with every generated section made anew."""
    sections = [("flat", flat), ("compare", compare), ("steps", steps), ("gpu", gpu)]
    for name, section in sections:
        pattern = rf"(<!-- {name}: .*? -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m, s=section: m[1] + s() + m[2], text, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md must hold one section <!-- {name}: ... --> ... <!-- end -->; found {count}")
    return text


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
