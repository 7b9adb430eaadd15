"""What must hold for a home after any faults, checked from outside: in the outbox, the inbox and the store.

Each check raises an AssertionError that says what is wrong. The traces of the runs show how often
something was published and how many units of work were made twice.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import soundfile
from harness import KILLED, TRACEBACK, ForkServer, Operation, ProgramRun, copy_of, new_home
from home_folder import Home, contents, sha256_of

SILENT = 1e-4
UNIT_ENDINGS = (".npy", ".npz", ".wav")  # normalize, embed, generate: each ends in a rename to such a name


@dataclass(frozen=True)
class Reference:
    """What a run without faults makes of the same inputs."""

    inputs: dict[str, str]  # hash of every source by its path below the inbox
    files: dict[str, dict[str, str]]  # by folder of the outbox: hash of every file but the manifest
    manifests: dict[str, dict[str, Any]]  # by folder, without dates

    @classmethod
    def of(cls, home: Home, inputs: dict[str, str]) -> Reference:
        return cls(
            inputs,
            {folder.name: contents(folder) for folder in home.folders},
            {folder.name: _manifest(folder) for folder in home.folders},
        )

    @property
    def units(self) -> int:
        """Units of work: a normalization, an embedding and the variations of each track."""
        return sum(1 + len(files) for files in self.files.values())


@dataclass(frozen=True)
class Case:
    """Inputs, and what is made of them: the start of any number of homes."""

    template: Home
    reference: Reference

    @classmethod
    def of(cls, fork_server: ForkServer, folder: Path, *, tracks: int, **sections: Any) -> Case:
        """Make so many tracks and see what a run without faults makes of them."""
        template = new_home(folder / "template", tracks=tracks, **sections)
        inputs = inputs_of(template)
        undisturbed = copy_of(template, folder / "undisturbed")
        run = fork_server.run(undisturbed, "once")
        assert run.code == 0, run.out
        reference = Reference.of(undisturbed, inputs)
        check_finished(undisturbed, reference, [run])
        assert check_redone(undisturbed, reference, [run]) == 0
        return cls(template, reference)

    def home(self, folder: Path) -> Home:
        return copy_of(self.template, folder)


def inputs_of(home: Home) -> dict[str, str]:
    return {str(path.relative_to(home.inbox)): sha256_of(path) for path in sorted(home.inbox.rglob("*.wav"))}


def _manifest(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    loaded.pop("created_at")
    return loaded


# -- at any time -------------------------------------------------------------------------------------


def check_database(home: Home) -> None:
    path = home.folder / "state" / "pipeline.db"
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)], "the database is damaged"
        assert db.execute("PRAGMA foreign_key_check").fetchall() == [], "rows without their track"


def states(home: Home) -> dict[str, str]:
    """State of every track by hash; empty before there is a database."""
    return {sha256: state for sha256, (state, _) in tracks(home).items()}


def tracks(home: Home) -> dict[str, tuple[str, int]]:
    """State and counted attempts of every track."""
    path = home.folder / "state" / "pipeline.db"
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'tracks'").fetchall():
            return {}
        rows = db.execute("SELECT sha256, state, attempts FROM tracks").fetchall()
    return {sha256: (state, attempts) for sha256, state, attempts in rows}


def check_nothing_false(home: Home, reference: Reference) -> None:
    """What is recorded as finished is complete, and every source still exists, unchanged and once."""
    known = states(home)
    if known:
        check_database(home)
    folders = {made["source"]["sha256"]: name for name, made in reference.manifests.items()}
    for sha256, state in known.items():
        assert sha256 in folders, "a track of bytes that are no source's"
        if state == "done":
            check_folder(home.outbox / folders[sha256], reference)
    for manifest in home.outbox.glob("*/manifest.json") if home.outbox.exists() else ():
        check_folder(manifest.parent, reference)
    sources = Counter(sha256_of(path) for path in home.inbox.rglob("*.wav"))
    assert sources == Counter(reference.inputs.values()), "a source is gone, altered or there twice"


def check_folder(folder: Path, reference: Reference) -> None:
    """A finished track has the files of the reference, each as its manifest describes it."""
    assert (folder / "manifest.json").exists(), f"{folder.name} is done without a manifest"
    found = _manifest(folder)
    for record in found["variations"]:
        path = folder / record["file"]
        assert sha256_of(path) == record["sha256"], f"{path} isn't what the manifest describes"
        samples, rate = soundfile.read(path, always_2d=True)
        assert (len(samples), rate) == (round(record["duration_s"] * rate), record["sample_rate"]), path
        assert np.isfinite(samples).all(), path
        assert np.abs(samples).max() > SILENT, path
    with np.load(folder / found["embedding"]["file"], allow_pickle=False) as vectors:
        assert np.isfinite(vectors["windows"]).all(), folder
    assert sha256_of(folder / found["embedding"]["file"]) == found["embedding"]["sha256"], folder
    wanted = reference.files[folder.name]
    assert {name: contents(folder).get(name) for name in wanted} == wanted, f"{folder.name} has other bytes"
    assert found == reference.manifests[folder.name], f"{folder.name} has another manifest"


# -- at the end --------------------------------------------------------------------------------------


def check_finished(
    home: Home, reference: Reference, runs: Sequence[ProgramRun], *, at_fault: Iterable[str] = ()
) -> None:
    """All tracks are done once, but for those that had to fail (hashes in `at_fault`), without leftovers."""
    failed = set(at_fault)
    check_database(home)
    wanted = {sha256: "failed" if sha256 in failed else "done" for sha256 in reference.inputs.values()}
    assert states(home) == wanted, f"{Counter(states(home).values())}"
    _check_sources(home, reference, failed)
    done = {name for name, made in reference.manifests.items() if made["source"]["sha256"] not in failed}
    assert {path.name for path in home.folders if (path / "manifest.json").exists()} == done
    for name in done:
        check_folder(home.outbox / name, reference)
        assert contents(home.outbox / name) == reference.files[name], f"{name} has unexpected files"
        assert (home.outbox / name / "index.html").read_text().endswith("</html>"), f"{name} has no page"
        assert f'"{quote(name)}/index.html"' in (home.outbox / "tracks.js").read_text(), (
            f"{name} isn't listed"
        )
    check_no_leftovers(home)
    check_published_once(home, runs)
    assert not any(run.code == TRACEBACK for run in runs), "an exception nobody caught"


def _check_sources(home: Home, reference: Reference, failed: set[str]) -> None:
    places = {
        f"{'failed' if sha256 in failed else 'done'}/{path}": sha256
        for path, sha256 in reference.inputs.items()
    }
    assert inputs_of(home) == places


def check_no_leftovers(home: Home) -> None:
    """No temporary files anywhere, no working copies of finished tracks."""
    hidden = [path for path in home.folder.rglob("*") if path.name.startswith(".") or path.suffix == ".part"]
    assert hidden == [], f"left behind: {hidden}"
    work = home.folder / "state" / "work"
    assert (list(work.rglob("*")) if work.exists() else []) == [], "working copies of finished tracks"


def operations(runs: Sequence[ProgramRun]) -> list[Operation]:
    return [op for run in runs for op in run.trace]


def check_published_once(home: Home, runs: Sequence[ProgramRun]) -> None:
    published = Counter(
        op.target for op in operations(runs) if op.happened and op.call == "rename" and _is_manifest(home, op)
    )
    twice = {Path(target).parent.name: n for target, n in published.items() if n > 1}
    assert not twice, f"manifests published more than once: {twice}"


def _is_manifest(home: Home, op: Operation) -> bool:
    return op.target.startswith(f"{home.outbox.resolve()}/") and op.target.endswith("/manifest.json")


def units_made(home: Home, runs: Sequence[ProgramRun]) -> int:
    """Results renamed into place over all runs; archived sources and the cache of vectors don't count."""
    others = tuple(f"{folder.resolve()}/" for folder in (home.inbox, home.folder / "state" / "vectors"))
    return sum(
        op.happened
        and op.call == "rename"
        and op.target.endswith(UNIT_ENDINGS)
        and not op.target.startswith(others)
        for op in operations(runs)
    )


def kills(runs: Sequence[ProgramRun]) -> int:
    return sum(run.code == KILLED for run in runs)


def check_redone(home: Home, reference: Reference, runs: Sequence[ProgramRun]) -> int:
    """At most one unit of work is made twice per kill; returns how many were.

    A kill from outside can fall between a rename and its line in the trace, so that one is missing.
    """
    redone, n_kills = units_made(home, runs) - reference.units, kills(runs)
    assert -n_kills <= redone <= n_kills, f"{redone} units made again after {n_kills} kills"
    return redone
