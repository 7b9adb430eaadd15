"""The scan of an inbox in a bucket: keys per second and memory, with nearly all keys known.

    python bench/listing.py [--keys 1000,100000] [--new 10]

A server on loopback (moto's, in a process of its own) holds the keys; the database knows all but a few of
them as finished, and `intake.after` is `keep`, so that every key is listed and looked up at every scan. The
scan runs in a process of its own. Beside it stands the same listing by obstore alone, which is the server's
share.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bucket_server import bucket_server, configure  # noqa: E402
from home_folder import Home  # noqa: E402

from pipeline.app import App  # noqa: E402
from pipeline.fs.bucket import BucketFiles  # noqa: E402
from pipeline.fs.copying import FileIdentity  # noqa: E402
from pipeline.intake.ingest import Ingest  # noqa: E402
from pipeline.intake.scanner import scanner_for  # noqa: E402
from pipeline.intake.settling import Settling  # noqa: E402
from pipeline.outbox.outbox import Outbox  # noqa: E402
from pipeline.store.schema import FileState, SourceFile  # noqa: E402

BUCKET = "listing"


def serve(n: int) -> None:
    """The server's process: until its input is closed."""
    with bucket_server() as server:
        bucket = server.made_bucket(BUCKET)
        bucket.fill(f"in/{i:07}.wav" for i in range(n))
        print(json.dumps(server.variables()), flush=True)
        sys.stdin.read()


def open_app(home: Home) -> App:
    return App.open(home.folder, home.folder / "settings.yaml")


def fill_database(app: App, n: int) -> None:
    """Record keys as finished."""
    store = app.open_store()
    inbox = app.workspace.inbox
    with store.transaction():
        for i in range(n):
            key = f"{i:07}.wav"
            content = f"in/{key}".encode()
            sha256 = hashlib.sha256(content).hexdigest()
            identity = FileIdentity(len(content), 0, 0, f'"{hashlib.md5(content).hexdigest()}"')
            file = SourceFile(inbox / key, sha256, inbox, key, state=FileState.SETTLED, **vars(identity))
            store.add_file(file, name=key, folder=Outbox.folder_name(Path(key), sha256), now=0.0)
            keys = {"plan_key": app.recipe.plan(sha256).key, "recipe_key": app.recipe.key}
            store.finish(sha256, **keys, source={}, now=0.0)
    store.close()


def scan(home: Home) -> None:
    """The scan's process; prints its figures."""
    app = open_app(home)
    store, folder = app.open_store(), app.workspace.input_folder
    files = app.workspace.inbox_files
    before_mb = peak_mb()
    ingest = Ingest(
        folder=folder,
        settings=app.config.intake,
        recipe=app.recipe,
        store=store,
        outbox=Outbox(app.workspace.outbox_files),
        workspace=app.workspace,
        scanner=scanner_for(folder, app.config.intake, files),
        settling=Settling(0.0),
    )
    figures: dict[str, float] = {}
    for which in ("first_s", "second_s"):
        began = time.perf_counter()
        result = ingest.scan(should_stop=lambda: False)
        figures[which] = time.perf_counter() - began
        figures["new"] = figures.get("new", 0) + result.queued
    print(json.dumps({**figures, "mb": peak_mb() - before_mb}))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def list_alone(home: Home) -> None:
    files = open_app(home).workspace.inbox_files
    assert isinstance(files, BucketFiles)
    import obstore

    began = time.perf_counter()
    n = sum(len(page) for page in obstore.list(files._store, chunk_size=1000))
    print(json.dumps({"s": time.perf_counter() - began, "n": n}))


@contextmanager
def server_process(n: int) -> Iterator[dict[str, str]]:
    words = [sys.executable, __file__, "--serve", str(n)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout
        for line in server.stdout:
            if line.startswith(b"{"):
                yield json.loads(line)
                break
        server.communicate()


def child(what: str, home: Home) -> dict[str, float]:
    words = [sys.executable, __file__, what, str(home.folder)]
    found: dict[str, float] = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    return found


def measure(folder: Path, n: int, n_new: int) -> None:
    home = Home(folder / str(n))
    with server_process(n) as variables:
        os.environ.update(variables)
        bucket = type("Named", (), {"name": BUCKET})
        configure(home, bucket, intake={"settle_s": 0, "after": "keep"})  # type: ignore[arg-type]
        app = open_app(home)
        app.workspace.prepare()
        fill_database(app, n - n_new)
        alone, ours = child("--list", home), child("--scan", home)
    assert ours["new"] == n_new, ours
    scans = f"first scan {ours['first_s']:.1f} s, the next {ours['second_s']:.1f} s"
    alone_s = f"obstore alone {alone['s']:.1f} s"
    print(f"{n} keys, {n_new} new: {scans}, {alone_s}, memory +{ours['mb']:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", default="1000,100000")
    parser.add_argument("--new", type=int, default=10)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--scan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--list", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
    elif given.scan:
        scan(Home(given.scan))
    elif given.list:
        list_alone(Home(given.list))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for n in map(int, given.keys.split(",")):
                measure(Path(folder), n, given.new)


if __name__ == "__main__":
    main()
