"""Two instances on one bucket: one works, whatever becomes of the other."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from drive import start, wait_until

if TYPE_CHECKING:
    from bucket_server import Bucket, BucketHome

pytestmark = pytest.mark.long  # true processes, and a package that only test-all installs


@pytest.fixture
def setup(bucket: Bucket, tmp_path: Path) -> BucketHome:
    from bucket_server import BucketHome

    return BucketHome.at(tmp_path / "home", bucket)


@pytest.fixture
def other(setup: BucketHome, tmp_path: Path) -> BucketHome:
    """Another state folder, as on another machine."""
    from bucket_server import BucketHome

    return BucketHome.at(tmp_path / "other", setup.bucket, has_tracks=False)


def test_a_second_owner_of_the_prefix_ends_with_3(setup: BucketHome, other: BucketHome) -> None:
    with start(setup.home, "watch") as child:
        wait_until(lambda: len(setup.bucket.manifests()) == 2, "both are done", child=child)
        ended = other.run("once")
        assert ended.code == 3
        assert "another instance (process " in ended.err
        child.send(signal.SIGTERM)
        assert child.ended() == 0, child.text()
    assert other.run("once").code == 0


def test_a_killed_owner_goes_on_at_once_and_another_one_after_the_lease(
    setup: BucketHome, other: BucketHome
) -> None:
    from bucket_server import aged

    with start(setup.home, "watch") as child:
        wait_until(lambda: len(setup.bucket.manifests()) == 2, "both are done", child=child)
        child.send(signal.SIGKILL)
        child.ended()
    assert other.run("once").code == 3
    with start(setup.home, "watch") as child:
        wait_until(lambda: "watching s3://" in child.text(), "the killed one is back", child=child)
        child.send(signal.SIGKILL)
        child.ended()

    aged(setup.bucket, "in/.lease", "out/.lease", by_s=60)

    assert other.run("once").code == 0


def test_an_owner_whose_lease_was_taken_over_ends_with_3(setup: BucketHome, other: BucketHome) -> None:
    from bucket_server import aged

    with start(setup.home, "watch") as child:
        wait_until(lambda: len(setup.bucket.listed("in/done")) == 2, "both are archived", child=child)
        child.send(signal.SIGSTOP)
        aged(setup.bucket, "in/.lease", "out/.lease", by_s=60)
        assert other.run("once").code == 0
        child.send(signal.SIGCONT)
        assert child.ended() == 3, child.text()
    assert "another instance has taken over s3://" in child.text()
