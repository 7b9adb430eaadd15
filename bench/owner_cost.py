"""The owner's cost per variation, with workers that cost nothing.

    python bench/owner_cost.py [--finished 1000,100000] [--seconds 1,30]

A runner takes tracks from a queue through all stages, with an executor that answers every task at once
with values made beforehand: what is left is the owner's own work (records, plans, and the names of files,
which workers have written), which is all that bounds the number of workers that one owner can serve. The time
in which the executor writes a file, as a worker does, is subtracted. The store holds `--finished` tracks
before. The least that the same disk needs for the same file (write, fsync, rename, fsync of the folder) is
measured beside it. With `--by-value` the owner writes the files, as it does for nodes of a Ray
cluster that it has joined.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from runner_setup import RunnerSetup  # noqa: E402

from pipeline import audio  # noqa: E402
from pipeline.executors import tasks  # noqa: E402
from pipeline.executors.encode import FileForm, embedding_file, sound_file  # noqa: E402
from pipeline.executors.judge import Verdict  # noqa: E402
from pipeline.fs.atomic import Written, write_new  # noqa: E402
from pipeline.outbox.outbox import Outbox  # noqa: E402
from pipeline.progress import Reporter  # noqa: E402
from pipeline.records import Audio, Embedding, MadeBy, SourceInfo, Stage  # noqa: E402
from pipeline.runner.runner import Runner  # noqa: E402
from pipeline.stages import Finished, Normalized  # noqa: E402
from pipeline.store.schema import Track, TrackState  # noqa: E402

RATE_HZ, TRACKS, VARIATIONS = 44100, 10, 10


class FreeExecutor:
    """Answers every task with values made beforehand."""

    where, loaded = "nowhere", ()

    def __init__(self, seconds: float, source: Path, setup: RunnerSetup, *, shares_disk: bool) -> None:
        self.shares_disk = shares_disk
        self.wrote_s = self.wrote_cpu_s = 0.0
        rng = np.random.default_rng(1)
        noise = rng.uniform(-0.2, 0.2, (2, round(seconds * RATE_HZ))).astype(np.float32)
        made, config = Audio(noise, RATE_HZ), setup.config
        decoded, self.source = audio.decode(
            source, sample_rate=config.normalize.sample_rate, limits=audio.DecodeLimits()
        )
        levels = audio.levels(decoded)
        self.normalized = Normalized(decoded, levels, levels.loudness_lufs)
        self.facts = Finished(made, -14.0, {}, None, None).facts()
        self.content = sound_file(made, FileForm(config.output, {"title": "t"}))
        unit = np.eye(1, 512, dtype=np.float32)
        self.vector = unit[0]
        self.embedding = embedding_file(Embedding(unit[0], unit, np.zeros((1, 2), np.float32)), 512)

    def run(self, task: Any, *args: Any, **_: Any) -> Iterator[Any]:
        made_by = MadeBy("free", "1")
        if task is tasks.make_takes:
            for one in args[0]:
                verdict = Verdict((), 0.5, 0.5, {}, b"")
                yield tasks.MadeTake(one.request.request_id, made_by, "", self.facts, verdict)
        elif task is tasks.normalize:
            yield self.normalized, self.source
        elif task is tasks.embed:
            yield self.embedding, made_by, 512
        elif task is tasks.embed_file:
            yield self.vector, made_by, 512
        elif task is tasks.encode:
            yield self.content if args[3] is None else self._written(args[3])
        else:
            yield None

    def _written(self, place: Path) -> Written:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        try:
            return write_new(place, self.content)
        finally:
            self.wrote_s += time.perf_counter() - began_s
            self.wrote_cpu_s += time.process_time() - began_cpu_s

    def release_if_idle(self) -> None:
        pass

    def close(self) -> None:
        pass


class FreeJudge:
    def shared(self, one: Any, other: Any) -> float:
        return 0.0


def remember(setup: RunnerSetup, n: int, source: SourceInfo) -> None:
    """Record n finished tracks, each with the units of work of ten variations."""
    with setup.store.transaction():
        for i in range(n):
            sha256 = f"{i:064x}"
            track = Track(
                sha256=sha256, name=f"{i}.wav", folder=f"{i}--{sha256[:8]}", state=TrackState.DONE, bytes=1,
                finished_at=1.0, plan_key="p", source=vars(source), queued_at=0.0, attempts=0,
                not_before=0.0, stage=None, error=None,
            )  # fmt: skip
            record = {"file": "variations/01-v.wav", "sha256": "0" * 64, "bytes": 1, "seed": 1}
            units = {f"{i}-{k}": (Stage.GENERATE, record) for k in range(VARIATIONS + 2)}
            setup.store.restore(track, units, now=1.0)


def least_s(folder: Path, content: bytes, n: int = 20) -> float:
    """Seconds per file of the least that publishes it safely."""
    handle, began_s = os.open(folder, os.O_RDONLY), time.perf_counter()
    for i in range(n):
        with (folder / "part").open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        (folder / "part").replace(folder / str(i))
        os.fsync(handle)
    took_s = time.perf_counter() - began_s
    os.close(handle)
    return took_s / n


def measure(folder: Path, finished: int, seconds: float, *, shares_disk: bool = True) -> None:
    setup = RunnerSetup.at(folder, count=VARIATIONS)
    names = [f"{i}.wav" for i in range(TRACKS)]
    hashes = setup.add_tracks(*names)
    [source] = [path for path in [setup.workspace.scratch(hashes[0]).source] if path.exists()]
    executor = FreeExecutor(seconds, source, setup, shares_disk=shares_disk)
    remember(setup, finished, executor.source)
    judge: Any = FreeJudge()
    runner = Runner(
        setup.recipe, setup.workspace, setup.workspace.input_folder, setup.store,
        Outbox(setup.workspace.outbox_files), executor, judge, Reporter(), time.time, lambda: False,
    )  # fmt: skip
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    runner.drain()
    took_s = time.perf_counter() - began_s - executor.wrote_s
    cpu_s = time.process_time() - began_cpu_s - executor.wrote_cpu_s
    failed = [track.error for track in map(setup.track, hashes) if track.error]
    assert not failed, failed
    n, disk_s = TRACKS * VARIATIONS, least_s(folder, executor.content)
    print(
        f"{finished:>9} {seconds:>7g} s {len(executor.content) / 1e6:>7.2f} MB {1e3 * took_s / n:>8.1f} ms"
        f" {1e3 * cpu_s / n:>8.1f} ms {1e3 * disk_s:>8.1f} ms",
        flush=True,
    )
    setup.store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finished", default="1000,100000")
    parser.add_argument("--seconds", default="1,30")
    parser.add_argument("--by-value", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work, on the disk that is measured")
    options = parser.parse_args()
    print(f"{'finished':>9} {'length':>9} {'file':>10} {'wall':>11} {'processor':>11} {'least, disk':>11}")
    for seconds in map(float, options.seconds.split(",")):
        for finished in map(int, options.finished.split(",")):
            with tempfile.TemporaryDirectory(dir=options.folder) as name:
                measure(Path(name), finished, seconds, shares_disk=not options.by_value)


if __name__ == "__main__":
    main()
