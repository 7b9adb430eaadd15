"""The ways in which programs write files into a watched folder, good and bad.

A habit is a function that puts files into the inbox in one such way; its `Writer` records what it wrote.
Once a writer has closed a file that looks whole and has left it unchanged for `settle_s`, nobody can
tell that it will be changed again. Such contents are `legitimate`: they may become tracks or not.
Writers measure their own pauses, since a loaded machine can turn a short pause into a long one.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import soundfile
from home_folder import SAMPLE_RATE

SETTLE_S = 0.4
SHORT_S, LONG_S = 0.3 * SETTLE_S, (1.4 * SETTLE_S, 2.5 * SETTLE_S)  # pauses: within settle_s, and beyond it
PATIENCE_S = 5 * SETTLE_S  # how long the program waits for the rest of a truncated file
INTAKE = {"settle_s": SETTLE_S, "rescan_s": 1.0, "poll_s": 0.3}


# -- sounds ----------------------------------------------------------------------------------------


def sound(seed: int, seconds: float) -> np.ndarray:
    """A chord under a beat: mono, distinct for each seed."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    root = 110 * 2 ** (rng.uniform(0, 12) / 12)
    tones = sum(np.sin(2 * np.pi * root * ratio * t) for ratio in (1.0, 1.25, 1.5)) / 3
    return (0.3 * tones + 0.3 * rng.standard_normal(len(t)) * np.exp(-((t % 0.5) / 0.03))).astype(np.float32)


def encoded(kind: str, seed: int, seconds: float = 1.5) -> bytes:
    """A whole file of that kind: wav, flac or m4a (AAC)."""
    out = io.BytesIO()
    samples = sound(seed, seconds)
    if kind != "m4a":
        soundfile.write(out, samples, SAMPLE_RATE, format=kind.upper(), subtype="PCM_16")
        return out.getvalue()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return out.getvalue()


# -- writers ---------------------------------------------------------------------------------------


@dataclass
class Writer:
    """Where and what one writer writes, and a record of what it has written."""

    inbox: Path
    beside: Path  # a folder on the same file system that nobody watches
    name: str
    rng: random.Random
    seed: int
    final_contents: list[bytes] = field(default_factory=list)  # must become tracks, once
    legitimate: list[bytes] = field(default_factory=list)  # looked whole and untouched for settle_s
    paused_too_long: bool = False  # longer than the program waits for the rest of a truncated file
    _made: int = 0

    def content(self, kind: str | None = None, seconds: float = 1.5) -> bytes:
        self._made += 1
        return encoded(kind or self.kind, self.seed * 100 + self._made, seconds)

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def path(self) -> Path:
        return self.inbox / self.name

    def short(self, before: bytes | None = None) -> None:
        """A pause within settle_s. If the machine made it longer, what lay there was legitimate."""
        self._pause(SHORT_S, before)

    def long(self, before: bytes | None = None) -> None:
        """A pause beyond settle_s, within the patience for files that are cut off."""
        self._pause(self.rng.uniform(*LONG_S), before)

    def _pause(self, seconds: float, before: bytes | None) -> None:
        start_s = time.monotonic()
        time.sleep(seconds)
        took_s = time.monotonic() - start_s
        if before is not None and took_s > 0.8 * SETTLE_S:
            self.legitimate.append(before)
        self.paused_too_long |= took_s > 0.8 * PATIENCE_S

    def pieces(self, content: bytes, n: int = 4) -> list[bytes]:
        cuts = sorted(self.rng.sample(range(200, len(content) - 200), n - 1))
        return [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]


Habit = Callable[[Writer], None]


def stalls_with_the_file_open(w: Writer) -> None:
    content = w.content()
    with w.path.open("wb", buffering=0) as out:
        for piece in w.pieces(content):
            out.write(piece)
            w.long()
    w.final_contents.append(content)


def changes_a_whole_file_it_never_closed(w: Writer) -> None:
    first, second = w.content("wav"), w.content("wav")
    with w.path.open("wb", buffering=0) as out:
        out.write(first)  # looks whole, but is open for writing
        w.long()
        w.long()
        out.seek(0)
        out.write(second)
        w.long()
    w.final_contents.append(second)


def appends_in_quick_steps(w: Writer) -> None:
    content = w.content()
    for piece in w.pieces(content, 6):
        with w.path.open("ab") as out:
            out.write(piece)
        w.short()
    w.final_contents.append(content)


def appends_in_slow_steps(w: Writer) -> None:
    content = w.content()
    for piece in w.pieces(content):
        with w.path.open("ab") as out:
            out.write(piece)
        w.long()
    w.final_contents.append(content)


def appends_with_its_times_set_back(w: Writer) -> None:
    content = w.content()
    for piece in w.pieces(content):
        with w.path.open("ab") as out:
            out.write(piece)
        os.utime(w.path, (1e9, 1e9))
        w.long()
    w.final_contents.append(content)


def copies_with_the_times_kept(w: Writer) -> None:
    content = w.content()
    with w.path.open("wb", buffering=0) as out:
        for piece in w.pieces(content):
            out.write(piece)
            w.long()
    os.utime(w.path, (1e9, 1e9))
    w.final_contents.append(content)


def rewrites_in_place(w: Writer) -> None:
    """With the same size, before the file has settled: by sizes alone nobody sees the change."""
    first, second = w.content("wav"), w.content("wav")
    w.path.write_bytes(first)
    w.short(first)
    _overwrite(w, second)
    w.final_contents.append(second)


