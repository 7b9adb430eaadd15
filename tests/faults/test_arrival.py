"""Writers of every habit, many at once, against one `watch`: nothing half-written is ever accepted, and
whatever they end up with is made, once.

A writer is a function that puts files into the inbox in its own way and says what it ended with.
What no reader can know is not held against the program: once a writer has closed a file that looks
whole and has left it alone for `settle_s`, that content is a file like any other, also if the
writer comes back and changes it. Such contents are `legitimate`: they may be made or not. Writers
watch their own clock, since a loaded machine can turn a short pause into a long one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from drive import Child, counts, is_idle, log_of, start, status, stop, wait_until
from homes import NEAR, SAMPLE_RATE, Home, sha256_of

SETTLE_S = 0.4
SHORT_S, LONG_S = 0.3 * SETTLE_S, (1.4 * SETTLE_S, 2.5 * SETTLE_S)  # pauses: within settle_s, and beyond it
PATIENCE_S = 5 * SETTLE_S  # so long a file that is cut off is looked at again
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
    """One writer's hands, and what it has done."""

    inbox: Path
    beside: Path  # a folder on the same file system that nobody watches
    name: str
    rng: random.Random
    seed: int
    ended_with: list[bytes] = field(default_factory=list)  # must be made, once
    legitimate: list[bytes] = field(default_factory=list)  # looked whole and untouched for settle_s
    overslept: bool = False  # a pause was longer than the program's patience: what it saw was a torn file
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
        self.overslept |= took_s > 0.8 * PATIENCE_S

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
    w.ended_with.append(content)


def changes_a_whole_file_it_never_closed(w: Writer) -> None:
    first, second = w.content("wav"), w.content("wav")
    with w.path.open("wb", buffering=0) as out:
        out.write(first)  # looks whole, but somebody holds it
        w.long()
        w.long()
        out.seek(0)
        out.write(second)
        w.long()
    w.ended_with.append(second)


def appends_in_quick_steps(w: Writer) -> None:
    content = w.content()
    for piece in w.pieces(content, 6):
        with w.path.open("ab") as out:
            out.write(piece)
        w.short()
    w.ended_with.append(content)


def appends_in_slow_steps(w: Writer) -> None:
    content = w.content()
    for piece in w.pieces(content):
        with w.path.open("ab") as out:
            out.write(piece)
        w.long()
    w.ended_with.append(content)


def appends_with_its_times_set_back(w: Writer) -> None:
    content = w.content()
    for piece in w.pieces(content):
        with w.path.open("ab") as out:
            out.write(piece)
        os.utime(w.path, (1e9, 1e9))
        w.long()
    w.ended_with.append(content)


def copies_with_the_times_kept(w: Writer) -> None:
    content = w.content()
    with w.path.open("wb", buffering=0) as out:
        for piece in w.pieces(content):
            out.write(piece)
            w.long()
    os.utime(w.path, (1e9, 1e9))
    w.ended_with.append(content)


def rewrites_in_place(w: Writer) -> None:
    """The same size, before it settled: a reader of size alone takes the first one."""
    first, second = w.content("wav"), w.content("wav")
    w.path.write_bytes(first)
    w.short(first)
    _overwrite(w, second)
    w.ended_with.append(second)


