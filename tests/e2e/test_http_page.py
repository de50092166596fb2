"""The chat page: its files are all there, and its script shows who said each token."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.serve.http.app import PAGE, PAGE_FILES
from dspark_jax.serve.http.settings import HttpSettings
from tests.serving import ScriptedEngine, Server, saying, serving

TEXT = "one, two, three, four, five"
NODE = shutil.which("node")


def test_every_file_of_the_page_is_served() -> None:
    with serving() as server, server.client() as client:
        kinds = {path: client.get(path).headers["content-type"] for path in PAGE_FILES}
    assert kinds["/"].startswith("text/html") and kinds["/page.css"].startswith("text/css")
    assert "javascript" in kinds["/page.js"]
    assert {path.name for path in PAGE.iterdir()} == set(PAGE_FILES.values())


def test_the_page_fetches_nothing_from_elsewhere() -> None:
    html = (PAGE / "index.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^"]*)"', html)) == {"page.js", "page.css"}
    assert not re.search(r"\son\w+=|style=|<script>|<style>", html)
    assert "innerHTML" not in (PAGE / "page.js").read_text()


def run(server: Server, action: str) -> Any:
    script = Path(__file__).with_name("page.cjs")
    command = [str(NODE), str(script), str(PAGE / "page.js"), server.url, action]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_tokens_are_coloured_by_who_said_them() -> None:
    with serving(ScriptedEngine(saying(TEXT))) as server:
        found = run(server, "chat")
        assert [turn["kind"] for turn in found["turns"]] == ["turn user", "turn assistant"]
        assert found["turns"][0]["text"] == "hello"
        *tokens, note = found["turns"][1]["marks"]
        round_ = [["drafted", 0], ["drafted", 1], ["bonus", None]]
        assert tokens == [["", None], *(round_ * 4)][: len(tokens)] and len(tokens) == 12
        assert note == ["note", None] and found["length"] == "3.00" and found["rounds"] == "4"
        assert TEXT.startswith(found["turns"][1]["text"].split("12 tokens")[0])


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_without_a_draft_nothing_is_coloured() -> None:
    with serving(ScriptedEngine(saying(TEXT))) as server:
        *tokens, _ = run(server, "plain")["turns"][1]["marks"]
        assert tokens == [["", None]] * 12


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_a_refusal_is_shown() -> None:
    with serving(settings=HttpSettings(api_keys=("secret",))) as server:
        _, error = run(server, "chat")["turns"]
        assert error["kind"] == "turn error" and "key" in error["text"]