def rewrites_in_place_and_puts_mtime_back(w: Writer) -> None:
    first, second = w.content("wav"), w.content("wav")
    w.path.write_bytes(first)
    before = w.path.stat()
    w.short(first)
    _overwrite(w, second)
    if w.path.exists():
        os.utime(w.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    w.final_contents.append(second)


def comes_back_to_a_whole_file(w: Writer) -> None:
    """Two files look the same: both are legitimate, but the second one must not be missed."""
    first, second = w.content("wav"), w.content("wav")
    w.path.write_bytes(first)
    w.long(first)
    _overwrite(w, second)
    w.final_contents.append(second)


def truncates_and_writes_another(w: Writer) -> None:
    first, second = w.content(), w.content(seconds=2.0)
    w.path.write_bytes(first)
    w.short(first)
    pieces = w.pieces(second, 3)
    w.path.write_bytes(pieces[0])
    for piece in pieces[1:]:
        w.long()
        with w.path.open("ab") as out:
            out.write(piece)
    w.final_contents.append(second)


def replaces_by_rename(w: Writer) -> None:
    first, second = w.content(), w.content()
    w.path.write_bytes(first)
    w.short(first)
    made = w.beside / w.name
    made.write_bytes(second)
    made.replace(w.path)
    w.final_contents.append(second)


def writes_as_rsync(w: Writer) -> None:
    _under_another_name(w, w.inbox / f".{w.name}.AbC123")


def writes_a_part_file(w: Writer) -> None:
    _under_another_name(w, w.inbox / f"{w.name}.{w.rng.choice(['part', 'crdownload', 'tmp'])}")


def links_into_place(w: Writer) -> None:
    content = w.content()
    temporary = w.rng.choice([w.beside / w.name, w.inbox / f".{w.name}", w.inbox / f"{w.name}.tmp"])
    with temporary.open("wb", buffering=0) as out:
        for piece in w.pieces(content):
            out.write(piece)
            w.long()
    os.link(temporary, w.path)
    w.short()
    temporary.unlink()
    w.final_contents.append(content)


def moves_a_tree_in(w: Writer) -> None:
    tree = w.beside / Path(w.name).stem
    for place in ("one", "disc 1/two", "disc 2/deep/three"):
        content = w.content()
        path = tree / f"{place}.{w.kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        w.final_contents.append(content)
    tree.rename(w.inbox / tree.name)


def copies_a_tree_in(w: Writer) -> None:
    tree = w.inbox / Path(w.name).stem
    for place in ("one", "disc 1/two", "disc 2/deep/three"):
        content = w.content()
        path = tree / f"{place}.{w.kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as out:
            for piece in w.pieces(content, 3):
                out.write(piece)
                w.short()
        w.long()
        w.final_contents.append(content)


def renames_while_it_settles(w: Writer) -> None:
    content = w.content()
    path = w.path
    path.write_bytes(content)
    for n in range(w.rng.randint(1, 4)):
        w.short()
        path = _renamed(path, w.inbox / f"{n} {w.name}")
    w.final_contents.append(content)


def removes_it_again(w: Writer) -> None:
    content = w.content()
    w.path.write_bytes(content)
    w.short(content)
    w.path.unlink(missing_ok=True)


def _overwrite(w: Writer, content: bytes) -> None:
    """In place if the file is still there; the program may have archived it if it was legitimate."""
    try:
        out = w.path.open("r+b", buffering=0)
    except FileNotFoundError:
        out = w.path.open("wb", buffering=0)
    with out:
        out.write(content)
        out.truncate()


def _renamed(path: Path, to: Path) -> Path:
    """After too long a pause the program may have archived the file already."""
    try:
        return path.rename(to)
    except FileNotFoundError:
        return path


def _under_another_name(w: Writer, temporary: Path) -> None:
    content = w.content()
    with temporary.open("ab", buffering=0) as out:
        for piece in w.pieces(content):
            out.write(piece)
            w.long()
    w.long()
    temporary.replace(w.path)
    w.final_contents.append(content)


HABITS: tuple[Habit, ...] = (
    stalls_with_the_file_open,
    changes_a_whole_file_it_never_closed,
    appends_in_quick_steps,
    appends_in_slow_steps,
    appends_with_its_times_set_back,
    copies_with_the_times_kept,
    rewrites_in_place,
    rewrites_in_place_and_puts_mtime_back,
    comes_back_to_a_whole_file,
    truncates_and_writes_another,
    replaces_by_rename,
    writes_as_rsync,
    writes_a_part_file,
    links_into_place,
    moves_a_tree_in,
    copies_a_tree_in,
    renames_while_it_settles,
    removes_it_again,
)


# -- with markers: a file counts once `name.done` lies beside it -------------------------------------


def marks_after_all(w: Writer) -> None:
    """Two whole-looking drafts, left alone for longer than settle_s, and then the real one."""
    for _ in range(2):
        w.path.write_bytes(w.content())
        w.long()
        w.long()
    content = w.content()
    w.path.write_bytes(content)
    w.short()
    w.path.with_name(f"{w.name}.done").touch()
    w.final_contents.append(content)


def marks_at_once(w: Writer) -> None:
    content = w.content()
    made = w.beside / w.name
    made.write_bytes(content)
    made.replace(w.path)
    w.path.with_name(f"{w.name}.done").touch()
    w.final_contents.append(content)


def never_marks(w: Writer) -> None:
    w.path.write_bytes(w.content())
    w.long()
