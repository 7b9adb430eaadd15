"""An interrupted variation is resumed where it was, with the same result."""

from __future__ import annotations

import logging
import shutil
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from musicgen_setup import generator_with, never, results_of
from set_clock import SetClock
from tones import RequestFn

from pipeline.engines.base import EngineSettings
from pipeline.engines.musicgen.savepoints import BucketSavepoints, Savepoints, savepoints_for
from pipeline.errors import Stopped
from pipeline.records import Failure, VariationRequest

if TYPE_CHECKING:
    from bucket_server import Bucket

pytestmark = pytest.mark.long  # half a minute together


def interrupted(engine: Any, request: VariationRequest, steps: int) -> None:
    """Stop a request after so many steps."""
    seen: list[int] = []
    results = engine.generate(
        [request], progress=lambda *step: seen.append(step[1]), should_stop=lambda: len(seen) >= steps
    )
    with pytest.raises(Stopped):
        next(results)


def picks(done: list[int]) -> int:
    """How many steps picked tokens, by the calls of `progress`.

    Those that report more than one frame are for blocks of known steps, of which the last picks tokens, too.
    The last call of all is for the decoded sound.
    """
    is_block = [now - before > 1 for before, now in pairwise([0, *done[:-1]])]
    return is_block.count(False) + any(is_block)


def resumed(engine: Any, request: VariationRequest) -> tuple[np.ndarray, int]:
    """The samples, and how many steps were made for them."""
    seen: list[int] = []
    (result,) = engine.generate([request], progress=lambda *step: seen.append(step[1]), should_stop=never)
    return result.audio.samples, picks(seen)


@pytest.fixture(scope="module", params=["int8", pytest.param("float32", marks=pytest.mark.long)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.long), 3.0])
def test_a_stopped_request_is_resumed_with_the_same_result(
    musicgen: Any, request_for: RequestFn, tmp_path: Path, kind: str, guidance: float
) -> None:
    request = request_for(duration_s=2.0, guidance=guidance)
    (whole,) = results_of(generator_with(musicgen.checkpoint, kind), request).values()
    interrupted(generator_with(musicgen.checkpoint, kind, saved=Savepoints(tmp_path)), request, 60)
    assert len(list(tmp_path.iterdir())) == 1
    again = generator_with(musicgen.checkpoint, kind, saved=Savepoints(tmp_path))
    samples, steps = resumed(again, request)
    assert steps == 103 - 60
    assert samples.tobytes() == whole.audio.samples.tobytes()
    assert not list(tmp_path.iterdir())


def test_a_request_stopped_in_its_second_window_is_resumed(
    short_musicgen: Any, request_for: RequestFn, tmp_path: Path
) -> None:
    """Windows of 3 s with a stride of 1.8 s."""
    checkpoint, request = short_musicgen.checkpoint, request_for(duration_s=5.0, guidance=1.0)
    (whole,) = results_of(generator_with(checkpoint, "int8"), request).values()
    interrupted(generator_with(checkpoint, "int8", saved=Savepoints(tmp_path)), request, 180)
    samples, steps = resumed(generator_with(checkpoint, "int8", saved=Savepoints(tmp_path)), request)
    assert steps < 100
    assert samples.tobytes() == whole.audio.samples.tobytes()


def test_a_kill_costs_what_came_after_the_last_savepoint(
    musicgen: Any, request_for: RequestFn, tmp_path: Path
) -> None:
    """A copy of the file as it is after 150 steps: what a kill would leave. Every 100 steps are saved."""
    request, left = request_for(duration_s=4.0, guidance=1.0), tmp_path / "left"
    left.mkdir()
    (tmp_path / "live").mkdir()

    def progress(request_id: str, done: int, total: int) -> None:
        if done == 150:
            for path in (tmp_path / "live").iterdir():
                shutil.copy(path, left)

    engine = generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path / "live"))
    (whole,) = engine.generate([request], progress=progress, should_stop=never)
    samples, steps = resumed(generator_with(musicgen.checkpoint, "int8", saved=Savepoints(left)), request)
    assert steps == 203 - 100
    assert samples.tobytes() == whole.audio.samples.tobytes()


@pytest.mark.parametrize(
    ("on_gpu", "expected"), [(False, [100, 200, 300, 400, 500, 600, 603]), (True, [500, 603])]
)
def test_a_gpu_waits_for_fewer_savepoints(
    musicgen: Any, request_for: RequestFn, on_gpu: bool, expected: list[int]
) -> None:
    saved = list[int]()

    class Counted(Savepoints):
        def save(self, identity: str, codes: Any) -> None:
            saved.append(steps[-1])

    engine = generator_with(musicgen.checkpoint, "int8", saved=Counted(None))
    engine.on_gpu = on_gpu
    steps = list[int]()
    asked = request_for(duration_s=12.0, guidance=1.0)
    list(engine.run([asked], lambda name, done, total: steps.append(done), never))
    assert saved == [min(step, 600) for step in expected]


