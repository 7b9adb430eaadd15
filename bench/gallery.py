"""The gallery of many tracks: how long one more track takes, and how soon a browser shows the list.

    python bench/gallery.py [--tracks 1000]

The bundled instrumental is processed once; its manifest and page stand for all tracks, under other names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from home_folder import Home  # noqa: E402

import pipeline.demo  # noqa: E402
from pipeline.app import App  # noqa: E402
from pipeline.cli import main as command_line  # noqa: E402
from pipeline.maintenance.rebuild import rebuild  # noqa: E402
from pipeline.outbox.outbox import Outbox  # noqa: E402

DEMO = Path(pipeline.demo.__file__).parent


def copy_track(made: Path, outbox: Path, n: int) -> None:
    """Another track with the same results."""
    manifest = json.loads((made / "manifest.json").read_text())
    sha256 = f"{n:064x}"
    manifest["source"] |= {"sha256": sha256, "name": f"Track {n:04}.wav"}
    manifest["keys"] = {
        "plan": sha256,
        "normalize": f"n{n}",
        "embed": f"e{n}",
        "generate": [f"g{n}-{k}" for k in range(len(manifest["variations"]))],
        "embed_variations": f"v{n}",
    }
    folder = outbox / f"track-{n:04}--{n:08x}"
    shutil.copytree(made, folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def seconds(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def shown_s(page: Path) -> float | None:
    """Seconds until a browser shows all rows; None: there is no browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if (found := shutil.which("chromium")) is None:
        return None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        tab = browser.new_page()
        began_s = time.perf_counter()
        tab.goto(page.as_uri())
        tab.wait_for_selector("#tracks tbody tr")
        took_s = time.perf_counter() - began_s
        browser.close()
    return took_s


def measure(folder: Path, n: int) -> None:
    home = Home(folder)
    home.configure(normalize={}, generate={"duration_s": 4}, gallery={"enabled": True})
    sys.argv = ["run_pipeline.py", *home.arguments("once", str(DEMO))]
    command_line(default_home=home.folder)
    [made] = home.folders
    for k in range(1, n):
        copy_track(made, home.outbox, k)
    app = App.open(home.folder, home.folder / "settings.yaml")
    outbox, store = Outbox(app.workspace.outbox_files), app.open_store()
    list(rebuild(store, outbox, app.workspace, now=time.time()))
    gallery = app.gallery(store, outbox)
    first_s = seconds(lambda: gallery.refresh(force=True))
    copy_track(made, home.outbox, n)
    list(rebuild(store, outbox, app.workspace, now=time.time()))
    more_s = seconds(lambda: gallery.refresh(force=True))
    again = app.gallery(store, outbox)
    again_s = seconds(lambda: again.refresh(force=True))
    track = store.find(f"Track {n:04}.wav")
    manifest = outbox.read_manifest(track.folder)
    assert manifest is not None
    page_s = seconds(lambda: gallery.add(track, manifest, None, lambda sounds: []))
    opened_s = shown_s(home.outbox / "index.html")
    size_kb = (home.outbox / "tracks.js").stat().st_size / 1e3
    print(f"{n + 1} tracks: the list from nothing {first_s:.2f} s, with one more track {1e3 * more_s:.0f} ms")
    print(f"a new process {1e3 * again_s:.0f} ms, a page {1e3 * page_s:.0f} ms, tracks.js {size_kb:.0f} kB")
    print(f"shown in a browser after {opened_s:.2f} s" if opened_s else "no browser")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tracks", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder) / "home", options.tracks)


if __name__ == "__main__":
    main()
