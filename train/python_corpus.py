"""Python source found on this machine: whole files, and functions as conversations.

Nothing is downloaded and nothing found here is stored in the repository. Files are split into
training and held-out by a hash of their name, the same on every machine and for every command.
"""

import ast
import sysconfig
import textwrap
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HELD_OUT_SHARE = 20
LARGEST_FILE_BYTES = 400_000
LONGEST_PROMPT_CHARACTERS = 600
LONGEST_ANSWER_CHARACTERS = 1200
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "_vendor"}


class Source(NamedTuple):
    """One file: its name relative to the folder it was found in, and its text."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether this file is kept for measuring; one in twenty is."""
        return zlib.crc32(self.name.encode()) % HELD_OUT_SHARE == 0


class Example(NamedTuple):
    """A function: its signature with docstring, and its body."""

    prompt: str
    answer: str
    documented: bool


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def installed_packages() -> Path:
    """The folder this interpreter's packages are installed in."""
    return Path(sysconfig.get_path("purelib"))


def sources(folder: Path, limit_bytes: int | None = None) -> Iterator[Source]:
    """Readable Python files of a folder by name, each top-level package up to `limit_bytes`."""
    used: dict[str, int] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if SKIPPED_FOLDERS & set(parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # Not every file of an interpreter is UTF-8 or readable; none is essential.
        size = len(text)
        if size > LARGEST_FILE_BYTES or used.get(parts[0], 0) + size > (limit_bytes or 1 << 62):
            continue
        used[parts[0]] = used.get(parts[0], 0) + size
        yield Source("/".join(parts), text)


def functions(source: Source) -> Iterator[Example]:
    """Functions and methods of one file that are short enough to be a conversation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source.text)
    except (SyntaxError, ValueError):
        return  # Templates and files for other Python versions are text, not code.
    lines = source.text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            example = _example(node, lines)
            if (
                len(example.prompt) <= LONGEST_PROMPT_CHARACTERS
                and 0 < len(example.answer) <= LONGEST_ANSWER_CHARACTERS
            ):
                yield example


def _example(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Example:
    documented = ast.get_docstring(node, clean=False) is not None
    first = node.body[1:] if documented else node.body
    if not first:
        return Example("", "", documented)
    # Decorators of a nested first statement belong to the answer.
    start = min([first[0].lineno, *(d.lineno for d in getattr(first[0], "decorator_list", []))])
    end = node.end_lineno or start
    whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : end])).splitlines()
    cut = start - node.lineno
    return Example("\n".join(whole[:cut]), "\n".join(whole[cut:]), documented)
