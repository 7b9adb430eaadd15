"""Files in a bucket: what is listed, copied, moved and written, and what it takes to lose a race."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.config import Intake
from pipeline.errors import BadAudio, BucketAway, FolderUnusable, LeaseLost
from pipeline.fs import bucket as module
from pipeline.fs.bucket import BucketFiles
from pipeline.fs.copying import FileChanged
from pipeline.fs.disk import environment_error
from pipeline.fs.files import holds
from pipeline.fs.lease import Lease
from pipeline.intake.scanner import BucketScanner

if TYPE_CHECKING:
    from bucket_server import Bucket, BucketServer

pytestmark = pytest.mark.long  # needs packages that only test-all installs


@pytest.fixture
def files(bucket: Bucket) -> BucketFiles:
    return BucketFiles(Path(f"s3:/{bucket.name}/in"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- listing -----------------------------------------------------------------------------------------


def test_a_scan_lists_what_may_be_a_track_by_its_key(files: BucketFiles, bucket: Bucket) -> None:
    tracks = ["a.wav", "album/done/x.wav", "done.wav", "doneness/y.wav", "e/ü +%20&.wav", "failed0", "z.wav"]
    others = ["done/old.wav", "done/sub/older.wav", "failed/bad.wav", ".lease", ".hidden/x.wav", "a.wav.part"]
    for name in [*tracks, *others, "notes.txt"]:
        bucket.put(f"in/{name}", name.encode())
    bucket.put("inner/no.wav", b"another prefix")

    found = list(BucketScanner(files, Intake()).scan())

    assert [scanned.display for scanned in found] == sorted(tracks)
    assert [scanned.identity.size for scanned in found] == [len(name.encode()) for name in sorted(tracks)]
    assert len({scanned.identity.etag for scanned in found}) == len(tracks)


def test_markers_are_no_tracks(files: BucketFiles, bucket: Bucket) -> None:
    bucket.fill(["in/a.wav", "in/a.wav.done"])
    scanner = BucketScanner(files, Intake(marker=".done"))
    assert [scanned.display for scanned in scanner.scan()] == ["a.wav"]


def test_the_marker_of_the_prefix_itself_is_no_file(files: BucketFiles, bucket: Bucket) -> None:
    bucket.fill(["in/", "in/a.wav"])  # as a console makes it for a new folder
    files.prepare()
    assert [entry.path.name for entry in files.entries(files.root)] == ["a.wav"]


def test_a_prefix_may_have_any_characters(bucket: Bucket) -> None:
    files = BucketFiles(Path(f"s3:/{bucket.name}/in #1?/50%25 ü"))
    bucket.put("in #1?/50%25 ü/a.wav", b"x")
    bucket.put("in ", b"another prefix")
    assert [entry.path for entry in files.entries(files.root)] == [files.root / "a.wav"]


def test_the_archive_is_not_listed_by_a_scan(
    files: BucketFiles, bucket: Bucket, server: BucketServer
) -> None:
    bucket.fill(["in/new.wav", *(f"in/done/{n:04}.wav" for n in range(1500))])  # more than a page
    assert len(list(files.entries(files.root))) == 1501
    assert [entry.path.name for entry in files.entries(files.root, without=("done",))] == ["new.wav"]


def test_folders_come_with_their_files(files: BucketFiles, bucket: Bucket) -> None:
    for name in ("a--1/x", "a--1/v/y", "album/b--2/x", ".gc/c--3/x", "loose"):
        bucket.put(f"in/{name}", b"x")
    found = {
        str(folder.relative_to(files.root)): [entry.path.name for entry in entries]
        for folder, entries in files.folders(lambda name: "--" in name)
        if not isinstance(entries, OSError)
    }
    assert found == {"a--1": ["y", "x"], "album/b--2": ["x"]}


# -- copies and moves --------------------------------------------------------------------------------


def test_an_object_is_copied_in_with_its_hash(files: BucketFiles, bucket: Bucket, tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000
    bucket.put("in/a.wav", content)
    entry = files.find(files.root / "a.wav")
    assert entry is not None
    assert files.copy_in(entry.path, tmp_path / "a", expected=entry.identity) == sha256(content)
    assert (tmp_path / "a").read_bytes() == content


def test_an_object_that_is_not_the_listed_one_is_not_taken(
    files: BucketFiles, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put("in/a.wav", b"one")
    entry = files.find(files.root / "a.wav")
    assert entry is not None
    bucket.put("in/a.wav", b"two")
    with pytest.raises(FileChanged):
        files.copy_in(entry.path, tmp_path / "a", expected=entry.identity)
    bucket.delete("in/a.wav")
    with pytest.raises(BadAudio, match="no such object"):
        files.copy_in(entry.path, tmp_path / "a", expected=entry.identity)


@pytest.mark.parametrize("parts", [False, True])
def test_a_move_takes_a_free_name_and_overwrites_nothing(
    files: BucketFiles, bucket: Bucket, *, parts: bool
) -> None:
    content = b"x" * (6 << 20)
    bucket.put("in/a.wav", content, parts=parts)
    bucket.put("in/done/a.wav", b"another one")
    path = files.root / "a.wav"

    moved = files.move_to_free_name(path, files.root / "done" / "a.wav", sha256=sha256(content))

    assert moved == files.root / "done" / "a (2).wav"
    assert bucket.listed() == ["in/done/a (2).wav", "in/done/a.wav"]
    assert bucket.get("in/done/a (2).wav") == content


@pytest.mark.parametrize("parts", [False, True])
def test_a_move_that_was_killed_after_the_copy_is_completed(
    files: BucketFiles, bucket: Bucket, *, parts: bool
) -> None:
    content = b"x" * (6 << 20)
    bucket.put("in/a.wav", content, parts=parts)
    bucket.put("in/done/a.wav", content)
    entry, copy = files.find(files.root / "a.wav"), files.find(files.root / "done" / "a.wav")
    assert entry is not None
    assert copy is not None
    assert (entry.identity == copy.identity) != parts
    assert holds(files, copy, entry.identity, sha256(content))

    assert files.move_to_free_name(entry.path, copy.path, sha256=sha256(content)) == copy.path

    assert bucket.listed() == ["in/done/a.wav"]


def test_metadata_of_others_says_nothing_about_the_content(files: BucketFiles, bucket: Bucket) -> None:
    content = b"x" * (6 << 20)
    path, target = files.root / "a.wav", files.root / "done" / "a.wav"
    bucket.put("in/a.wav", content, parts=True, attributes={"sha256": "eA=="})
    assert files.move_to_free_name(path, target, sha256=sha256(content)) == target


# -- writing -----------------------------------------------------------------------------------------


def test_what_is_written_carries_its_hash_and_a_copy_does_too(files: BucketFiles, bucket: Bucket) -> None:
    assert files.write(files.root / "a", b"content") == sha256(b"content")
    files.move(files.root / "a", files.root / "b")
    bucket.put("in/c", b"somebody's")
    assert files.sha256_of(files.root / "b") == sha256(b"content")
    assert files.sha256_of(files.root / "c") == sha256(b"somebody's")
    assert bucket.listed() == ["in/b", "in/c"]


def test_a_file_is_written_only_over_the_known_one(files: BucketFiles, bucket: Bucket) -> None:
    path = files.root / "manifest.json"
    files.write_over(path, b"1", None)
    known = files.find(path)
    files.write_over(path, b"1", None)  # as if the answer to the first had been lost
    with pytest.raises(LeaseLost, match="another instance"):
        files.write_over(path, b"2", None)
    files.write_over(path, b"2", known)
    with pytest.raises(LeaseLost):
        files.write_over(path, b"3", known)
    bucket.delete("in/manifest.json")
    with pytest.raises(LeaseLost):
        files.write_over(path, b"3", known)


def test_without_its_lease_an_owner_writes_nothing(files: BucketFiles, bucket: Bucket) -> None:
    lease, other = Lease(files, "one", lasts_s=-2.0), Lease(BucketFiles(files.root), "other")
    lease.take()
    other.take()  # as the first one has expired
    files.lease = lease
    lease.renew()
    path = files.root / "a.wav"
    for call in (
        lambda: files.write(path, b"x"),
        lambda: files.write_over(path, b"x", None),
        lambda: files.move(path, files.root / "b.wav"),
        lambda: files.move_to_free_name(path, files.root / "b.wav", sha256=""),
        lambda: files.delete(path),
        lambda: list(files.entries(files.root)),
    ):
        with pytest.raises(LeaseLost, match="has taken over"):
            call()
    assert bucket.listed() == []


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut before", "503", "412"])
def test_a_bucket_that_does_not_answer_is_away(
    server: BucketServer, monkeypatch: pytest.MonkeyPatch, bucket: Bucket, fault: str
) -> None:
    from bucket_proxy import proxy_to

    monkeypatch.setattr(module, "PAUSES_S", (0.0,))
    monkeypatch.setattr(module, "OBSTORE_RETRIES", {"max_retries": 0})
    with proxy_to(server.port, fault=fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        files = BucketFiles(Path(f"s3:/{bucket.name}/in"))
        path = files.root / "a.wav"
        for call in (
            files.prepare,
            lambda: files.find(path),
            lambda: files.read(path),
            lambda: files.write(path, b"x"),
            lambda: files.write_over(path, b"x", None),
            lambda: files.delete(path),
        ):
            with pytest.raises(BucketAway):
                call()


def test_what_is_wrong_with_one_object_is_no_fault_of_the_bucket(
    files: BucketFiles, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put("in/cold.wav", b"x", attributes={"Storage-Class": "GLACIER"})
    path = files.root / "cold.wav"
    for call in (lambda: files.copy_in(path, tmp_path / "a"), lambda: files.read(path)):
        with pytest.raises(OSError, match="has to be restored first") as caught:
            call()
        assert environment_error(caught.value) is None


def test_a_missing_bucket_is_no_missing_file(bucket: Bucket, tmp_path: Path) -> None:
    files = BucketFiles(Path("s3:/no-such-bucket/in"))
    path = files.root / "a.wav"
    for call in (
        lambda: files.find(path),
        lambda: files.read(path),
        lambda: files.copy_in(path, tmp_path / "a"),
        lambda: list(files.entries(files.root)),
        lambda: files.write(path, b"x"),
    ):
        with pytest.raises(FolderUnusable, match="there is no such bucket"):
            call()