def test_requests_that_finish_together_are_all_saved_before_the_first_is_decoded(
    musicgen: Any, request_for: RequestFn, tmp_path: Path
) -> None:
    engine = generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path))
    finished = engine.run([request_for(name) for name in "abc"], lambda *step: None, never)
    next(finished)
    codes = [np.load(path)["codes"] for path in tmp_path.iterdir()]
    assert [(code >= 0).all() for code in codes] == [True] * 3


def test_a_stopped_batch_saves_what_was_begun_and_not_what_was_delivered(
    any_musicgen: Any, request_for: RequestFn, tmp_path: Path
) -> None:
    """Two rows: the first request is delivered, the second stopped half-way, the third never begun."""
    checkpoint, decoder = any_musicgen.checkpoint, any_musicgen.decoder
    requests = [request_for("a"), request_for("b", duration_s=0.7), request_for("c")]
    whole = results_of(any_musicgen, *requests)
    seen: dict[str, list[int]] = {name: [] for name in "abc"}

    def progress(request_id: str, done: int, total: int) -> None:
        seen[request_id].append(done)

    def run(should_stop: Any) -> Any:
        engine = generator_with(checkpoint, decoder, saved=Savepoints(tmp_path), max_memory_gb=0.001)
        return engine.generate(requests, progress=progress, should_stop=should_stop)

    results = run(lambda: len(seen["b"]) >= 10)
    first = next(results)
    assert first.request_id == "a"
    with pytest.raises(Stopped):
        next(results)
    assert len(list(tmp_path.iterdir())) == 1
    for its in seen.values():
        its.clear()
    again = {result.request_id: result for result in run(never)}
    known = 10 if hasattr(decoder, "stack") else 0  # torch runs known steps one by one
    assert [picks(seen[name]) for name in "abc"] == [28, 38 - known, 28]
    for name, result in again.items():
        assert result.audio.samples.tobytes() == whole[name].audio.samples.tobytes()


def test_tokens_are_saved_until_the_caller_asks_for_the_next_result(
    musicgen: Any, request_for: RequestFn, tmp_path: Path
) -> None:
    """A kill between the result and its publication costs no tokens."""
    request = request_for(duration_s=5.2, guidance=1.0)
    engine = generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path))
    results = engine.generate([request], progress=lambda *step: None, should_stop=never)
    next(results)
    assert len(list(tmp_path.iterdir())) == 1
    assert next(results, None) is None
    assert not list(tmp_path.iterdir())


def test_without_a_folder_nothing_is_saved(
    musicgen: Any, request_for: RequestFn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    interrupted(generator_with(musicgen.checkpoint, "int8"), request_for(), 10)
    assert not list(tmp_path.iterdir())
    assert resumed(generator_with(musicgen.checkpoint, "int8"), request_for())[1] == 28


@pytest.mark.parametrize("change", [{"seed": 8}, {"temperature": 0.5}, {"prompt": "slow piano"}], ids=str)
def test_tokens_of_another_request_are_not_used(
    musicgen: Any, request_for: RequestFn, tmp_path: Path, change: dict
) -> None:
    interrupted(generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path)), request_for(), 10)
    _, steps = resumed(
        generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path)), request_for(**change)
    )
    assert steps == 28


def test_tokens_of_another_precision_are_not_used(
    musicgen: Any, request_for: RequestFn, tmp_path: Path
) -> None:
    interrupted(generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path)), request_for(), 10)
    _, steps = resumed(
        generator_with(musicgen.checkpoint, "float32", saved=Savepoints(tmp_path)), request_for()
    )
    assert steps == 28


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 cut off", b"no archive"], ids=["empty", "cut", "other"]
)
def test_a_request_with_a_damaged_savepoint_begins_again(
    musicgen: Any, request_for: RequestFn, tmp_path: Path, content: bytes
) -> None:
    saved = Savepoints(tmp_path)
    interrupted(generator_with(musicgen.checkpoint, "int8", saved=saved), request_for(), 10)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    _, steps = resumed(generator_with(musicgen.checkpoint, "int8", saved=saved), request_for())
    assert steps == 28


