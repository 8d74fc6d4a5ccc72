"""Write the measured tables into the README from the files under bench/results: `python -m bench.readme`."""

import csv
import json
import re
from pathlib import Path

from projgrad.demo.methods import TITLES

from .gpu_readme import gpu
from .report import RESULTS
from .steps import SUMMARY, summary

STEPS = {
    "neggrad": "no projection (NegGrad+)",
    "orthograd": "OrthoGrad, projgrad",
    "orthograd-qr": "OrthoGrad, QR on explicit gradients",
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


def demo() -> str:
    results = json.loads((RESULTS / "demo-digits.json").read_text())
    summary, sizes = results["summary"], results["sizes"]
    lines = [
        f"`make demo` trains a network of {sizes['parameters']:,} parameters on scikit-learn's digits with 15 % of the "
        f"training labels wrong, and forgets these {sizes['forget']} samples. Settings of every method come from one "
        f"search on validation data (`{results['chosen_by']['command']}`); mean ± standard deviation over "
        f"{len(results['seeds'])} seeds:",
        "",
        "| method | wrong labels repeated % | retain % | test % | ms/step |",
        "|---|---|---|---|---|",
    ]
    for method, row in summary["methods"].items():
        cells = [_share(row[key]) for key in ("forget", "retain", "test")]
        cells.append(f"{1e3 * row['step_seconds']:.1f}" if row["step_seconds"] else "")
        lines.append(f"| {TITLES[method]} | " + " | ".join(cells) + " |")
    lines += ["", summary["verdict"], ""]
    panel = results["panel_settings"][0]
    lines += [
        f"What more retain gradients buy (α = {panel['alpha']}, lr {panel['lr']}, {panel['steps']} steps):",
        "",
        "| retain samples a step | wrong labels repeated % | test % | preserved norm | ms/step |",
        "|---|---|---|---|---|",
    ]
    for row in summary["panel"]:
        label = f"{row['n']}, no projection" if row["method"] == "neggrad" else str(row["n"])
        kept = "" if row["preserved_norm"] is None else f"{row['preserved_norm']:.2f}"
        cells = [_share(row["forget"]), _share(row["test"]), kept, f"{1e3 * row['step_seconds']:.1f}"]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    if rows := summary.get("steps"):  # an interrupted demo has none
        lines += [
            "",
            "One whole step from the same batch and weights. Memory is the peak above the loaded model, in a process "
            "of its own; the difference is relative, between the two projected updates:",
            "",
            "| retain samples | " + " | ".join(STEPS.values()) + " | difference |",
            "|---|" + "---|" * (len(STEPS) + 1),
        ]
        for row in rows:
            cells = [f"{1e3 * row['seconds'][k]:.1f} ms, {_mebibytes(row['bytes'][k])}" for k in STEPS]
            lines.append(f"| {row['n']} | " + " | ".join(cells) + f" | {row['relative_difference']:.0e} |")
    return "\n".join([*lines, "", "![Accuracy per step, time and memory of a step](bench/results/demo-digits.png)"])


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


def _share(value: dict) -> str:
    return f"{100 * value['mean']:.1f}" + ("" if value["std"] is None else f" ± {100 * value['std']:.1f}")


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MiB"


def written(text: str) -> str:
    """`text` with every generated section made anew."""
    sections = [("flat", flat), ("demo", demo), ("gpu", gpu)]
    if (RESULTS / "steps_cpu.csv").exists():
        sections.append(("steps", steps))
    for name, section in sections:
        pattern = rf"(<!-- {name}: .*? -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m, s=section: m[1] + s() + m[2], text, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md must hold one section <!-- {name}: ... --> ... <!-- end -->; found {count}")
    return text


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
