"""Many writers at once, with every habit of writers.py, against one `watch`: no incomplete file is ever
accepted, and every final file is processed once.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from drive import Child, counts, start, stop, wait_until
from home_folder import NEAR, Home, sha256_of
from writers import HABITS, INTAKE, Habit, Writer, marks_after_all, marks_at_once, never_marks


@dataclass(frozen=True)
class Trial:
    habit: str
    writer: Writer
    error: str | None = None  # the program moved a file that was still being written


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
            return Trial(habit.__name__, writer, f"{name}: moved while it was written: {e}")
        return Trial(habit.__name__, writer)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, range(n)))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def due_of(trials: list[Trial]) -> dict[str, str]:
    """The contents that must become tracks, by hash: all that were written without too long a pause."""
    return {
        sha256(content): trial.writer.name
        for trial in trials
        for content in trial.writer.final_contents
        if not trial.writer.paused_too_long
    }


def legitimate_of(trials: list[Trial]) -> set[str]:
    """The contents that may become tracks: whole files, unchanged for long enough to look finished."""
    writers = [trial.writer for trial in trials]
    late = [content for w in writers if w.paused_too_long for content in w.final_contents]
    return {sha256(content) for content in (*late, *(c for w in writers for c in w.legitimate))}


def problems(home: Home, trials: list[Trial]) -> list[str]:
    """Contents that were accepted but never a whole file, and files that were missed or processed twice."""
    due, legitimate = due_of(trials), legitimate_of(trials)
    paused_too_long = {trial.writer.name for trial in trials if trial.writer.paused_too_long}
    found = [trial.error for trial in trials if trial.error]
    store = home.store()
    tracks = {track.sha256: track for track in store.tracks()}
    for key, track in tracks.items():
        if key not in due and key not in legitimate and track.name not in paused_too_long:
            found.append(f"{track.name}: taken in half-written ({track.state}: {track.error})")
        elif key in due and track.state != "done":
            found.append(f"{track.name}: is {track.state}: {track.error}")
        elif key in due:
            runs = [a.outcome for a in store.attempts(key) if a.stage == "generate"]
            if runs.count("done") != 1:
                found.append(f"{track.name}: generated {runs}")
    store.close()
    found += [f"{name}: missed" for key, name in due.items() if key not in tracks]
    return found + _outbox_problems(home, due, legitimate) + _inbox_problems(home, due, paused_too_long)


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


def _inbox_problems(home: Home, due: dict[str, str], paused_too_long: set[str]) -> list[str]:
    """Every source is in the archive, with its bytes, and none among the failed."""
    left = [path for path in home.inbox.rglob("*") if path.is_file()]
    done = Counter(sha256_of(path) for path in left if path.is_relative_to(home.inbox / "done"))
    others = [path for path in left if not path.is_relative_to(home.inbox / "done")]
    found = [
        f"{path.relative_to(home.inbox)}: left in the inbox"
        for path in others
        if not any(name in path.name for name in paused_too_long)
    ]
    return found + [f"{name}: {done[key]} copies in done" for key, name in due.items() if done[key] != 1]


def all_made(home: Home, trials: list[Trial]) -> bool:
    """Whether all final files of the writers are done or failed, and nothing is queued or running."""
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
    """Wait for the end of the work, stop the program, and check everything."""
    for _ in range(40):  # in rounds, so that a file that is missed is reported with all other problems
        try:
            wait_until(lambda: all_made(home, trials), "all is made", tries=20 + len(trials))
            break
        except AssertionError:
            if not any(counts(home).get(state) for state in ("queued", "running")):
                break
    assert stop(child) == 0, child.text()
    return problems(home, trials)


def report(trials: list[Trial], found: list[str]) -> list[str]:
    files = sum(len(trial.writer.final_contents) for trial in trials)
    paused = sum(trial.writer.paused_too_long for trial in trials)
    both = sum(len(trial.writer.legitimate) for trial in trials)
    return [
        f"{len(trials)} slow writers, {files} files: {len(found)} wrong",
        *found,
        f"({both} contents that can't be told from finished files, {paused} writers held up by the machine)",
    ]


def slow_writers(home: Home, figures: list[str], n: int, *, seed: int) -> list[str]:
    home.configure(NEAR, intake=INTAKE, retry={"max_attempts": 3, "backoff_s": 0.2})
    with start(home, "watch") as child:
        wait_until(lambda: counts(home), "the program is up", child=child)
        trials = run_trials(home, n, seed=seed, at_once=n, habits=HABITS)
        found = check(home, child, trials)
    figures += report(trials, found)
    assert sum(trial.writer.paused_too_long for trial in trials) < n / 4, "this machine is too busy to tell"
    return found


@pytest.mark.long
def test_no_slow_writer_of_36_is_cut_short_or_missed(home: Home, figures: list[str]) -> None:
    assert slow_writers(home, figures, 36, seed=1) == []


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(2, 6))
def test_no_slow_writer_of_54_is_cut_short_or_missed(home: Home, figures: list[str], seed: int) -> None:
    assert slow_writers(home, figures, 54, seed=seed) == []


@pytest.mark.long
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