def test_no_flipped_byte_and_no_cut_is_ever_taken_for_tokens(tmp_path: Path) -> None:
    saved, codes = Savepoints(tmp_path), np.arange(80).reshape(4, 20)
    saved.save("it", codes)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = [whole[:at] for at in range(len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(len(whole))]
    for content in damaged:
        path.write_bytes(content)
        found = saved.load("it", (4, 20))
        assert found is None or np.array_equal(found, codes)
    path.write_bytes(whole)
    np.testing.assert_array_equal(saved.load("it", (4, 20)), codes)
    assert saved.load("it", (4, 21)) is None


# -- complete tokens ----------------------------------------------------------------------------------


def test_tokens_stay_saved_when_decoding_fails(
    musicgen: Any, request_for: RequestFn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.engines.musicgen import codec

    def fail(*_: Any) -> Any:
        raise MemoryError

    engine = generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path))
    with monkeypatch.context() as broken:
        broken.setattr(codec, "decode", fail)
        (failure,) = results_of(engine, request_for()).values()
    assert isinstance(failure, Failure)
    assert resumed(engine, request_for())[1] == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["int8", pytest.param("torch", marks=pytest.mark.long)])
def test_requests_with_all_their_tokens_are_only_decoded(
    musicgen: Any, request_for: RequestFn, tmp_path: Path, kind: str
) -> None:
    """More requests than rows, together with one that has no tokens yet."""
    engine = generator_with(musicgen.checkpoint, kind, saved=Savepoints(tmp_path), max_memory_gb=0.001)
    requests = [request_for(name) for name in "abc"]
    whole = results_of(engine, *requests)
    for request in requests:
        for _ in engine.run([request], lambda *step: None, never):
            break  # the tokens stay saved, since the next result was not asked for
    steps: list[str] = []
    again = {
        result.request_id: result
        for result in engine.generate(
            [*requests, request_for("d")], progress=lambda *step: steps.append(step[0]), should_stop=never
        )
    }
    assert [steps.count(name) for name in "abcd"] == [1, 1, 1, 29]
    for request in requests:
        name = request.request_id
        assert again[name].audio.samples.tobytes() == whole[name].audio.samples.tobytes()


def test_a_caller_that_asks_for_no_more_results_loses_no_tokens(
    musicgen: Any, request_for: RequestFn, tmp_path: Path
) -> None:
    """Two requests at once; the generator is closed when the shorter one is delivered."""
    engine = generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path))
    results = engine.generate(
        [request_for("a"), request_for("b", duration_s=1.0)], progress=lambda *step: None, should_stop=never
    )
    assert next(results).request_id == "a"
    results.close()
    assert resumed(engine, request_for("b", duration_s=1.0))[1] == 53 - 28


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Savepoints(tmp_path).save("it", np.zeros((4, 2), np.int64))


# -- in a bucket --------------------------------------------------------------------------------------


def test_another_worker_goes_on_from_the_tokens_in_a_bucket(
    musicgen: Any, request_for: RequestFn, bucket: Bucket
) -> None:
    """Tokens are offered every 100 steps, which are 100 s here; in the bucket they are first after 200."""
    request, clock, folder = request_for(duration_s=4.0, guidance=1.0), SetClock(), f"s3:/{bucket.name}/out"
    (whole,) = results_of(generator_with(musicgen.checkpoint, "int8"), request).values()

    def step(_: str, done: int, total: int) -> None:
        clock.now = float(done)

    lost = BucketSavepoints(Path(folder), clock)
    results = generator_with(musicgen.checkpoint, "int8", saved=lost).generate(
        [request], progress=step, should_stop=lambda: clock.now == 200
    )
    with pytest.raises(Stopped):
        next(results)
    lost._thread.shutdown()
    assert len(bucket.listed("out")) == 1

    other = BucketSavepoints(Path(folder))
    samples, steps = resumed(generator_with(musicgen.checkpoint, "int8", saved=other), request)
    other._thread.shutdown()
    assert steps == 203 - 200
    assert samples.tobytes() == whole.audio.samples.tobytes()
    assert bucket.listed("out") == []


def test_without_access_to_the_bucket_variations_are_made_all_the_same(
    musicgen: Any, request_for: RequestFn, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    saved = BucketSavepoints(Path(f"s3:/{bucket.name}/out"))
    with caplog.at_level(logging.INFO):
        (made,) = results_of(generator_with(musicgen.checkpoint, "int8", saved=saved), request_for()).values()
        saved._thread.shutdown()
    assert not isinstance(made, Failure)
    assert caplog.text.count("not saved: s3://") == 1


def test_the_bucket_is_for_workers_that_do_not_reach_the_state_folder(tmp_path: Path) -> None:
    bucket_dir = Path("s3:/music/out/.engines")
    local = savepoints_for(EngineSettings(state_dir=tmp_path, bucket_dir=bucket_dir), "musicgen")
    away = savepoints_for(EngineSettings(bucket_dir=bucket_dir), "musicgen")
    assert (type(local), local.folder) == (Savepoints, tmp_path / "musicgen" / "unfinished")
    assert (type(away), away.folder) == (BucketSavepoints, bucket_dir / "musicgen" / "unfinished")
    assert savepoints_for(EngineSettings(), "musicgen").folder is None
