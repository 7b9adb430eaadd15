"""Many small files at once, without events that announce them: one scan finds them all.

bench/queue_cost.py measures the time; here the scans are counted.
"""

from __future__ import annotations

import pytest
from drive import configure_for_small_files, counts, is_idle, start, stop, wait_until, write_small_files
from home_folder import Home, sha256_of

pytestmark = pytest.mark.long  # true processes


def scans_that_found_files(home: Home) -> int:
    """How many scans took files in: one, plus the files taken in after work on others had begun."""
    store = home.store()
    queued = sorted(track.queued_at for track in store.tracks())
    began = sorted(a.started_at for track in store.tracks() for a in store.attempts(track.sha256))
    store.close()
    return 1 + sum(at > began[0] for at in queued)


@pytest.mark.parametrize("n", [30, pytest.param(10_000, marks=pytest.mark.torture)])
def test_all_of_a_folder_moved_in_unannounced_is_found_by_one_scan_and_made_once(home: Home, n: int) -> None:
    configure_for_small_files(home)
    write_small_files(home.folder / "drop", n)
    with start(home, "watch", engines=True) as child:
        wait_until(lambda: counts(home), "the program is up", child=child)
        (home.folder / "drop").rename(home.inbox / "drop")  # one rename: all are there or none
        wait_until(lambda: is_idle(home, done=n), f"{n} are done", tries=40 * n, child=child)
        assert stop(child) == 0, child.text()
    assert counts(home) == {"queued": 0, "running": 0, "done": n, "failed": 0}
    assert scans_that_found_files(home) == 1
    assert len(home.folders) == n
    done = {sha256_of(path) for path in (home.inbox / "done" / "drop").iterdir()}
    assert len(done) == n
    store = home.store()
    assert {track.sha256 for track in store.tracks()} == done
    store.close()


@pytest.mark.torture
@pytest.mark.parametrize("n", [10_000])
def test_files_that_lie_there_at_the_start_are_found_by_the_first_scan(home: Home, n: int) -> None:
    configure_for_small_files(home)
    write_small_files(home.inbox / "drop", n)
    with start(home, "once", engines=True) as child:
        assert child.ended(tries=40 * n + 1200) == 0, child.text()
    assert counts(home) == {"queued": 0, "running": 0, "done": n, "failed": 0}
    assert scans_that_found_files(home) == 1
