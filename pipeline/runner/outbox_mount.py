"""Whether the outbox's disk is mounted: its empty mount point must not be taken for the outbox."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import FolderUnusable
from pipeline.fs.mounts import mounts_of
from pipeline.store.store import Store


def check_outbox_mount(outbox: Path, store: Store) -> None:
    """Refuse an outbox whose disk is not mounted, since all results would seem lost and be made again.

    Raises:
        FolderUnusable: the outbox used to be on a mount that is missing now, and its folder is empty.
    """
    mounts = mounts_of(outbox)
    if not mounts:
        return
    before, now = store.fact("outbox mount"), mounts[0].mount_point
    was_deeper = before is not None and len(before) > len(now) and outbox.is_relative_to(before)
    if was_deeper and not any(outbox.iterdir()):
        raise FolderUnusable(f"the outbox was on a disk mounted at {before}, which isn't mounted now")
    if before != now:
        store.set_fact("outbox mount", now)
