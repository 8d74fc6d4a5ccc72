"""The README's first table: projgrad beside other packages, from what `bench.peers` and `bench.support` measured."""

from projgrad.experiments.benchmark.report import read_csv

from .report import RESULTS
from .support import counts

SHOWN = {
    "plain": "training without projection",
    "projgrad": "**projgrad**",
    "vmap + Gram": "vmap(grad), Gram matrix",
    "vmap + QR": "vmap(grad), QR",
    "one by one": "batches of one",
    "torchjd": "TorchJD",
    "opacus": "Opacus",
    "backpack": "BackPACK",
    "nngeometry": "NNGeometry",
}
COLUMNS = {  # case of `bench.peers`: what its two columns show
    "gram-mlp": "K of an MLP, n = 64",
    "projection-encoder": "projection, encoder, n = 32",
}
ALIKE = {"vmap + QR": "vmap + Gram"}  # the same K, and the same features of models


def field() -> str:
    """Return time and memory of K and of the projection, and on how many features of models each way is right."""
    peers, support = read_csv(RESULTS / "peers_cpu.csv"), read_csv(RESULTS / "support.csv")
    measured = {(row["case"], row["contender"]): row for row in peers}
    count = len({row["feature"] for row in support})
    heads = [f"{title}: {unit}" for title in COLUMNS.values() for unit in ("time", "memory")]
    heads += [f"right, of {count} kinds of models", "wrong without an error"]
    lines = ["|  | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, title in SHOWN.items():
        cells = [cell for case in COLUMNS for cell in _cost(measured.get((case, name)))]
        tried = [row for row in support if row["contender"] == ALIKE.get(name, name)]
        cells += [str(sum(counts(row, (of,)) for row in tried)) if tried else "" for of in ("right", "wrong")]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    about = peers[0]
    lines += ["", f"Medians, float32, {about['threads']} threads, {about['device']}; memory above the loaded model."]
    return "\n".join(lines)


def _cost(row: dict | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    if row["note"]:
        return row["note"].partition(":")[0], ""
    return f"{float(row['ms']):.3g} ms", f"{float(row['peak_mb']):.3g} MB" if row["peak_mb"] else ""
