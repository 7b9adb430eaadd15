"""Where models' weights are: a local folder or the hub's cache, and how they get there.

Only safetensors are ever looked at or downloaded: a pickle (`.bin`, `.pt`) can run code when it
is opened. Looking something up needs neither the network nor the hub's library: the cache's
layout (`models--org--name/{refs,snapshots,blobs}`) and the variables that place it are part of
huggingface_hub's documentation ("Understand caching", "Environment variables"), and `status` and
`doctor` must answer at once, in a core install too. Only `fetch` imports the library.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BadCheckpoint, FolderUnusable, MissingPackage, MissingWeights

FETCH_COMMAND = "python run_pipeline.py models fetch"
INSTALL_COMMAND = "pip install -r requirements.txt"

# The revision used where none is asked for, if it isn't the default branch.
# laion/clap-htsat-unfused has only a pickle on `main` (8fa0f1c, 2023); its safetensors are the
# hub's own conversion of that file, one commit on top, never merged. A commit can't be moved.
KNOWN_REVISIONS = {"laion/clap-htsat-unfused": "79b58ed25fc00386262a2bea4b19fd21dc4310a0"}
DEFAULT_REVISION = "main"

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
ALLOW_PATTERNS = (
    *("config.json", "generation_config.json", *PREPROCESSORS),
    *(WEIGHTS, INDEX, "model-*-of-*.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "vocab.json", "merges.txt"),
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")

TIMEOUT_S = 10
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
SMALL_FILE_BYTES = 4 << 20  # files up to this size go into a fingerprint whole
BLOCK_BYTES, BLOCKS = 1 << 16, 16  # what of a larger one does, evenly spaced


@dataclass(frozen=True)
class Weights:
    """A usable checkpoint on this machine."""

    folder: Path  # holds config.json and the safetensors
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


def locate(model: str, revision: str | None = None, cache_dir: Path | None = None) -> Weights | None:
    """Find a model on this machine, without the network; None if it isn't here.

    `model` is a folder if there is one of that name, else a hub id. `revision` (commit, tag or
    branch; None: `KNOWN_REVISIONS`, else main) is of the hub; a folder has none. `cache_dir` None
    is the library's own default, see `hub_cache`.

    Raises:
        BadCheckpoint: the folder is there but can't be used, or the cached weights are damaged.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check(folder)
        return Weights(folder, model, fingerprint(folder))
    if not HUB_ID.fullmatch(model):
        return None
    snapshot = _snapshot(_repo_folder(model, cache_dir), revision or _default_revision(model))
    if snapshot is None or _missing(snapshot):
        return None
    _check(snapshot)
    return Weights(snapshot, model, snapshot.name)


def fetch(
    model: str,
    revision: str | None = None,
    cache_dir: Path | None = None,
    *,
    progress: bool = True,
    endpoint: str | None = None,
) -> Weights:
    """Bring a model into the hub's cache, or up to date; on a terminal, with the library's bars.

    `endpoint` replaces the hub's address (default: HF_ENDPOINT, else the public hub). What can't
    be looked up now but is cached whole is taken as it is.

    Raises:
        MissingWeights: not here, and not to be had now: no network, HF_HUB_OFFLINE, no such model
            or revision, or no permission.
        BadCheckpoint: what is there has no usable safetensors.
        MissingPackage: huggingface_hub isn't installed.
        FolderUnusable: the cache can't be written.
    """
    if Path(model).expanduser().is_dir():
        found = locate(model)
        assert found is not None  # a folder is usable or raises
        return found
    if not HUB_ID.fullmatch(model):
        raise MissingWeights(f"There is no folder {model}, and it isn't a hub id such as org/name.")
    revision = revision or _default_revision(model)
    try:
        snapshot = _download(model, revision, cache_dir, progress=progress, endpoint=endpoint)
    except MissingWeights:
        if found := locate(model, revision, cache_dir):
            return found
        raise
    try:
        _check(snapshot)
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


def fingerprint(folder: Path) -> str:
    """A quick identity of a local checkpoint: "sha256:" and 16 hex digits.

    Over the names and sizes of the files a model is loaded from, the whole of those up to 4 MiB,
    and of larger ones the first 64 KiB, the last and 14 between, evenly spaced. Made to notice
    another checkpoint in the same folder, fine-tuned ones included; not an integrity check.
    """
    digest = hashlib.sha256()
    for path in sorted(_loaded_files(folder)):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset, length in _sampled(size):
                file.seek(offset)
                digest.update(file.read(length))
    return f"sha256:{digest.hexdigest()[:16]}"


