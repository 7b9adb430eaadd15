"""Copies with a hash, and moves that never overwrite a file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pipeline.errors import BadAudio
from pipeline.fs.copying import (
    READ_BYTES,
    FileChanged,
    FileIdentity,
    WriteFailed,
    copy_in,
    error_path,
    free_name,
    hash_file,
    move_to_free_name,
)
from pipeline.fs.local import LocalFiles


def put(folder: Path, *names: str, content: bytes = b"sound") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# -- copying -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bytes", [0, 1, READ_BYTES, READ_BYTES + 1])
def test_a_file_is_copied_completely_under_the_hash_of_the_copy(tmp_path: Path, n_bytes: int) -> None:
    content = (bytes(range(256)) * (n_bytes // 256 + 1))[:n_bytes]
    put(tmp_path, "a.wav", content=content)

    found = copy_in(tmp_path / "a.wav", tmp_path / "copy")

    assert found == hashlib.sha256(content).hexdigest() == hash_file(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_copying_ends_when_it_is_asked_to_stop(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", content=bytes(3 * READ_BYTES))
    asked = iter([False, True])

    assert copy_in(tmp_path / "a.wav", tmp_path / "copy", should_stop=lambda: next(asked)) is None
    assert (tmp_path / "copy").stat().st_size == READ_BYTES


def test_a_file_that_is_not_the_expected_one_any_more_is_not_taken(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "b.wav")
    expected = FileIdentity.of((tmp_path / "a.wav").stat())
    (tmp_path / "b.wav").replace(tmp_path / "a.wav")

    with pytest.raises(FileChanged):
        copy_in(tmp_path / "a.wav", tmp_path / "copy", expected=expected)


def test_a_file_that_is_written_to_while_it_is_copied_is_not_taken(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", content=bytes(2 * READ_BYTES))

    def append() -> bool:
        with (tmp_path / "a.wav").open("ab") as file:
            file.write(b"more")
        return False

    with pytest.raises(FileChanged):
        copy_in(tmp_path / "a.wav", tmp_path / "copy", should_stop=append)


def test_a_file_that_is_replaced_while_it_is_copied_is_copied_as_it_was(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", content=b"old" * READ_BYTES)
    put(tmp_path, "b.wav", content=b"new")

    def replace() -> bool:
        if (tmp_path / "b.wav").exists():
            (tmp_path / "b.wav").replace(tmp_path / "a.wav")
        return False

    assert copy_in(tmp_path / "a.wav", tmp_path / "copy", should_stop=replace) is not None
    assert (tmp_path / "copy").read_bytes() == b"old" * READ_BYTES


def test_a_link_is_not_followed_unless_asked(tmp_path: Path) -> None:
    put(tmp_path, "a.wav")
    (tmp_path / "link.wav").symlink_to(tmp_path / "a.wav")

    with pytest.raises(OSError, match="symbolic links"):
        copy_in(tmp_path / "link.wav", tmp_path / "copy")
    assert copy_in(tmp_path / "link.wav", tmp_path / "copy", follow=True) == hash_file(tmp_path / "a.wav")


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(FileChanged):
        copy_in(tmp_path / "a.wav", tmp_path / "copy")


def test_a_file_that_cannot_be_read_is_bad_audio(tmp_path: Path) -> None:
    with pytest.raises(BadAudio, match="can't be read: no such file"):
        copy_in(tmp_path / "none.wav", tmp_path / "copy")


def test_a_copy_that_cannot_be_written_is_not_the_files_fault(tmp_path: Path) -> None:
    put(tmp_path, "a.wav")
    with pytest.raises(WriteFailed):
        copy_in(tmp_path / "a.wav", tmp_path / "none" / "copy")


# -- moving ------------------------------------------------------------------------------------------


def test_a_free_name_is_the_name_itself_or_the_first_unused_number(tmp_path: Path) -> None:
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


def test_moving_to_a_free_name_never_overwrites(tmp_path: Path) -> None:
    put(tmp_path, "done/a.wav", content=b"old")
    for n in (2, 3):
        put(tmp_path, "a.wav", content=b"new %d" % n)
        assert (
            move_to_free_name(tmp_path / "a.wav", tmp_path / "done" / "a.wav")
            == tmp_path / "done" / f"a ({n}).wav"
        )

    assert (tmp_path / "done" / "a.wav").read_bytes() == b"old"
    assert (tmp_path / "done" / "a (3).wav").read_bytes() == b"new 3"
    assert not (tmp_path / "a.wav").exists()


def test_moving_to_a_free_name_makes_the_folders_it_needs(tmp_path: Path) -> None:
    put(tmp_path, "album/a.wav", content=b"music")
    moved = move_to_free_name(tmp_path / "album" / "a.wav", tmp_path / "done" / "album" / "a.wav")
    assert moved.read_bytes() == b"music"


def test_the_reason_is_written_beside_the_file(tmp_path: Path) -> None:
    LocalFiles(tmp_path).note(error_path(tmp_path / "a.wav"), "is silent \udce9\n")
    assert (tmp_path / "a.wav.error.txt").read_text(encoding="utf-8") == "is silent \\udce9\n"


@pytest.mark.parametrize("raw", [b"x" * 251 + b".wav", b"\xc3\xa9" * 125 + b".wav", b"\xff" * 255])
def test_the_reason_of_the_longest_name_still_fits(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / os.fsdecode(raw)
    LocalFiles(tmp_path).note(error_path(path), "why\n")

    assert error_path(path).read_text() == "why\n"
    assert os.fsencode(error_path(path).name).endswith(b".error.txt")
    assert len(os.fsencode(error_path(path).name)) <= 255
