"""The house rules, read from the syntax trees: arrows between the floors, sizes, and what code may not do."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
FILES = sorted((SRC / "stfm").rglob("*.py"))

FLOORS = [
    {"errors"},  # and every module of the package whose name starts with an underscore
    {"corpus", "metrics", "nn", "slide"},
    {"encoders", "models", "weights"},
    {"inference", "outcome", "training"},
    {"datasets", "get", "pl", "pp", "tl"},
    {"__init__", "__main__", "cli"},
]
# A floor has an order of its own where one of its rooms serves another.
SIDEWAYS = {
    ("corpus", "slide"),
    ("metrics", "slide"),
    ("nn", "metrics"),
    ("models", "encoders"),
    ("models", "weights"),
    ("encoders", "weights"),
    ("training", "inference"),
    ("outcome", "inference"),
    ("pl", "get"),
    ("tl", "get"),
    ("__main__", "cli"),
}
ANNDATA_READERS = "from_"  # slide/from_*.py: the only files below floor 4 that may name AnnData or SpatialData
CONTAINERS = {"anndata", "scanpy", "spatialdata", "squidpy"}
MAX_FILE, MAX_FUNCTION = 500, 60


def module_name(path: Path) -> str:
    parts = list(path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def floor(module: str) -> int:
    name = room(module)
    if name.startswith("_") and not name.startswith("__"):
        return 0
    found = [level for level, rooms in enumerate(FLOORS) if name in rooms]
    if not found:
        pytest.fail(f"{module} stands in a room that is on no floor (FLOORS; CONTRIBUTING.md): {name}")
    return found[0]


def imports(path: Path) -> set[tuple[str, int]]:
    """Every imported module of a file with its line: type-only and in-function imports too."""
    found: set[tuple[str, int]] = set()
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                longer = f"{base}.{alias.name}"
                found.add((longer if longer in MODULES else base, node.lineno))
    return found


def own_imports(path: Path) -> set[tuple[str, int]]:
    return {
        ("stfm.__init__" if name == "stfm" else name, line)
        for name, line in imports(path)
        if name == "stfm" or name.startswith("stfm.")
    }


def test_arrows_point_down():
    wrong = []
    for module, path in MODULES.items():
        for target, line in own_imports(path):
            here, there = room(module), room(target)
            down = floor(target) < floor(module) or here == there or (here, there) in SIDEWAYS
            if not down and not (floor(module) == 0 and floor(target) == 0):
                wrong.append(f"{path.relative_to(SRC)}:{line} imports {target}")
    assert wrong == []


def test_no_cycles():
    graph = {module: {name for name, _ in own_imports(path)} for module, path in MODULES.items()}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> list[str]:
        if module in trail:
            return [" -> ".join([*trail[trail.index(module) :], module])]
        if module in done or module not in graph:
            return []
        loops = [loop for name in sorted(graph[module]) for loop in walk(name, (*trail, module))]
        done.add(module)
        return loops

    assert [loop for module in graph for loop in walk(module, ())] == []


def test_only_the_top_floor_knows_anndata():
    wrong = []
    for module, path in MODULES.items():
        if floor(module) in {1, 2, 3} and not path.name.startswith(ANNDATA_READERS):
            named = {(name.split(".")[0], line) for name, line in imports(path)}
            wrong += [f"{path.relative_to(SRC)}:{line} names {name}" for name, line in named if name in CONTAINERS]
    assert wrong == []


def test_calls_for_users_hold_no_torch_modules():
    wrong = []
    for module, path in MODULES.items():
        if floor(module) == 4:
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.ClassDef) and any("nn.Module" in ast.unparse(base) for base in node.bases):
                    wrong.append(f"{path.relative_to(SRC)}:{node.lineno} {node.name}")
    assert wrong == []


def test_files_are_short():
    lengths = {str(path.relative_to(SRC)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE} == {}


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Length of a function without its docstring."""
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        length -= (first.end_lineno or first.lineno) - first.lineno + 1
    return length


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_functions_are_short():
    long = {
        f"{path.relative_to(SRC)}:{node.lineno} {node.name}": code_lines(node)
        for path in FILES
        for node in functions(path)
        if code_lines(node) > MAX_FUNCTION
    }
    assert long == {}


def _is_broad(node: ast.ExceptHandler) -> bool:
    names = [node.type] if not isinstance(node.type, ast.Tuple) else node.type.elts
    return any(name is None or ast.unparse(name) in {"Exception", "BaseException"} for name in names)


def test_no_assert_print_or_broad_except():
    wrong = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            called = node.func if isinstance(node, ast.Call) else None
            if (
                isinstance(node, ast.Assert)
                or (isinstance(called, ast.Name) and called.id in {"print", "breakpoint"})
                or (isinstance(node, ast.ExceptHandler) and _is_broad(node))
            ):
                wrong.append(f"{path.relative_to(SRC)}:{node.lineno} {type(node).__name__}")
    assert wrong == []


def test_no_work_at_import():
    """Module level holds definitions and constants: no loops that compute, no files or sockets opened."""
    wrong = []
    for path in FILES:
        for node in tree(path).body:
            calls = ast.walk(node) if isinstance(node, (ast.Expr, ast.Assign, ast.AnnAssign, ast.With)) else ()
            for call in calls:
                if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in {
                    "open", "read_text", "read_bytes", "urlopen", "retrieve", "mkdir", "basicConfig", "addHandler",
                } and "NullHandler" not in ast.unparse(call):  # fmt: skip
                    wrong.append(f"{path.relative_to(SRC)}:{call.lineno} {ast.unparse(call)[:60]}")
    assert wrong == []


def test_pl_neither_shows_nor_sets_rcparams():
    wrong = []
    for path in (SRC / "stfm" / "pl").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        wrong += [f"{path.name}: {word}" for word in ("plt.show(", "rcParams[", "savefig(") if word in text]
    assert wrong == []


def test_slots_are_named_once():
    """The names of docs/slots.md are written out in ``_keys.py`` and in docstrings, nowhere else."""
    slots = {"X_stfm", "spatial_domain", "predicted_expression", "niche_connectivities", "niche_distances"}
    wrong = []
    for module, path in MODULES.items():
        if module == "stfm._keys" or floor(module) > 4 or path.name == "__init__.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and node.value in slots:
                wrong.append(f"{path.relative_to(SRC)}:{node.lineno} {node.value!r}")
    assert wrong == []
