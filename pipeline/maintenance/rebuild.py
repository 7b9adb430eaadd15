"""Makes lost records of finished tracks again from the manifests in the outbox."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from pipeline.fs.files import is_in_bucket
from pipeline.fs.names import printable
from pipeline.maintenance.reconcile import Finding, unreadable
from pipeline.outbox.outbox import VECTORS_RECORD, Outbox
from pipeline.records import Stage
from pipeline.store.schema import FileState, SourceFile, Track, TrackState
from pipeline.store.store import Store
from pipeline.workspace import DONE, Workspace

OF_FILE = ("name", "names", "sha256", "bytes")  # what a manifest says of the source file, not of its sound


def rebuild(store: Store, outbox: Outbox, workspace: Workspace, *, now: float) -> Iterator[Finding]:
    """Record the finished tracks of the outbox that the database does not know; a line for each folder.

    Then their sources in `done`, see `_record_sources`.

    The sizes of the files are checked at the next start, and their hashes by `doctor`. To be called only by
    the holder of the instance lock.

    Raises:
        OSError: the outbox can't be read.
    """
    for folder, files, manifest in outbox.contents_and_manifests():
        where = printable(folder)
        if isinstance(files, OSError):
            yield unreadable(folder, files)
            continue
        if manifest is None:
            yield Finding("unknown", where, "has no manifest.json, so it is not finished")
            continue
        try:
            track, units = _track_of(manifest, folder), _units_of(manifest)
        except (AttributeError, KeyError, TypeError, ValueError):
            text = "its manifest.json has no keys: it was made by version 0.1.0 or is damaged"
            yield Finding("unknown", where, text)
            continue
        if store.restore(track, units, now=now):
            text = f"{len(manifest['variations'])} variations recorded"
            yield Finding("result", where, text, mended=True)
    _record_sources(store, workspace, now=now)


def _record_sources(store: Store, workspace: Workspace, *, now: float) -> None:
    """Record the files in the archive that are the source of a finished track, by their hash.

    Without that `requeue` and a repair would take the source for lost, and `gc` would never remove it. A file
    is read if it has the size of a track. Not in a bucket, where that would be a download.
    """
    inbox, done = workspace.inbox, workspace.inbox / DONE
    if is_in_bucket(inbox):
        return
    tracks = {track.sha256: track for track in store.tracks(TrackState.DONE)}
    sizes = {track.bytes for track in tracks.values()}
    known = {file.current_path for file in store.files_below(inbox)}
    for entry in workspace.inbox_files.entries(done):
        if entry.size not in sizes or entry.path in known:
            continue
        try:
            sha256 = workspace.inbox_files.sha256_of(entry.path)
        except OSError:
            continue
        path = inbox / entry.path.relative_to(done)
        if sha256 in tracks and store.file_at(path) is None:
            file = SourceFile(
                path=path,
                sha256=sha256,
                root=inbox,
                display=printable(path.relative_to(inbox)),
                size=entry.size,
                mtime_ns=entry.identity.mtime_ns,
                inode=entry.identity.inode,
                state=FileState.SETTLED,
                moved_to=entry.path,
            )
            store.add_file(file, name=tracks[sha256].name, folder=tracks[sha256].folder, now=now)


def _track_of(manifest: Mapping[str, Any], folder: str) -> Track:
    source = manifest["source"]
    return Track(
        sha256=source["sha256"],
        name=source["name"],
        folder=folder,
        state=TrackState.DONE,
        bytes=source["bytes"],
        finished_at=datetime.fromisoformat(manifest["created_at"]).timestamp(),
        plan_key=manifest["keys"]["plan"],
        source=_sound_of(source),
        queued_at=0.0,
        attempts=0,
        not_before=0.0,
        stage=None,
        error=None,
    )


def _units_of(manifest: Mapping[str, Any]) -> dict[str, tuple[Stage, Mapping[str, Any]]]:
    """The units of work and their stages by key, as they were recorded."""
    keys = manifest["keys"]
    normalized = {"source": _sound_of(manifest["source"]), **manifest["normalized"]}
    generated = zip(keys["generate"], manifest["variations"], strict=True)
    vectors = manifest.get(VECTORS_RECORD)
    return {
        keys["normalize"]: (Stage.NORMALIZE, normalized),
        keys["embed"]: (Stage.EMBED, manifest["embedding"]),
        **{key: (Stage.GENERATE, record) for key, record in generated},
        **({keys["embed_variations"]: (Stage.EMBED_VARIATIONS, vectors)} if vectors else {}),
    }


def _sound_of(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key not in OF_FILE}
