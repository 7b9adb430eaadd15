"""The store, on real SQLite files: the queue, the attempts and the units of work."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlite_utils
from stored_tracks import WHOLE_QUEUE, claim_due

from pipeline.errors import DatabaseDamaged, FolderUnusable, UnknownTrack
from pipeline.store.schema import MIGRATIONS, FileState, SourceFile
from pipeline.store.store import Store
from pipeline.workspace import InputFolder

INBOX, ELSEWHERE = Path("/home/inbox"), Path("/music")
SOURCE = {"duration_s": 3.5, "sample_rate": 44100, "channels": 2, "codec": "flac"}


def sha(letter: str) -> str:
    return letter * 64


def a_file(letter: str = "a", *, name: str | None = None, root: Path = INBOX) -> SourceFile:
    name = name or f"{letter}.wav"
    return SourceFile(
        path=root / name,
        sha256=sha(letter),
        root=root,
        display=name,
        size=1000,
        mtime_ns=1_700_000_000_123_456_789,
        inode=42,
        state="waiting",
    )


def add(
    store: Store, letter: str = "a", *, name: str | None = None, root: Path = INBOX, now: float = 100.0
) -> bool:
    file = a_file(letter, name=name, root=root)
    return store.add_file(file, name=f"song {letter}", folder=f"{letter}--{letter * 8}", now=now)


def claimed(
    store: Store, limit: int = 10, *, now: float = 1000.0, folder: InputFolder = WHOLE_QUEUE
) -> list[str]:
    return [track.sha256[0] for track in store.claim(store.due(limit, folder, now=now))]


def state_of(store: Store, letter: str = "a") -> str:
    track = store.track(sha(letter))
    assert track is not None
    return track.state


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "state" / "pipeline.db"


@pytest.fixture
def store(database: Path) -> Iterator[Store]:
    store = Store(database)
    yield store
    store.close()


# -- arrival -----------------------------------------------------------------------------------------


def test_a_new_track_is_queued(store: Store) -> None:
    assert add(store, now=100.0)

    track = store.track(sha("a"))
    assert track is not None
    assert (track.name, track.folder, track.bytes) == ("song a", "a--aaaaaaaa", 1000)
    assert (track.state, track.queued_at, track.attempts) == ("queued", 100.0, 0)
    assert (track.finished_at, track.error, track.plan_key, track.source) == (None, None, None, None)
    assert store.counts() == {"queued": 1, "running": 0, "done": 0, "failed": 0}


def test_the_same_bytes_under_two_names_are_one_track_with_two_files(store: Store) -> None:
    assert add(store, name="one.wav", now=1.0)
    assert not add(store, name="two.wav", now=2.0)

    assert [file.display for file in store.files_of(sha("a"))] == ["one.wav", "two.wav"]
    assert [track.name for track in store.tracks()] == ["song a"]


def test_other_bytes_at_a_known_path_are_another_track(store: Store) -> None:
    add(store, "a", name="song.wav")
    add(store, "b", name="song.wav")

    assert store.files_of(sha("a")) == []
    assert [file.sha256 for file in store.files_below(INBOX)] == [sha("b")]
    assert len(store.tracks()) == 2


def test_a_finished_track_is_not_queued_by_its_bytes_coming_again(store: Store) -> None:
    add(store)
    claim_due(store, 1, now=200.0)
    store.finish(sha("a"), plan_key="k", recipe_key="r", source=SOURCE, now=300.0)

    assert not add(store, name="again.wav")
    assert state_of(store) == "done"


def test_every_field_of_a_file_comes_back(store: Store) -> None:
    file = replace(a_file(), moved_to=INBOX / "done" / "a.wav", state="aside")
    store.add_file(file, name="a", folder="a", now=1.0)

    assert store.file_at(file.path) == file
    assert store.file_at(INBOX / "b.wav") is None


def test_a_path_that_is_not_utf8_comes_back_byte_for_byte(store: Store) -> None:
    raw = b"/in\xff/caf\xe9 \n\xf0\x9f\x8e\xb5.wav"
    path = Path(os.fsdecode(raw))
    store.add_file(replace(a_file(), path=path, root=path.parent), name="a", folder="a", now=1.0)
    store.set_file_state(path, FileState.FAILED, moved_to=path.with_name(os.fsdecode(b"\xfe.wav")))

    (found,) = store.files_below(path.parent)
    assert os.fsencode(found.path) == raw
    assert found.moved_to is not None
    assert os.fsencode(found.moved_to) == b"/in\xff/\xfe.wav"
    assert claimed(store, folder=InputFolder(path.parent, is_inbox=False)) == ["a"]


def test_setting_the_state_of_a_file_changes_no_other(store: Store) -> None:
    add(store, name="one.wav")
    add(store, name="two.wav")
    store.set_file_state(INBOX / "one.wav", FileState.SETTLED)

    assert {file.display: file.state for file in store.files_of(sha("a"))} == {
        "one.wav": "settled",
        "two.wav": "waiting",
    }


# -- the queue ---------------------------------------------------------------------------------------


def test_tracks_are_claimed_oldest_first_and_once(store: Store) -> None:
    for letter, now in (("c", 1.0), ("a", 3.0), ("b", 2.0)):
        add(store, letter, now=now)

    assert claimed(store, 2) == ["c", "b"]
    assert claimed(store, 2) == ["a"]
    assert claimed(store, 2) == []
    assert store.counts()["running"] == 3


def test_tracks_of_one_moment_are_claimed_in_the_order_of_their_hashes(store: Store) -> None:
    for letter in "cab":
        add(store, letter, now=1.0)
    assert [*claimed(store, 1), *claimed(store, 2)] == ["a", "b", "c"]


def test_a_claim_below_a_folder_takes_only_tracks_found_there(store: Store) -> None:
    add(store, "a", root=INBOX)
    add(store, "b", root=ELSEWHERE)
    other = InputFolder(ELSEWHERE, is_inbox=False)

    assert claimed(store, folder=other) == ["b"]
    assert claimed(store, folder=other) == []
    assert store.next_due(other) is None
    assert store.next_due(WHOLE_QUEUE) == 0
    assert claimed(store) == ["a"]


def test_two_connections_never_claim_the_same_track(store: Store, database: Path) -> None:
    for letter in "abcd":
        add(store, letter)
    other = Store(database)
    taken = [*claimed(store, 2), *claimed(other, 2), *claimed(store, 2)]
    other.close()

    assert sorted(taken) == ["a", "b", "c", "d"]


def test_what_is_due_is_found_and_claimed_without_reading_the_whole_queue(store: Store) -> None:
    add(store)
    asked = list[str]()
    store._db.set_trace_callback(asked.append)
    store.claim(store.due(1, WHOLE_QUEUE, now=9.0))
    store._db.set_trace_callback(None)
    due, claim = (next(sql for sql in asked if sql.startswith(verb)) for verb in ("SELECT *", "UPDATE"))
    assert "USING INDEX tracks_queue (state=?)" in plan_of(store, due)
    assert "TEMP B-TREE" not in plan_of(store, due)
    assert "USING INDEX sqlite_autoindex_tracks_1 (sha256=?)" in plan_of(store, claim)


def plan_of(store: Store, sql: str) -> str:
    return "; ".join(row[3] for row in store._db.execute(f"EXPLAIN QUERY PLAN {sql}"))


def test_a_finished_track_has_its_result_and_no_error(store: Store) -> None:
    add(store)
    store.fail(sha("a"), stage="embed", error="oh", now=150.0, retry_at=160.0)
    claim_due(store, 1, now=200.0)
    store.finish(sha("a"), plan_key="key", recipe_key="r", source=SOURCE, now=300.0)

    track = store.track(sha("a"))
    assert track is not None
    assert (track.state, track.finished_at, track.plan_key, track.source) == ("done", 300.0, "key", SOURCE)
    assert (track.stage, track.error) == (None, None)
    assert claimed(store) == []


def test_a_failure_that_is_retried_waits_until_it_is_due(store: Store) -> None:
    add(store)
    claim_due(store, 1, now=100.0)
    store.fail(sha("a"), stage="generate", error="no luck", now=110.0, retry_at=120.0)

    track = store.track(sha("a"))
    assert track is not None
    assert (track.state, track.attempts, track.stage, track.error) == ("queued", 1, "generate", "no luck")
    assert store.next_due(WHOLE_QUEUE) == 120.0
    assert claimed(store, now=119.9) == []
    assert claimed(store, now=120.0) == ["a"]


def test_a_track_that_has_failed_is_not_claimed_again(store: Store) -> None:
    add(store)
    claim_due(store, 1, now=100.0)
    store.fail(sha("a"), stage="normalize", error="silent", now=110.0, retry_at=None)

    track = store.track(sha("a"))
    assert track is not None
    assert (track.state, track.attempts, track.finished_at) == ("failed", 1, 110.0)
    assert store.next_due(WHOLE_QUEUE) is None
    assert claimed(store, now=1e9) == []


def test_a_released_track_is_queued_in_its_old_place_and_has_no_attempt(store: Store) -> None:
    add(store, "a", now=1.0)
    add(store, "b", now=2.0)
    claim_due(store, 1, now=10.0)
    store.release(sha("a"))

    assert [(track.sha256[0], track.attempts) for track in store.tracks("queued")] == [("a", 0), ("b", 0)]


def test_releasing_leaves_a_finished_track_finished(store: Store) -> None:
    add(store)
    store.finish(sha("a"), plan_key="k", recipe_key="r", source=SOURCE, now=1.0)
    store.release(sha("a"))
    assert state_of(store) == "done"


def test_requeueing_resets_the_attempts_and_keeps_the_units(store: Store) -> None:
    add(store)
    claim_due(store, 1, now=100.0)
    store.finish_unit("n", sha256=sha("a"), stage="normalize", result={}, seconds=1.0, now=101.0)
    store.fail(sha("a"), stage="embed", error="oh", now=110.0, retry_at=None)
    store.requeue(sha("a"), now=500.0)

    track = store.track(sha("a"))
    assert track is not None
    assert (track.state, track.attempts, track.stage, track.error) == ("queued", 0, None, None)
    assert (track.queued_at, track.finished_at, track.plan_key) == (500.0, None, None)
    assert store.unit("n") == {}


def test_requeueing_a_stage_deletes_the_units_of_that_stage_and_track_only(store: Store) -> None:
    add(store, "a")
    add(store, "b")
    for key, letter, stage in (("n", "a", "normalize"), ("g", "a", "generate"), ("other", "b", "generate")):
        store.finish_unit(key, sha256=sha(letter), stage=stage, result={}, seconds=1.0, now=1.0)
    store.requeue(sha("a"), now=500.0, stages=["generate"])

    assert [key for key in ("n", "g", "other") if store.unit(key) is not None] == ["n", "other"]


def test_requeueing_leaves_what_runs_running(store: Store) -> None:
    add(store)
    claim_due(store, 1, now=100.0)
    store.requeue(sha("a"), now=200.0)
    assert state_of(store) == "running"


def test_recovery_queues_the_running_tracks_of_a_killed_instance_and_returns_their_open_stages(
    store: Store, database: Path
) -> None:
    for letter in "abc":
        add(store, letter)
    claim_due(store, 2, now=200.0)
    store.end_attempt(store.begin_attempt(sha("a"), "normalize", now=201.0), outcome="done", now=202.0)
    store.begin_attempt(sha("a"), "generate", now=203.0)
    store.close()

    reopened = Store(database)
    found = reopened.recover(now=900.0)

    assert [(track.sha256, stage) for track, stage in found] == [(sha("a"), "generate")]
    assert reopened.counts() == {"queued": 3, "running": 0, "done": 0, "failed": 0}
    assert [(a.stage, a.outcome, a.ended_at) for a in reopened.attempts(sha("a"))] == [
        ("normalize", "done", 202.0),
        ("generate", "crashed", 900.0),
    ]
    assert reopened.attempts() == []
    assert reopened.recover(now=901.0) == []
    reopened.close()


def test_recovery_returns_no_track_that_was_not_running(store: Store) -> None:
    add(store)
    store.begin_attempt(sha("a"), "generate", now=201.0)
    store.finish(sha("a"), plan_key="k", recipe_key="r", source=SOURCE, now=202.0)

    assert store.recover(now=900.0) == []
    assert state_of(store) == "done"
    assert store.attempts() == []


# -- work --------------------------------------------------------------------------------------------


def test_an_attempt_is_open_until_it_ends(store: Store) -> None:
    add(store)
    attempt = store.begin_attempt(sha("a"), "embed", now=1.0)
    assert [(a.stage, a.outcome) for a in store.attempts()] == [("embed", None)]

    store.end_attempt(attempt, outcome="failed", now=2.5, error="why", traceback="where")
    assert store.attempts() == []
    (ended,) = store.attempts(sha("a"))
    assert (ended.started_at, ended.ended_at, ended.outcome, ended.error) == (1.0, 2.5, "failed", "why")


def test_a_unit_is_found_by_its_key(store: Store) -> None:
    add(store)
    result = {"file": "variations/01-ü.wav", "seed": 2**62, "peak_dbfs": -1.5}
    store.finish_unit("k", sha256=sha("a"), stage="generate", result=result, seconds=2.0, now=3.0)

    assert store.unit("k") == result
    assert [(unit["key"], unit["result"]) for unit in store.units_of(sha("a"))] == [("k", result)]
    assert store.unit("another") is None


def test_a_unit_made_again_replaces_the_first(store: Store) -> None:
    add(store)
    for n in (1, 2):
        store.finish_unit("k", sha256=sha("a"), stage="embed", result={"n": n}, seconds=n, now=n)
    assert [unit["result"] for unit in store.units_of(sha("a"))] == [{"n": 2}]


def test_work_for_a_track_nobody_added_is_refused(store: Store) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        store.begin_attempt(sha("z"), "embed", now=1.0)
    add(store)
    store.begin_attempt(sha("a"), "embed", now=2.0)  # the refusal left no transaction open


def test_a_config_is_stored_once(store: Store, database: Path) -> None:
    store.remember_config("h", "{}")
    store.remember_config("h", "{}")
    with sqlite3.connect(database) as plain:
        assert plain.execute("SELECT * FROM configs").fetchall() == [("h", "{}")]
    plain.close()


# -- queries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["song a", "a--aaaaaaaa", "aaaa", "AAAA", "a" * 64, "sub/a.wav"])
def test_a_track_is_found_by_name_folder_hash_or_file(store: Store, wanted: str) -> None:
    add(store, "a", name="sub/a.wav")
    add(store, "b")
    assert store.find(wanted).sha256 == sha("a")


def test_a_name_that_is_not_unicode_is_found_by_its_bytes(store: Store) -> None:
    add(store, "a", name="caf\\xe9.wav")
    assert store.find("caf\udce9.wav").sha256 == sha("a")


def test_a_unique_part_of_a_name_is_enough_and_an_exact_name_wins(store: Store) -> None:
    for letter, name in (("a", "Paper Lanterns"), ("b", "paper"), ("c", "Cafe\u0301 noir")):
        store.add_file(a_file(letter), name=name, folder=letter, now=1.0)
    assert store.find("lanterns").sha256 == sha("a")
    assert store.find("paper").sha256 == sha("b")
    assert store.find("CAF\u00c9").sha256 == sha("c")
    with pytest.raises(
        UnknownTrack, match=r"2 tracks match 'pap'.*Paper Lanterns \(aaaaaaaa\), paper \(bbbb"
    ):
        store.find("pap")


@pytest.mark.parametrize("wanted", ["", "aaa", "aaaab", "sing", "%", "a%", "____"])
def test_what_is_no_part_of_a_name_and_no_long_enough_prefix_is_unknown(store: Store, wanted: str) -> None:
    add(store, "a")
    with pytest.raises(UnknownTrack, match="there is no track"):
        store.find(wanted)


def test_a_name_of_two_tracks_is_refused_with_their_hashes(store: Store) -> None:
    for letter in "ab":
        store.add_file(a_file(letter), name="song", folder=letter, now=1.0)
    with pytest.raises(UnknownTrack, match=r"2 tracks match 'song'.*song \(aaaaaaaa\), song \(bbbbbbbb\)"):
        store.find("song")


def test_finished_tracks_are_listed_newest_first(store: Store) -> None:
    for n, letter in enumerate("abc"):
        add(store, letter)
        store.finish(sha(letter), plan_key="k", recipe_key="r", source=SOURCE, now=float(n))

    assert [track.sha256[0] for track in store.tracks("done")] == ["c", "b", "a"]
    assert [track.sha256[0] for track in store.tracks("done", limit=1)] == ["c"]
    assert store.tracks("failed") == []


# -- the file ----------------------------------------------------------------------------------------


def test_everything_is_there_when_it_is_opened_again(store: Store, database: Path) -> None:
    add(store)
    before = store.tracks()
    store.close()

    again = Store(database)
    assert again.tracks() == before
    again.close()


def test_a_reader_sees_what_is_written_meanwhile_and_can_write_nothing(store: Store, database: Path) -> None:
    reader = Store(database, read_only=True)
    add(store)

    assert reader.counts()["queued"] == 1
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.requeue(sha("a"), now=1.0)
    reader.close()


def garbage_header(path: Path) -> None:
    path.write_bytes(b"this is no database " * 1000)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeroed_page(path: Path) -> None:
    with path.open("r+b") as raw:
        raw.seek(path.stat().st_size // 2 // 4096 * 4096)
        raw.write(bytes(4096))


def empty_beside_its_log(path: Path) -> None:
    os.truncate(path, 0)
    path.with_name(f"{path.name}-wal").write_bytes(b"x" * 5000)


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [garbage_header, truncated, zeroed_page, empty_beside_its_log, replaced_by_a_folder]
)
def test_a_damaged_database_is_refused_with_what_to_do(
    store: Store, database: Path, damage: Callable[[Path], None]
) -> None:
    for n in range(100):
        file = replace(a_file(name=f"{n}.wav"), sha256=f"{n:064d}")
        store.add_file(file, name=f"song {n}", folder=str(n), now=float(n))
    store.check()
    store.close()
    damage(database)

    with pytest.raises(DatabaseDamaged, match=r"pipeline\.db is damaged .*: stop the program, then restore"):
        Store(database)
    with pytest.raises(DatabaseDamaged):
        Store(database, read_only=True).check()


def test_a_database_that_may_not_be_written_is_named(
    store: Store, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.close()

    def refused(*_: object) -> None:
        error = sqlite3.OperationalError("attempt to write a readonly database")
        error.sqlite_errorcode = sqlite3.SQLITE_READONLY
        raise error

    monkeypatch.setattr(Store, "_migrate", refused)  # root may write everything
    with pytest.raises(FolderUnusable, match=r"pipeline\.db can't be used: attempt to write a readonly"):
        Store(database)


def test_a_database_that_was_not_completely_made_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "pipeline.db").touch()
    store = Store(tmp_path / "pipeline.db", read_only=True)
    assert store.counts() == dict.fromkeys(("queued", "running", "done", "failed"), 0)
    store.close()


def test_a_database_of_an_older_version_can_be_read_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr("pipeline.store.store.MIGRATIONS", dict([*MIGRATIONS.items()][:1]))
        Store(tmp_path / "pipeline.db").close()
    db = sqlite_utils.Database(tmp_path / "pipeline.db")
    db.execute(
        "INSERT INTO tracks (sha256, name, folder, state, bytes, queued_at) VALUES"
        " ('a', 'a.wav', 'a', 'done', 1, 1)"
    )
    db.close()

    store = Store(tmp_path / "pipeline.db", read_only=True)

    [track] = store.tracks()
    assert (track.state, track.solo, track.collected_at) == ("done", False, None)
    store.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_database_of_a_newer_version_is_refused(tmp_path: Path, read_only: bool) -> None:
    Store(tmp_path / "pipeline.db").close()
    db = sqlite3.connect(tmp_path / "pipeline.db")
    db.execute("INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('pipeline', 'm999')")
    db.commit()
    db.close()

    with pytest.raises(FolderUnusable, match="newer version"):
        Store(tmp_path / "pipeline.db", read_only=read_only)


def test_a_running_track_is_not_queued_again_and_keeps_its_units(store: Store) -> None:
    add(store)
    claim_due(store, 1, now=1.0)
    store.finish_unit("k", sha256=sha("a"), stage="generate", result={}, seconds=0.0, now=2.0)

    assert not store.requeue(sha("a"), now=3.0, stages=["generate"])

    assert store.unit("k") is not None
