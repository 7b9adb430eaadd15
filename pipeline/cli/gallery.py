"""What `gallery` does."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.app import App
from pipeline.errors import BadAudio
from pipeline.fs.files import with_url
from pipeline.gallery.gallery import INDEX
from pipeline.gallery.pictures import Picture, draw
from pipeline.maintenance.reconcile import check_outbox_mount
from pipeline.outbox.outbox import Outbox

log = logging.getLogger("pipeline")


def index_of(outbox: Path) -> str:
    """The path or URL of the page of all tracks."""
    return with_url(str(outbox / INDEX))


def write_pages(app: App) -> tuple[int, int]:
    """Write all pages; returns the number of them, and that of finished tracks without results.

    Raises:
        AlreadyRunning: another instance is at work, which writes pages itself.
        FolderUnusable: see `check_outbox_mount`.
    """
    app.workspace.prepare()
    with app.workspace.locked(), app.workspace.leased():
        store = app.open_store()
        check_outbox_mount(app.workspace.outbox, store)
        gallery = app.gallery(store, Outbox(app.workspace.outbox_files))
        written = [has_page for _, has_page in gallery.write_all(_draw)]
    return sum(written), len(written) - sum(written)


def _draw(source: Path | None, results: list[Path | bytes]) -> list[Picture]:
    try:
        return draw(source, results)
    except BadAudio as e:
        log.warning("a page has no waveforms: %s", e)
        return []
