"""Takes the files of a folder into the store: copies and hashes new ones, queues what has to be made."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import Intake
from pipeline.errors import BadAudio, DiskFull, FolderUnusable, os_reason
from pipeline.fs import copying
from pipeline.fs.copying import FileChanged, FileIdentity, WriteFailed, error_path
from pipeline.fs.disk import count_that_fit, environment_error
from pipeline.fs.files import Files, is_in_bucket
from pipeline.fs.names import printable
from pipeline.intake.archive import archive_files
from pipeline.intake.copies import is_plainer
from pipeline.intake.scanner import ScannedFile, Scans
from pipeline.intake.settling import PATIENCE, Settling, has_writer
from pipeline.outbox.outbox import Outbox
from pipeline.plan import Recipe
from pipeline.store.schema import UNREADABLE, AttemptOutcome, FileState, SourceFile, Track, TrackState
from pipeline.store.store import Store
from pipeline.workspace import InputFolder, Workspace

log = logging.getLogger("pipeline")

MAX_SCAN_S = 30.0  # after so long with files that it takes in, a scan ends, so that tracks are processed
READ_PATIENCE_S = 30.0  # how long a file is tried again whose device fails


@dataclass
class ScanResult:
    """What one scan of a folder found: numbers of files, or hashes of tracks."""

    queued: int = 0  # new tracks, and finished ones that the configuration now wants otherwise
    up_to_date: int = 0  # known files of finished tracks
    brought_again: int = 0  # new files of finished tracks
    failed: set[str] = field(default_factory=set)  # hashes of tracks that failed before, files unchanged
    unsettled: int = 0  # they may still be written to
    unmarked: int = 0  # their marker is missing
    waiting: int = 0  # ready, but not taken in by this scan: there are enough working copies
    is_cut_short: bool = False  # the scan reached its time limit before all files were taken in
    read_errors: int = 0  # they could not be read and are tried again
    unreadable: set[str] = field(default_factory=set)  # they failed in this scan: they can't be read
    disk_full: DiskFull | None = None  # why the scan ended early


@dataclass(frozen=True)
class Ingest:
    """Scans one folder and updates the store."""

    folder: InputFolder
    settings: Intake
    recipe: Recipe
    store: Store
    outbox: Outbox
    workspace: Workspace
    scanner: Scans
    settling: Settling
    clock: Callable[[], float] = time.time
    _logged: set[str] = field(default_factory=set)  # tracks whose results could not be read
    _failing_since: dict[Path, float] = field(default_factory=dict)  # files that can't be read

    def scan(self, *, should_stop: Callable[[], bool]) -> ScanResult:
        """Take in the new files, and queue tracks whose results have to be made again.

        Raises:
            FolderUnusable: the folder can't be listed.
        """
        result, pending = ScanResult(), set[Path]()
        try:
            for scanned in self._ready_files(result, pending, should_stop):
                if (sha256 := self._copy(scanned, result, should_stop)) is not None:
                    self._add(scanned, sha256, result)
        except DiskFull as e:
            result.disk_full = e
        else:
            if not should_stop():
                self._forget_all_but(pending)
        return result

    def _listed(self) -> Iterator[ScannedFile]:
        """A folder is listed before anything in it is moved; a bucket may have more than fits into memory."""
        files = self.scanner.scan()
        if is_in_bucket(self.folder.path):
            return files
        try:
            return iter(list(files))
        except OSError as e:
            raise FolderUnusable(f"{printable(self.folder.path)} can't be read: {os_reason(e)}") from e

    def _forget_all_but(self, pending: set[Path]) -> None:
        """Forget what earlier scans noted of files that are gone or known by now."""
        self.settling.keep_only(pending)
        for gone in self._failing_since.keys() - pending:
            del self._failing_since[gone]

    def _ready_files(
        self, result: ScanResult, pending: set[Path], should_stop: Callable[[], bool]
    ) -> Iterator[ScannedFile]:
        """The new files that are ready, as long as the working copies stay below their limit.

        `pending` gets the paths of all files that are not known yet.
        """
        spooled, limit = self.store.spooled_bytes(self.folder.path), self.settings.spool_gb * 1e9
        taking_s = 0.0
        for scanned in self._listed():
            if should_stop():
                return
            known = self.store.file_at(scanned.path)
            if known is not None and self._was_taken_in(known, scanned):
                self._check_known_file(known, result)
                continue
            pending.add(scanned.path)
            if not scanned.marked:
                result.unmarked += 1
            elif self.settings.marker is None and not self._is_ready(scanned):
                result.unsettled += 1
            elif spooled and spooled + scanned.identity.size > limit:
                result.waiting += 1
            elif taking_s > MAX_SCAN_S:
                result.waiting += 1
                result.is_cut_short = True
            else:
                spooled += scanned.identity.size
                began = self.clock()
                yield scanned
                taking_s += self.clock() - began

    @property
    def _files(self) -> Files:
        return self.workspace.files_at(self.folder.path)

    def _was_taken_in(self, file: SourceFile, scanned: ScannedFile) -> bool:
        """Whether this very file was taken in from this folder and has not been moved since."""
        return file.moved_to is None and file.root == self.folder.path and file.identity == scanned.identity

    def _is_ready(self, scanned: ScannedFile) -> bool:
        if scanned.identity.etag:  # an object appears whole
            return True
        return self.settling.is_settled(scanned, self.clock()) and not has_writer(scanned.real_path)

    # -- new files -------------------------------------------------------------------------------

    def _copy(self, scanned: ScannedFile, result: ScanResult, should_stop: Callable[[], bool]) -> str | None:
        """Make the working copy; returns its hash, or None if there is nothing to record."""
        # The reserve is for the processing of the queue.
        reserve = self.recipe.config.disk.min_free_mb * 1e6 + self.recipe.result_bytes
        count_that_fit([self.workspace.state], each_bytes=scanned.identity.size, reserve_bytes=reserve)
        incoming = self.workspace.incoming()
        try:
            sha256 = self._files.copy_in(
                scanned.real_path, incoming, expected=scanned.identity, should_stop=should_stop
            )
            if sha256 is not None:
                with copying.write_errors(incoming):
                    self.workspace.scratch(sha256).adopt(incoming)
            self._failing_since.pop(scanned.path, None)
            return sha256
        except FileChanged:
            result.unsettled += 1
        except BadAudio as e:
            if self._files.find(scanned.path) is not None:
                until = patience_end(scanned.changed_s, self.settings, now=self.clock())
                self._retry_or_fail(scanned, str(e), until, result)
        except WriteFailed as e:
            raise environment_error(e, in_track=False) or e from e
        except OSError as e:
            if fault := environment_error(e):
                raise fault from e
            until = self._failing_since.get(scanned.path, self.clock()) + READ_PATIENCE_S
            self._retry_or_fail(scanned, f"can't be read: {os_reason(e)}", until, result)
        finally:
            incoming.unlink(missing_ok=True)
        return None

    def _retry_or_fail(self, scanned: ScannedFile, error: str, until: float, result: ScanResult) -> None:
        """Leave a file that can't be read for the next scan; from `until` on, it has failed."""
        if self.clock() >= until:
            self._fail_unreadable(scanned, error, result)
            return
        if scanned.path not in self._failing_since:
            self._failing_since[scanned.path] = self.clock()
            log.warning("%s %s; it is tried again", scanned.display, error)
        result.read_errors += 1

    def _fail_unreadable(self, scanned: ScannedFile, error: str, result: ScanResult) -> None:
        """Record the failure under a hash of the path, as the content has none."""
        sha256 = hashlib.sha256(b"unreadable:" + os.fsencode(scanned.path)).hexdigest()
        file = self._source_file(scanned, sha256)
        name = printable(scanned.path.name)
        with self.store.transaction():
            folder = Outbox.folder_name(scanned.path, sha256)
            self.store.add_file(file, name=name, folder=folder, now=self.clock())
            attempt = self.store.begin_attempt(sha256, UNREADABLE, now=self.clock())
            failed = AttemptOutcome.FAILED
            self.store.end_attempt(attempt, outcome=failed, now=self.clock(), error=error, cause="unreadable")
            self.store.fail(sha256, stage=UNREADABLE, error=error, now=self.clock(), retry_at=None)
        log.error("%s: failed: %s", name, error)
        result.unreadable.add(sha256)
        archive_files(self.store, [file], self.workspace.inbox_files, self.settings, error=f"{name} {error}")

    def _add(self, scanned: ScannedFile, sha256: str, result: ScanResult) -> None:
        """Add a copied file to the store, and archive it if its track is finished."""
        with self.store.transaction():
            is_queued, track = self._record(scanned, sha256)
        if is_queued:
            result.queued += 1
            return
        self._check_results(track, result)
        current = self.store.track(sha256)
        if current is not None and current.state == TrackState.DONE:
            self.workspace.scratch(sha256).clear()

    def _record(self, scanned: ScannedFile, sha256: str) -> tuple[bool, Track]:
        """Returns whether this queued the track, and the track as it was found."""
        below = (
            scanned.path.parent.relative_to(self.folder.path) if self.settings.subfolders == "keep" else None
        )
        folder = Outbox.folder_name(scanned.path, sha256, below=below)
        name = printable(scanned.path.name)
        before = self.store.file_at(scanned.path)
        file = self._source_file(scanned, sha256)
        is_new = self.store.add_file(file, name=name, folder=folder, now=self.clock())
        track = self.store.track(sha256)
        assert track is not None
        failed = before.moved_to if before is not None and before.state == FileState.FAILED else None
        if failed is not None and self._files.find(failed) is None:  # it was put back in the inbox
            self._files.delete(error_path(failed))
        is_failed = track.state == TrackState.FAILED
        if is_new:
            log.info("%s: queued", scanned.display)
        elif is_failed:  # the user put it here again, to have it tried again
            self.store.requeue(sha256, now=self.clock())
        elif is_plainer(name, track.name) and self.store.rename_track(sha256, name=name, folder=folder):
            log.info("%s: has the content of %s, which is queued under this name now", name, track.name)
        return is_new or is_failed, track

    def _source_file(self, scanned: ScannedFile, sha256: str) -> SourceFile:
        return SourceFile(
            path=scanned.path,
            sha256=sha256,
            root=self.folder.path,
            display=scanned.display,
            state=FileState.WAITING,
            **vars(scanned.identity),
        )

    # -- known files -----------------------------------------------------------------------------

    def _check_known_file(self, file: SourceFile, result: ScanResult) -> None:
        track = self.store.track(file.sha256)
        assert track is not None
        if track.state == TrackState.FAILED:
            result.failed.add(track.sha256)
            if file.state == FileState.WAITING:  # a kill came before it was moved
                error = f"{track.name}: {track.error}"
                archive_files(self.store, [file], self.workspace.inbox_files, self.settings, error=error)
        else:
            self._check_results(track, result, file)

    def _check_results(self, track: Track, result: ScanResult, file: SourceFile | None = None) -> None:
        """Queue a finished track again if need be; an error with its results does not end the scan."""
        if track.state != TrackState.DONE:
            return
        is_new_file = file is None or file.state in (FileState.WAITING, FileState.LOST)
        try:
            if self._is_to_be_made_again(track, is_new_file=is_new_file):
                self.store.requeue(track.sha256, now=self.clock())
                result.queued += 1
                return
            if is_new_file:
                files = self.store.files_of(track.sha256)
                self.outbox.set_source_names(track.folder, [one.display for one in files])
                archive_files(self.store, files, self.workspace.inbox_files, self.settings, error=None)
                result.brought_again += 1
            else:
                result.up_to_date += 1
        except OSError as e:
            if isinstance(environment_error(e), DiskFull):
                raise
            if track.sha256 not in self._logged:
                reason = os_reason(e)
                log.warning("%s: its results can't be read: %s", track.name, reason)
            self._logged.add(track.sha256)

    def _is_to_be_made_again(self, track: Track, *, is_new_file: bool) -> bool:
        """Whether the configuration has changed, or a user brought a file whose results were removed."""
        if track.collected_at is not None:
            return is_new_file
        if track.recipe_key != self.recipe.key:
            if track.plan_key != self.recipe.plan(track.sha256).key:
                return True
            self.store.note_recipe(track.sha256, self.recipe.key)
        return is_new_file and not self.outbox.is_complete(track.folder)


