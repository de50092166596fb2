"""Where a model's files are: a folder as given, or a hub id through the hub's cache."""

import json
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
ALLOWED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model")
"""Data only: a checkpoint's code and pickles are never fetched."""
REFUSED = ("*/*",)
INDEX = "model.safetensors.index.json"


def embedded(name: str) -> Path:
    """A folder of the package's own data: `tiny-glm` or `tiny-glm-dspark`."""
    return Path(__file__).resolve().parents[1] / "assets" / name


def resolve(name: str, offline: bool | None = None) -> Path:
    """The folder that holds a model: `name` itself, or hub id `org/name[@revision]`'s snapshot.

    `offline` None means what HF_HUB_OFFLINE says. Files in the cache are used without a network
    when offline, when the revision is a whole commit, and when the network fails. Raises ValueError
    when `name` is neither, when the cache lacks it and the hub cannot be asked, and when the hub
    does not give it (gated, not found, unknown revision).
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    repo, revision = _hub_id(name)
    offline = constants.HF_HUB_OFFLINE if offline is None else offline
    cached = None
    if offline or COMMIT.fullmatch(revision):
        cached = _cached(repo, revision)
    if cached and (offline or _has_weights(cached)):
        return cached
    if offline:
        raise ValueError(
            f"{repo} at revision {revision!r} is not whole in the cache {constants.HF_HUB_CACHE} "
            "and the hub may not be asked (offline); download it once without HF_HUB_OFFLINE."
        )
    return _download(name, repo, revision)


def _hub_id(name: str) -> tuple[str, str]:
    match = HUB_ID.fullmatch(name)
    try:
        validate_repo_id(match["repo"] if match else "")
    except HFValidationError:
        match = None
    if match is None or ".." in name or Path(name).expanduser().exists():
        raise ValueError(
            f"{name!r} is neither a folder nor a hub id; "
            "give a folder in Hugging Face layout, or org/name[@revision]."
        )
    return match["repo"], match["revision"] or constants.DEFAULT_REVISION


def _cached(repo: str, revision: str) -> Path | None:
    try:
        return _snapshot(repo, revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _download(name: str, repo: str, revision: str) -> Path:
    try:
        return _snapshot(repo, revision, local_files_only=False)
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{repo} has no revision {revision!r} on the hub; "
            "give one of its branches, tags or whole commits after the @."
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"{repo} at revision {revision!r} is gated on the hub; "
            "accept its terms there, then log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name!r} and no model {repo} that you may see on the hub; "
            "correct the name, or log in with `hf auth login` if it is private."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(_unreachable(repo, revision, error.__cause__ or error)) from error
    except Exception as error:  # its class depends on the HTTP library below the hub's client
        # The hub named the files but did not send them all; a snapshot that is whole still serves.
        if (cached := _cached(repo, revision)) and _has_weights(cached):
            return cached
        raise ValueError(_unreachable(repo, revision, error)) from error


def _unreachable(repo: str, revision: str, error: BaseException) -> str:
    said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"{repo} at revision {revision!r} is not whole in the cache {constants.HF_HUB_CACHE} "
        f"and the hub did not give it ({said}); check the network, or give a folder."
    )


def _snapshot(repo: str, revision: str, local_files_only: bool) -> Path:
    folder = snapshot_download(
        repo,
        revision=revision,
        local_files_only=local_files_only,
        allow_patterns=list(ALLOWED),
        ignore_patterns=list(REFUSED),
    )
    return Path(folder)


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot can be used as it is: one that only had its tokenizer fetched cannot."""
    if not (folder / "config.json").is_file():
        return False
    try:
        files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    except FileNotFoundError:
        return any(folder.glob("*.safetensors"))
    except (ValueError, KeyError, AttributeError, TypeError):
        return True  # broken rather than unfinished: `shards` says how
    return all((folder / str(file)).is_file() for file in files)
