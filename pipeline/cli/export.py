"""What `export` does and says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.app import App
from pipeline.errors import ConfigError, FolderUnusable, os_reason
from pipeline.fs.names import printable
from pipeline.outbox.outbox import Outbox
from pipeline.ratings.export import export_kept

REASONS = {
    "missing": "is not in the outbox any more, or was changed",
    "in the way": "other files have its names",
}


def export_lines(app: App, folder: Path) -> Iterator[tuple[str, str]]:
    """The state of each result that was kept, and a line about it.

    Raises:
        ConfigError: the folder is one of this home's, whose files are not the user's.
        FolderUnusable: it can't be written.
    """
    folder, workspace = folder.resolve(), app.workspace
    for ours in (workspace.inbox, workspace.outbox, workspace.state):
        if folder.is_relative_to(ours):
            raise ConfigError(f"{printable(folder)} lies in {printable(ours)}: name another folder")
    store = app.read_store()
    if store is None:
        return
    try:
        for copy in export_kept(store, Outbox(workspace.outbox_files), folder):
            shown = copy.file if copy.state in REASONS else printable(folder / copy.file)
            yield copy.state, f"{shown}: {REASONS.get(copy.state, copy.state)}"
    except OSError as e:
        raise FolderUnusable(f"{printable(folder)} can't be used: {os_reason(e)}") from e
