"""From a scan to the queue: what each file in the inbox, or in a folder, means for the store."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import Disk, Intake
from pipeline.errors import BadAudio, DiskFull, FolderUnusable, os_reason
from pipeline.fs import copying
from pipeline.fs.copying import Changed, Identity, WriteFailed
from pipeline.fs.disk import environment_error, room_for
from pipeline.fs.names import printable
from pipeline.intake import scanner
from pipeline.intake.archive import archive_files, drop_stale_error, is_same
from pipeline.intake.scanner import ScannedFile, Scanner, Settling
from pipeline.outbox.outbox import Outbox
from pipeline.plan import Recipe
from pipeline.store.schema import UNREADABLE, FileState, SourceFile, Track
from pipeline.store.store import Store
from pipeline.workspace import InputFolder, Workspace

log = logging.getLogger("pipeline")

PATIENCE = 5  # times settle_s: a file that can't be used is waited for if it was written to so lately
TOGETHER, TOGETHER_S = 100, 2.0  # files recorded in one transaction, and for how long it is put off
LONGEST_S = 30.0  # a look that takes in files ends after so long; the rest waits for the next
READ_PATIENCE_S = 30.0  # a file whose device fails is tried again for so long


@dataclass
class ScanResult:
    """What one look at a folder found."""

    queued: int = 0  # new tracks, or finished ones that the configuration now wants otherwise
    up_to_date: set[str] = field(default_factory=set)  # hashes of finished tracks
    failed: set[str] = field(default_factory=set)  # hashes of tracks that failed before, files unchanged
    unsettled: int = 0  # somebody may still be writing them
    unmarked: int = 0  # their marker isn't there yet
    waiting: int = 0  # ready, but there are working copies enough for now
    is_cut_short: bool = False  # it took long enough; there is more to take in
    troubled: int = 0  # their device fails; they are tried again
    unreadable: set[str] = field(default_factory=set)  # failed just now, since they can't be read
    no_room: DiskFull | None = None  # why it ended early


@dataclass(frozen=True)
class Ingest:
    """Looks at one folder and keeps the store in step with it."""

    folder: InputFolder
    settings: Intake
    disk: Disk
    recipe: Recipe
    store: Store
    outbox: Outbox
    workspace: Workspace
    scanner: Scanner
    settling: Settling
    clock: Callable[[], float] = time.time
    _plan_keys: dict[str, str] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)  # tracks whose trouble is in the log
    _trouble: dict[Path, float] = field(default_factory=dict)  # since when a file's device has failed

    @property
    def inbox(self) -> Path | None:
        return self.folder.path if self.folder.is_inbox else None

    def scan(self, *, should_stop: Callable[[], bool]) -> ScanResult:
        """Take in what is new, queue what has to be made again.

        A look that takes in much ends after `LONGEST_S`, so that what is queued gets to work.

        Raises:
            FolderUnusable: the folder can't be listed.
        """
        found = ScanResult()
        try:
            scanned_files = list(self.scanner.scan())
        except OSError as e:
            raise FolderUnusable(f"{self.folder.path} can't be read: {os_reason(e)}") from e
        paths = {scanned.path for scanned in scanned_files}
        self.settling.keep_only(paths)
        for gone in self._trouble.keys() - paths:
            del self._trouble[gone]
        new = self._news(scanned_files, found, should_stop)
        taken: list[tuple[ScannedFile, str]] = []
        recorded_at = self.clock()
        try:
            for scanned in new:
                if (sha256 := self._take_in(scanned, found, should_stop)) is not None:
                    taken.append((scanned, sha256))
                if len(taken) >= TOGETHER or self.clock() - recorded_at > TOGETHER_S:
                    full, taken = taken, []
                    self._record(full, found)
                    recorded_at = self.clock()
        except DiskFull as e:
            found.no_room = e
        finally:
            self._record(taken, found)
        return found

    def _news(
        self, scanned_files: Iterable[ScannedFile], found: ScanResult, should_stop: Callable[[], bool]
    ) -> Iterable[ScannedFile]:
        """What is ready and not known yet, as long as there is room for it."""
        spooled, limit = self.store.spooled_bytes(self.folder.path), self.settings.spool_gb * 1e9
        until = self.clock() + LONGEST_S
        for scanned in scanned_files:
            if should_stop():
                return
            known = self.store.known(scanned.path)
            if known is not None and self._is_dealt_with(known[0], scanned):
                self._seen_before(*known, found)
            elif not scanned.marked:
                found.unmarked += 1
            elif self.settings.marker is None and not self._is_ready(scanned):
                found.unsettled += 1
            elif spooled and spooled + scanned.size > limit:
                found.waiting += 1
            elif self.clock() > until:
                found.waiting += 1
                found.is_cut_short = True
            else:
                spooled += scanned.size
                yield scanned

    def _is_dealt_with(self, file: SourceFile, scanned: ScannedFile) -> bool:
        """Whether this very file was taken in from this folder, and wasn't moved since."""
        return file.moved_to is None and file.root == self.folder.path and is_same(file, scanned)

    def _is_ready(self, scanned: ScannedFile) -> bool:
        return self.settling.is_settled(scanned, self.clock()) and not scanner.has_writer(scanned.to_open)

    def _take_in(
        self, scanned: ScannedFile, found: ScanResult, should_stop: Callable[[], bool]
    ) -> str | None:
        """Make the working copy; returns its hash, or None if there is nothing to record."""
        reserve = self.disk.min_free_mb * 1e6 + self.recipe.result_bytes  # copies must not stop the work
        room_for([self.workspace.state], each_bytes=scanned.size, reserve_bytes=reserve)
        incoming = self.workspace.incoming()
        expected = Identity(scanned.size, scanned.mtime_ns, scanned.inode)
        try:
            sha256 = copying.copy_in(scanned.to_open, incoming, expected=expected, should_stop=should_stop)
            if sha256 is not None:
                self._keep(sha256, incoming)
            self._trouble.pop(scanned.path, None)
        except Changed:
            found.unsettled += 1
        except BadAudio as e:
            if scanned.path.exists():
                self._unreadable(scanned, str(e), found)
        except OSError as e:
            self._could_not_be_read(scanned, e, found)
        else:
            return sha256
        finally:
            incoming.unlink(missing_ok=True)
        return None

    def _keep(self, sha256: str, incoming: Path) -> None:
        try:
            self.workspace.scratch(sha256).adopt(incoming)
        except OSError as e:
            raise WriteFailed(e.errno, e.strerror, str(incoming)) from e

    def _could_not_be_read(self, scanned: ScannedFile, error: OSError, found: ScanResult) -> None:
        """A device error may pass; one that stays is that file's failure."""
        if isinstance(error, WriteFailed):
            raise environment_error(error, in_track=False) or error from error
        if fault := environment_error(error):
            raise fault from error
        text = f"can't be read: {os_reason(error)}"
        if scanned.path not in self._trouble:
            self._trouble[scanned.path] = self.clock()
            log.warning("%s %s; it is looked at again", scanned.display, text)
        if self.clock() - self._trouble[scanned.path] >= READ_PATIENCE_S:
            self._unreadable(scanned, text, found)
        else:
            found.troubled += 1

    def _record(self, taken: list[tuple[ScannedFile, str]], found: ScanResult) -> None:
        """Note what was taken in, in one transaction; what is moved is moved after it."""
        known: list[Track] = []
        with self.store.together():
            for scanned, sha256 in taken:
                track = self._arrived(scanned, sha256, found)
                if track is not None:
                    known.append(track)
        for track in known:
            self._known(track, found)
            now = self.store.track(track.sha256)
            if now is not None and now.state == "done":
                self.workspace.scratch(track.sha256).clear()

    def _arrived(self, scanned: ScannedFile, sha256: str, found: ScanResult) -> Track | None:
        """New here: bytes nobody has seen, or a file put back; else the track they are another name of."""
        below = (
            scanned.path.parent.relative_to(self.folder.path) if self.settings.subfolders == "keep" else None
        )
        folder = Outbox.folder_name(scanned.path, sha256, below=below)
        name = printable(scanned.path.name)
        before = self.store.file_at(scanned.path)
        new = self.store.add(self._file(scanned, sha256), name=name, folder=folder, now=self.clock())
        track = self.store.track(sha256)
        assert track is not None
        if before is not None and before.state == FileState.FAILED and before.moved_to is not None:
            drop_stale_error(before.moved_to)
        if new:
            log.info("%s: queued", scanned.display)
            found.queued += 1
        elif track.state == "failed":  # whoever puts it here again wants it tried again
            self.store.requeue(sha256, now=self.clock())
            found.queued += 1
        else:
            return track
        return None

    def _seen_before(self, file: SourceFile, track: Track, found: ScanResult) -> None:
        if track.state == "failed":
            found.failed.add(track.sha256)
            if file.state == FileState.WAITING:  # a kill came before it could be moved
                archive_files(
                    self.store, [file], self.inbox, self.settings, error=f"{track.name}: {track.error}"
                )
        else:
            self._known(track, found, file)

    def _known(self, track: Track, found: ScanResult, file: SourceFile | None = None) -> None:
        """What a finished track's file means; trouble with that track's results stops no other file."""
        if track.state != "done":
            return
        try:
            self._finished(track, found, file)
        except OSError as e:
            if isinstance(environment_error(e), DiskFull):
                raise
            if track.sha256 not in self._told:
                log.warning("%s: its results can't be read: %s", track.name, os_reason(e))
            self._told.add(track.sha256)

    def _finished(self, track: Track, found: ScanResult, file: SourceFile | None) -> None:
        if track.plan_key != self._plan_key(track.sha256) and track.collected_at is None:
            self.store.requeue(track.sha256, now=self.clock())
            found.queued += 1
            return
        if file is None or file.state in (FileState.WAITING, FileState.LOST):  # it has just come
            if not self.outbox.is_whole(track.folder):  # its results were removed: it is wanted again
                self.store.requeue(track.sha256, now=self.clock())
                found.queued += 1
                return
            self._settle(track)
        found.up_to_date.add(track.sha256)

    def _plan_key(self, sha256: str) -> str:
        if sha256 not in self._plan_keys:
            self._plan_keys[sha256] = self.recipe.plan(sha256).key
        return self._plan_keys[sha256]

    def _settle(self, track: Track) -> None:
        """Finished before this file came, or was dealt with: note its name and put it with the others."""
        found = self.store.files_of(track.sha256)
        self.outbox.add_names(track.folder, [file.display for file in found])
        archive_files(self.store, found, self.inbox, self.settings, error=None)

    def _unreadable(self, scanned: ScannedFile, error: str, found: ScanResult) -> None:
        """Without bytes there is no content hash: the failure is recorded under a hash of the path."""
        sha256 = hashlib.sha256(b"unreadable:" + os.fsencode(scanned.path)).hexdigest()
        file = self._file(scanned, sha256)
        name = printable(scanned.path.name)
        with self.store.together():
            folder = Outbox.folder_name(scanned.path, sha256)
            self.store.add(file, name=name, folder=folder, now=self.clock())
            self.store.fail(sha256, stage=UNREADABLE, error=error, now=self.clock(), retry_at=None)
        log.error("%s: failed: %s", name, error)
        found.unreadable.add(sha256)
        archive_files(self.store, [file], self.inbox, self.settings, error=f"{name} {error}")

    def _file(self, scanned: ScannedFile, sha256: str) -> SourceFile:
        return SourceFile(
            path=scanned.path,
            sha256=sha256,
            root=self.folder.path,
            display=scanned.display,
            size=scanned.size,
            mtime_ns=scanned.mtime_ns,
            inode=scanned.inode,
            state=FileState.WAITING,
        )


def still_arriving(store: Store, sha256: str, settings: Intake, *, now: float) -> float | None:
    """Whether unusable bytes may be those of a file that somebody was still writing.

    Returns:
        When to look again; `-inf` if no file has these bytes any more, so that they were part of
        something else; None if the file has rested: it is what it is.
    """
    patience_s = PATIENCE * settings.settle_s
    if patience_s == 0 or settings.marker is not None:
        return None
    found = store.files_of(sha256)
    if any(file.state in (FileState.SETTLED, FileState.FAILED) for file in found):  # was dealt with before
        return None
    latest = -float("inf")
    for file in found:
        try:
            seen = file.path.stat() if settings.follow_symlinks else file.path.lstat()
        except OSError:
            continue
        if Identity.of(seen) != Identity(file.size, file.mtime_ns, file.inode):
            return now + settings.settle_s  # the next look takes the new bytes
        latest = max(latest, seen.st_mtime, seen.st_ctime)
    if latest == -float("inf"):
        return latest
    until = latest + patience_s
    return until if latest - patience_s <= now < until else None  # times far in the future tell nothing