def rewrites_in_place_and_puts_mtime_back(w: Writer) -> None:
    first, second = w.content("wav"), w.content("wav")
    w.path.write_bytes(first)
    before = w.path.stat()
    w.short(first)
    _overwrite(w, second)
    if w.path.exists():
        os.utime(w.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    w.ended_with.append(second)


def comes_back_to_a_whole_file(w: Writer) -> None:
    """It can't be told from two files: both are legitimate, but the second one must not be missed."""
    first, second = w.content("wav"), w.content("wav")
    w.path.write_bytes(first)
    w.long(first)
    _overwrite(w, second)
    w.ended_with.append(second)


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
    w.ended_with.append(second)


def replaces_by_rename(w: Writer) -> None:
    first, second = w.content(), w.content()
    w.path.write_bytes(first)
    w.short(first)
    made = w.beside / w.name
    made.write_bytes(second)
    made.replace(w.path)
    w.ended_with.append(second)


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
    w.ended_with.append(content)


def moves_a_tree_in(w: Writer) -> None:
    tree = w.beside / Path(w.name).stem
    for place in ("one", "disc 1/two", "disc 2/deep/three"):
        content = w.content()
        path = tree / f"{place}.{w.kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        w.ended_with.append(content)
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
        w.ended_with.append(content)


def renames_while_it_settles(w: Writer) -> None:
    content = w.content()
    path = w.path
    path.write_bytes(content)
    for n in range(w.rng.randint(1, 4)):
        w.short()
        path = _renamed(path, w.inbox / f"{n} {w.name}")
    w.ended_with.append(content)


def removes_it_again(w: Writer) -> None:
    content = w.content()
    w.path.write_bytes(content)
    w.short(content)
    w.path.unlink(missing_ok=True)


def _overwrite(w: Writer, content: bytes) -> None:
    """In place if it is still there; the program may have taken a legitimate one away."""
    try:
        out = w.path.open("r+b", buffering=0)
    except FileNotFoundError:
        out = w.path.open("wb", buffering=0)
    with out:
        out.write(content)
        out.truncate()


def _renamed(path: Path, to: Path) -> Path:
    """After an overlong pause the program may have taken it away already."""
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
    w.ended_with.append(content)


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


# -- what must be true in the end ------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    habit: str
    writer: Writer
    error: str | None = None  # the program took a file away from under its writer


def run_trials(home: Home, n: int, *, seed: int, at_once: int, habits: tuple[Habit, ...]) -> list[Trial]:
    """`n` writers, each with one habit, up to `at_once` of them at the same time."""
    beside = home.folder / "beside"
    beside.mkdir()

    def one(i: int) -> Trial:
        habit = habits[i % len(habits)]
        rng = random.Random(f"{seed} {i}")
        time.sleep(rng.uniform(0, 0.5))
        name = f"{i:03d} {habit.__name__}.{('wav', 'flac', 'm4a')[(i + i // len(habits)) % 3]}"
        writer = Writer(home.inbox, beside, name, rng, seed * 1000 + i)
        try:
            habit(writer)
        except FileNotFoundError as e:
            return Trial(habit.__name__, writer, f"{name}: taken away while it was written: {e}")
        return Trial(habit.__name__, writer)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, range(n)))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def due_of(trials: list[Trial]) -> dict[str, str]:
    """What has to be made, by hash: all that was written within the program's patience."""
    return {
        sha256(content): trial.writer.name
        for trial in trials
        for content in trial.writer.ended_with
        if not trial.writer.overslept
    }


def legitimate_of(trials: list[Trial]) -> set[str]:
    """What may be made: whole files that were left alone for long enough to be taken for finished."""
    writers = [trial.writer for trial in trials]
    late = [content for w in writers if w.overslept for content in w.ended_with]
    return {sha256(content) for content in (*late, *(c for w in writers for c in w.legitimate))}


def problems(home: Home, trials: list[Trial]) -> list[str]:
    """What was accepted that never was a whole file, what was missed, what was made twice."""
    due, legitimate = due_of(trials), legitimate_of(trials)
    overslept = {trial.writer.name for trial in trials if trial.writer.overslept}
    found = [trial.error for trial in trials if trial.error]
    store = home.store()
    tracks = {track.sha256: track for track in store.tracks()}
    for key, track in tracks.items():
        if key not in due and key not in legitimate and track.name not in overslept:
            found.append(f"{track.name}: taken in half-written ({track.state}: {track.error})")
        elif key in due and track.state != "done":
            found.append(f"{track.name}: is {track.state}: {track.error}")
        elif key in due:
            runs = [a.outcome for a in store.attempts(key) if a.stage == "generate"]
            if runs.count("done") != 1:
                found.append(f"{track.name}: generated {runs}")
    store.close()
    found += [f"{name}: missed" for key, name in due.items() if key not in tracks]
    return found + _outbox_problems(home, due, legitimate) + _inbox_problems(home, due, overslept)


def _outbox_problems(home: Home, due: dict[str, str], legitimate: set[str]) -> list[str]:
    found, made = [], Counter[str]()
    for folder in home.folders:
        manifest = json.loads((folder / "manifest.json").read_text())
        made[manifest["source"]["sha256"]] += 1
        for entry in (manifest["embedding"], *manifest["variations"]):
            if sha256_of(folder / entry["file"]) != entry["sha256"]:
                found.append(f"{folder.name}/{entry['file']}: torn")
    found += [f"{key}: published but never whole" for key in made if key not in due and key not in legitimate]
    return found + [f"{name}: published {made[key]} times" for key, name in due.items() if made[key] != 1]


