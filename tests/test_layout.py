"""The layout in scd/README.md: imports go one way; names and docstrings stand for themselves."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "scd"
# From top to bottom, as in scd/README.md: a module imports from its own row and those above it.
ROWS = [
    ("errors", "utils"),
    ("options",),
    ("data", "doom"),
    ("models",),
    ("flow",),
    ("rollout",),
    ("distill",),
    ("pipeline",),
    ("wan",),
    ("evaluation",),
    ("training",),
    ("analysis", "benchmark", "play", "web", "export"),
    ("cli",),
]
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    """Name the folder or module of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """List the parts of the package that a module imports, with line numbers.

    Imports inside functions count; those for type checkers alone do not.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "scd" and rest:
                yield node.lineno, rest.split(".")[0]
        yield from imports(node)


def wrong_imports(own: str, source: str) -> list[str]:
    """List the imports of a module in the part `own` that lead to a lower row."""
    return [
        f"line {line}: {own} imports {other}"
        for line, other in imports(ast.parse(source))
        if ROW_OF[other] > ROW_OF[own]
    ]


def test_imports_go_one_way() -> None:
    wrong = {p.relative_to(PACKAGE): wrong_imports(part(p), p.read_text()) for p in MODULES}
    assert not [f"{path}: {line}" for path, lines in wrong.items() for line in lines]


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import scd.models", True),
        ("from scd import training", True),
        ("from scd.evaluation.summary import table", True),
        ("def late():\n    if True:\n        from scd.models.scd import SCD", True),
        ("from scd.data.lists import read_list\nimport torch", False),
        ("if TYPE_CHECKING:\n    from scd.cli import main", False),
    ],
)
def test_a_wrong_direction_is_noticed(source: str, wrong: bool) -> None:
    assert bool(wrong_imports("data", source)) == wrong


def test_all_imports_are_absolute() -> None:
    """`imports` relies on it."""
    nodes = [(path, node) for path in MODULES for node in ast.walk(ast.parse(path.read_text()))]
    assert not [path for path, node in nodes if isinstance(node, ast.ImportFrom) and node.level]


def test_the_readme_has_the_same_rows() -> None:
    table = (PACKAGE / "README.md").read_text().split("| --- | --- | --- |\n")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()]
    assert len(rows) == len(ROWS)
    for (names, contents), row in zip(rows, ROWS, strict=True):
        for name in row:
            assert f"`{name}/`" in names + contents or f"`{name}.py`" in names, name


def test_no_two_modules_share_a_name() -> None:
    """Modules of the command line are named after the packages whose commands they hold."""
    by_name = defaultdict(list)
    for path in MODULES:
        if part(path) != "cli" and path.stem not in ("__init__", "__main__"):
            by_name[path.stem].append(path.relative_to(PACKAGE).as_posix())
    assert not [paths for paths in by_name.values() if len(paths) > 1]


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """List the docstrings of a module, its classes and functions, each with its name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{path.relative_to(PACKAGE)}: {getattr(node, 'name', 'module')}"
            yield name, ast.get_docstring(node) or ""


LEANING = ("Of ", "The same", "See ")
"""Beginnings of a first line that mean something only beside other lines."""


@pytest.mark.parametrize("name", sorted({part(path) for path in MODULES}))
def test_docstrings_stand_alone(name: str) -> None:
    documented = [pair for path in MODULES if part(path) == name for pair in docstrings(path)]
    leaning = [
        f"{where}: {text.splitlines()[0]}" for where, text in documented if text.startswith(LEANING)
    ]
    assert not leaning
