"""Imports point inward: kernels <- core <- train, serve, convert and plan."""

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}
OUTER = {"dspark_jax.train", "dspark_jax.serve", "dspark_jax.convert", "dspark_jax.plan"}
KERNELS = "dspark_jax.pallas_kernels"


def is_within(module: str, package: str) -> bool:
    """Whether `module` is `package` or lies below it."""
    return module == package or module.startswith(package + ".")


def module_name(package: str, path: Path) -> str:
    """`layers.py` in the folder of `dspark_jax` is `dspark_jax.layers`."""
    parts = path.relative_to(FOLDERS[package]).with_suffix("").parts
    return ".".join((package, *parts)).removesuffix(".__init__")


# rglob does not enter symlinks, so each file counts once, under the package that owns it.
MODULES = {module_name(k, p): p for k, folder in FOLDERS.items() for p in folder.rglob("*.py")}
CORE = {m for m in MODULES if not any(is_within(m, p) for p in (*OUTER, KERNELS))}


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


IMPORTS = {module: imported_modules(path) for module, path in MODULES.items()}


def offenders(modules: set[str], *packages: str) -> list[str]:
    """The imports of `packages` by `modules`, written out."""
    return sorted(
        f"{module} imports {other}"
        for module in modules
        for other in IMPORTS[module]
        if any(is_within(other, package) for package in packages)
    )


def test_there_is_something_to_check():
    assert {"dspark_jax", *OUTER, KERNELS} <= MODULES.keys()


def test_kernels_import_jax_only():
    allowed = {*sys.stdlib_module_names, "jax", "jaxtyping"}
    foreign = {
        f"{module} imports {other}"
        for module in MODULES
        if is_within(module, KERNELS)
        for other in IMPORTS[module]
        if other.split(".")[0] not in allowed and not is_within(other, KERNELS)
    }
    assert not foreign


def test_core_reaches_kernels_through_ops_only():
    assert not offenders(CORE - {"dspark_jax.ops"}, KERNELS)


def test_core_never_imports_train_serve_convert_or_plan():
    assert not offenders(CORE, *OUTER)


@pytest.mark.parametrize("package", sorted(OUTER))
def test_train_serve_convert_and_plan_never_import_one_another(package: str):
    inside = {m for m in MODULES if is_within(m, package)}
    assert not offenders(inside, *(OUTER - {package}))


def test_core_touches_no_clock_socket_or_tokenizer():
    assert not offenders(CORE, "time", "datetime", "http", "urllib")
    # One file meets other processes, for training and serving alike.
    assert not offenders(CORE - {"dspark_jax.hosts"}, "socket")
    # One file reads what lies in a target's folder, for training, serving and converting alike.
    assert not offenders(CORE - {"dspark_jax.target_folder"}, "tokenizers", "transformers")


def test_the_loop_knows_no_model():
    models = {m for m in CORE if m.startswith("dspark_jax.targets.")}
    assert not offenders(
        {"dspark_jax.loop", "dspark_jax.paged_loop"}, *(models - {"dspark_jax.targets.target"})
    )


def test_core_has_no_import_cycle():
    graph = {module: (IMPORTS[module] & CORE) - {"dspark_jax", module} for module in CORE}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_package_itself_imports_without_jax():
    program = "import sys, dspark_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_torch_is_imported_only_to_time_others():
    assert not offenders(set(MODULES) - {"dspark_jax.train.transformers_speed"}, "torch")
    folders = [p for p in (ROOT / "tests").iterdir() if p.is_dir() and p.name != "golden"]
    files = [p for folder in (*folders, ROOT / "benchmarks") for p in folder.rglob("*.py")]
    files.remove(ROOT / "benchmarks" / "speculators_step.py")
    files.remove(ROOT / "benchmarks" / "torch_kernels.py")
    files.remove(ROOT / "tests" / "interop" / "judge.py")
    assert not [p for p in files for m in imported_modules(p) if is_within(m, "torch")]


def test_no_import_is_relative():
    relative = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    }
    assert not relative
