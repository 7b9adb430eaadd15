"""Paths of buckets: what they look like, and how the folder of a program is told from one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import Config, Folders
from pipeline.errors import FolderUnusable
from pipeline.fs.bucket import BucketFiles, without_credentials
from pipeline.fs.files import bucket_path, is_in_bucket
from pipeline.fs.local import LocalFiles
from pipeline.fs.mounts import mounts_of
from pipeline.fs.names import printable
from pipeline.workspace import Workspace


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("s3://bucket", "s3:/bucket"),
        ("s3://bucket/", "s3:/bucket"),
        ("gs://bucket/a/b/", "gs:/bucket/a/b"),
        ("az://bucket/ä b", "az:/bucket/ä b"),
    ],
)
def test_a_url_of_a_bucket_has_a_path_and_is_shown_as_a_url(url: str, path: str) -> None:
    assert bucket_path(url) == Path(path)
    assert is_in_bucket(Path(path) / "x")
    assert printable(Path(path)) == url.rstrip("/")
    assert mounts_of(Path(path)) == []


@pytest.mark.parametrize("text", ["inbox", "/mnt/s3:/x", "s3:", "s3:/bucket", "s3:///x", "S3://bucket"])
def test_other_texts_are_folders(text: str) -> None:
    assert bucket_path(text) is None
    assert not is_in_bucket(Path("/home") / text)


@pytest.mark.parametrize(
    "folders",
    [
        {"inbox": "http://bucket/x"},
        {"outbox": "file:///tmp"},
        {"outbox": "s3://bucket/a/../b"},
        {"state": "s3://bucket/state"},
    ],
)
def test_other_urls_and_a_state_in_a_bucket_are_refused(folders: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate({"folders": folders})


def test_each_folder_is_in_a_bucket_or_on_the_disk(tmp_path: Path) -> None:
    workspace = Workspace.of(tmp_path, Folders(outbox="s3://bucket/out"))
    assert workspace.inbox_files == LocalFiles(tmp_path / "inbox")
    assert workspace.outbox_files == BucketFiles(Path("s3:/bucket/out"))
    assert workspace.disks == [tmp_path / "state"]
    assert workspace.files_at(tmp_path / "elsewhere") == LocalFiles(tmp_path / "elsewhere")


def test_an_inbox_and_an_outbox_in_one_another_are_refused_in_a_bucket_too(tmp_path: Path) -> None:
    with pytest.raises(FolderUnusable, match=r"s3://bucket/x/out\) and .* lie in one another"):
        Workspace.of(tmp_path, Folders(inbox="s3://bucket/x", outbox="s3://bucket/x/out"))


def test_workers_get_no_credentials_of_buckets() -> None:
    given = {"AWS_SECRET_ACCESS_KEY": "x", "GOOGLE_SERVICE_ACCOUNT": "x", "AZURE_STORAGE_ACCOUNT_KEY": "x"}
    kept = {"PATH": "/bin", "HF_HOME": "/hf"}
    assert without_credentials({**given, **kept}) == kept
