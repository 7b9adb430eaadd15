"""Keys and values outlive a kill, are taken for what they are, and are never left to nobody."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from musicgen_setup import Watched, decoder_of, generator_with, made, never
from tones import RequestFn

from pipeline.engines.musicgen import memory_budget, shm
from pipeline.engines.musicgen.savepoints import Savepoints
from pipeline.engines.musicgen.shm import FACTS, Files, Shelf, Sizes
from pipeline.errors import Stopped
from pipeline.records import Failure, VariationRequest

if not hasattr(os, "posix_fallocate") or not hasattr(mmap, "MADV_REMOVE"):
    pytest.skip("nothing outlives a kill on this system", allow_module_level=True)

GIGABYTE = 10**9


class Killed(BaseException):
    """What stands for SIGKILL in these tests: nobody catches it."""


@dataclass
class Home:
    """What outlives a process: tokens on the disk, keys and values in memory."""

    checkpoint: Any
    kind: str
    folder: Path

    def engine(self, **options: Any) -> tuple[Any, Watched]:
        decoder = Watched(decoder_of(self.checkpoint, self.kind))
        shelf = Shelf(self.folder / "shelf", options.pop("mode", "shm"))
        saved = Savepoints(self.folder / "tokens")
        return generator_with(self.checkpoint, decoder, saved=saved, shelf=shelf, **options), decoder

    def kill(self, requests: Sequence[VariationRequest], at: Callable[[str, int], bool]) -> list[str]:
        """Run until `at(request, frames made)`, and leave both as they are. Returns what was delivered."""

        def progress(request_id: str, done: int, total: int) -> None:
            if at(request_id, done):
                (self.folder / "shelf").rename(self.folder / "left")
                with suppress(FileNotFoundError):
                    shutil.copytree(self.folder / "tokens", self.folder / "copy")
                raise Killed

        engine, _ = self.engine()
        delivered = []
        with pytest.raises(Killed):
            for result in engine.generate(requests, progress=progress, should_stop=never):
                delivered.append(result.request_id)
        del engine
        (self.folder / "left").rename(self.folder / "shelf")
        shutil.rmtree(self.folder / "tokens", ignore_errors=True)
        with suppress(FileNotFoundError):
            (self.folder / "copy").rename(self.folder / "tokens")
        return delivered


@pytest.fixture(params=["int8", "float32"])
def home(musicgen: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Home:
    return Home(musicgen.checkpoint, request.param, tmp_path)


@pytest.fixture
def int8_home(musicgen: Any, tmp_path: Path) -> Home:
    return Home(musicgen.checkpoint, "int8", tmp_path)


@pytest.fixture
def tmpfs_home(musicgen: Any) -> Iterator[Home]:
    """In real memory: other file systems may give room to neighbours of what is written."""
    if not shm._is_memory(shm.ROOT):
        pytest.skip(f"no file system in memory at {shm.ROOT}")
    with TemporaryDirectory(dir=shm.ROOT) as folder:
        yield Home(musicgen.checkpoint, "int8", Path(folder))


def assert_same(found: dict[str, Any], whole: dict[str, Any]) -> None:
    assert found.keys() == whole.keys()
    for name, result in whole.items():
        assert not isinstance(found[name], Failure), found[name]
        assert found[name].audio.samples.tobytes() == result.audio.samples.tobytes(), name


# -- a kill ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_nothing_is_calculated_again_after_a_kill_but_what_was_not_saved(
    home: Home, request_for: RequestFn, guidance: float
) -> None:
    """Tokens are saved every 100 steps; killed after 270 of 303."""
    request = request_for(duration_s=6.0, guidance=guidance)
    whole = made(generator_with(home.checkpoint, home.kind), request)
    home.kill([request], lambda name, done: done == 270)
    engine, decoder = home.engine()
    assert_same(made(engine, request), whole)
    assert decoder.prefills == 0
    assert decoder.steps == 303 - 200
    assert not (home.folder / "shelf").exists()


def test_killed_again_and_again(int8_home: Home, request_for: RequestFn) -> None:
    request = request_for(duration_s=6.0)
    whole = made(generator_with(int8_home.checkpoint, "int8"), request)
    for frames in (101, 150, 203, 299):
        int8_home.kill([request], lambda name, done, at=frames: done == at)  # type: ignore[misc]
    engine, decoder = int8_home.engine()
    assert_same(made(engine, request), whole)
    assert (decoder.prefills, decoder.steps) == (0, 303 - 200)


def test_of_a_batch_whoever_was_under_way_goes_on_and_others_may_have_joined(
    home: Home, request_for: RequestFn
) -> None:
    """One of three is done; afterwards they come in another order, with two that are new, in more rows."""
    short = request_for("short", guidance=1.0)
    two = [request_for("b", duration_s=6.0, seed=1), request_for("c", duration_s=6.0, prompt="slow piano")]
    new = [request_for("d", duration_s=1.0), request_for("e", duration_s=2.0, pitches_hz=(220.0, 330.0))]
    whole = made(generator_with(home.checkpoint, home.kind), *two, *new)
    assert home.kill([short, *two], lambda name, done: name == "c" and done == 260) == ["short"]
    engine, decoder = home.engine()
    assert_same(made(engine, new[0], two[1], new[1], two[0]), whole)
    assert decoder.prefills == 1  # of the other track; all others were there
    assert decoder.steps == 103  # the longest of all that was left: 303 - 200, and e's 103


def most_held(engine: Any, requests: Sequence[VariationRequest]) -> tuple[dict[str, Any], int]:
    """Results, and the bytes in memory files at most."""
    held: list[int] = []
    results = engine.generate(
        requests, progress=lambda *_: held.append(engine.shelf.held_bytes), should_stop=never
    )
    return {result.request_id: result for result in results}, max(held)


def test_fewer_rows_than_were_left_take_no_more_memory_than_without(
    tmpfs_home: Home, request_for: RequestFn
) -> None:
    """Two of four go on, two rows at once: what the others held is given back at once."""
    requests = [request_for(name, duration_s=3.0, seed=seed) for seed, name in enumerate("abcd")]
    engine, _ = tmpfs_home.engine(max_memory_gb=0.001)
    whole, least = most_held(engine, requests[2:])
    tmpfs_home.kill(requests, lambda name, done: name == "d" and done == 120)
    engine, decoder = tmpfs_home.engine(max_memory_gb=0.001)
    found, most = most_held(engine, requests[2:])
    assert_same(found, whole)
    assert max(decoder.rows) == 2
    assert decoder.steps == 153 - 100 + 153  # the one's rows were kept, the other's given back
    assert most < least + 20 * mmap.PAGESIZE  # of files whose rows don't end at a page


def test_longer_rows_that_were_left_are_not_used_for_short_ones(
    tmpfs_home: Home, request_for: RequestFn
) -> None:
    long, short = request_for("long", duration_s=12.0, guidance=1.0), request_for("s", guidance=1.0)
    whole, least = most_held(tmpfs_home.engine()[0], [short])
    tmpfs_home.kill([long], lambda name, done: done == 120)
    found, most = most_held(tmpfs_home.engine()[0], [short])
    assert_same(found, whole)
    assert most == least


def test_fewer_may_come_back(int8_home: Home, request_for: RequestFn) -> None:
    requests = [request_for(name, duration_s=3.0, seed=seed) for seed, name in enumerate("abcd")]
    whole = made(generator_with(int8_home.checkpoint, "int8"), requests[2])
    int8_home.kill(requests, lambda name, done: name == "d" and done == 120)
    engine, decoder = int8_home.engine()
    assert_same(made(engine, requests[2]), whole)
    assert (decoder.prefills, decoder.steps) == (0, 153 - 100)


@pytest.mark.parametrize(("frames", "steps_left"), [(215, 53), (155, 153 - 60)], ids=["later", "at once"])
def test_in_the_second_window_as_well(
    short_musicgen: Any, request_for: RequestFn, tmp_path: Path, frames: int, steps_left: int
) -> None:
    """Windows of 3 s, each going on 1.8 s after the one before: the second is frames 90 to 240.

    Killed after 215 frames, its 100th step was saved. After 155, five more than the first has, that one
    was saved as a whole when it ended, and step 60 picks the first frame that isn't of it.
    """
    request, home = request_for(duration_s=5.0), Home(short_musicgen.checkpoint, "int8", tmp_path)
    whole = made(generator_with(home.checkpoint, "int8"), request)
    home.kill([request], lambda name, done: done == frames)
    engine, decoder = home.engine()
    assert_same(made(engine, request), whole)
    assert decoder.prefills == 1
    # The third has 70 frames and 3 steps of lags, of which 60 are known and read in one block.
    assert decoder.steps == steps_left + 73


def test_those_that_end_together_are_all_saved_before_there_is_sound(
    int8_home: Home, request_for: RequestFn
) -> None:
    requests = [request_for(name, seed=seed) for seed, name in enumerate("abc")]
    whole = made(generator_with(int8_home.checkpoint, "int8"), *requests)
    assert int8_home.kill(requests, lambda name, done: done > 25) == []
    engine, decoder = int8_home.engine()
    assert_same(made(engine, *requests), whole)
    assert decoder.steps == 0


def test_what_was_never_saved_begins_anew(int8_home: Home, request_for: RequestFn) -> None:
    request = request_for(duration_s=1.0)
    whole = made(generator_with(int8_home.checkpoint, "int8"), request)
    int8_home.kill([request], lambda name, done: done == 40)
    engine, decoder = int8_home.engine()
    assert_same(made(engine, request), whole)
    assert (decoder.prefills, decoder.steps) == (0, 53)


@pytest.mark.parametrize("tokens", ["changed", "further on"])
def test_rows_are_known_by_their_tokens(int8_home: Home, request_for: RequestFn, tokens: str) -> None:
    """Another process may have gone on with the tokens elsewhere: only what both have is taken."""
    request = request_for(duration_s=6.0)
    int8_home.kill([request], lambda name, done: done == 220)
    saved = Savepoints(int8_home.folder / "tokens")
    (path,) = (int8_home.folder / "tokens").iterdir()
    identity = path.name.split(".")[0]
    codes = saved.load(identity, (4, 300))
    assert codes is not None
    if tokens == "changed":
        codes[0, 150] = (codes[0, 150] + 1) % 2048
    else:
        codes[:, :280] = np.where(codes[:, :280] < 0, 5, codes[:, :280])
    saved.save(identity, codes)
    shutil.copytree(int8_home.folder / "tokens", int8_home.folder / "same")
    engine, decoder = int8_home.engine()
    found = made(engine, request)
    held = 151 if tokens == "changed" else 201  # told 150 at step 151, and one step more than was saved
    assert decoder.steps == 303 - held
    without = generator_with(int8_home.checkpoint, "int8", saved=Savepoints(int8_home.folder / "same"))
    assert_same(found, made(without, request))


# -- what can't be used ------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    if how == "missing":
        (folder / "row-keys").unlink()
    elif how == "another":
        size = (folder / "row-keys").stat().st_size
        (folder / "row-keys").rename(folder / "gone")
        (folder / "row-keys").write_bytes(bytes(size))
    elif how == "cut":
        os.truncate(folder / "row-values", 100)
    elif how == "no facts":
        (folder / FACTS).unlink()
    elif how == "facts cut":
        os.truncate(folder / FACTS, 40)
    elif how == "boot":
        text = (folder / FACTS).read_text()
        (folder / FACTS).write_text(text.replace('"boot": "', '"boot": "another'))


@pytest.mark.parametrize("how", ["missing", "another", "cut", "no facts", "facts cut", "boot"])
def test_what_is_not_whole_is_calculated_again(int8_home: Home, request_for: RequestFn, how: str) -> None:
    request = request_for(duration_s=3.0)
    whole = made(generator_with(int8_home.checkpoint, "int8"), request)
    int8_home.kill([request], lambda name, done: done == 120)
    damage(int8_home.folder / "shelf", how)
    engine, decoder = int8_home.engine()
    assert_same(made(engine, request), whole)
    assert (decoder.prefills, decoder.steps) == (2, 153)
    assert not (int8_home.folder / "shelf").exists()


def test_of_another_precision_version_or_length_it_is_not_used(
    int8_home: Home, request_for: RequestFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.engines.musicgen import engine as module

    def again(**change: Any) -> int:
        kind = change.pop("kind", "int8")
        engine, decoder = Home(
            change.pop("checkpoint", int8_home.checkpoint), kind, int8_home.folder
        ).engine()
        made(engine, request_for("new", **{"duration_s": 3.0, **change}))
        return decoder.prefills

    killed = request_for(duration_s=3.0)

    def kill() -> None:
        int8_home.kill([killed], lambda name, done: done == 120)

    kill()
    assert again() == 0
    kill()
    assert again(kind="float32") == 2
    kill()
    checkpoint = int8_home.checkpoint
    another = replace(checkpoint, weights=replace(checkpoint.weights, revision="another"))
    assert again(checkpoint=another) == 2
    kill()
    with monkeypatch.context() as other:
        other.setattr(module, "VERSION", "another")
        assert again() == 2
    kill()
    assert again(duration_s=6.0) == 2
    kill()
    assert again(prompt=" ".join(["slow piano"] * 12)) == 2  # a longer prefix


def test_a_step_or_prefix_that_was_cut_off_is_not_held(
    musicgen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.engines.musicgen.decoder import Feed

    decoder, key, other = decoder_of(musicgen.checkpoint, "int8"), b"k" * 32, b"o" * 32
    inputs = np.ones((5, decoder.shape.hidden), np.float32)
    tokens = np.arange(24).reshape(6, 4)

    def memory() -> Any:
        return decoder.memory(2, 20, 2, 8, Files(tmp_path, {}))

    def fail(*_: Any) -> None:
        raise Killed

    first = memory()
    first.prefill(1, inputs, key)
    slot, steps = first.take_row(key, tokens, [0, 1])
    assert steps == 0
    first.advance([Feed(slot, 1, 0, tokens[:4])])
    with monkeypatch.context() as broken:
        broken.setattr(type(decoder), "run", fail)
        for feed in (Feed(slot, 1, 4, tokens[4:]), Feed(slot, 1, 2, tokens[2:])):
            with pytest.raises(Killed):
                first.advance([feed])
            assert memory().take_row(key, tokens, [slot]) == (slot, feed.position)
        with pytest.raises(Killed):
            first.prefill(1, inputs, other)
    again = memory()
    assert again.held_prefixes() == {}
    assert again.take_row(other, tokens, [0, 1])[1] == 0
    assert again.take_row(key, tokens, [0, 1]) == (slot, 2)


def test_a_row_counts_as_held_once_its_tokens_are_written(musicgen: Any) -> None:
    from pipeline.engines.musicgen.decoder import Feed

    class Cut(np.ndarray):
        def __setitem__(self, *_: Any) -> None:
            raise Killed

    memory, tokens = decoder_of(musicgen.checkpoint, "int8").memory(1, 20, 1, 8), np.arange(8).reshape(2, 4)
    memory.take_row(b"k" * 32, tokens, [0])
    memory.held.tokens = memory.held.tokens.view(Cut)
    with pytest.raises(Killed):
        memory.advance([Feed(0, 0, 0, tokens)])
    assert memory.held.steps[0] == 0


def test_a_row_of_another_is_not_known_by_its_first_step(musicgen: Any) -> None:
    """Which is the same for all: nothing was picked before it."""
    from pipeline.engines.musicgen.decoder import Feed

    memory, key = decoder_of(musicgen.checkpoint, "int8").memory(2, 20, 1, 8), b"k" * 32
    tokens = np.arange(16).reshape(4, 4)
    memory.take_row(key, tokens[:0], [0])
    memory.advance([Feed(0, 0, 0, tokens)])
    ours = np.concatenate([tokens[:1], tokens[:1]])
    assert memory.take_row(key, ours, [0, 1]) == (1, 0)
    assert memory.take_row(key, tokens[:2], [0]) == (0, 2)


@pytest.mark.parametrize("how", ["release", "leave_row"])
def test_a_row_that_was_given_back_or_left_holds_nothing(musicgen: Any, how: str) -> None:
    from pipeline.engines.musicgen.decoder import Feed

    memory, key = decoder_of(musicgen.checkpoint, "int8").memory(1, 20, 1, 8), b"k" * 32
    tokens = np.arange(8).reshape(2, 4)
    memory.take_row(key, tokens, [0])
    memory.advance([Feed(0, 0, 0, tokens)])
    assert memory.held.common(0, key, tokens) == 2
    getattr(memory, how)(0)
    assert memory.take_row(key, tokens, [0]) == (0, 0)


def test_a_row_that_skipped_steps_holds_none_of_them(musicgen: Any) -> None:
    from pipeline.engines.musicgen.decoder import Feed

    memory, key = decoder_of(musicgen.checkpoint, "int8").memory(1, 20, 1, 8), b"k" * 32
    tokens = np.arange(40).reshape(10, 4)
    memory.prefill(0, np.ones((5, memory.decoder.shape.hidden), np.float32), key)
    memory.take_row(key, tokens[:0], [0])
    memory.advance([Feed(0, 0, 0, tokens[:3])])
    memory.advance([Feed(0, 0, 6, tokens[6:7])])
    assert memory.take_row(key, tokens, [0]) == (0, 3)


# -- files --------------------------------------------------------------------------------------------


def test_files_grow_by_slots_and_keep_what_is_there(tmp_path: Path) -> None:
    files = Files(tmp_path, {"version": "1"})
    assert files.fit(Sizes(2, 256, 1, 128)) == Sizes(2, 256, 1, 128)
    files.pages("numbers", 8000).array(np.int64)[:] = 7
    files.describe(Sizes(2, 256, 1, 128))
    more = Files(tmp_path, {"version": "1"})
    assert more.fit(Sizes(4, 256, 1, 128)) == Sizes(4, 256, 1, 128)
    numbers = more.pages("numbers", 16000).array(np.int64)
    assert (numbers[:1000] == 7).all()
    assert (numbers[1000:] == 0).all()
    assert more.fit(Sizes(1, 256, 3, 128)) == Sizes(2, 256, 3, 128)


@pytest.mark.parametrize("wanted", [(2, 384, 1, 128), (2, 128, 1, 128), (2, 256, 1, 256)], ids=str)
def test_files_with_slots_of_another_length_are_removed(tmp_path: Path, wanted: tuple) -> None:
    files = Files(tmp_path, {})
    files.pages("numbers", 8000)
    files.describe(Sizes(2, 256, 1, 128))
    assert files.fit(Sizes(*wanted)) == Sizes(*wanted)
    assert not list(tmp_path.iterdir())


def test_the_facts_are_removed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left when removing is cut off isn't taken for anything."""
    files, unlink, removed = Files(tmp_path, {}), Path.unlink, list[str]()
    for name in ("a", "z"):
        files.pages(name, 100)
    files.describe(Sizes(1, 128, 1, 128))

    def note(self: Path, missing_ok: bool = False) -> None:
        removed.append(self.name)
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", note)
    files.fit(Sizes(1, 256, 1, 128))
    assert removed[0] == FACTS
    assert sorted(removed) == ["a", FACTS, "z"]


