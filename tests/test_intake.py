"""From a folder to ready, hashed files: what a scan sees, when a file is ready, how it is moved."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import BadAudio
from pipeline.intake import (
    READ_BYTES,
    Settling,
    Sighting,
    error_file,
    free_name,
    hash_file,
    move_aside,
    scan,
    write_error,
)

WAV_HEAD = b"RIFF\x24\x00\x00\x00WAVEfmt "


def put(root: Path, *names: str, content: bytes = WAV_HEAD) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def seen(root: Path, *ignore: str, is_inbox: bool = True) -> list[str]:
    return [sighting.display for sighting in scan(root, ignore=ignore, is_inbox=is_inbox)]


def sighting(*, mtime_s: float = 0.0, ctime_s: float = 0.0, size: int = 10) -> Sighting:
    return Sighting(Path("/in/a.wav"), "a.wav", size, int(mtime_s * 1e9), int(ctime_s * 1e9), 7)


# -- scanning ----------------------------------------------------------------------------------------


def test_a_scan_finds_files_below_folders_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path, "b.wav", "a.wav", "album/2.wav", "album/1.wav", "c.wav")
    assert seen(tmp_path) == ["a.wav", "album/1.wav", "album/2.wav", "b.wav", "c.wav"]


def test_a_sighting_has_the_files_own_figures(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", content=b"12345")
    found = (tmp_path / "a.wav").stat()

    (seen_file,) = scan(tmp_path, ignore=(), is_inbox=True)
    assert (seen_file.path, seen_file.size, seen_file.inode) == (tmp_path / "a.wav", 5, found.st_ino)
    assert (seen_file.mtime_ns, seen_file.ctime_ns) == (found.st_mtime_ns, found.st_ctime_ns)


def test_dotfiles_and_dot_folders_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, ".hidden.wav", ".trash/a.wav", "album/.a.wav.part", "a.wav")
    assert seen(tmp_path) == ["a.wav"]


def test_symbolic_links_and_special_files_are_left_out(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "a.wav")
    inbox = tmp_path / "inbox"
    put(inbox, "real.wav")
    (inbox / "file.wav").symlink_to(tmp_path / "elsewhere" / "a.wav")
    (inbox / "folder").symlink_to(tmp_path / "elsewhere")
    (inbox / "dangling.wav").symlink_to(tmp_path / "nowhere")
    os.mkfifo(inbox / "pipe.wav")

    assert seen(inbox) == ["real.wav"]


def test_done_and_failed_are_reserved_at_the_top_of_the_inbox_only(tmp_path: Path) -> None:
    put(tmp_path, "done/a.wav", "failed/b.wav", "album/done/c.wav")

    assert seen(tmp_path) == ["album/done/c.wav"]
    assert seen(tmp_path, is_inbox=False) == ["album/done/c.wav", "done/a.wav", "failed/b.wav"]


def test_ignored_patterns_match_whatever_the_case(tmp_path: Path) -> None:
    put(tmp_path, "a.wav.part", "b.WAV.PART", "Thumbs.db", "COVER.jpg", "skip/c.wav", "d.wav")
    assert seen(tmp_path, "*.part", "thumbs.DB", "*.jpg", "skip") == ["d.wav"]


def test_a_folder_named_like_a_file_is_scanned_into(tmp_path: Path) -> None:
    put(tmp_path, "x.wav/inner.wav")
    assert seen(tmp_path) == ["x.wav/inner.wav"]
    assert seen(tmp_path, is_inbox=False) == ["x.wav/inner.wav"]


def test_what_is_not_audio_is_seen_in_the_inbox_but_not_in_another_folder(tmp_path: Path) -> None:
    put(tmp_path, "letter.doc", content=b"Dear all, this is no music")
    put(tmp_path, "named-wrong.bin")
    put(tmp_path, "text.mp3", content=b"hello")

    assert seen(tmp_path) == ["letter.doc", "named-wrong.bin", "text.mp3"]
    assert seen(tmp_path, is_inbox=False) == ["named-wrong.bin", "text.mp3"]


def test_a_name_that_is_not_text_is_seen_and_shown_in_one_line(tmp_path: Path) -> None:
    raw = b"caf\xe9\n\xf0\x9f\x8e\xb5 'q\".wav"
    put(tmp_path, os.fsdecode(raw))

    (found,) = scan(tmp_path, ignore=(), is_inbox=True)
    assert os.fsencode(found.path.name) == raw
    assert found.display == "caf\\xe9\\n🎵 'q\".wav"


def test_what_vanishes_during_a_scan_is_skipped(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "b/1.wav", "c.wav", "d.wav")
    sightings = scan(tmp_path, ignore=(), is_inbox=True)
    found = [next(sightings).display]
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "c.wav").unlink()

    assert found + [sighting.display for sighting in sightings] == ["a.wav", "d.wav"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        seen(tmp_path / "none")


# -- settling ----------------------------------------------------------------------------------------


def test_a_file_is_ready_once_its_times_are_old_enough() -> None:
    settling = Settling(settle_s=2.0)
    written = sighting(mtime_s=100.0, ctime_s=100.0)

    assert not settling.is_settled(written, 101.9)
    assert settling.is_settled(written, 102.0)


def test_an_old_file_is_ready_at_the_first_look() -> None:
    assert Settling(settle_s=2.0).is_settled(sighting(mtime_s=5.0, ctime_s=5.0), 1000.0)


def test_a_copy_with_its_old_mtime_is_as_young_as_its_ctime() -> None:
    copied = sighting(mtime_s=5.0, ctime_s=100.0)
    assert not Settling(settle_s=2.0).is_settled(copied, 101.0)
    assert Settling(settle_s=2.0).is_settled(copied, 102.0)


def test_a_file_from_the_future_is_ready_when_two_looks_agree() -> None:
    settling = Settling(settle_s=2.0)
    future = sighting(mtime_s=1e6, ctime_s=100.0)

    assert not settling.is_settled(future, 100.0)
    assert not settling.is_settled(future, 101.9)
    assert settling.is_settled(future, 102.0)


def test_a_file_from_the_future_that_grows_is_waited_for_again() -> None:
    settling = Settling(settle_s=2.0)
    future = sighting(mtime_s=1e6)

    settling.is_settled(future, 100.0)
    assert not settling.is_settled(replace(future, size=11), 102.0)
    assert not settling.is_settled(replace(future, size=11), 103.9)
    assert settling.is_settled(replace(future, size=11), 104.0)


def test_what_is_gone_is_forgotten() -> None:
    settling = Settling(settle_s=2.0)
    future = sighting(mtime_s=1e6)

    settling.is_settled(future, 100.0)
    settling.keep_only(set())
    assert not settling.is_settled(future, 103.0)
    settling.keep_only({future.path})
    assert settling.is_settled(future, 105.0)


@pytest.mark.parametrize("mtime_s", [100.0, 1e6])
def test_without_a_settling_time_every_file_is_ready(mtime_s: float) -> None:
    settling = Settling(settle_s=0)
    assert settling.is_settled(sighting(mtime_s=mtime_s), 100.0)
    assert settling.is_settled(sighting(mtime_s=mtime_s), 100.0)


# -- hashing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bytes", [0, 1, READ_BYTES, READ_BYTES + 1])
def test_a_file_is_hashed_and_copied_whole(tmp_path: Path, n_bytes: int) -> None:
    content = bytes(range(256)) * (n_bytes // 256 + 1)
    put(tmp_path, "a.wav", content=content[:n_bytes])

    found = hash_file(tmp_path / "a.wav", copy_to=tmp_path / "copy")
    assert found == hashlib.sha256(content[:n_bytes]).hexdigest()
    assert found == hash_file(tmp_path / "a.wav")
    assert (tmp_path / "copy").read_bytes() == content[:n_bytes]


def test_hashing_ends_when_it_is_told_to_stop(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", content=bytes(3 * READ_BYTES))
    asked = iter([False, True])

    assert hash_file(tmp_path / "a.wav", copy_to=tmp_path / "copy", should_stop=lambda: next(asked)) is None
    assert (tmp_path / "copy").stat().st_size == READ_BYTES


def test_a_file_that_cannot_be_read_is_bad_audio(tmp_path: Path) -> None:
    with pytest.raises(BadAudio, match="can't be read: no such file"):
        hash_file(tmp_path / "none.wav")
    with pytest.raises(BadAudio, match="can't be read: is a directory"):
        hash_file(tmp_path)


def test_a_copy_that_cannot_be_written_is_not_the_files_fault(tmp_path: Path) -> None:
    put(tmp_path, "a.wav")
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "a.wav", copy_to=tmp_path / "none" / "copy")


# -- moving ------------------------------------------------------------------------------------------


def test_a_free_name_is_the_name_itself_or_the_first_number_nobody_has(tmp_path: Path) -> None:
    wanted = tmp_path / "a b.wav"
    assert free_name(wanted) == wanted

    put(tmp_path, "a b.wav", "a b (2).wav")
    assert free_name(wanted) == tmp_path / "a b (3).wav"


def test_a_dangling_link_takes_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.wav").symlink_to(tmp_path / "nowhere")
    assert free_name(tmp_path / "a.wav") == tmp_path / "a (2).wav"


@pytest.mark.parametrize("raw", [b"x" * 251 + b".wav", b"\xff" * 251 + b".wav", b"x" * 255])
def test_a_free_name_of_the_longest_name_still_fits(tmp_path: Path, raw: bytes) -> None:
    name = os.fsdecode(raw)
    put(tmp_path, name)

    free = free_name(tmp_path / name)
    assert not free.exists()
    free.write_bytes(b"fits")
    assert len(os.fsencode(free.name)) == 255
    assert free.suffix == Path(name).suffix


def test_moving_aside_never_overwrites(tmp_path: Path) -> None:
    put(tmp_path, "done/a.wav", content=b"old")
    for n in (2, 3):
        put(tmp_path, "a.wav", content=b"new %d" % n)
        assert (
            move_aside(tmp_path / "a.wav", tmp_path / "done" / "a.wav") == tmp_path / "done" / f"a ({n}).wav"
        )

    assert (tmp_path / "done" / "a.wav").read_bytes() == b"old"
    assert (tmp_path / "done" / "a (3).wav").read_bytes() == b"new 3"
    assert not (tmp_path / "a.wav").exists()


def test_moving_aside_makes_the_folders_it_needs(tmp_path: Path) -> None:
    put(tmp_path, "album/a.wav", content=b"music")
    moved = move_aside(tmp_path / "album" / "a.wav", tmp_path / "done" / "album" / "a.wav")
    assert moved.read_bytes() == b"music"


def test_the_reason_stands_beside_the_file(tmp_path: Path) -> None:
    write_error(tmp_path / "a.wav", "is silent \udce9")
    assert (tmp_path / "a.wav.error.txt").read_text(encoding="utf-8") == "is silent \\udce9\n"


@pytest.mark.parametrize("raw", [b"x" * 251 + b".wav", b"\xc3\xa9" * 125 + b".wav", b"\xff" * 255])
def test_the_reason_of_the_longest_name_still_fits(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / os.fsdecode(raw)
    write_error(path, "why")

    assert error_file(path).read_text() == "why\n"
    assert os.fsencode(error_file(path).name).endswith(b".error.txt")
    assert len(os.fsencode(error_file(path).name)) <= 255
