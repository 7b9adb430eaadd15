"""The pages of a gallery and its list of tracks: what is written, when, and what stands in it."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from gallery_setup import BROKEN, HOSTILE, content, made_gallery, page_of, process, rows
from home_folder import Home, write_music

from pipeline.app import App
from pipeline.gallery import gallery as gallery_module
from pipeline.gallery.map import HEIGHT, WIDTH
from pipeline.gallery.page import pictures_of
from pipeline.maintenance.reconcile import OUTBOX_MOUNT
from pipeline.outbox.outbox import Outbox
from pipeline.store.schema import TrackState


class Tags(HTMLParser):
    """The tags of a page, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._is_code = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._is_code = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._is_code = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._is_code else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return made_gallery(tmp_path_factory.mktemp("gallery") / "home", seconds=2.0)


@pytest.fixture
def home(made: Home, tmp_path: Path) -> Home:
    """A copy, to be changed."""
    shutil.copytree(made.folder, tmp_path / "home", symlinks=True)
    return Home(tmp_path / "home")


def test_the_list_has_finished_and_failed_tracks(made: Home) -> None:
    found = rows(made)
    assert set(found) == {HOSTILE, "song.wav", BROKEN}
    assert (found[BROKEN]["state"], found[BROKEN]["page"], found[BROKEN]["takes"]) == ("failed", None, None)
    assert found[BROKEN]["error"]
    song = found["song.wav"]
    assert (song["state"], song["engine"], song["takes"]) == ("done", "remix", 3)
    assert 0 < song["score"] <= 1
    for link in (song["page"], song["best"]):
        assert (made.outbox / unquote(link)).is_file()


def test_the_map_has_each_source_and_take_once(made: Home) -> None:
    points = content(made)["points"]
    urls = [url for *_, url, _ in points]
    assert len(set(urls)) == len(points) == 2 * (1 + 3)
    assert all((made.outbox / unquote(url)).is_file() for url in urls)
    assert sorted(name for *_, name, _, is_source in points if is_source) == sorted([HOSTILE, "song.wav"])
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y, *_ in points)


def test_a_page_shows_all_takes_by_rank_with_links_that_lead_to_files(made: Home) -> None:
    page = page_of(made, "song")
    tags = Tags(page.read_text())
    places = [one["src"] or "-" for one in tags.all("source")]
    source, *takes = [place for place in places if (page.parent / unquote(place)).is_file()]
    assert source == "../../inbox/done/song.wav"
    assert len(takes) == 3
    ranks = [float(text.split()[0]) for text in tags.text.split("rank")[1:4]]
    assert ranks == sorted(ranks, reverse=True)
    for words in ("commercial use", "seed", "ranks lower", "reproduce", "near & <b>far"):
        assert words in tags.text
    assert len(pictures_of(page.read_text())) == 1 + 3 + 1  # of the source, the takes and the one not kept


def test_a_hostile_name_is_only_a_name(made: Home) -> None:
    tags = Tags(page_of(made, "_img").read_text())
    assert not tags.all("img")
    assert not tags.all("b")
    assert HOSTILE in tags.text


def test_what_has_not_changed_is_not_written_again(home: Home) -> None:
    files = [home.outbox / "index.html", home.outbox / "tracks.js", page_of(home, "song")]
    before = [path.stat().st_mtime_ns for path in files]
    process(home, "once")
    write_music(home.inbox / "more.wav", seed=3, seconds=4.0)
    process(home, "once")
    index, tracks, page = (path.stat().st_mtime_ns - then for path, then in zip(files, before, strict=True))
    assert (index, page) == (0, 0)
    assert tracks > 0
    assert "more.wav" in rows(home)


def test_nothing_is_computed_while_the_list_is_up_to_date(home: Home) -> None:
    app = App.open(home.folder, home.folder / "settings.yaml")
    with closing(app.open_store()) as store:
        gallery, asked = app.gallery(store, Outbox(app.workspace.outbox_files)), []
        find = gallery.vectors
        gallery.vectors = lambda: asked.append(1) or find()
        gallery.refresh(force=True)
        gallery.refresh(force=True)
        assert len(asked) == 1
        [failed] = store.tracks(TrackState.FAILED)
        store.requeue(failed.sha256, now=0.0)
        gallery.refresh(force=True)
        assert len(asked) == 2
    assert BROKEN not in rows(home)


def test_the_store_is_not_asked_for_changes_before_the_list_may_be_written_again(home: Home) -> None:
    """The answer takes a fifth of a second with a million tracks, and each track that is finished asks."""
    app = App.open(home.folder, home.folder / "settings.yaml")
    with closing(app.open_store()) as store:
        gallery = app.gallery(store, Outbox(app.workspace.outbox_files))
        gallery.refresh(force=True)
        asked: list[str] = []
        store._db.set_trace_callback(asked.append)
        gallery.clock = lambda: gallery._next_at - 0.001
        gallery.refresh()
        assert asked == []