def test_pages_of_a_file_are_given_back_and_can_be_used_again(tmp_path: Path) -> None:
    pages = Files(tmp_path, {}).pages("numbers", 1 << 20)
    pages.array(np.uint8)[:] = 1
    pages.release(0, 1 << 20)
    assert not pages.array(np.uint8).any()
    assert (tmp_path / "numbers").stat().st_blocks == 0
    pages.reserve(0, 1 << 19)
    assert (tmp_path / "numbers").stat().st_blocks * 512 == 1 << 19


def test_no_room_for_a_row_fails_its_variation_alone(
    int8_home: Home, request_for: RequestFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system can be filled by others at any time; the first row begins its files."""
    reserve = os.posix_fallocate

    def one_row(handle: int, first: int, count: int) -> None:
        if first > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(handle, first, count)

    a, b = request_for("a", guidance=1.0), request_for("b", guidance=1.0, seed=3)
    whole = made(generator_with(int8_home.checkpoint, "int8"), a)
    monkeypatch.setattr(os, "posix_fallocate", one_row)
    engine, _ = int8_home.engine()
    found = made(engine, a, b)
    failure = found.pop("b")
    assert isinstance(failure, Failure)
    assert "no room for keys and values" in str(failure.error)
    assert_same(found, whole)


def test_no_room_for_a_prefix_fails_its_variations_alone(
    int8_home: Home, request_for: RequestFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.engines.musicgen.kv_cache import Cache

    reserve = Cache.reserve

    def one_prefix(self: Cache, slot: int) -> None:
        if self.slots == 2 and slot == 1 and self.arrays[0].shape[0] == cache_rows["prefixes"]:
            raise MemoryError("no room for keys and values")
        reserve(self, slot)

    a, b = request_for("a", guidance=1.0), request_for("b", guidance=1.0, prompt="slow piano")
    c = request_for("c", guidance=1.0, seed=9)
    whole = made(generator_with(int8_home.checkpoint, "int8"), a, c)
    shape = int8_home.checkpoint.layers.shape
    cache_rows = {"prefixes": 2 * shape.layers * shape.heads}
    monkeypatch.setattr(Cache, "reserve", one_prefix)
    engine, _ = int8_home.engine()
    found = made(engine, a, b, c)
    failure = found.pop("b")
    assert isinstance(failure, Failure)
    assert "no room for keys and values" in str(failure.error)
    assert_same(found, whole)


@pytest.mark.parametrize("what", ["link", "no room", "folder"])
def test_files_that_cannot_be_made_are_told_and_done_without(
    int8_home: Home,
    request_for: RequestFn,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = request_for()
    whole = made(generator_with(int8_home.checkpoint, "int8"), request)
    shelf, victim = int8_home.folder / "shelf", int8_home.folder / "victim"
    victim.write_bytes(b"mine")
    fit = Files.fit

    def in_the_way(self: Files, wanted: Sizes) -> Sizes:
        found = fit(self, wanted)
        (self.folder / "row-keys").symlink_to(victim)
        return found

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "link":
        monkeypatch.setattr(Files, "fit", in_the_way)
    elif what == "no room":
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        (shelf / "sub").mkdir(mode=0o700, parents=True)
        shelf.chmod(0o700)
    engine, _ = int8_home.engine()
    assert_same(made(engine, request), whole)
    if what == "folder":
        assert not shelf.exists()
    else:
        assert "can't be used" in caplog.text
    assert victim.read_bytes() == b"mine"


# -- the shelf ----------------------------------------------------------------------------------------


@pytest.fixture
def shm_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shm, "ROOT", tmp_path)
    monkeypatch.setattr(shm, "MOUNTS", tmp_path / "mounts")
    return tmp_path


def opened(shelf: Shelf, n_bytes: int = 1000) -> bool:
    with shelf.open({}, n_bytes) as files:
        return files is not None


@pytest.mark.parametrize("end", ["done", "stopped", "error", "nobody asks"])
def test_any_end_but_a_kill_leaves_nothing(int8_home: Home, request_for: RequestFn, end: str) -> None:
    engine, _ = int8_home.engine()
    folder, seen = int8_home.folder / "shelf", list[bool]()

    def progress(request_id: str, done: int, total: int) -> None:
        seen.append(folder.exists())
        if end == "error" and done == 20:
            raise OSError(errno.ENOSPC, "no space left")

    results = engine.generate(
        [request_for("a", duration_s=0.3), request_for("b", duration_s=2.0)],
        progress=progress,
        should_stop=lambda: end == "stopped" and len(seen) > 30,
    )
    with suppress(Stopped, OSError):
        for _ in results:
            if end == "nobody asks":
                results.close()
    assert seen[0]
    assert not folder.exists()


def test_one_batch_at_a_time_has_the_shelf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = (Shelf(tmp_path / "shelf", "shm") for _ in range(2))
    with one.open({}, 1000) as files:
        assert files is not None
        (files.folder / "it").touch()
        assert not opened(two)
        assert (files.folder / "it").exists()
    assert opened(two)
    assert caplog.text.count("are not kept over a kill") == 1


@pytest.mark.parametrize("what", ["open to others", "link", "file"])
def test_a_folder_that_is_not_ours_alone_is_left_alone(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "shelf"
    if what == "open to others":
        folder.mkdir()
        folder.chmod(0o755)
    elif what == "link":
        (tmp_path / "other").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "other")
    else:
        folder.touch()
    assert not opened(Shelf(folder, "shm"))
    assert folder.exists()
    assert "WARNING" in caplog.text


@pytest.mark.parametrize(
    ("free_gb", "mode", "taken"), [(20, "auto", True), (5, "auto", False), (5, "shm", True)]
)
def test_auto_holds_no_more_than_a_third_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gb: int, mode: str, taken: bool
) -> None:
    monkeypatch.setattr(memory_budget, "available_bytes", lambda: free_gb * GIGABYTE)
    assert opened(Shelf(tmp_path / "shelf", mode), 3 * GIGABYTE) is taken


def test_what_is_held_already_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(tmp_path / "shelf", "auto")
    monkeypatch.setattr(memory_budget, "available_bytes", lambda: 2e6)
    for held, taken in ((False, False), (True, True)):
        (tmp_path / "shelf").mkdir(mode=0o700)
        if held:
            (tmp_path / "shelf" / "it").write_bytes(bytes(1 << 20))
            assert shelf.held_bytes == 1 << 20
        assert opened(shelf, 1_000_000) is taken
    assert shelf.held_bytes == 0


def test_more_than_the_file_system_has_is_not_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "shelf").mkdir(mode=0o700)
    (tmp_path / "shelf" / "left").write_bytes(bytes(5000))
    assert not opened(Shelf(tmp_path / "shelf", "shm"), 1 << 60)
    assert "has no room" in caplog.text
    assert not (tmp_path / "shelf").exists()


def test_a_folder_removed_while_it_is_locked_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may end between our opening the folder and our locking it."""
    flock = fcntl.flock

    def too_late(handle: int, how: int) -> None:
        (tmp_path / "shelf").rmdir()
        (tmp_path / "shelf").mkdir(mode=0o700)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    assert not opened(Shelf(tmp_path / "shelf", "shm"))


def test_any_umask_will_do(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        with Shelf(tmp_path / "shelf", "shm").open({}, 1000) as files:
            assert files is not None
            assert files.folder.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("whose", ["another's", "a link's", "open to others"])
def test_what_is_not_ours_counts_as_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """Everybody can make names in /dev/shm; believing them would take memory that isn't there."""
    folder = tmp_path / "shelf"
    folder.mkdir(mode=0o700)
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    (folder / "it").symlink_to(tmp_path / "large")
    assert Shelf(folder).held_bytes < 1 << 13
    (folder / "it").unlink()
    (folder / "it").write_bytes(bytes(1 << 20))
    assert Shelf(folder).held_bytes >= 1 << 20
    if whose == "another's":
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    elif whose == "a link's":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.chmod(0o750)
    assert Shelf(folder).held_bytes == 0


@pytest.mark.parametrize("mode", ["private", "auto"])
def test_what_was_left_is_removed_where_it_will_not_be_used(shm_root: Path, mode: str) -> None:
    kind = "tmpfs" if mode == "private" else "ext4"
    (shm_root / "mounts").write_text(f"it {shm_root} {kind} rw 0 0\n")
    left = shm.folder_of(shm_root / "state")
    left.mkdir(mode=0o700)
    (left / "it").touch()
    assert shm.leftovers(shm_root / "state") == [left]
    with Shelf(left, "shm").open({}, 10):
        assert shm.leftovers(shm_root / "state") == []
        shm.shelf(shm_root / "state", mode)
        assert left.exists()
    left.mkdir(mode=0o700)
    shm.shelf(shm_root / "state", mode)
    assert not left.exists()


def test_what_other_homes_left_is_removed_after_a_day(shm_root: Path) -> None:
    own, old, new, used = (shm.folder_of(Path(name)) for name in ("own", "old", "new", "used"))
    not_ours = shm_root / "something-else"
    for folder in (old, new, used, not_ours):
        folder.mkdir(mode=0o700)
        (folder / "it").write_bytes(b"1")
        if folder != new:
            os.utime(folder, (0, time.time() - 2 * shm.FORGOTTEN_S))
    with Shelf(used, "shm").open({}, 10):
        os.utime(used, (0, time.time() - 2 * shm.FORGOTTEN_S))
        assert opened(Shelf(own, "shm"))
        assert set(shm_root.iterdir()) == {new, used, not_ours}


def test_each_home_and_user_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert shm.folder_of(tmp_path / "a") != shm.folder_of(tmp_path / "b")
    assert shm.folder_of(tmp_path / "a") == shm.folder_of(tmp_path / "link")
    here = shm.folder_of(tmp_path / "a")
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert shm.folder_of(tmp_path / "a") != here


@pytest.mark.parametrize(
    ("mounts", "mode", "outcome"),
    [
        ("tmpfs {} tmpfs rw 0 0", "auto", "kept"),
        ("tmpfs {} tmpfs rw 0 0", "private", "private"),
        ("/dev/sda {} ext4 rw 0 0", "auto", "private"),
        ("/dev/sda {} ext4 rw 0 0", "shm", "private, told"),
        ("tmpfs {0} tmpfs rw 0 0\n/dev/sda {0} ext4 rw 0 0", "auto", "private"),
        ("", "auto", "private"),
    ],
)
def test_only_a_file_system_in_memory_is_used(
    shm_root: Path, caplog: pytest.LogCaptureFixture, mounts: str, mode: str, outcome: str
) -> None:
    (shm_root / "mounts").write_text(f"proc /proc proc rw 0 0\n{mounts.format(shm_root)}\n")
    with caplog.at_level(logging.WARNING):
        found = shm.shelf(shm_root / "state", mode)
    assert (found.folder is not None) is (outcome == "kept")
    assert bool(caplog.records) is (outcome == "private, told")
    assert shm.shelf(None, "shm").folder is None
