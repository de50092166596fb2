"""A model's name leads to its folder: as given, from the hub's cache, or from the hub."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from dspark_jax.checkpoints.folder import resolve

REPO, COMMIT, OTHER = "org/model", "a" * 40, "b" * 40
ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "modeling.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "original/model.safetensors": b"again",
    "README.md": b"hello",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, behind which no hub answers."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return folder


def fill(cache: Path, *names: str, commit: str = COMMIT) -> Path:
    """Put files into the cache as huggingface_hub lays them out: links to blobs."""
    home = cache / "models--org--model"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    for name in names:
        blob = hashlib.sha256(FILES[name]).hexdigest()
        (home / "blobs" / blob).write_bytes(FILES[name])
        (home / "snapshots" / commit / name).symlink_to(Path("../../blobs", blob))
    return home / "snapshots" / commit


def test_a_folder_is_taken_as_it_is(tmp_path: Path):
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nothing", "./a/b", "/a/b", "a/b/c", "a/..", "a/b@", "a b/c", ""])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(name: str, cache: Path):
    with pytest.raises(ValueError, match="neither a folder nor a hub id; give a folder"):
        resolve(name)


def test_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/model").touch()
    with pytest.raises(ValueError, match="'org/model' is neither a folder nor a hub id"):
        resolve(REPO)


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_cached_files_are_used_offline(cache: Path, revision: str):
    snapshot = fill(cache, "config.json", "model.safetensors")
    assert resolve(REPO + revision, offline=True) == snapshot


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_cached_files_are_used_when_the_network_fails(cache: Path, revision: str):
    snapshot = fill(cache, "config.json", "model.safetensors")
    assert resolve(REPO + revision) == snapshot


@pytest.mark.parametrize("revision", ["", "@v2", f"@{OTHER}"])
def test_what_is_not_cached_is_refused_offline(cache: Path, revision: str):
    if revision:
        fill(cache, "config.json", "model.safetensors")
    with pytest.raises(ValueError, match=r"not whole in the cache .*hub.*\(offline\); download it"):
        resolve(REPO + revision, offline=True)


def test_what_is_not_cached_is_refused_when_the_network_fails(cache: Path):
    with pytest.raises(ValueError, match="the hub did not give it .*; check the network"):
        resolve(REPO)


def test_the_environment_names_cache_and_offline_mode(cache: Path):
    snapshot = fill(cache, "config.json", "model.safetensors")
    program = "from dspark_jax.checkpoints.folder import resolve; print(resolve('org/model'))"
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == str(snapshot)


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for one model; other names are errors of the same name."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        """Headers of a file."""
        self.answer(head=True)

    def do_GET(self) -> None:
        """A model's description, its list of files, or a file."""
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        """Send what the path asks for."""
        path = self.path.split("?")[0].removeprefix("/api/models")
        _, name, *rest = path.strip("/").split("/")
        status, error, body = 200, "", b""
        if name != "model":
            status, error = {"gated": (403, "GatedRepo"), "absent": (404, "RepoNotFound")}[name]
        elif rest[0] == "revision" and rest[1] != "main":
            status, error = 404, "RevisionNotFound"
        elif rest[0] == "revision":
            body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode()
        elif rest[0] == "tree":
            listed = [
                {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for p, b in FILES.items()
            ]
            body = json.dumps(listed).encode()
        else:
            body = FILES["/".join(rest[2:])]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if not head:
            self.wfile.write(body)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_data_is_downloaded(cache: Path, hub: None):
    snapshot = resolve(REPO)
    assert snapshot == cache / "models--org--model" / "snapshots" / COMMIT
    names = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {p.name for p in snapshot.iterdir()} == names
    assert (snapshot / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert resolve(REPO, offline=True) == snapshot


def test_a_commit_of_which_only_the_tokenizer_is_cached_is_completed(cache: Path, hub: None):
    snapshot = fill(cache, "config.json", "tokenizer.json")
    assert resolve(f"{REPO}@{COMMIT}") == snapshot
    assert (snapshot / "model.safetensors").read_bytes() == FILES["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("org/gated", "org/gated at revision 'main' is gated on the hub; accept its terms"),
        ("org/absent", "no folder 'org/absent' and no model org/absent .*; correct the name"),
        ("org/model@v9", "org/model has no revision 'v9' on the hub; give one of its branches"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(name: str, sentence: str, hub: None):
    with pytest.raises(ValueError, match=sentence) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