def test_the_verb_writes_lost_pages_again_and_takes_over_known_pictures(
    home: Home, monkeypatch: Any, capsys: Any
) -> None:
    lost, kept = page_of(home, "song"), page_of(home, "_img")
    before = lost.read_text(), kept.read_text()
    lost.unlink()
    (home.outbox / "tracks.js").unlink()
    drawn: list[int] = []
    whole = gallery_module.Gallery.add

    def counted(self: Any, track: Any, manifest: Any, source: Any, draw: Any) -> None:
        def count(source: Any, results: Any) -> Any:
            drawn.append(len(results))
            return draw(source, results)

        whole(self, track, manifest, source, count)

    monkeypatch.setattr(gallery_module.Gallery, "add", counted)
    assert process(home, "gallery") == 0
    assert drawn == [4]
    assert [pictures_of(page.read_text()) for page in (lost, kept)] == [pictures_of(page) for page in before]
    assert rows(home)["song.wav"]["page"]
    assert f"open {home.outbox / 'index.html'}" in capsys.readouterr().out


def test_the_verb_gives_tracks_of_before_the_gallery_their_pages_in_the_list(home: Home) -> None:
    for page in (page_of(home, "song"), home.outbox / "tracks.js"):
        page.unlink()
    process(home, "once")
    assert rows(home)["song.wav"]["page"] is None
    process(home, "gallery")
    assert rows(home)["song.wav"]["page"]


def test_a_name_that_is_not_unicode_is_linked_by_its_bytes(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.configure({"name": "near"}, gallery={"enabled": True}, generate={"duration_s": 1})
    write_music(home.inbox / "one.wav", seconds=2.0).rename(home.inbox / os.fsdecode(b"caf\xe9.wav"))
    assert process(home, "once") == 0
    [row] = rows(home).values()
    assert row["source"] == "../inbox/done/caf%E9.wav"
    assert "../../inbox/done/caf%E9.wav" in page_of(home, "caf").read_text()


def test_damaged_pages_and_manifests_and_deleted_takes_end_no_run(home: Home, capsys: Any) -> None:
    page_of(home, "song").write_bytes(b'caf\xe9 <script type="application/json" id="pictures">{"x</script>')
    manifest = page_of(home, "_img").with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace('"scores"', '"of another version"'))
    (home.outbox / "tracks.js").unlink()
    assert process(home, "once") == 0
    assert rows(home)[HOSTILE]["best"] is None
    next((page_of(home, "song").parent / "variations").iterdir()).unlink()
    assert process(home, "gallery") == 0
    assert "1 pages written, 1 tracks have no results" in capsys.readouterr().out
    assert len(pictures_of(page_of(home, "song").read_text())) == 1 + 2 + 1


def test_nothing_is_written_where_the_disk_of_the_outbox_is_not_mounted(home: Home, capsys: Any) -> None:
    with closing(App.open(home.folder, home.folder / "settings.yaml").open_store()) as store:
        store.set_fact(OUTBOX_MOUNT, str(home.outbox))
    shutil.rmtree(home.outbox)
    assert process(home, "gallery") == 4
    assert "isn't mounted now" in capsys.readouterr().err
    assert not any(home.outbox.iterdir())  # by which `once` knows as well


def test_pages_are_no_results_and_are_removed_with_them(home: Home, capsys: Any) -> None:
    page = page_of(home, "song")
    (page.parent / ".index.html.part").write_text("left by a kill")
    process(home, "doctor", "--repair")
    assert not (page.parent / ".index.html.part").exists()
    page.unlink()
    assert process(home, "doctor") == 0  # a page that is missing is no defect
    process(home, "gallery")
    home.configure(gallery={"enabled": True}, retention={"outbox_days": 0})
    process(home, "gc")
    process(home, "once")
    assert not page.parent.exists()
    assert set(rows(home)) == {BROKEN}


def test_an_unreadable_list_is_made_again(home: Home) -> None:
    def without_source() -> list[dict[str, Any]]:  # which has moved with the home
        return [{**row, "source": None} for row in rows(home).values()]

    before = without_source()
    (home.outbox / "tracks.js").write_text('const TRACKS = {"rows": [{"sha256": 1}, 7]};\n')
    process(home, "once")
    assert without_source() == before


def test_without_the_gallery_there_are_no_pages(home: Home) -> None:
    shutil.rmtree(home.outbox)
    home.outbox.mkdir()
    home.configure(generate={"duration_s": 2})
    write_music(home.inbox / "other.wav", seed=4, seconds=4.0)
    process(home, "once")
    assert not list(home.outbox.rglob("*.html"))
    assert not (home.outbox / "tracks.js").exists()
