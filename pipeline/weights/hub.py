"""Finding and downloading the weights of models, in a local folder or in the hub's cache.

Only the files of a model's layout are downloaded, which for most engines are safetensors and settings.
Only `fetch` imports the hub's library. `locate` reads the cache itself, so that `status` and `doctor`
are fast and work without the library; the cache's layout (`models--org--name/{refs,snapshots,blobs}`)
and its environment variables are documented by huggingface_hub ("Understand caching", "Environment
variables").
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
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
DEFAULT_REVISION = "main"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")

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


def locate(
    model: str,
    revision: str | None = None,
    cache_dir: Path | None = None,
    *,
    layout: Layout = TRANSFORMERS,
) -> Weights | None:
    """Find a model on this machine, without the network; None if it is not here.

    `model` is a folder if one of that name exists, otherwise a hub id. `revision` is a commit, tag or
    branch of the hub (None: that of `KNOWN_REVISIONS`, otherwise main), and not used for a folder.
    `cache_dir` None is the library's default, see `hub_cache`.

    Raises:
        BadCheckpoint: the folder can't be used, or the cached weights are damaged.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        layout.check(folder)
        return Weights(folder, model, fingerprint(folder, layout.files))
    if not HUB_ID.fullmatch(model):
        return None
    snapshot = _snapshot(_repo_folder(model, cache_dir), revision or _default_revision(model))
    if snapshot is None or not _arrived(snapshot, layout):
        return None
    layout.check(snapshot)
    return Weights(snapshot, model, snapshot.name)


def fetch(
    model: str,
    revision: str | None = None,
    cache_dir: Path | None = None,
    *,
    layout: Layout = TRANSFORMERS,
    progress: bool = True,
    endpoint: str | None = None,
) -> Weights:
    """Download a model into the hub's cache, or update it, with the library's progress bars on a terminal.

    `endpoint` replaces the hub's address (default: HF_ENDPOINT, otherwise the public hub). If the hub
    can't be reached, a complete model in the cache is used.

    Raises:
        MissingWeights: the model is not here and can't be downloaded: there is no network,
            HF_HUB_OFFLINE is set, no such model or revision exists, or permission is missing.
        BadCheckpoint: the model has no usable weights in this layout.
        MissingPackage: huggingface_hub is not installed.
        FolderUnusable: the cache can't be written.
    """
    if Path(model).expanduser().is_dir():
        found = locate(model, layout=layout)
        assert found is not None  # `locate` raises if the folder can't be used
        return found
    if not HUB_ID.fullmatch(model):
        raise MissingWeights(f"There is no folder {model}, and it is not a hub id such as org/name.")
    revision = revision or _default_revision(model)
    try:
        snapshot = _download(model, revision, cache_dir, layout, progress=progress, endpoint=endpoint)
    except MissingWeights:
        if found := locate(model, revision, cache_dir, layout=layout):
            return found
        raise
    try:
        layout.check(snapshot)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{model} at revision {revision}: {error}") from error
    return Weights(snapshot, model, snapshot.name)


def cached(cache_dir: Path | None = None) -> list[CachedModel]:
    """All snapshots of models in the hub's cache, sorted by id, including those of other programs."""
    return sorted(
        (
            _describe(repo, snapshot)
            for repo in hub_cache(cache_dir).glob("models--*")
            for snapshot in (repo / "snapshots").glob("*")
            if COMMIT.fullmatch(snapshot.name)
        ),
        key=lambda item: (item.model, item.revision),
    )


def hub_cache(cache_dir: Path | None = None) -> Path:
    """The hub's cache folder: `cache_dir`, otherwise from the environment as the library finds it."""
    if cache_dir is not None:
        return cache_dir.expanduser()
    env = os.environ
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(cache)).expanduser()


def _default_revision(model: str) -> str:
    return KNOWN_REVISIONS.get(model, DEFAULT_REVISION)


def _repo_folder(model: str, cache_dir: Path | None) -> Path:
    return hub_cache(cache_dir) / f"models--{model.replace('/', '--')}"