def _inbox_problems(home: Home, due: dict[str, str], overslept: set[str]) -> list[str]:
    """Every source is put away, with its bytes, and none of them among the failed."""
    left = [path for path in home.inbox.rglob("*") if path.is_file()]
    done = Counter(sha256_of(path) for path in left if path.is_relative_to(home.inbox / "done"))
    others = [path for path in left if not path.is_relative_to(home.inbox / "done")]
    found = [
        f"{path.relative_to(home.inbox)}: left in the inbox"
        for path in others
        if not any(name in path.name for name in overslept)
    ]
    return found + [f"{name}: {done[key]} copies in done" for key, name in due.items() if done[key] != 1]


def all_made(home: Home, trials: list[Trial]) -> bool:
    """Whether all that the writers ended with is done, or failed, and nothing is on its way."""
    now = counts(home)
    if not now or now["queued"] or now["running"]:
        return False
    due = due_of(trials).keys()
    store = home.store()
    ended = {track.sha256 for track in (*store.tracks("done"), *store.tracks("failed"))}
    store.close()
    in_inbox = [p for p in home.inbox.iterdir() if p.name not in ("done", "failed") and p.is_file()]
    return due <= ended and not in_inbox


def check(home: Home, child: Child, trials: list[Trial]) -> list[str]:
    """Wait for the end of the work, stop the program, and look at everything."""
    for _ in range(40):  # in rounds, so that what never comes is reported with all the rest
        try:
            wait_until(lambda: all_made(home, trials), "all is made", tries=20 + len(trials))
            break
        except AssertionError:
            if not any(counts(home).get(state) for state in ("queued", "running")):
                break
    assert stop(child) == 0, child.said()
    return problems(home, trials)


def report(trials: list[Trial], found: list[str]) -> list[str]:
    files = sum(len(trial.writer.ended_with) for trial in trials)
    slept = sum(trial.writer.overslept for trial in trials)
    both = sum(len(trial.writer.legitimate) for trial in trials)
    return [
        f"{len(trials)} slow writers, {files} files: {len(found)} wrong",
        *found,
        f"({both} contents that nobody can tell from whole files, {slept} writers held up by the machine)",
    ]


def slow_writers(home: Home, figures: list[str], n: int, *, seed: int) -> list[str]:
    home.configure(NEAR, intake=INTAKE, retry={"max_attempts": 3, "backoff_s": 0.2})
    with start(home, "watch") as child:
        wait_until(lambda: counts(home), "the program is up", child=child)
        trials = run_trials(home, n, seed=seed, at_once=n, habits=HABITS)
        found = check(home, child, trials)
    figures += report(trials, found)
    assert sum(trial.writer.overslept for trial in trials) < n / 4, "this machine is too busy to tell"
    return found


def test_no_slow_writer_of_36_is_cut_short_or_missed(home: Home, figures: list[str]) -> None:
    assert slow_writers(home, figures, 36, seed=1) == []


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(2, 6))
def test_no_slow_writer_of_200_is_cut_short_or_missed(home: Home, figures: list[str], seed: int) -> None:
    assert slow_writers(home, figures, 54, seed=seed) == []


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
    w.ended_with.append(content)


def marks_at_once(w: Writer) -> None:
    content = w.content()
    made = w.beside / w.name
    made.write_bytes(content)
    made.replace(w.path)
    w.path.with_name(f"{w.name}.done").touch()
    w.ended_with.append(content)


def never_marks(w: Writer) -> None:
    w.path.write_bytes(w.content())
    w.long()


@pytest.mark.parametrize("n", [6, pytest.param(60, marks=pytest.mark.torture)])
def test_with_markers_only_what_is_marked_is_taken(home: Home, n: int) -> None:
    home.configure(NEAR, intake={**INTAKE, "marker": ".done"})
    with start(home, "watch") as child:
        wait_until(lambda: counts(home), "the program is up", child=child)
        trials = run_trials(home, n, seed=9, at_once=n, habits=(marks_after_all, marks_at_once))
        draft = Writer(home.inbox, home.folder / "beside", "draft.wav", random.Random(0), 7)
        never_marks(draft)
        found = [line for line in check(home, child, trials) if "draft.wav: left" not in line]
    assert (home.inbox / "draft.wav").exists()
    assert found == []


# -- the inbox itself comes and goes ---------------------------------------------------------------


def put(home: Home, name: str, seed: int) -> Path:
    """Drop a whole file in by one rename."""
    made = home.folder / "made.tmp"
    made.write_bytes(encoded("wav", seed))
    return made.replace(home.inbox / name)


