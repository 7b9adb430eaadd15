"""Publication: whole files or none, and nothing of a person's own is touched."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pipeline.outbox import EMBEDDING, MANIFEST, Outbox, Published

FOLDER = "song--aaaaaaaa"
FIRST, SECOND, THIRD = (f"variations/{n:02d}-{name}.wav" for n, name in ((1, "a"), (2, "b"), (3, "c")))
SOURCE = {"name": "song.wav", "sha256": "a" * 64, "names": ["song.wav"]}


class WriterFailed(Exception):
    pass


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox")


def publish(outbox: Outbox, file: str, content: bytes) -> Published:
    def write(out: BinaryIO) -> None:
        out.write(content)

    return outbox.publish(FOLDER, file, write)


def files(outbox: Outbox) -> dict[str, bytes]:
    base = outbox.root / FOLDER
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}


def fail_half_way(out: BinaryIO) -> None:
    out.write(b"half of it")
    raise WriterFailed


def test_a_published_file_is_on_the_disk_with_its_hash_and_size(outbox: Outbox) -> None:
    published = publish(outbox, FIRST, b"music")

    assert published == Published(FIRST, hashlib.sha256(b"music").hexdigest(), 5)
    assert files(outbox) == {FIRST: b"music"}


def test_a_writer_may_go_back_to_its_header(outbox: Outbox) -> None:
    def write(out: BinaryIO) -> None:
        out.write(b"????body")
        out.seek(0)
        out.write(b"size")

    published = outbox.publish(FOLDER, FIRST, write)
    assert (published.bytes, published.sha256) == (8, hashlib.sha256(b"sizebody").hexdigest())


def test_nobody_sees_the_name_before_the_file_is_whole(outbox: Outbox) -> None:
    visible: list[list[str]] = []

    def write(out: BinaryIO) -> None:
        out.write(b"music")
        visible.append([path.name for path in (outbox.root / FOLDER).rglob("[!.]*") if path.is_file()])

    outbox.publish(FOLDER, FIRST, write)
    assert visible == [[]]


def test_a_writer_that_fails_leaves_nothing(outbox: Outbox) -> None:
    with pytest.raises(WriterFailed):
        outbox.publish(FOLDER, FIRST, fail_half_way)
    assert files(outbox) == {}


def test_a_writer_that_fails_leaves_the_file_before_as_it_was(outbox: Outbox) -> None:
    before = publish(outbox, FIRST, b"music")
    with pytest.raises(WriterFailed):
        outbox.publish(FOLDER, FIRST, fail_half_way)

    assert files(outbox) == {FIRST: b"music"}
    assert outbox.holds(FOLDER, before)


def test_a_file_published_again_replaces_the_first(outbox: Outbox) -> None:
    before = publish(outbox, FIRST, b"a longer piece")
    after = publish(outbox, FIRST, b"short")

    assert files(outbox) == {FIRST: b"short"}
    assert outbox.holds(FOLDER, after)
    assert not outbox.holds(FOLDER, before)


def test_what_a_killed_run_left_is_written_over(outbox: Outbox) -> None:
    left = outbox.root / FOLDER / "variations" / ".01-a.wav.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"much more than what comes now")

    publish(outbox, FIRST, b"music")
    assert files(outbox) == {FIRST: b"music"}


def test_an_outbox_that_cannot_be_written_is_an_os_error(outbox: Outbox) -> None:
    outbox.root.write_bytes(b"a file where the folder should be")
    with pytest.raises(OSError, match="outbox"):
        publish(outbox, FIRST, b"music")


@pytest.mark.parametrize("now", [b"Music", b"musi", b"music!", b""])
def test_an_altered_file_is_not_held(outbox: Outbox, now: bytes) -> None:
    published = publish(outbox, FIRST, b"music")
    assert outbox.holds(FOLDER, published)

    (outbox.root / FOLDER / FIRST).write_bytes(now)
    assert not outbox.holds(FOLDER, published)


def test_a_missing_file_is_not_held(outbox: Outbox) -> None:
    published = publish(outbox, FIRST, b"music")
    (outbox.root / FOLDER / FIRST).unlink()

    assert not outbox.holds(FOLDER, published)
    assert not outbox.holds("nowhere", published)


def test_a_manifest_reads_back_as_it_was_written(outbox: Outbox) -> None:
    manifest = {"source": {**SOURCE, "name": "café 🎵"}, "variations": []}
    outbox.publish_manifest(FOLDER, manifest)

    assert outbox.manifest(FOLDER) == manifest
    text = (outbox.root / FOLDER / MANIFEST).read_text(encoding="utf-8")
    assert "café 🎵" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_manifest_that_is_not_json_is_refused_whole(outbox: Outbox, value: float) -> None:
    outbox.publish_manifest(FOLDER, {"peak_dbfs": -1.0})
    with pytest.raises(ValueError, match="Out of range"):
        outbox.publish_manifest(FOLDER, {"peak_dbfs": value})
    assert outbox.manifest(FOLDER) == {"peak_dbfs": -1.0}


@pytest.mark.parametrize("damaged", [b"", b'{"source": ', b"\xff\xfe", b"[]"])
def test_a_damaged_manifest_is_none(outbox: Outbox, damaged: bytes) -> None:
    publish(outbox, MANIFEST, damaged)

    assert outbox.manifest(FOLDER) is None
    outbox.add_names(FOLDER, ["song.wav"])
    assert files(outbox) == {MANIFEST: damaged}


def test_a_folder_under_work_has_no_manifest(outbox: Outbox) -> None:
    outbox.open_for_work(FOLDER)  # also before there is any folder
    outbox.publish_manifest(FOLDER, {"source": SOURCE})
    publish(outbox, FIRST, b"music")

    outbox.open_for_work(FOLDER)
    assert outbox.manifest(FOLDER) is None
    assert files(outbox) == {FIRST: b"music"}


def test_another_name_is_added_and_the_rest_of_the_manifest_stays(outbox: Outbox) -> None:
    manifest: dict[str, Any] = {"source": SOURCE, "created_at": "2001-02-03T04:05:06Z"}
    outbox.publish_manifest(FOLDER, manifest)
    outbox.add_names(FOLDER, ["song.wav", "copy.wav"])

    assert outbox.manifest(FOLDER) == {**manifest, "source": {**SOURCE, "names": ["song.wav", "copy.wav"]}}


def test_names_that_are_there_are_not_written_again(outbox: Outbox) -> None:
    path = outbox.root / FOLDER / MANIFEST
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"source": SOURCE}))  # not as it would be written
    before = path.read_bytes()
    outbox.add_names(FOLDER, ["song.wav"])
    assert path.read_bytes() == before


def test_names_are_not_added_where_no_manifest_is(outbox: Outbox) -> None:
    outbox.add_names(FOLDER, ["song.wav"])
    assert not (outbox.root / FOLDER).exists()


def test_files_can_trade_names(outbox: Outbox) -> None:
    for file in (FIRST, SECOND, THIRD):
        publish(outbox, file, file.encode())
    outbox.rename(FOLDER, {FIRST: SECOND, SECOND: THIRD, THIRD: FIRST})

    assert files(outbox) == {SECOND: FIRST.encode(), THIRD: SECOND.encode(), FIRST: THIRD.encode()}


def test_files_can_move_along_and_one_that_keeps_its_name_stays(outbox: Outbox) -> None:
    for file in (FIRST, SECOND):
        publish(outbox, file, file.encode())
    outbox.rename(FOLDER, {SECOND: THIRD, FIRST: FIRST})

    assert files(outbox) == {FIRST: FIRST.encode(), THIRD: SECOND.encode()}


def test_only_what_is_asked_for_is_kept(outbox: Outbox) -> None:
    for file in (
        FIRST,
        SECOND,
        "variations/100-z.wav",
        "variations/.03-c.wav.part",
        ".manifest.json.part",
        EMBEDDING,
    ):
        publish(outbox, file, b"x")
    outbox.keep_only(FOLDER, {FIRST, EMBEDDING})
    assert sorted(files(outbox)) == [EMBEDDING, FIRST]

    outbox.keep_only(FOLDER, {FIRST})
    assert sorted(files(outbox)) == [FIRST]


@pytest.mark.parametrize(
    "note",
    ["notes.txt", "variations/01-a.txt", "variations/favourite.wav", "variations/2020 mix.wav",
     "variations/best/01-a.wav", "01-a.wav", ".hidden", "mine/embedding.npz"],
)  # fmt: skip
def test_a_persons_own_files_stay(outbox: Outbox, note: str) -> None:
    publish(outbox, note, b"mine")
    publish(outbox, FIRST, b"x")
    outbox.keep_only(FOLDER, set())
    assert files(outbox) == {note: b"mine"}


def test_a_folder_is_named_for_the_track_and_the_start_of_its_hash() -> None:
    assert Outbox.folder_name(Path("in/Song No. 5.wav"), "0123456789abcdef") == "Song No. 5--01234567"
