"""A target's fingerprint: of all its bytes, read once, and again only when a file has changed."""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.target_folder import load_tokenizer, read_json, target_fingerprint


def test_the_fingerprint_is_of_all_bytes_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, text in (("config.json", b"{}"), ("b.safetensors", b"2"), ("a.safetensors", b"1")):
        (tmp_path / name).write_bytes(text)
    assert target_fingerprint(tmp_path) == hashlib.sha256(b"{}12").hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", None)
        assert target_fingerprint(tmp_path) == hashlib.sha256(b"{}12").hexdigest()
    (tmp_path / "a.safetensors").write_bytes(b"3")
    os.utime(tmp_path / "a.safetensors", ns=(0, 0))
    assert target_fingerprint(tmp_path) == hashlib.sha256(b"{}32").hexdigest()


def test_json_nested_without_end_is_one_sentence(tmp_path: Path):
    (tmp_path / "config.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=f"target {tmp_path} has no readable config.json"):
        read_json(tmp_path / "config.json", "target")


def test_a_folders_own_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, marker = tmp_path / "target", tmp_path / "marker"
    shutil.copytree(embedded("tiny-glm"), folder)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described |= {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tok.Tok", "tok.Tok"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    code = f"""open({str(marker)!r}, "w").close()
from transformers import PreTrainedTokenizerFast

class Tok(PreTrainedTokenizerFast):
    pass
"""
    (folder / "tok.py").write_text(code)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    assert not marker.exists()
    assert "needs code of its own" in str(error.value) and "\n" not in str(error.value)
