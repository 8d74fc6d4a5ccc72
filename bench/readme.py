"""Write the measured tables into README.md and docs/scenarios.md from bench/results: `python -m bench.readme`."""

import csv
import json
import re
from pathlib import Path

from projgrad.evaluate import verdict
from projgrad.evaluate.tables import caption, columns
from projgrad.experiments.comparison.methods import TITLES
from projgrad.experiments.scenarios import FAST, SCENARIOS

from .gpu_readme import gpu
from .report import RESULTS
from .steps import SUMMARY, summary

HIDDEN = ("steps", "usable")  # columns of the comparison's tables that there is no room for
ROOT = Path(__file__).parent.parent


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
    """A table and a verdict for every scenario of the fast preset, and what more retain samples buy on two."""
    results = _compared()
    lines = ["![Forget and test accuracy of every method](bench/results/overview.png)", ""]
    for name in FAST:
        lines += _scenario(name, results[name])
    lines += [_study(name, results[name], "bench/results") for name in ("digits-labels", "news-full")]
    return "\n".join(lines)


def scenarios() -> str:
    """The same for every other scenario that was run, and the n-study of all."""
    lines, results = [], _compared()
    for name, scenario in results.items():
        if name not in FAST:
            made = scenario["environment"]
            lines += _scenario(name, scenario)
            lines += [f"`{scenario['command']}`: torch {made['torch']}, threads: {made['threads']}.", ""]
    lines += [_study(name, scenario, "../bench/results") for name, scenario in results.items() if scenario["study"]]
    return "\n".join(lines)


def _compared() -> dict[str, dict]:
    found = json.loads((RESULTS / "compare.json").read_text())["scenarios"]
    return {name: found[name] for name in SCENARIOS if name in found}


def _scenario(name: str, scenario: dict) -> list[str]:
    shown = [column for column in columns(scenario, TITLES) if column.title not in HIDDEN]
    titles = [scenario["forget_title"] + " %" if c.title == "forget %" else c.title for c in shown]
    rows = zip(*(column.cells for column in shown), strict=True)
    return [
        f"**{scenario['title'][0].upper()}{scenario['title'][1:]}** (`{name}`): {caption(scenario)}",
        "",
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
        *("| " + " | ".join(cell.replace("±", " ± ") for cell in cells) + " |" for cells in rows),
        "",
        verdict(scenario, TITLES),
        "",
    ]


def _study(name: str, scenario: dict, folder: str) -> str:
    return f"![{scenario['title']}: accuracy and cost against n]({folder}/{name}-study.png)"


def steps() -> str:
    with (RESULTS / "steps_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = [
        f"Whole steps in float32 on {rows[0]['threads']} threads, {rows[0]['device']}, torch {rows[0]['torch']}, with "
        "targets in parentheses. Plain: the same two batches without projection, for K (all inner products of retain "
        "gradients) alone one forward and backward pass. global, per_tensor: `scope`; two passes: "
        "`keep_output_gradients=False`. Memory: the peak above the loaded model, of the first step, which inspects the "
        "model, unless it says otherwise. vmap: `torch.func.vmap` of `grad`, then QR or a Gram matrix. "
        "`python -m bench.steps` measures it on your machine:",
        "",
        "| " + " | ".join(SUMMARY) + " |",
        "|---|" + "---|" * (len(SUMMARY) - 1),
    ]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in summary(rows)])


SECTIONS = {
    "README.md": {"flat": flat, "compare": compare, "steps": steps, "gpu": gpu},
    "docs/scenarios.md": {"scenarios": scenarios},
}


def written(file: str, text: str) -> str:
    """`text` of a file of SECTIONS with every generated section made anew."""
    for name, section in SECTIONS[file].items():
        pattern = rf"(<!-- {name}: .*? -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m, s=section: m[1] + s() + m[2], text, flags=re.S)
        if count != 1:
            raise ValueError(f"{file} must hold one section <!-- {name}: ... --> ... <!-- end -->; found {count}")
    return text


if __name__ == "__main__":
    for file in SECTIONS:
        (ROOT / file).write_text(written(file, (ROOT / file).read_text()))
