"""Finding and downloading the weights of models, in a local folder or in the hub's cache.

Only the files of a model's layout are downloaded, which for most engines are safetensors and settings.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BadCheckpoint, FolderUnusable, MissingPackage, MissingWeights
from pipeline.weights.layout import TRANSFORMERS, Layout, fingerprint, read_json

FETCH_COMMAND = "python run_pipeline.py models fetch"
INSTALL_COMMAND = "pip install -r requirements.txt"

# Revisions that are used instead of the default branch where the configuration names none.
# laion/clap-htsat-unfused has only a pickle on `main` (8fa0f1c, 2023). Its safetensors are in the
# hub's conversion of that file, a commit that was never merged. A commit does not change.
KNOWN_REVISIONS = {"laion/clap-htsat-unfused": "79b58ed25fc00386262a2bea4b19fd21dc4310a0"}

TIMEOUT_S = 10


@dataclass(frozen=True)
class Weights:
    """A usable checkpoint on this machine."""

    folder: Path  # holds the files of the model's layout
    model: str  # hub id or folder, as given
    revision: str  # hub: the commit; folder: "sha256:" and 16 hex digits, see `fingerprint`


@dataclass(frozen=True)
class CachedModel:
    """One snapshot in the hub's cache."""

    model: str  # hub id
    revision: str  # commit
    model_type: str  # of its config.json: "musicgen_melody", "clap", ...; "" without one
    size_bytes: int  # of its files, which other snapshots of the model may share
    complete: bool  # false: only pickles, or a download that was cut off


def locate(model: str, revision: str | None = None, *, layout: Layout = TRANSFORMERS) -> Weights | None:
    """Find a model on this machine, without the network; None if it is not here.

    `model` is a folder if one of that name exists, otherwise a hub id. `revision` is a commit, tag or
    branch of the hub (None: that of `KNOWN_REVISIONS`, otherwise main), and not used for a folder.

    Raises:
        BadCheckpoint: the folder can't be used, or the cached weights are damaged.
    """
    if found := _in_folder(model, layout):
        return found
    if not (_hub_cache() / f"models--{model.replace('/', '--')}").is_dir():
        return None  # without importing the hub's library, which takes a quarter of a second
    try:
        import huggingface_hub as hub

        snapshot = _snapshot(hub, model, revision or _default(model), layout, local_files_only=True)
    except (ImportError, OSError, ValueError):  # no library, no complete snapshot, not a hub id
        return None
    if layout.missing(snapshot):
        return None
    layout.check(snapshot)
    return Weights(snapshot, model, snapshot.name)


def fetch(model: str, revision: str | None = None, *, layout: Layout = TRANSFORMERS) -> Weights:
    """Download a model into the hub's cache, or update it, with the library's progress bars on a terminal.

    If the hub can't be reached, a complete model in the cache is used.

    Raises:
        MissingWeights: the model is not here and can't be downloaded: there is no network,
            HF_HUB_OFFLINE is set, no such model or revision exists, or permission is missing.
        BadCheckpoint: the model has no usable weights in this layout.
        MissingPackage: huggingface_hub is not installed.
        FolderUnusable: the cache can't be written.
    """
    if found := _in_folder(model, layout):
        return found
    try:
        snapshot = _download(model, revision or _default(model), layout)
    except MissingWeights:
        if found := locate(model, revision, layout=layout):
            return found
        raise
    layout.check(snapshot)
    return Weights(snapshot, model, snapshot.name)


def find_or_fetch(model: str, revision: str | None = None, *, layout: Layout = TRANSFORMERS) -> Weights:
    """The model on this machine, otherwise downloaded. Raises as `fetch`."""
    return locate(model, revision, layout=layout) or fetch(model, revision, layout=layout)


def cached() -> list[CachedModel]:
    """All snapshots of models in the hub's cache, sorted by id, including those of other programs."""
    try:
        import huggingface_hub as hub
    except ImportError:
        return []
    try:
        repos = hub.scan_cache_dir(hub.constants.HF_HUB_CACHE).repos
    except hub.CacheNotFound:
        return []
    found = [
        _described(repo.repo_id, snapshot)
        for repo in repos
        if repo.repo_type == "model"
        for snapshot in repo.revisions
    ]
    return sorted(found, key=lambda item: (item.model, item.revision))


def _in_folder(model: str, layout: Layout) -> Weights | None:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return None
    layout.check(folder)
    return Weights(folder, model, fingerprint(folder, layout.files))


def _hub_cache() -> Path:
    """The hub's cache, where its library looks for it (HF_HUB_CACHE in huggingface_hub.constants)."""
    home = os.getenv("HF_HOME") or f"{os.getenv('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = os.getenv("HF_HUB_CACHE") or os.getenv("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(cache)).expanduser()


def _default(model: str) -> str:
    return KNOWN_REVISIONS.get(model, "main")


def _snapshot(hub: Any, model: str, revision: str, layout: Layout, **options: Any) -> Path:
    patterns = list(layout.files)
    return Path(hub.snapshot_download(model, revision=revision, allow_patterns=patterns, **options))


def _described(model: str, snapshot: Any) -> CachedModel:
    model_type, complete = "", False
    with suppress(BadCheckpoint):
        model_type = str(read_json(snapshot.snapshot_path / "config.json").get("model_type", ""))
        complete = locate(model, snapshot.commit_hash) is not None
    return CachedModel(model, snapshot.commit_hash, model_type, snapshot.size_on_disk, complete)


def _download(model: str, revision: str, layout: Layout) -> Path:
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
        from huggingface_hub.utils import httpx
    except ImportError as error:
        raise MissingPackage(f"Fetching {model} needs huggingface_hub: {INSTALL_COMMAND}.") from error
    try:
        # One request first, as the download would retry a dead network for half a minute.
        hub.HfApi().repo_info(model, revision=revision, timeout=TIMEOUT_S)
        return _snapshot(hub, model, revision, layout)
    except errors.HFValidationError as error:
        raise MissingWeights(
            f"There is no folder {model}, and it is not a hub id such as org/name."
        ) from error
    except errors.GatedRepoError as error:
        raise MissingWeights(f"{model} is gated: accept its licence on the hub, and log in there.") from error
    except errors.RepositoryNotFoundError as error:
        raise MissingWeights(f"The hub has no model {model}, or the model needs a login.") from error
    except errors.RevisionNotFoundError as error:
        raise MissingWeights(f"{model} has no revision {revision} on the hub.") from error
    except (ConnectionError, TimeoutError, httpx.HTTPError, errors.XetDownloadError) as error:
        raise MissingWeights(_unreachable(hub, model)) from error
    except OSError as error:
        if error.errno is None:  # raised by the library for files that the hub does not provide
            raise MissingWeights(_unreachable(hub, model)) from error
        raise FolderUnusable(
            f"{model} can't be stored in {hub.constants.HF_HUB_CACHE}: {error.strerror}."
        ) from error


def _unreachable(hub: Any, model: str) -> str:
    reason = "HF_HUB_OFFLINE forbids it" if hub.is_offline_mode() else "the hub can't be reached"
    return (
        f"{model} is missing or incomplete on this machine and can't be downloaded, because {reason}: "
        f"run `{FETCH_COMMAND}` once there is a network."
    )
