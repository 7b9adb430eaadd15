"""Publication: complete files or none; files of a user are not touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path, PurePath
from typing import Any

import pytest

from pipeline.fs import atomic
from pipeline.fs.copying import FileChanged
from pipeline.fs.local import LocalFiles
from pipeline.outbox.outbox import (
    EMBEDDING,
    MANIFEST,
    VECTORS,
    Outbox,
    Published,
    is_temporary,
    listed_files,
)

FOLDER = "song--aaaaaaaa"
FIRST, SECOND, THIRD = (f"variations/{n:02d}-{name}.wav" for n, name in ((1, "a"), (2, "b"), (3, "c")))
BY_EITHER = pytest.mark.parametrize("by_worker", [False, True])
SOURCE = {"name": "song.wav", "sha256": "a" * 64, "names": ["song.wav"]}


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(LocalFiles(tmp_path / "outbox"))


def folders_of(outbox: Outbox) -> list[str]:
    return [folder for folder, _ in outbox.contents()]


def publish(outbox: Outbox, file: str, content: bytes, *, by_worker: bool = False) -> Published:
    """Publish a file that the owner writes, or that a worker has written at its place."""
    if not by_worker:
        return outbox.publish(FOLDER, file, content)
    place = outbox.place(FOLDER, file)
    assert place
    return outbox.publish(FOLDER, file, atomic.write_new(place, content))


def files(outbox: Outbox) -> dict[str, bytes]:
    base = outbox.root / FOLDER
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}


@BY_EITHER
def test_a_published_file_is_on_the_disk_with_its_hash_and_size(outbox: Outbox, by_worker: bool) -> None:
    published = publish(outbox, FIRST, b"music", by_worker=by_worker)

    assert published == Published(FIRST, hashlib.sha256(b"music").hexdigest(), 5)
    assert files(outbox) == {FIRST: b"music"}


@BY_EITHER
def test_a_file_published_again_replaces_the_first(outbox: Outbox, by_worker: bool) -> None:
    before = publish(outbox, FIRST, b"a longer piece")
    after = publish(outbox, FIRST, b"short", by_worker=by_worker)

    assert files(outbox) == {FIRST: b"short"}
    assert outbox.is_intact(FOLDER, after)
    assert not outbox.is_intact(FOLDER, before)


@BY_EITHER
def test_the_temporary_file_of_a_killed_run_is_replaced(outbox: Outbox, by_worker: bool) -> None:
    left = outbox.root / FOLDER / "variations" / ".01-a.wav.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"much more than what comes now")

    publish(outbox, FIRST, b"music", by_worker=by_worker)
    assert files(outbox) == {FIRST: b"music"}


def test_what_a_worker_has_written_is_not_published_yet(outbox: Outbox) -> None:
    place = outbox.place(FOLDER, FIRST)
    assert place
    atomic.write_new(place, b"music")
    assert is_temporary(str(place.relative_to(outbox.root / FOLDER)))

    outbox.keep_only(FOLDER, {FIRST})
    assert files(outbox) == {}


@pytest.mark.parametrize("other", [b"", b"mus", None])
def test_a_file_that_another_worker_has_begun_at_the_same_place_is_not_published(
    outbox: Outbox, other: bytes | None
) -> None:
    """A worker whose owner was killed may go on for a moment."""
    place = outbox.place(FOLDER, FIRST)
    assert place
    written = atomic.write_new(place, b"music")
    place.unlink()
    if other is not None:
        place.write_bytes(other)
    with pytest.raises(FileChanged):
        outbox.publish(FOLDER, FIRST, written)
    assert not (outbox.root / FOLDER / FIRST).exists()


def test_what_cannot_be_renamed_is_removed(outbox: Outbox) -> None:
    (outbox.root / FOLDER / FIRST).mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        publish(outbox, FIRST, b"music", by_worker=True)
    assert files(outbox) == {}


def test_an_outbox_that_cannot_be_written_is_an_os_error(outbox: Outbox) -> None:
    outbox.root.write_bytes(b"a file where the folder should be")
    with pytest.raises(OSError, match="outbox"):
        publish(outbox, FIRST, b"music")


@pytest.mark.parametrize("now", [b"Music", b"musi", b"music!", b""])
def test_an_altered_file_is_not_intact(outbox: Outbox, now: bytes) -> None:
    published = publish(outbox, FIRST, b"music")
    assert outbox.is_intact(FOLDER, published)

    (outbox.root / FOLDER / FIRST).write_bytes(now)
    assert not outbox.is_intact(FOLDER, published)


def test_a_missing_file_is_not_intact(outbox: Outbox) -> None:
    published = publish(outbox, FIRST, b"music")
    (outbox.root / FOLDER / FIRST).unlink()

    assert not outbox.is_intact(FOLDER, published)
    assert not outbox.is_intact("nowhere", published)


def test_a_manifest_reads_back_as_it_was_written(outbox: Outbox) -> None:
    manifest = {"source": {**SOURCE, "name": "café 🎵"}, "variations": []}
    outbox.publish_manifest(FOLDER, manifest)

    assert outbox.read_manifest(FOLDER) == manifest
    text = (outbox.root / FOLDER / MANIFEST).read_text(encoding="utf-8")
    assert "café 🎵" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_manifest_that_is_not_json_is_refused(outbox: Outbox, value: float) -> None:
    outbox.publish_manifest(FOLDER, {"peak_dbfs": -1.0})
    with pytest.raises(ValueError, match="Out of range"):
        outbox.publish_manifest(FOLDER, {"peak_dbfs": value})
    assert outbox.read_manifest(FOLDER) == {"peak_dbfs": -1.0}


@pytest.mark.parametrize("damaged", [b"", b'{"source": ', b"\xff\xfe", b"[]"])
def test_a_damaged_manifest_is_none(outbox: Outbox, damaged: bytes) -> None:
    publish(outbox, MANIFEST, damaged)

    assert outbox.read_manifest(FOLDER) is None
    outbox.set_source_names(FOLDER, ["song.wav"])
    assert files(outbox) == {MANIFEST: damaged}


def test_a_folder_that_is_being_worked_on_has_no_manifest(outbox: Outbox) -> None:
    outbox.remove_manifest(FOLDER)  # also before there is any folder
    outbox.publish_manifest(FOLDER, {"source": SOURCE})
    publish(outbox, FIRST, b"music")

    outbox.remove_manifest(FOLDER)
    assert outbox.read_manifest(FOLDER) is None
    assert files(outbox) == {FIRST: b"music"}


def test_another_name_is_added_and_the_rest_of_the_manifest_stays(outbox: Outbox) -> None:
    manifest: dict[str, Any] = {"source": SOURCE, "created_at": "2001-02-03T04:05:06Z"}
    outbox.publish_manifest(FOLDER, manifest)
    outbox.set_source_names(FOLDER, ["song.wav", "copy.wav"])

    assert outbox.read_manifest(FOLDER) == {
        **manifest,
        "source": {**SOURCE, "names": ["song.wav", "copy.wav"]},
    }


def test_names_that_are_there_are_not_written_again(outbox: Outbox) -> None:
    path = outbox.root / FOLDER / MANIFEST
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"source": SOURCE}))  # not as it would be written
    before = path.read_bytes()
    outbox.set_source_names(FOLDER, ["song.wav"])
    assert path.read_bytes() == before


def test_names_are_not_added_where_no_manifest_is(outbox: Outbox) -> None:
    outbox.set_source_names(FOLDER, ["song.wav"])
    assert not (outbox.root / FOLDER).exists()


def test_files_can_exchange_their_names(outbox: Outbox) -> None:
    for file in (FIRST, SECOND, THIRD):
        publish(outbox, file, file.encode())
    outbox.rename(FOLDER, {FIRST: SECOND, SECOND: THIRD, THIRD: FIRST})

    assert files(outbox) == {SECOND: FIRST.encode(), THIRD: SECOND.encode(), FIRST: THIRD.encode()}


def test_files_can_be_renamed_in_a_chain_and_one_that_keeps_its_name_stays(outbox: Outbox) -> None:
    for file in (FIRST, SECOND):
        publish(outbox, file, file.encode())
    outbox.rename(FOLDER, {SECOND: THIRD, FIRST: FIRST})

    assert files(outbox) == {FIRST: FIRST.encode(), THIRD: SECOND.encode()}


def test_only_the_files_to_keep_are_kept(outbox: Outbox) -> None:
    for file in (
        FIRST,
        SECOND,
        "variations/100-z.wav",
        "variations/.03-c.wav.part",
        ".manifest.json.part",
        EMBEDDING,
        VECTORS,
    ):
        publish(outbox, file, b"x")
    outbox.keep_only(FOLDER, {FIRST, EMBEDDING})
    assert sorted(files(outbox)) == [EMBEDDING, FIRST]

    outbox.keep_only(FOLDER, {FIRST})
    assert sorted(files(outbox)) == [FIRST]


@pytest.mark.parametrize(
    "note",
    ["notes.txt", "variations/01-a.txt", "variations/favourite.wav", "variations/2020 mix.wav",
     "variations/best/01-a.wav", "01-a.wav", ".hidden", "mine/embedding.npz", ".mix.part",
     "variations/.favourite.wav.part", "variations/.embedding.npz.part", ".01-a.wav.part", "x.part",
     "album/song--bbbbbbbb/embedding.npz", "variations/song--bbbbbbbb/variations/01-a.wav"],
)  # fmt: skip
def test_a_users_own_files_stay(outbox: Outbox, note: str) -> None:
    publish(outbox, note, b"mine")
    publish(outbox, FIRST, b"x")
    outbox.keep_only(FOLDER, set())
    assert files(outbox) == {note: b"mine"}


def test_a_folder_is_named_for_the_track_and_the_start_of_its_hash() -> None:
    assert Outbox.folder_name(Path("in/Song No. 5.wav"), "0123456789abcdef") == "Song No. 5--01234567"


# -- verification ----------------------------------------------------------------------------------


def test_the_name_appears_only_with_the_complete_file(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bytes, bool]] = []

    def look(path: Path, sha256: str) -> None:
        check(path, sha256)
        seen.append((path.read_bytes(), (outbox.root / FOLDER / FIRST).exists()))

    check = atomic._check
    monkeypatch.setattr(atomic, "_check", look)
    publish(outbox, FIRST, b"music")
    assert seen == [(b"music", False)]


def test_a_disk_that_returns_other_bytes_is_a_device_error(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync_of_a_torn_write(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            os.pwrite(handle, b"?", 2)

    monkeypatch.setattr(atomic.os, "fsync", fsync_of_a_torn_write)
    with pytest.raises(OSError, match="other bytes") as caught:
        publish(outbox, FIRST, b"music")
    assert caught.value.errno == errno.EIO
    assert files(outbox) == {}


def test_a_temporary_name_that_is_a_link_is_not_followed(outbox: Outbox, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.wav"
    theirs.write_bytes(b"theirs")
    link = outbox.root / FOLDER / "variations" / ".01-a.wav.part"
    link.parent.mkdir(parents=True)
    link.symlink_to(theirs)

    publish(outbox, FIRST, b"music")
    assert theirs.read_bytes() == b"theirs"
    assert files(outbox) == {FIRST: b"music"}


# -- the manifest ----------------------------------------------------------------------------------


def a_manifest(outbox: Outbox, *published: Published, **changes: Any) -> dict[str, Any]:
    entries = [{"file": one.file, "sha256": one.sha256, "bytes": one.bytes} for one in published]
    made = {"source": SOURCE, "embedding": entries[0], "variations": entries[1:], "created_at": "2001-02-03"}
    return {**made, **changes}


def test_a_manifest_that_says_the_same_is_published_once(outbox: Outbox) -> None:
    manifest = a_manifest(outbox, publish(outbox, EMBEDDING, b"e"), publish(outbox, FIRST, b"x"))
    outbox.publish_manifest(FOLDER, manifest)
    path = outbox.root / FOLDER / MANIFEST
    before = path.stat()
    outbox.publish_manifest(FOLDER, {**manifest, "created_at": "2009-09-09"})

    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert outbox.read_manifest(FOLDER) == manifest


@pytest.mark.parametrize("change", [{"config_sha256": "b"}, {"source": {**SOURCE, "name": "other.wav"}}])
def test_a_manifest_that_says_something_else_is_replaced(outbox: Outbox, change: dict[str, Any]) -> None:
    manifest = a_manifest(outbox, publish(outbox, EMBEDDING, b"e"))
    outbox.publish_manifest(FOLDER, manifest)
    outbox.publish_manifest(FOLDER, {**manifest, **change, "created_at": "2009-09-09"})
    assert outbox.read_manifest(FOLDER) == {**manifest, **change, "created_at": "2009-09-09"}


def test_a_damaged_manifest_is_replaced(outbox: Outbox) -> None:
    manifest = a_manifest(outbox, publish(outbox, EMBEDDING, b"e"))
    publish(outbox, MANIFEST, b'{"source": ')
    outbox.publish_manifest(FOLDER, manifest)
    assert outbox.read_manifest(FOLDER) == manifest


def test_a_manifest_lists_its_files_and_no_others(outbox: Outbox) -> None:
    one, two = publish(outbox, EMBEDDING, b"e"), publish(outbox, FIRST, b"x")
    assert not outbox.manifest_lists(FOLDER, [one, two])  # there is none

    outbox.publish_manifest(FOLDER, a_manifest(outbox, one, two))
    assert outbox.manifest_lists(FOLDER, [two, one])
    assert not outbox.manifest_lists(FOLDER, [one])
    assert not outbox.manifest_lists(FOLDER, [one, two, two])
    assert not outbox.manifest_lists(FOLDER, [one, Published(FIRST, "0" * 64, two.bytes)])


@pytest.mark.parametrize(
    "lacking",
    [{}, {"embedding": {}, "variations": []}, {"embedding": None, "variations": []},
     {"embedding": {"file": "e", "sha256": "s", "bytes": 1}, "variations": 3},
     {"embedding": {"file": "e", "sha256": "s", "bytes": "1"}, "variations": []}],
)  # fmt: skip
def test_json_that_is_no_manifest_lists_nothing(outbox: Outbox, lacking: dict[str, Any]) -> None:
    publish(outbox, MANIFEST, json.dumps(lacking).encode())
    assert listed_files(lacking) is None
    assert not outbox.manifest_lists(FOLDER, [])


@pytest.mark.parametrize("content", [b"{}", b'{"source": null}', b'{"source": "song.wav"}'])
def test_names_are_not_added_to_json_that_is_no_manifest(outbox: Outbox, content: bytes) -> None:
    publish(outbox, MANIFEST, content)
    outbox.set_source_names(FOLDER, ["song.wav"])
    assert files(outbox) == {MANIFEST: content}


def test_json_that_is_nested_too_deeply_is_no_manifest(outbox: Outbox) -> None:
    publish(outbox, MANIFEST, b"[" * 200_000)
    assert outbox.read_manifest(FOLDER) is None


# -- files under other names -----------------------------------------------------------------------


def test_files_of_an_interrupted_rename_are_found_by_their_content(outbox: Outbox) -> None:
    first, second = publish(outbox, FIRST, b"first"), publish(outbox, SECOND, b"other")
    variations = outbox.root / FOLDER / "variations"
    (variations / "01-a.wav").rename(variations / ".01-a.wav.move")  # an exchange of names, killed after
    (variations / "02-b.wav").rename(variations / "01-a.wav")  # its second step

    held = outbox.find_intact(FOLDER, {"one": first, "two": second})
    assert held == {
        "one": Published("variations/.01-a.wav.move", first.sha256, 5),
        "two": Published("variations/01-a.wav", second.sha256, 5),
    }
    outbox.rename(FOLDER, {held["one"].file: SECOND, held["two"].file: FIRST})
    assert files(outbox) == {SECOND: b"first", FIRST: b"other"}


def test_a_file_of_an_interrupted_rename_is_not_overwritten_by_another_rename(outbox: Outbox) -> None:
    publish(outbox, FIRST, b"first")
    variations = outbox.root / FOLDER / "variations"
    (variations / ".02-b.wav.move").write_bytes(b"second")
    outbox.rename(FOLDER, {FIRST: SECOND, "variations/.02-b.wav.move": THIRD})
    assert files(outbox) == {SECOND: b"first", THIRD: b"second"}


def test_one_file_does_not_serve_for_two_results(outbox: Outbox) -> None:
    published = publish(outbox, FIRST, b"the same sound")
    assert outbox.find_intact(FOLDER, {"one": published, "two": published}) == {"one": published}

    publish(outbox, SECOND, b"the same sound")
    held = outbox.find_intact(FOLDER, {"one": published, "two": published})
    assert {one.file for one in held.values()} == {FIRST, SECOND}


def test_a_file_that_was_being_written_or_is_altered_is_not_found(outbox: Outbox) -> None:
    published, other = publish(outbox, FIRST, b"music"), publish(outbox, SECOND, b"other")
    variations = outbox.root / FOLDER / "variations"
    (variations / "01-a.wav").rename(variations / ".01-a.wav.part")
    (variations / "02-b.wav").write_bytes(b"Other")
    assert outbox.find_intact(FOLDER, {"one": published, "two": other}) == {}


def test_only_this_programs_temporary_files_are_listed(outbox: Outbox) -> None:
    ours = [
        "variations/.01-a.wav.part",
        "variations/.120-b.wav.move",
        ".embedding.npz.part",
        ".variations.npz.part",
        ".manifest.json.part",
    ]
    theirs = [
        ".x.part",
        "variations/.x.wav.part",
        ".01-a.wav.part",
        "variations/01-a.wav.part",
        "deep/.01-a.wav.part",
    ]
    for file in [*ours, *theirs, FIRST, EMBEDDING]:
        path = outbox.root / FOLDER / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert set(filter(is_temporary, outbox.files_in(FOLDER))) == set(ours)


# -- names of folders ------------------------------------------------------------------------------


def test_folders_of_the_inbox_become_folders_of_the_outbox() -> None:
    below = PurePath("The Album", "disc 1.5")
    name = Outbox.folder_name(Path("in/Song.wav"), "0123456789abcdef", below=below)
    assert name == "The Album/disc 1.5/Song--01234567"
    assert Outbox.folder_name(Path("Song.wav"), "0123456789abcdef", below=PurePath()) == "Song--01234567"


@pytest.mark.parametrize(
    "part", ["..", ".hidden", ".gc-x", "a:b\\c", "-rf", "a\nb", "x" * 255, "é" * 120, "\udcff", " ", "..."]
)
def test_no_folders_name_leads_out_or_hides(outbox: Outbox, part: str) -> None:
    name = Outbox.folder_name(Path("Song.wav"), "0123456789abcdef", below=PurePath("a", part, "b"))
    above = name.split("/")[1]

    assert name.count("/") == 3
    assert not above.startswith((".", "-"))
    assert above.isprintable()
    assert 0 < len(above.encode()) <= 130
    outbox.publish(name, FIRST, b"x")
    assert folders_of(outbox) == [name]


@pytest.mark.parametrize("album", ["Song--01234567", "Song--ABCDEF01"])
def test_an_album_that_is_named_like_a_tracks_folder_is_not_taken_for_one(outbox: Outbox, album: str) -> None:
    track = Outbox.folder_name(Path("Song.wav"), "0123456789abcdef")
    other = Outbox.folder_name(Path("B.wav"), "fedcba9876543210", below=PurePath(album, "variations"))
    for folder in (track, other):
        outbox.publish(folder, FIRST, b"x")

    assert sorted(folders_of(outbox)) == sorted([track, other])
    assert not other.lower().startswith(f"{track.lower()}/")


def test_folders_behind_links_and_hidden_ones_are_not_the_outboxs(outbox: Outbox, tmp_path: Path) -> None:
    publish(outbox, FIRST, b"x")
    (outbox.root / ".gc-x" / "hidden--00000000").mkdir(parents=True)
    (tmp_path / "elsewhere" / "far--00000000").mkdir(parents=True)
    (outbox.root / "link").symlink_to(tmp_path / "elsewhere")
    assert folders_of(outbox) == [FOLDER]


def test_every_new_folders_name_is_flushed_and_the_last_one_after_the_rename(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    real = atomic.sync_folder
    monkeypatch.setattr(atomic, "sync_folder", lambda path: (flushed.append(path), real(path)))
    outbox.publish("album/song--aaaaaaaa", FIRST, b"x")

    base = outbox.root / "album" / "song--aaaaaaaa"
    assert {outbox.root.parent, outbox.root, outbox.root / "album", base} <= set(flushed)
    assert flushed[-1] == base / "variations"
