"""Files are where installs and checkouts expect them, short, and say what they are for."""

import ast
import statistics
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGE_DIRS: dict[str, str] = SETUPTOOLS["package-dir"]
LINKED = sorted(folder for name, folder in PACKAGE_DIRS.items() if name != folder)
# rglob does not enter symlinks, so each file counts once, under the package that owns it.
SOURCES = sorted(p for folder in PACKAGE_DIRS.values() for p in (ROOT / folder).rglob("*.py"))
CHECKS = sorted(p for folder in ("tests", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
FILES = [p for p in (*SOURCES, *CHECKS) if not p.is_relative_to(ROOT / "tests" / "golden")]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def shown(path: Path) -> str:
    """A path as the reader of a failure knows it."""
    return path.relative_to(ROOT).as_posix()


def line_count(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text().splitlines())


def package_folder(package: str) -> Path:
    """Where setuptools looks for a package: its own entry, or below its nearest mapped parent."""
    parent, below = package, []
    while parent not in PACKAGE_DIRS:
        parent, _, last = parent.rpartition(".")
        below.insert(0, last)
    return ROOT.joinpath(PACKAGE_DIRS[parent], *below)


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(), filename=shown(path))


def public_functions(scope: ast.Module | ast.ClassDef) -> list[Function]:
    """Functions of a module and methods of its public classes, dunder methods included."""
    found: list[Function] = []
    for node in scope.body:
        name = getattr(node, "name", "_")
        if name.startswith("_") and not name.endswith("__"):
            continue
        if isinstance(node, Function):
            found.append(node)
        elif isinstance(node, ast.ClassDef):
            found += public_functions(node)
    return found


def unannotated(function: Function) -> list[str]:
    """Names without an annotation; `__init__` needs none for what it returns."""
    a = function.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    bare = [argument.arg for argument in arguments if not argument.annotation]
    missing = [name for name in bare if name not in ("self", "cls")]
    if not function.returns and function.name != "__init__":
        missing.append("return")
    return missing


@pytest.mark.parametrize("folder", LINKED)
def test_a_checkout_finds_every_package_through_a_relative_link(folder: str):
    link = ROOT / "dspark_jax" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", folder)
    assert link.resolve() == (ROOT / folder).resolve()
    assert (link / "__init__.py").is_file()


def test_every_package_folder_is_listed():
    listed = {package_folder(package) for package in SETUPTOOLS["packages"]}
    assert {p.parent for p in SOURCES} == listed


def test_no_file_is_longer_than_400_lines():
    assert not [f"{shown(p)}: {line_count(p)}" for p in FILES if line_count(p) > 400]


def test_the_median_file_is_shorter_than_200_lines():
    assert statistics.median(line_count(p) for p in FILES) < 200


def test_every_file_begins_by_saying_what_it_is_for():
    assert not [shown(p) for p in (*SOURCES, *CHECKS) if not ast.get_docstring(parse(p))]


def test_public_functions_are_fully_annotated():
    assert not [
        f"{shown(p)}:{function.lineno} {function.name}({missing})"
        for p in SOURCES
        for function in public_functions(parse(p))
        if (missing := ", ".join(unannotated(function)))
    ]
