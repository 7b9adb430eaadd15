"""Where models' weights are: a local folder or the hub's cache, and how they get there.

Only what a model's layout names is ever downloaded: safetensors and settings, unless an engine
says otherwise. Looking something up needs neither the network
nor the hub's library: the cache's layout (`models--org--name/{refs,snapshots,blobs}`) and the
variables that place it are part of huggingface_hub's documentation ("Understand caching",
"Environment variables"), and `status` and `doctor` must answer at once, in a core install too.
Only `fetch` imports the library.
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

# The revision used where none is asked for, if it isn't the default branch.
# laion/clap-htsat-unfused has only a pickle on `main` (8fa0f1c, 2023); its safetensors are the
# hub's own conversion of that file, one commit on top, never merged. A commit can't be moved.
KNOWN_REVISIONS = {"laion/clap-htsat-unfused": "79b58ed25fc00386262a2bea4b19fd21dc4310a0"}
DEFAULT_REVISION = "main"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")

TIMEOUT_S = 10


@dataclass(frozen=True)
class Weights:
    """A usable checkpoint on this machine."""

    folder: Path  # holds the files of the model's layout
    model: str  # as asked for: a hub id or a folder
    revision: str  # hub: the commit; folder: "sha256:" and 16 hex digits, see `fingerprint`


@dataclass(frozen=True)
class CachedModel:
    """One snapshot in the hub's cache."""

    model: str  # hub id
    revision: str  # commit
    model_type: str  # of its config.json: "musicgen_melody", "clap", ...; "" without one
    size_bytes: int  # of the files it refers to; snapshots of one model may share them
    complete: bool  # false: pickles only, or a download that was cut off


def locate(
    model: str,
    revision: str | None = None,
    cache_dir: Path | None = None,
    *,
    layout: Layout = TRANSFORMERS,
) -> Weights | None:
    """Find a model on this machine, without the network; None if it isn't here.

    `model` is a folder if there is one of that name, else a hub id. `revision` (commit, tag or
    branch; None: `KNOWN_REVISIONS`, else main) is of the hub; a folder has none. `cache_dir` None
    is the library's own default, see `hub_cache`.

    Raises:
        BadCheckpoint: the folder is there but can't be used, or the cached weights are damaged.
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
    """Bring a model into the hub's cache, or up to date; on a terminal, with the library's bars.

    `endpoint` replaces the hub's address (default: HF_ENDPOINT, else the public hub). What can't
    be looked up now but is cached whole is taken as it is.

    Raises:
        MissingWeights: not here, and not to be had now: no network, HF_HUB_OFFLINE, no such model
            or revision, or no permission.
        BadCheckpoint: what is there has no usable weights in this layout.
        MissingPackage: huggingface_hub isn't installed.
        FolderUnusable: the cache can't be written.
    """
    if Path(model).expanduser().is_dir():
        found = locate(model, layout=layout)
        assert found is not None  # a folder is usable or raises
        return found
    if not HUB_ID.fullmatch(model):
        raise MissingWeights(f"There is no folder {model}, and it isn't a hub id such as org/name.")
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
    """Every model snapshot in the hub's cache, sorted by id; other programs' models as well."""
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
    """The hub's cache folder: `cache_dir`, else what HF_HUB_CACHE or HF_HOME say, as the library does."""
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
    """Whether all of a snapshot that is loaded is here: what every model needs, and what the hub has."""
    listed = _listed(snapshot, layout)
    return not layout.missing(snapshot) and all((snapshot / name).is_file() for name in listed)


def _listed(snapshot: Path, layout: Layout) -> Iterator[str]:
    """The files the hub has of a snapshot, of those we load: huggingface_hub 2 and later notes them."""
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
        # Asked first, and once: the download would retry a dead network for half a minute.
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
        raise MissingWeights(f"{model} needs its licence accepted on the hub, and a login there.") from error
    except errors.RepositoryNotFoundError as error:
        raise MissingWeights(f"The hub has no model {model}, or it needs a login.") from error
    except errors.RevisionNotFoundError as error:
        raise MissingWeights(f"{model} has no revision {revision} on the hub.") from error
    except (ConnectionError, TimeoutError, httpx.HTTPError, errors.XetDownloadError) as error:
        raise MissingWeights(_not_here(model, offline=hub.is_offline_mode())) from error
    except OSError as error:
        if error.errno is None:  # the library's own, of files the hub doesn't give
            raise MissingWeights(_not_here(model, offline=hub.is_offline_mode())) from error
        where = hub_cache(cache_dir)
        raise FolderUnusable(f"{model} can't be stored in {where}: {error.strerror}.") from error
    return Path(folder)


def _not_here(model: str, *, offline: bool) -> str:
    if offline:
        return (
            f"{model} isn't on this machine and HF_HUB_OFFLINE forbids fetching it: "
            f"unset it and run `{FETCH_COMMAND}`."
        )
    return (
        f"{model} isn't (wholly) on this machine and the hub can't be reached: "
        f"once there is a network, run `{FETCH_COMMAND}`."
    )


def _silent_bar() -> type:
    from huggingface_hub.utils import tqdm

    class SilentBar(tqdm):  # type: ignore[misc]  # the library is untyped here
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return SilentBar
