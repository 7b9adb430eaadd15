"""What runs, as bars: for `status --watch`, and for `once` and `watch` on a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.app import App
from pipeline.cli.status import failure_text, head_lines, status_facts, waiting_text
from pipeline.errors import PipelineError
from pipeline.fs.disk import environment_error
from pipeline.pace import rough
from pipeline.runner.retry import local_time

REFRESH_S = 1.0  # on a terminal
BLOCK_S = 10.0  # between two blocks of text elsewhere
LISTED = 5  # entries of the queue and failures
BAR = 20  # characters
LABEL = 40  # most characters for what a bar stands for


@contextmanager
def bars_on(app: App, console: Console) -> Iterator[None]:
    """Show within, below the log lines, the bars of what this instance does."""
    ended = threading.Event()
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show() -> None:
            while not ended.wait(REFRESH_S):
                with suppress(Exception):  # the work is told of what is wrong, and this only shows it
                    live.update(bars(status_facts(app)), refresh=True)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def watch_status(
    app: App, console: Console, *, wait: Callable[[float], None] = time.sleep, n_times: int | None = None
) -> None:
    """Show the status again and again: in place on a terminal, one block below the other elsewhere.

    Args:
        n_times: how often; None: until the process is interrupted.
    """
    rounds = count() if n_times is None else range(n_times)
    if not console.is_terminal:
        for _ in rounds:
            console.print(Text(local_time(time.time())), _view(app))
            wait(BLOCK_S)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for _ in rounds:
            live.update(_view(app), refresh=True)
            wait(REFRESH_S)


def _view(app: App) -> RenderableType:
    try:
        return view(status_facts(app))
    except Exception as e:  # such as a database that is being replaced; the next look may find it
        error = environment_error(e, in_track=False) or e
        if not isinstance(error, PipelineError):
            raise
        return Text(str(error))


def view(facts: dict[str, Any]) -> RenderableType:
    """Everything that `status --watch` shows, one line each, of what `status_facts` gives."""
    lines = [*head_lines(facts)]
    queue, waiting, failures = facts["queue"], facts["waiting"], facts["failures"]
    below = [waiting_text(one) for one in waiting[:LISTED]]
    below += [f"next: {name}" for name in queue[:LISTED]]
    below += [failure_text(one) for one in failures[:LISTED]]
    return Group(*map(_line, lines), bars(facts), *map(_line, below))


def bars(facts: dict[str, Any]) -> RenderableType:
    """A bar for the tracks since the instance's start, and one for what each worker does."""
    table = Table.grid(padding=(0, 1))
    table.add_column(max_width=LABEL)  # the first to be made narrower, as its cells alone may be wrapped
    for _ in range(3):
        table.add_column(no_wrap=True)
    if not facts["instance"]:
        return table
    ended, tracks = facts["ended"], facts["tracks"]
    total = ended + tracks["queued"] + tracks["running"]
    table.add_row(_line("tracks"), _bar(ended, total), f"{ended} of {total}", _left(facts["time_left_s"]))
    for one in facts["workers"]:
        if one["stage"] is not None:
            done, total = one.get("done", 0.0), one.get("total", 0.0)
            n_done = f"{int(done)} of {total:.0f}" if total else ""
            what = _line(f"{one['stage']}: {one['track']}")
            table.add_row(what, _bar(done, total), n_done, _left(one.get("left_s")))
    return table


def _bar(done: float, total: float) -> ProgressBar:
    return ProgressBar(total=max(total, 1.0), completed=done, width=BAR)


def _left(seconds: float | None) -> str:
    return f"{rough(seconds)} left" if seconds else ""


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")
