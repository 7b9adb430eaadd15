"""From a scan to the queue: what each file in the inbox, or in a folder, means for the store."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import intake
from pipeline.config import Intake
from pipeline.errors import BadAudio, FolderUnusable
from pipeline.intake import Settling, Sighting
from pipeline.names import printable
from pipeline.outbox import Outbox
from pipeline.plan import Recipe
from pipeline.store import SourceFile, Store, Track

log = logging.getLogger("pipeline")

# What became of a file: not dealt with yet; moved, deleted or left in place as the configuration
# says; moved to `failed`; not there any more when it was to be moved.
WAITING, SETTLED, ASIDE, LOST = "waiting", "settled", "aside", "lost"


@dataclass
class Look:
    """What one look at a folder found."""

    queued: int = 0  # new tracks, or finished ones that the configuration now wants otherwise
    up_to_date: int = 0
    failed: list[str] = field(
        default_factory=list
    )  # hashes of files that failed before and lie there unchanged
    unsettled: int = 0  # somebody may still be writing them


@dataclass(frozen=True)
class Arrivals:
    """Looks at one folder and keeps the store in step with it."""

    root: Path
    is_inbox: bool
    settings: Intake
    recipe: Recipe
    store: Store
    outbox: Outbox
    settling: Settling
    clock: Callable[[], float] = time.time

    def look(self, *, should_stop: Callable[[], bool]) -> Look:
        """Queue what is new or has to be made again.

        Raises:
            FolderUnusable: the folder can't be listed.
        """
        found = Look()
        try:
            sightings = list(intake.scan(self.root, ignore=self.settings.ignore, is_inbox=self.is_inbox))
        except OSError as e:
            raise FolderUnusable(f"{self.root} can't be read: {(e.strerror or str(e)).lower()}") from e
        self.settling.keep_only({sighting.path for sighting in sightings})
        for sighting in sightings:
            if should_stop():
                break
            known = self.store.file_at(sighting.path)
            if known is not None and known.moved_to is None and _is_same(known, sighting):
                self._seen_before(known, found)
            elif not self.settling.is_settled(sighting, self.clock()):
                found.unsettled += 1
            elif (sha256 := self._hash(sighting, found, should_stop)) is not None:
                self._arrived(sighting, sha256, found)
        return found

    def _hash(self, sighting: Sighting, found: Look, should_stop: Callable[[], bool]) -> str | None:
        try:
            sha256 = intake.hash_file(sighting.path, should_stop=should_stop)
            after = sighting.path.lstat()
        except FileNotFoundError:
            return None
        except BadAudio as e:
            self._unreadable(sighting, str(e), found)
            return None
        if sha256 is not None and (after.st_size, after.st_mtime_ns) != (sighting.size, sighting.mtime_ns):
            found.unsettled += 1
            return None
        return sha256

    def _arrived(self, sighting: Sighting, sha256: str, found: Look) -> None:
        """New here: bytes nobody has seen, another name of known ones, or a file put back."""
        folder = Outbox.folder_name(sighting.path, sha256)
        name = printable(sighting.path.name)
        new = self.store.add(self._file(sighting, sha256), name=name, folder=folder, now=self.clock())
        track = self.store.track(sha256)
        assert track is not None
        if new:
            log.info("%s: queued", sighting.display)
            found.queued += 1
        elif track.state == "failed":  # whoever puts it here again wants it tried again
            self.store.requeue(sha256, now=self.clock())
            found.queued += 1
        else:
            self._known(track, found)

    def _seen_before(self, file: SourceFile, found: Look) -> None:
        track = self.store.track(file.sha256)
        assert track is not None
        if track.state == "failed":
            found.failed.append(track.sha256)
        else:
            self._known(track, found)

    def _known(self, track: Track, found: Look) -> None:
        if track.state != "done":
            return
        if track.plan_key != self.recipe.plan(track.sha256).key:
            self.store.requeue(track.sha256, now=self.clock())
            found.queued += 1
        else:
            found.up_to_date += 1
            self._settle(track)

    def _settle(self, track: Track) -> None:
        """Finished before this file came: note its name and put it with the others."""
        files = self.store.files_of(track.sha256)
        if any(file.state == WAITING for file in files):
            self.outbox.add_names(track.folder or "", [file.display for file in files])
            put_away(self.store, files, self.root if self.is_inbox else None, self.settings, error=None)

    def _unreadable(self, sighting: Sighting, error: str, found: Look) -> None:
        """Without bytes there is no content hash: the failure is recorded under a hash of the path."""
        sha256 = hashlib.sha256(b"unreadable:" + os.fsencode(sighting.path)).hexdigest()
        file = self._file(sighting, sha256)
        name = printable(sighting.path.name)
        self.store.add(file, name=name, folder=Outbox.folder_name(sighting.path, sha256), now=self.clock())
        self.store.fail(sha256, stage="intake", error=error, now=self.clock(), retry_at=None)
        log.error("%s: failed: %s", name, error)
        found.failed.append(sha256)
        put_away(
            self.store, [file], self.root if self.is_inbox else None, self.settings, error=f"{name} {error}"
        )

    def _file(self, sighting: Sighting, sha256: str) -> SourceFile:
        return SourceFile(
            path=sighting.path,
            sha256=sha256,
            root=self.root,
            display=sighting.display,
            size=sighting.size,
            mtime_ns=sighting.mtime_ns,
            inode=sighting.inode,
            state=WAITING,
        )


def put_away(
    store: Store, files: list[SourceFile], inbox: Path | None, settings: Intake, *, error: str | None
) -> None:
    """Do with a finished or failed track's files what the configuration says; only those of the inbox move.

    A file that is not what was hashed any more is left alone: the next look takes it as a new one.
    """
    for file in files:
        here = file.moved_to or file.path
        if file.state == SETTLED or (file.state == ASIDE and error is not None):
            continue
        if file.root != inbox:
            store.settle_file(file.path, state=SETTLED)
            continue
        try:
            if not _is_same(file, _sight(here)):
                continue
            moved_to = _dispose(file, here, settings, error)
        except FileNotFoundError:
            store.settle_file(file.path, state=LOST)
        except OSError as e:
            log.warning("%s: can't be moved out of the inbox: %s", file.display, e.strerror)
        else:
            store.settle_file(file.path, state=SETTLED if error is None else ASIDE, moved_to=moved_to)


def _dispose(file: SourceFile, here: Path, settings: Intake, error: str | None) -> Path | None:
    """Move, delete or keep; returns the new place, or None if it stays where it was found (or is gone)."""
    if error is not None:
        moved_to = intake.move_aside(here, file.root / intake.FAILED / file.path.relative_to(file.root))
        intake.write_error(moved_to, error)
        return moved_to
    if file.state == ASIDE:
        intake.error_file(here).unlink(missing_ok=True)
    if settings.after == "move":
        return intake.move_aside(here, file.root / intake.DONE / file.path.relative_to(file.root))
    if settings.after == "delete":
        here.unlink()
    elif file.state == ASIDE:
        back = intake.move_aside(here, file.path)
        return None if back == file.path else back
    return None


def _sight(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _is_same(file: SourceFile, seen: Sighting | tuple[int, int, int]) -> bool:
    if isinstance(seen, Sighting):
        seen = (seen.size, seen.mtime_ns, seen.inode)
    return (file.size, file.mtime_ns, file.inode) == seen
