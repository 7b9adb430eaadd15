"""A store, an outbox and an inbox with finished, failed or queued tracks, made without engines."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pipeline.config import Folders
from pipeline.outbox.outbox import EMBEDDING, Outbox, Published
from pipeline.store.schema import FileState, SourceFile, Track
from pipeline.store.store import Store
from pipeline.workspace import InputFolder, Workspace

WHOLE_QUEUE = InputFolder(Path("/home/inbox"), is_inbox=True)


def claim_due(store: Store, limit: int, *, now: float) -> list[Track]:
    """Claim due tracks as the runner does."""
    return store.claim(store.due(limit, WHOLE_QUEUE, now=now))


@dataclass(frozen=True)
class StoredTracks:
    """A workspace with its store and its outbox, and methods that put tracks into them."""

    store: Store
    outbox: Outbox
    workspace: Workspace

    @classmethod
    def new(cls, home: Path) -> StoredTracks:
        workspace = Workspace.of(home, Folders())
        workspace.prepare()
        return cls(Store(workspace.database), Outbox(workspace.outbox_files), workspace)

    def arrived(self, name: str, content: bytes, *, now: float) -> str:
        """A source in the inbox, queued; returns its hash."""
        path = self.workspace.inbox / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        found = path.lstat()
        below = PurePath(name).parent
        file = SourceFile(
            path=path,
            sha256=sha256,
            root=self.workspace.inbox,
            display=name,
            size=found.st_size,
            mtime_ns=found.st_mtime_ns,
            inode=found.st_ino,
            state=FileState.WAITING,
        )
        folder = Outbox.folder_name(path, sha256, below=below)
        self.store.add_file(file, name=path.name, folder=folder, now=now)
        return sha256

    def finished(self, name: str, content: bytes, *, now: float, wav_bytes: int = 100) -> str:
        """A source with results, done at `now` and moved to the archive; returns its hash."""
        sha256 = self.arrived(name, content, now=now)
        track = self.store.track(sha256)
        assert track is not None
        files = [EMBEDDING, "variations/01-near.wav", "variations/02-far.wav"]
        made = [self.made(sha256, file, n, now=now, n_bytes=wav_bytes) for n, file in enumerate(files)]
        self.outbox.publish_manifest(track.folder, a_manifest(sha256, made))
        claim_due(self.store, 100, now=now)
        self.store.finish(sha256, plan_key="plan", recipe_key="r", source={"codec": "flac"}, now=now)
        self.archive_files(name, "done")
        return sha256

    def made(self, sha256: str, file: str, n: int, *, now: float, n_bytes: int) -> Published:
        """Publish a file and record it as a finished unit of work."""
        track = self.store.track(sha256)
        assert track is not None
        content = hashlib.sha256(f"{sha256}{file}".encode()).digest() * (n_bytes // 32 + 1)
        path = self.outbox.root / track.folder / file
        published = self.outbox.publish(track.folder, file, content[:n_bytes])
        os.utime(path, (now, now))
        record = {"file": file, "sha256": published.sha256, "bytes": published.bytes}
        stage = "embed" if file == EMBEDDING else "generate"
        self.store.finish_unit(
            f"{n}-{sha256}", sha256=sha256, stage=stage, result=record, seconds=1.0, now=now
        )
        return published

    def failed(self, name: str, content: bytes, *, now: float) -> str:
        """A source that failed at `now` and lies in the archive with its error beside it."""
        sha256 = self.arrived(name, content, now=now)
        claim_due(self.store, 100, now=now)
        self.store.fail(sha256, stage="normalize", error="is silent", now=now, retry_at=None)
        there = self.archive_files(name, "failed")
        there.with_name(f"{there.name}.error.txt").write_text("is silent\n")
        return sha256

    def archive_files(self, name: str, archive: str) -> Path:
        path, target = self.workspace.inbox / name, self.workspace.inbox / archive / name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        state = FileState.SETTLED if archive == "done" else FileState.FAILED
        self.store.set_file_state(path, state, moved_to=target)
        return target

    def scratch(self, sha256: str, *, age_s: float = 0.0, now: float = 0.0) -> Path:
        """A working copy, last written to `age_s` before `now`."""
        folder = self.workspace.scratch(sha256).folder
        folder.mkdir(parents=True)
        (folder / "source").write_bytes(b"x" * 10)
        for path in (folder / "source", folder):
            os.utime(path, (now - age_s, now - age_s))
        return folder

    def folder(self, sha256: str) -> Path:
        track = self.store.track(sha256)
        assert track is not None
        return self.outbox.root / track.folder

    def state(self, sha256: str) -> str:
        track = self.store.track(sha256)
        assert track is not None
        return track.state


def a_manifest(sha256: str, made: list[Published]) -> dict[str, Any]:
    entries = [{"file": one.file, "sha256": one.sha256, "bytes": one.bytes} for one in made]
    return {"source": {"sha256": sha256, "names": []}, "embedding": entries[0], "variations": entries[1:]}


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by path; an empty folder is listed with a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
        elif not any(path.iterdir()):
            found[f"{path.relative_to(folder)}/"] = b""
    return found
