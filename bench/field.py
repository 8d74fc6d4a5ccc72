"""The README's first table: projgrad beside other packages, from what `bench.peers` and `bench.support` measured."""

from projgrad.experiments.benchmark.report import read_csv

from .report import RESULTS
from .support import counts

SHOWN = {
    "plain": "training without projection",
    "projgrad": "**projgrad**",
    "vmap + Gram": "vmap(grad)",
    "one by one": "batches of one",
    "torchjd": "TorchJD",
    "opacus": "Opacus",
    "backpack": "BackPACK",
    "nngeometry": "NNGeometry",
}
COLUMNS = {"mlp": "MLP, n = 64", "conv": "conv net, n = 64", "encoder": "encoder, n = 32"}  # models of `bench.peers`


def field() -> str:
    """Return time and memory of K on three models, and on how many features of models each way is right."""
    peers, support = read_csv(RESULTS / "peers_cpu.csv"), read_csv(RESULTS / "support.csv")
    measured = {(row["case"], row["contender"]): row for row in peers}
    count = len({row["feature"] for row in support})
    heads = [*COLUMNS.values(), f"right, of {count} features of models", "wrong without an error"]
    lines = ["| K = G Gᵀ by | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, title in SHOWN.items():
        cells = [_cost(measured.get((f"gram-{model}", name))) for model in COLUMNS]
        tried = [row for row in support if row["contender"] == name]
        cells += [str(sum(counts(row, (of,)) for row in tried)) if tried else "" for of in ("right", "wrong")]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    about = peers[0]
    lines += [
        "",
        f"Median time and memory above the loaded model, float32, {about['threads']} threads, {about['device']}. Every "
        "projection needs K. What each package is for, feature by feature: [other packages](docs/support.md).",
    ]
    return "\n".join(lines)


def _cost(row: dict | None) -> str:
    if row is None or row["note"]:
        return "fails" if row else ""
    return f"{float(row['ms']):,.0f} ms" + (f", {float(row['peak_mb']):,.0f} MB" if row["peak_mb"] else "")