def recheck_time(store: Store, sha256: str, settings: Intake, *, now: float) -> float | None:
    """When to try a track with unusable bytes again, if its file may still have been written to.

    Returns:
        `-inf` if no file has these bytes any more, so that they were only part of a file; None if the
        file has not changed lately, so that the bytes are final.
    """
    if settings.settle_s == 0 or settings.marker is not None:
        return None
    files = store.files_of(sha256)
    if any(file.state in (FileState.SETTLED, FileState.FAILED) for file in files):  # it was archived before
        return None
    if any(file.etag for file in files):  # an object appears whole
        return None
    latest = -float("inf")
    for file in files:
        try:
            stat = file.path.stat() if settings.follow_symlinks else file.path.lstat()
        except OSError:
            continue
        if FileIdentity.of(stat) != file.identity:
            return now + settings.settle_s  # the next scan takes the new bytes
        latest = max(latest, stat.st_mtime, stat.st_ctime)
    if latest == -float("inf"):
        return latest
    until = patience_end(latest, settings, now=now)
    return until if now < until else None


def patience_end(changed_s: float, settings: Intake, *, now: float) -> float:
    """Until when a file that can't be used is tried again, counted from its last change; `-inf`: never."""
    patience_s = PATIENCE * settings.settle_s
    if settings.marker is not None or changed_s - patience_s > now:  # a time far in the future proves nothing
        return -float("inf")
    return changed_s + patience_s
