"""The imports of the house: one direction, no circle, nobody's private names."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "projgrad").rglob("*.py"))
}
# A room imports from itself and from rooms to its right, further than its neighbours in the same tuple.
ORDER = [
    ("__init__", "__main__"),
    ("functional", "baselines", "projectors"),  # fronts: they only pass names on
    ("experiments", "integrations"),
    ("methods", "evaluate"),
    ("tape",),
    ("recording",),
    ("rules", "kernels"),
    ("ops",),
    ("_atomic", "_extras", "_options", "_torch_private", "version"),
]


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def imports(module: str) -> dict[str, set[str]]:
    """The names taken from every module of projgrad that this one imports anywhere, TYPE_CHECKING included."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    taken: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in FILES:
                    taken.setdefault(alias.name, set())
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names if base in FILES else ():
            if f"{base}.{alias.name}" in FILES:
                taken.setdefault(f"{base}.{alias.name}", set())
            elif alias.name != "_C":  # the extension is no file of Python
                taken.setdefault(base, set()).add(alias.name)
    return taken


IMPORTS = {module: imports(module) for module in FILES}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach one another (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for following in sorted(edges[node]):
            if following not in order:
                visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], order[following])
        if low[node] == order[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1 or node in edges[node]:
                found.append(sorted(component))

    for node in sorted(edges):
        if node not in order:
            visit(node)
    return found


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_no_file_imports_itself_by_way_of_others():
    assert circles({module: set(taken) for module, taken in IMPORTS.items()}) == []


def test_imports_go_one_way():
    rank = {name: place for place, names in enumerate(ORDER) for name in names}
    backwards = [
        f"{module} imports {other}"
        for module, taken in IMPORTS.items()
        for other in taken
        if room(other) != room(module) and rank[room(other)] <= rank[room(module)]
    ]
    assert backwards == []


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_private_name_of_another_file_is_imported():
    assert [
        f"{m} takes {n} from {o}" for m, t in IMPORTS.items() for o, names in t.items() for n in names if private(n)
    ] == []


def test_no_private_attribute_of_another_file_is_used():
    """An attribute with an underscore is one that the same file defines; those of torch are in `_torch_private.py`."""
    used = []
    for module, path in FILES.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        own = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {"_replace", "_asdict", "_fields", "_exit"}  # public, of named tuples and of os
        used += [
            f"{module}: {ast.unparse(n)}"
            for n in nodes
            if isinstance(n, ast.Attribute) and private(n.attr) and n.attr not in own
        ]
    assert [line for line in used if not line.startswith("projgrad._torch_private")] == []


def test_the_tape_is_a_facade():
    assert len(FILES["projgrad.tape.tape"].read_text().splitlines()) < 150