def is_degraded(home: Home) -> bool:
    return bool(status(home).get("degraded"))


def rows(home: Home) -> tuple[int, int]:
    """Tracks, and files by content: what must never get fewer."""
    store = home.store()
    tracks = store.tracks()
    files = sum(len(store.files_of(track.sha256)) for track in tracks)
    store.close()
    return len(tracks), files


def away_and_back(home: Home, way: str) -> None:
    """Take the inbox away, wait until the program says so, and bring one back."""
    away = home.folder / "inbox away"
    before = rows(home)
    if way == "removed":
        shutil.rmtree(home.inbox)
    else:
        home.inbox.rename(away)
    if way == "replaced":
        home.inbox.mkdir()
    else:
        wait_until(lambda: is_degraded(home), "status shows that the inbox is away", tries=60)
        assert rows(home) == before
        if way == "removed":
            home.inbox.mkdir()
        else:
            away.rename(home.inbox)


@pytest.mark.parametrize(("way", "watch"), [
    ("moved away", "events"),
    ("replaced", "events"),
    pytest.param("removed", "events", marks=pytest.mark.torture),
    pytest.param("moved away", "polling", marks=pytest.mark.torture),
    pytest.param("removed", "polling", marks=pytest.mark.torture),
    pytest.param("replaced", "polling", marks=pytest.mark.torture),
])  # fmt: skip
def test_the_inbox_goes_and_comes_back_and_work_goes_on(home: Home, way: str, watch: str) -> None:
    rescan_s = 1.5 if way == "replaced" else 3600  # nothing but its own look at the fault may find it
    home.configure(NEAR, intake={**INTAKE, "watch": watch, "rescan_s": rescan_s})
    with start(home, "watch") as child:
        wait_until(lambda: counts(home), "the program is up", child=child)
        put(home, "before.wav", 1)
        wait_until(lambda: is_idle(home, done=1), "the first one is done", child=child)
        away_and_back(home, way)
        put(home, "after.wav", 2)
        wait_until(lambda: is_idle(home, done=2), "the one after is done", child=child)
        wait_until(lambda: not is_degraded(home), "status is well again", tries=60, child=child)
        put(home, "later.wav", 3)
        wait_until(lambda: is_idle(home, done=3), "the third one is done", child=child)
        assert stop(child) == 0
    assert rows(home) == (3, 3)
    assert counts(home)["failed"] == 0


def test_what_finishes_while_the_inbox_is_away_is_put_away_when_it_is_back(home: Home) -> None:
    home.configure(
        {"name": "only"}, intake=INTAKE, embed={"engine": "free-vectors"}, generate={"engine": "paced"}
    )
    with start(home, "watch", engines=True) as child:
        wait_until(lambda: counts(home), "the program is up", child=child)
        path = put(home, "long.wav", 1)
        wait_until(lambda: "generate" in log_of(home).partition("long.wav: queued")[2], "it is at work")
        home.inbox.rename(home.folder / "away")
        wait_until(lambda: is_idle(home, done=1), "it is done without its inbox", child=child)
        (home.folder / "away").rename(home.inbox)
        wait_until(lambda: not path.exists(), "its source is put away", child=child)
        assert stop(child) == 0
    assert [p.name for p in (home.inbox / "done").iterdir()] == ["long.wav"]
    assert rows(home) == (1, 1)


@pytest.mark.torture
def test_the_inbox_is_away_for_a_minute_with_a_queue_behind_it(home: Home) -> None:
    home.configure(NEAR, intake={"settle_s": SETTLE_S})
    with start(home, "watch") as child:
        wait_until(lambda: counts(home), "the program is up", child=child)
        for i in range(40):
            put(home, f"{i}.wav", i)
        wait_until(lambda: counts(home).get("done", 0) >= 5, "some are done", child=child)
        before = rows(home)
        home.inbox.rename(home.folder / "away")
        wait_until(lambda: is_degraded(home), "status shows that the inbox is away", tries=120)
        time.sleep(60)
        assert rows(home) == before
        (home.folder / "away").rename(home.inbox)
        put(home, "after.wav", 1000)
        wait_until(lambda: is_idle(home, done=41), "all are done", tries=2400, child=child)
        wait_until(lambda: len(list((home.inbox / "done").iterdir())) == 41, "all are put away", child=child)
        assert stop(child) == 0
    assert counts(home) == {"queued": 0, "running": 0, "done": 41, "failed": 0}
