"""The cost of the queue per file, and the time of the scan at start-up.

    python bench/queue_cost.py [--sizes 100,1000,10000]

`once` runs as a child process over n small files (1.2 s, mono, 8 kHz, about 20 KB) with engines that
cost nothing (tests/faults/drive.py), so that a file's wall time is intake, working copy, decode,
normalization, queue, encoding and publication. Decoding, normalization, levelling and encoding are
measured alone, in this process, and subtracted; so is the start of the program with its imports,
measured on an inbox of one file. What is left is the queue's overhead: scan, hash, copies,
transactions, verification, flushes, renames.

It is compared with a peer of the same durability in the same run: the fewest flushes that can
publish a track's files atomically (write, fsync, rename, fsync of the folder; three files and one commit).
"""

from __future__ import annotations

import argparse
import io
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from drive import RATE_HZ, configure_for_small_files, counts, register, small_wav, start, write_small_files  # noqa: E402
from home_folder import Home  # noqa: E402

from pipeline import audio, stages  # noqa: E402
from pipeline.config import load_config  # noqa: E402
from pipeline.records import Audio, Variation, VariationRequest  # noqa: E402

SAMPLE = 200  # files measured alone


def run(home: Home) -> tuple[float, float]:
    """Wall time of `once`, and from its start until the last file was queued; seconds."""
    began_s = time.time()
    with start(home, "once", engines=True) as child:
        code = child.process.wait()
    took_s = time.time() - began_s
    if code != 0:
        raise SystemExit(child.text())
    store = home.store()
    queued = [track.queued_at for track in store.tracks()]
    store.close()
    return took_s, max(queued, default=began_s) - began_s


def measure(folder: Path, n: int) -> tuple[float, float]:
    """Seconds: a run over n files, and its scan."""
    home = Home(folder / str(n))
    configure_for_small_files(home)
    write_small_files(home.inbox / "drop", n)
    took_s, scan_s = run(home)
    if counts(home)["done"] != n:
        raise SystemExit(f"{counts(home)} of {n}")
    return took_s, scan_s


def sound_alone(folder: Path) -> float:
    """Seconds per file of the work on the sound: decode, normalize, level, encode."""
    home = Home(folder / "alone")
    configure_for_small_files(home)
    config = load_config(home.folder / "settings.yaml")
    limits, times = audio.DecodeLimits(), []
    for i in range(SAMPLE):
        path = folder / "alone.wav"
        path.write_bytes(small_wav(i))
        began_s = time.perf_counter()
        decoded, _ = audio.decode(path, sample_rate=RATE_HZ, limits=limits)
        normalized = stages.normalize(decoded, config.normalize).audio
        request = VariationRequest("r", "t", normalized, 1.0, i)
        made = Audio(normalized.samples[:, :RATE_HZ], RATE_HZ)
        finished = stages.finish(
            Variation("r", made), request, config.output, length_s=1.0, source_lufs=-14.0
        )
        audio.write_wav(io.BytesIO(), finished.audio, bit_depth=24, tags={})
        times.append(time.perf_counter() - began_s)
    return statistics.mean(times)


def least_durable(folder: Path) -> float:
    """Seconds per track for three files published atomically and one commit, the least that a queue needs."""
    base = folder / "least"
    base.mkdir()
    db = sqlite3.connect(base / "db", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE t (k TEXT)")
    began_s = time.perf_counter()
    for i in range(SAMPLE):
        track = base / str(i)
        track.mkdir()
        handle = os.open(track, os.O_RDONLY)
        for name in ("embedding", "variation", "manifest"):
            with (track / "part").open("wb") as out:
                out.write(bytes(20_000))
                out.flush()
                os.fsync(out.fileno())
            (track / "part").replace(track / name)
            os.fsync(handle)
        os.close(handle)
        db.execute("INSERT INTO t VALUES (?)", [str(i)])
    db.close()
    return (time.perf_counter() - began_s) / SAMPLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="100,1000,10000")
    parser.add_argument("--folder", type=Path, help="where to work, on the disk that is measured")
    options = parser.parse_args()
    register()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        sound_s, least_s = sound_alone(folder), least_durable(folder)
        one_s, one_scan_s = measure(folder, 1)
        print(
            f"start of the program and one file {one_s:.2f} s; sound alone {1e3 * sound_s:.1f} ms per file;"
        )
        print(f"three files and a commit, flushed: {1e3 * least_s:.1f} ms per track")
        print(f"{'files':>7} {'scan':>9} {'run':>9} {'per file':>10} {'overhead':>10}")
        for n in map(int, options.sizes.split(",")):
            took_s, scan_s = measure(folder, n)
            each_s = (took_s - one_s) / (n - 1)
            print(
                f"{n:>7} {scan_s - one_scan_s:>7.2f} s {took_s:>7.1f} s {1e3 * each_s:>7.1f} ms"
                f" {1e3 * (each_s - sound_s):>7.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