def _snapshot(repo: Path, revision: str) -> Path | None:
    commit = revision
    if not COMMIT.fullmatch(revision):
        try:
            commit = (repo / "refs" / revision).read_text("ascii").strip()
        except (OSError, ValueError):
            return None
    folder = repo / "snapshots" / commit
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def _arrived(snapshot: Path, layout: Layout) -> bool:
    """Whether a snapshot has every file that is loaded: those that all models need, and those of the hub."""
    listed = _listed(snapshot, layout)
    return not layout.missing(snapshot) and all((snapshot / name).is_file() for name in listed)


def _listed(snapshot: Path, layout: Layout) -> Iterator[str]:
    """Names of the layout's files that the hub has for a snapshot, as huggingface_hub 2 and later records."""
    note = snapshot.parent.parent / "trees" / f"{snapshot.name}.json"
    for name in read_json(note).get("files", {}) if note.is_file() else ():
        if "/" not in name and any(Path(name).match(pattern) for pattern in layout.files):
            yield name


def _describe(repo: Path, snapshot: Path) -> CachedModel:
    files = {path.resolve() for path in snapshot.rglob("*") if path.is_file()}
    return CachedModel(
        model=repo.name.removeprefix("models--").replace("--", "/", 1),
        revision=snapshot.name,
        model_type=_model_type(snapshot),
        size_bytes=sum(path.stat().st_size for path in files),
        complete=_usable(snapshot),
    )


def _model_type(snapshot: Path) -> str:
    try:
        return str(read_json(snapshot / "config.json").get("model_type", ""))
    except BadCheckpoint:
        return ""


def _usable(snapshot: Path) -> bool:
    try:
        TRANSFORMERS.check(snapshot)
        return _arrived(snapshot, TRANSFORMERS)
    except BadCheckpoint:
        return False


def _download(
    model: str,
    revision: str,
    cache_dir: Path | None,
    layout: Layout,
    *,
    progress: bool,
    endpoint: str | None,
) -> Path:
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
        from huggingface_hub.utils import httpx
    except ImportError as error:
        raise MissingPackage(f"Fetching {model} needs huggingface_hub: {INSTALL_COMMAND}.") from error
    try:
        # One request first, as the download would retry a dead network for half a minute.
        hub.HfApi(endpoint=endpoint).repo_info(model, revision=revision, timeout=TIMEOUT_S)
        folder = hub.snapshot_download(
            model,
            revision=revision,
            cache_dir=hub_cache(cache_dir),
            allow_patterns=list(layout.files),
            endpoint=endpoint,
            **({} if progress else {"tqdm_class": _silent_bar()}),
        )
    except errors.GatedRepoError as error:
        raise MissingWeights(f"{model} is gated: accept its licence on the hub, and log in there.") from error
    except errors.RepositoryNotFoundError as error:
        raise MissingWeights(f"The hub has no model {model}, or the model needs a login.") from error
    except errors.RevisionNotFoundError as error:
        raise MissingWeights(f"{model} has no revision {revision} on the hub.") from error
    except (ConnectionError, TimeoutError, httpx.HTTPError, errors.XetDownloadError) as error:
        raise MissingWeights(_not_here(model, offline=hub.is_offline_mode())) from error
    except OSError as error:
        if error.errno is None:  # raised by the library for files that the hub does not provide
            raise MissingWeights(_not_here(model, offline=hub.is_offline_mode())) from error
        where = hub_cache(cache_dir)
        raise FolderUnusable(f"{model} can't be stored in {where}: {error.strerror}.") from error
    return Path(folder)


def _not_here(model: str, *, offline: bool) -> str:
    if offline:
        return (
            f"{model} is not on this machine and HF_HUB_OFFLINE forbids downloading it: "
            f"unset HF_HUB_OFFLINE and run `{FETCH_COMMAND}`."
        )
    return (
        f"{model} is missing or incomplete on this machine and the hub can't be reached: "
        f"run `{FETCH_COMMAND}` once there is a network."
    )


def _silent_bar() -> type:
    from huggingface_hub.utils import tqdm

    class SilentBar(tqdm):  # type: ignore[misc]  # the library is untyped here
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return SilentBar