def _sampled(size: int) -> list[tuple[int, int]]:
    if size <= SMALL_FILE_BYTES:
        return [(0, size)]
    last = size - BLOCK_BYTES
    return [(last * i // (BLOCKS - 1), BLOCK_BYTES) for i in range(BLOCKS)]


def _loaded_files(folder: Path) -> set[Path]:
    return {path for pattern in ALLOW_PATTERNS for path in folder.glob(pattern) if path.is_file()}


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


def _shards(folder: Path) -> list[str]:
    """Names of the safetensors files a model is loaded from, in the library's order of preference."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    index = _read_json(folder / INDEX)
    names = sorted(set(index["weight_map"].values())) if isinstance(index.get("weight_map"), dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise BadCheckpoint(f"{INDEX} in {folder} doesn't name the weights' files.")
    return names


def _missing(folder: Path) -> list[str]:
    """What a checkpoint lacks of config, weights and preprocessor settings."""
    missing = [name for name in ("config.json", *_shards(folder)) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in PREPROCESSORS):
        missing.append(PREPROCESSORS[0])
    return missing + [name for name in _listed(folder) if not (folder / name).is_file()]


def _listed(snapshot: Path) -> Iterator[str]:
    """The files the hub has of a snapshot, of those we load: as noted by huggingface_hub 2 and later."""
    note = snapshot.parent.parent / "trees" / f"{snapshot.name}.json"
    if COMMIT.fullmatch(snapshot.name) and note.is_file():
        for name in _read_json(note).get("files", {}):
            if "/" not in name and any(Path(name).match(pattern) for pattern in ALLOW_PATTERNS):
                yield name


def _check(folder: Path) -> None:
    """Raise BadCheckpoint, saying what is missing or damaged, unless `folder` can be loaded."""
    if missing := _missing(folder):
        if missing[0] == "config.json":
            raise BadCheckpoint(f"{folder} has no config.json, so it isn't a model's folder.")
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if WEIGHTS in missing and pickles:
            raise BadCheckpoint(
                f"{folder} has only pickled weights ({pickles[0]}), which are never loaded "
                f"because they can run code: convert them to {WEIGHTS}."
            )
        raise BadCheckpoint(f"{folder} is incomplete: {', '.join(dict.fromkeys(missing))} missing.")
    for name in _shards(folder):
        _check_safetensors(folder / name)


def _check_safetensors(path: Path) -> None:
    """The header's offsets must end where the file does: a cheap test for a cut-off download."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(size - 8, MAX_HEADER_BYTES):
            raise BadCheckpoint(f"{path} is cut off or not a safetensors file.")
        try:
            header = json.loads(file.read(header_bytes))
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise BadCheckpoint(f"{path} is not a safetensors file.") from error
    if size != 8 + header_bytes + end:
        raise BadCheckpoint(
            f"{path} is cut off or damaged: it has {size} bytes of {8 + header_bytes + end}; "
            f"delete it and get it again."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} is not readable JSON.") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} is not a JSON object.")
    return value


def _describe(repo: Path, snapshot: Path) -> CachedModel:
    files = {path.resolve() for path in snapshot.rglob("*") if path.is_file()}
    try:
        model_type = str(_read_json(snapshot / "config.json").get("model_type", ""))
        _check(snapshot)
        complete = True
    except BadCheckpoint:
        complete = False
    model = repo.name.removeprefix("models--").replace("--", "/", 1)
    size = sum(path.stat().st_size for path in files)
    return CachedModel(model, snapshot.name, model_type, size, complete)


def _download(
    model: str, revision: str, cache_dir: Path | None, *, progress: bool, endpoint: str | None
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
            allow_patterns=list(ALLOW_PATTERNS),
            endpoint=endpoint,
            **({} if progress else {"tqdm_class": _silent_bar()}),
        )
    except errors.GatedRepoError as error:
        raise MissingWeights(f"{model} needs its licence accepted on the hub, and a login there.") from error
    except errors.RepositoryNotFoundError as error:
        raise MissingWeights(f"The hub has no model {model}, or it needs a login.") from error
    except errors.RevisionNotFoundError as error:
        raise MissingWeights(f"{model} has no revision {revision} on the hub.") from error
    except (OSError, httpx.HTTPError, errors.XetDownloadError) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = hub_cache(cache_dir)
            raise FolderUnusable(f"{model} can't be stored in {where}: {error.strerror}.") from error
        raise MissingWeights(_not_here(model, offline=hub.is_offline_mode())) from error
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
