"""What a scan of a folder finds, and what it ignores."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from other_user import AsOtherUser

from pipeline.config import Intake
from pipeline.fs.copying import FileIdentity
from pipeline.intake.scanner import MAX_DEPTH, Scanner
from pipeline.workspace import InputFolder

WAV_HEAD = b"RIFF\x24\x00\x00\x00WAVEfmt "
ROOT = Path(__file__).parents[2]


def put(root: Path, *names: str, content: bytes = WAV_HEAD) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def scanner_of(
    root: Path, *, is_inbox: bool = True, ignore: tuple[str, ...] = (), **settings: Any
) -> Scanner:
    return Scanner(InputFolder(root, is_inbox=is_inbox), Intake(ignore=ignore, **settings))


def found_names(root: Path, *ignore: str, is_inbox: bool = True) -> list[str]:
    return [found.display for found in scanner_of(root, ignore=ignore, is_inbox=is_inbox).scan()]


def marked(root: Path, marker: str | None = ".done") -> dict[str, bool]:
    return {found.display: found.marked for found in scanner_of(root, marker=marker).scan()}


def followed(root: Path) -> list[str]:
    return [found.display for found in scanner_of(root, follow_symlinks=True).scan()]


# -- what a scan finds --------------------------------------------------------------------------------


def test_a_scan_finds_files_below_folders_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path, "b.wav", "a.wav", "album/2.wav", "album/1.wav", "c.wav", "album/cd 2/3.wav")
    assert found_names(tmp_path) == [
        "a.wav",
        "album/1.wav",
        "album/2.wav",
        "album/cd 2/3.wav",
        "b.wav",
        "c.wav",
    ]


def test_a_scanned_file_has_the_size_and_times_of_the_file(tmp_path: Path) -> None:
    put(tmp_path, "album/a.wav", content=b"12345")
    path = tmp_path / "album" / "a.wav"
    found = path.stat()

    (scanned,) = scanner_of(tmp_path).scan()
    assert (scanned.path, scanned.real_path) == (path, path)
    assert scanned.identity == FileIdentity(5, found.st_mtime_ns, found.st_ino)
    assert (scanned.ctime_ns, scanned.device) == (found.st_ctime_ns, found.st_dev)
    assert scanned.marked


def test_special_files_are_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    assert found_names(tmp_path) == []
    assert found_names(tmp_path, is_inbox=False) == []


def test_done_and_failed_are_reserved_at_the_top_of_the_inbox_only(tmp_path: Path) -> None:
    put(tmp_path, "done/a.wav", "failed/b.wav", "album/done/c.wav")

    assert found_names(tmp_path) == ["album/done/c.wav"]
    assert found_names(tmp_path, is_inbox=False) == ["album/done/c.wav", "done/a.wav", "failed/b.wav"]


def test_a_folder_that_done_is_a_link_to_is_not_scanned(tmp_path: Path) -> None:
    put(tmp_path, "archive/a.wav", "b.wav")
    (tmp_path / "done").symlink_to(tmp_path / "archive")
    assert found_names(tmp_path) == ["b.wav"]


def test_a_folder_named_like_a_file_is_scanned_into(tmp_path: Path) -> None:
    put(tmp_path, "x.wav/inner.wav")
    assert found_names(tmp_path) == ["x.wav/inner.wav"]
    assert found_names(tmp_path, is_inbox=False) == ["x.wav/inner.wav"]


def test_what_is_not_audio_is_seen_in_the_inbox_but_not_in_another_folder(tmp_path: Path) -> None:
    put(tmp_path, "letter.doc", content=b"Dear all, this is no music")
    put(tmp_path, "named-wrong.bin")
    put(tmp_path, "text.mp3", content=b"hello")

    assert found_names(tmp_path) == ["letter.doc", "named-wrong.bin", "text.mp3"]
    assert found_names(tmp_path, is_inbox=False) == ["named-wrong.bin", "text.mp3"]


def test_a_name_that_is_not_text_is_seen_and_shown_in_one_line(tmp_path: Path) -> None:
    raw = b"caf\xe9\n\xf0\x9f\x8e\xb5 'q\".wav"
    put(tmp_path, os.fsdecode(raw))

    (found,) = scanner_of(tmp_path).scan()
    assert os.fsencode(found.path.name) == raw
    assert found.path.exists()
    assert found.display == "caf\\xe9\\n🎵 'q\".wav"


def test_hard_links_are_two_files(tmp_path: Path) -> None:
    put(tmp_path, "a.wav")
    (tmp_path / "b.wav").hardlink_to(tmp_path / "a.wav")
    assert found_names(tmp_path) == ["a.wav", "b.wav"]


def test_a_moved_in_tree_is_found_by_the_next_scan(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "1/2/3/a.wav", "1/b.wav")
    inbox = tmp_path / "inbox"
    put(inbox, "c.wav")
    scanner = scanner_of(inbox)
    assert [found.display for found in scanner.scan()] == ["c.wav"]
    (tmp_path / "elsewhere").rename(inbox / "tree")

    assert [found.display for found in scanner.scan()] == ["c.wav", "tree/1/2/3/a.wav", "tree/1/b.wav"]


def test_every_one_of_many_files_is_found_once(tmp_path: Path) -> None:
    names = [f"{n:05}.wav" for n in range(1000)]
    for name in names:
        (tmp_path / name).touch()
    assert found_names(tmp_path) == names


# -- what goes wrong during a scan -------------------------------------------------------------------


def test_a_folder_that_vanishes_during_a_scan_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.wav", "b/1.wav", "c.wav")
    scanned_files = scanner_of(tmp_path).scan()
    found = [next(scanned_files).display]
    shutil.rmtree(tmp_path / "b")

    assert found + [scanned.display for scanned in scanned_files] == ["a.wav", "c.wav"]
    assert caplog.records == []


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, as_other_user: AsOtherUser
) -> None:
    put(tmp_path, "a.wav", "closed/1.wav", "z.wav")
    (tmp_path / "closed").chmod(0)
    scanner = scanner_of(Path())

    with as_other_user(tmp_path):
        for _ in range(2):
            assert [found.display for found in scanner.scan()] == ["a.wav", "z.wav"]
    (tmp_path / "closed").chmod(0o700)
    assert caplog.messages == ["closed: can't be read: permission denied"]


@pytest.mark.parametrize(("failing", "expected"), [(1, None), (2, ["b.wav", "c/2.wav"])])
def test_a_failing_device_hides_one_folder_and_is_an_error_of_the_top_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, expected: list[str] | None
) -> None:
    put(tmp_path, "a/1.wav", "b.wav", "c/2.wav")
    real, calls = os.listdir, iter(range(1, 10))

    def listdir(fd: int) -> list[str]:
        if next(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd)

    monkeypatch.setattr(os, "listdir", listdir)
    if expected is None:
        with pytest.raises(OSError, match="Input/output error"):
            found_names(tmp_path)
    else:
        assert found_names(tmp_path) == expected


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        found_names(tmp_path / "none")


def test_a_scan_leaves_no_descriptor_open(tmp_path: Path) -> None:
    put(tmp_path, "a/b/c/d.wav", "a/e.wav", "f.wav")
    (tmp_path / "g").symlink_to("a/b")
    scanner = scanner_of(tmp_path, follow_symlinks=True)
    before = sorted(os.listdir("/dev/fd"))  # noqa: PTH208
    list(scanner.scan())
    half = scanner.scan()
    next(half)
    half.close()
    assert sorted(os.listdir("/dev/fd")) == before  # noqa: PTH208


def test_folders_too_deep_for_their_files_to_be_opened_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "z.wav")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):  # 20 × 250 bytes: more than a path can have
        os.mkdir("d" * 250, dir_fd=here)
        here, above = os.open("d" * 250, os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)

    assert found_names(tmp_path) == ["z.wav"]
    (message,) = caplog.messages
    assert message.endswith("is nested too deeply, so its files are left alone")


def test_folders_are_scanned_two_hundred_levels_deep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deep = "/".join(["d"] * MAX_DEPTH)
    put(tmp_path, f"{deep}/a.wav", f"{deep}/d/b.wav")
    assert found_names(tmp_path) == [f"{deep}/a.wav"]
    assert len(caplog.messages) == 1


# -- what is ignored ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        ".hidden.wav", "._a.wav", ".a.wav.Kx81Qz", ".syncthing.a.wav.tmp", ".pending-17-a.wav", ".nfs0001",
        "a.wav.part", "a.WAV.PART", "a.wav.1a2b3c4d.partial", "a.wav.filepart", "a.wav.crdownload",
        "Unconfirmed 12.crdownload", "a.wav.opdownload", "a.wav.aria2", "a.wav.tmp", "a.TEMP", "a.wav~", "~",
        "~$a.wav", "~syncthing~a.wav.tmp", "a.wav.!sync", "a.wav.bts", "a.wav.!qB", "a.wav.fdmdownload",
        "lost+found", "$Recycle.Bin",
    ],
)  # fmt: skip
def test_unfinished_copies_and_downloads_are_never_found(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"album/{name}", "other.wav")
    assert found_names(tmp_path) == ["other.wav"]
    assert found_names(tmp_path, is_inbox=False) == ["other.wav"]


@pytest.mark.parametrize(
    "folder",
    [
        ".stversions", ".stfolder", ".dropbox.cache", ".sync", ".Trash-1000", ".~tmp~", ".git", "@eaDir",
        "#recycle", "#Recycle", "@Recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information",
        "lost+found", "__MACOSX", "a.wav.download", "~snapshot",
    ],
)  # fmt: skip
def test_folders_of_sync_tools_and_systems_are_never_scanned(tmp_path: Path, folder: str) -> None:
    put(tmp_path, f"{folder}/a.wav", f"album/{folder}/deeper/b.wav", "other.wav")
    assert found_names(tmp_path) == ["other.wav"]


@pytest.mark.parametrize(
    "name",
    ["a.b.wav", "a~b.wav", "part.wav", "tmp", "temp.wav", "@home.wav", "#1 hit.wav", "$.wav", "a (2).wav",
     "~a.wav", "done.wav", "a.partner", "a.sync-conflict-20260101-ABC.wav", "-a.wav", "recycle.wav"],
)  # fmt: skip
def test_names_that_only_resemble_those_are_found(tmp_path: Path, name: str) -> None:
    put(tmp_path, name)
    assert found_names(tmp_path) == [name]


def test_the_users_patterns_match_files_and_folders_whatever_the_case(tmp_path: Path) -> None:
    put(tmp_path, "Thumbs.db", "COVER.jpg", "skip/c.wav", "album/Skip/c.wav", "d.wav", "[x] e.wav")
    assert found_names(tmp_path, "thumbs.DB", "*.jpg", "skip/") == ["[x] e.wav", "d.wav"]


def test_a_pattern_with_a_slash_matches_the_path_below_the_folder(tmp_path: Path) -> None:
    put(tmp_path, "stems/a.wav", "album/stems/b.wav", "album/c.wav", "old/x/d.wav")

    assert found_names(tmp_path, "/stems") == ["album/c.wav", "album/stems/b.wav", "old/x/d.wav"]
    assert found_names(tmp_path, "*/stems") == ["album/c.wav", "old/x/d.wav", "stems/a.wav"]
    assert found_names(tmp_path, "OLD/*/d.*") == ["album/c.wav", "album/stems/b.wav", "stems/a.wav"]


def test_a_pattern_matches_however_the_accents_are_written(tmp_path: Path) -> None:
    put(tmp_path, "de\u0301mo.wav", "a.wav")
    assert found_names(tmp_path, "D\u00c9MO*") == ["a.wav"]


# -- markers, and the tools that write in place ------------------------------------------------------


def test_with_a_marker_files_wait_for_theirs_and_markers_are_never_seen(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "a.wav.done", "b.wav", "c.done", "album/d.wav", "album/d.wav.done", "e.wav.DONE")
    assert marked(tmp_path) == {"a.wav": True, "album/d.wav": True, "b.wav": False, "e.wav.DONE": False}


def test_a_folder_named_like_a_marker_is_scanned_into(tmp_path: Path) -> None:
    put(tmp_path, "album.done/a.wav", "album.done/a.wav.done")
    assert marked(tmp_path) == {"album.done/a.wav": True}


def test_a_marker_marks_even_if_its_ending_is_ignored(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "a.wav.txt", "b.wav")
    scanner = scanner_of(tmp_path, ignore=("*.txt",), marker=".txt")
    assert [(found.display, found.marked) for found in scanner.scan()] == [
        ("a.wav", True),
        ("b.wav", False),
    ]


def test_without_a_marker_in_the_settings_every_file_is_marked(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "a.wav.done")
    assert marked(tmp_path, marker=None) == {"a.wav": True, "a.wav.done": True}


def test_a_file_that_a_download_tool_fills_in_place_waits_until_its_own_file_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.wav", "a.wav.aria2", "b.wav")
    scanner = scanner_of(tmp_path)
    for _ in range(2):
        assert {found.display: found.marked for found in scanner.scan()} == {"a.wav": False, "b.wav": True}
    assert caplog.messages == ["a.wav: left alone while a.wav.aria2 says that it is being written"]

    (tmp_path / "a.wav.aria2").unlink()
    assert [found.marked for found in scanner.scan()] == [True, True]


def test_the_empty_placeholder_of_a_download_waits_but_a_file_beside_an_old_part_does_not(
    tmp_path: Path,
) -> None:
    put(tmp_path, "a.wav", content=b"")
    put(tmp_path, "a.wav.part", "b.wav", "b.wav.part")
    assert marked(tmp_path, marker=None) == {"a.wav": False, "b.wav": True}


# -- symbolic links ----------------------------------------------------------------------------------


def inbox_with_links(tmp_path: Path) -> Path:
    put(tmp_path / "elsewhere", "a.wav")
    inbox = tmp_path / "inbox"
    put(inbox, "real.wav", ".store/s.wav", ".store/more/t.wav", "done/d.wav")
    (inbox / "out.wav").symlink_to(tmp_path / "elsewhere" / "a.wav")
    (inbox / "out").symlink_to(tmp_path / "elsewhere")
    (inbox / "dangling.wav").symlink_to(inbox / "nowhere")
    return inbox


def test_links_are_left_alone_and_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inbox = inbox_with_links(tmp_path)
    scanner = scanner_of(inbox)
    for _ in range(3):
        assert [found.display for found in scanner.scan()] == ["real.wav"]
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "dangling.wav: is a symbolic link",
        "out: is a symbolic link",
        "out.wav: is a symbolic link",
    ]

    caplog.clear()
    (inbox / "out").unlink()
    list(scanner.scan())
    (inbox / "out").symlink_to(tmp_path / "elsewhere")
    list(scanner.scan())
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_followed_links_never_lead_outside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inbox = inbox_with_links(tmp_path)
    (inbox / "hop.wav").symlink_to(inbox / "out" / "a.wav")
    (inbox / "up").symlink_to("../elsewhere")
    (inbox / "beside.wav").symlink_to("../inbox-2/b.wav")
    put(tmp_path / "inbox-2", "b.wav")

    assert followed(inbox) == ["real.wav"]
    assert sum(message.endswith("leads out of the folder, left alone") for message in caplog.messages) == 5
    assert "dangling.wav: is a symbolic link whose target can't be read" in caplog.messages


def test_a_followed_link_shows_its_own_name_and_where_the_file_is(tmp_path: Path) -> None:
    inbox = inbox_with_links(tmp_path)
    (inbox / "song.wav").symlink_to(".store/s.wav")
    (inbox / "album").symlink_to(".store/more")

    found = {each.display: each for each in scanner_of(inbox, follow_symlinks=True).scan()}
    assert list(found) == ["real.wav", "album/t.wav", "song.wav"]
    assert found["song.wav"].path == inbox / "song.wav"
    assert found["song.wav"].real_path == inbox / ".store" / "s.wav"
    assert found["album/t.wav"].real_path == inbox / ".store" / "more" / "t.wav"
    assert found["song.wav"].identity.inode == (inbox / ".store" / "s.wav").stat().st_ino


def test_followed_links_find_no_file_twice_and_end_in_circles(tmp_path: Path) -> None:
    put(tmp_path, "album/a.wav", "z/b.wav", ".store/s.wav")
    (tmp_path / "0-again.wav").symlink_to("album/a.wav")
    (tmp_path / "0-album").symlink_to("album")
    (tmp_path / "album" / "up").symlink_to("..")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / ".store" / "back").symlink_to("../.store")
    (tmp_path / "s1").symlink_to(".store")
    (tmp_path / "s2").symlink_to(".store")
    (tmp_path / "s3.wav").symlink_to("s1/s.wav")
    put(tmp_path, ".t.wav")
    (tmp_path / "t1.wav").symlink_to(".t.wav")
    (tmp_path / "t2.wav").symlink_to(".t.wav")

    assert followed(tmp_path) == ["album/a.wav", "z/b.wav", "s1/s.wav", "t1.wav"]


def test_followed_links_do_not_lead_into_the_archive(tmp_path: Path) -> None:
    put(tmp_path, "done/a.wav", "failed/b.wav")
    (tmp_path / "again").symlink_to("done")
    (tmp_path / "b.wav").symlink_to("failed/b.wav")
    assert followed(tmp_path) == []


def test_a_folder_swapped_for_a_link_in_the_middle_of_a_scan_leads_nowhere(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "b/secret.wav")
    inbox = tmp_path / "inbox"
    put(inbox, "a/0.wav", "a/b/1.wav", "c.wav")

    for follow_symlinks in (False, True):
        scanned_files = scanner_of(inbox, follow_symlinks=follow_symlinks).scan()
        found = [next(scanned_files).display]
        (inbox / "a").rename(tmp_path / "was")
        (inbox / "a").symlink_to(tmp_path / "elsewhere")
        found += [scanned.display for scanned in scanned_files]
        assert found == ["a/0.wav", "a/b/1.wav", "c.wav"]  # of the folder that was there, not of the other
        (inbox / "a").unlink()
        (tmp_path / "was").rename(inbox / "a")
