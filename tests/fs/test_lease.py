"""The lease on a bucket's prefix, on a bucket that is a dictionary and a clock that the test sets."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.config import Folders
from pipeline.errors import AlreadyRunning, BucketAway, LeaseLost
from pipeline.fs.copying import FileIdentity
from pipeline.fs.files import Entry
from pipeline.fs.lease import LASTS_S, Lease
from pipeline.workspace import Workspace


@dataclass
class Memory:
    """As much of `BucketFiles` as a lease needs."""

    root: Path = Path("s3:/bucket/out")
    url: str = "s3://bucket/out"
    now: float = 1000.0
    is_away: bool = False
    objects: dict[Path, tuple[bytes, Entry]] = field(default_factory=dict)
    lease: Lease | None = None

    def check_conditions(self, name: str) -> float:
        return self.now

    def find(self, path: Path) -> Entry | None:
        return self.objects[path][1] if path in self.objects else None

    def read(self, path: Path) -> bytes:
        return self.objects[path][0]

    def write_if(self, path: Path, content: bytes, known: FileIdentity | None) -> FileIdentity | None:
        if self.is_away:
            raise BucketAway("it is away")
        found = self.find(path)
        if (found.identity if found else None) != known:
            return None
        identity = FileIdentity(len(content), 0, 0, str(hash(content)))
        self.objects[path] = content, Entry(path, identity, self.now, self.now)
        return identity


def a_lease(memory: Memory, owner: str) -> Lease:
    return Lease(memory, owner, clock=lambda: memory.now)  # type: ignore[arg-type]


def test_a_second_owner_is_refused_until_the_lease_has_expired() -> None:
    memory = Memory()
    first, second = a_lease(memory, "first"), a_lease(memory, "second")
    first.take()
    memory.now += LASTS_S
    with pytest.raises(AlreadyRunning, match=r"another instance \(process \d+ on .*\) uses s3://bucket/out"):
        second.take()
    memory.now += 2
    second.take()
    second.check()


def test_a_renewed_lease_does_not_expire() -> None:
    memory = Memory()
    first, second = a_lease(memory, "first"), a_lease(memory, "second")
    first.take()
    for _ in range(5):
        memory.now += LASTS_S - 1
        first.check()
        first.renew()
    with pytest.raises(AlreadyRunning):
        second.take()


def test_an_owner_takes_what_it_held_before_a_kill() -> None:
    memory = Memory()
    a_lease(memory, "first").take()
    a_lease(memory, "first").take()


def test_a_copy_of_a_state_folder_is_another_owner(tmp_path: Path) -> None:
    folders = Folders(inbox="s3://bucket/in")
    (tmp_path / "home" / "state").mkdir(parents=True)
    first = Workspace.of(tmp_path / "home", folders)._owner()
    shutil.copytree(tmp_path / "home", tmp_path / "copy")
    assert Workspace.of(tmp_path / "home", folders)._owner() == first
    assert Workspace.of(tmp_path / "copy", folders)._owner() != first


def test_an_owner_that_was_replaced_must_not_write() -> None:
    memory = Memory()
    first, second = a_lease(memory, "first"), a_lease(memory, "second")
    first.take()
    memory.now += LASTS_S + 2
    second.take()
    with pytest.raises(BucketAway):
        first.check()
    first.renew()
    with pytest.raises(LeaseLost):
        first.check()
    first.renew()
    second.renew()
    second.check()


def test_an_owner_that_cannot_renew_stops_writing_until_it_can() -> None:
    memory = Memory()
    first = a_lease(memory, "first")
    first.take()
    memory.is_away = True
    first.renew()
    first.check()
    memory.now += LASTS_S + 2
    first.renew()
    with pytest.raises(BucketAway, match="could not be renewed"):
        first.check()
    memory.is_away = False
    first.renew()
    first.check()


def test_a_lease_that_was_given_back_is_free_at_once() -> None:
    memory = Memory()
    with a_lease(memory, "first").held():
        assert memory.lease is not None
    assert memory.lease is None
    a_lease(memory, "second").take()
