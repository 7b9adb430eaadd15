"""The pages in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gallery_setup import BROKEN, HOSTILE, made_gallery, page_of, process
from home_folder import Home, write_music

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="no playwright: requirements-test-all.txt"),
]
# How many sounds are heard, and of the first its place among all and its position in seconds.
HEARD = """() => {
  const sounds = [...document.querySelectorAll(".sound audio")];
  const heard = sounds.filter((audio) => !audio.paused && audio.volume > 0);
  return {n: heard.length, which: sounds.indexOf(heard[0]), at: heard[0]?.currentTime};
}"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return made_gallery(tmp_path_factory.mktemp("browser") / "home", seconds=8.0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root may not use the sandbox, and a container has little shared memory.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        launched = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        yield launched
        launched.close()


@contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """A page, of which no error is logged and no request leaves the file system."""
    context = browser.new_context(**options)
    page, problems = context.new_page(), list[str]()
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda asked: None if is_local(asked.url) else problems.append(asked.url))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert not [text for text in problems if "ERR_FILE_NOT_FOUND" not in text]  # the places of a source
    assert all("inbox" in text or "ERR_FILE_NOT_FOUND" in text for text in problems)


def is_local(url: str) -> bool:
    return url.startswith(("file:", "blob:", "data:"))


@pytest.fixture
def page(browser: Any, home: Home) -> Iterator[Any]:
    with opened(browser, page_of(home, "song")) as found:
        found.wait_for_function(
            "[...document.querySelectorAll('.take audio')].every((one) => one.readyState > 0)"
        )
        yield found


def names(page: Any) -> list[str]:
    found: list[str] = page.eval_on_selector_all(".take", "list => list.map((take) => take.dataset.file)")
    return found


def table(page: Any) -> list[str]:
    found: list[str] = page.eval_on_selector_all(
        "#tracks tbody td:nth-child(2)",
        "list => list.map((cell) => (cell.querySelector('a') || cell).firstChild.textContent)",
    )
    return found


# -- one track -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["2", "3", "0"])
def test_another_sound_plays_on_at_the_same_position(page: Any, key: str) -> None:
    page.keyboard.press("Space")
    page.wait_for_timeout(800)
    before = page.evaluate(HEARD)
    assert (before["n"], before["which"]) == (1, 1)  # the take that ranks highest
    page.evaluate(
        """(key) => {
          const [before, after] = [1, key].map((n) => document.querySelectorAll(".sound audio")[n]);
          const note = () => (window.positions = [before.currentTime, after.currentTime]);
          before.addEventListener("pause", note);
        }""",
        int(key),
    )
    page.keyboard.press(key)
    page.wait_for_function("window.positions")
    left, entered = page.evaluate("window.positions")
    assert entered == pytest.approx(left, abs=0.05)
    assert left > before["at"]
    after = page.evaluate(HEARD)
    assert (after["n"], after["which"]) == (1, int(key))


def test_while_another_sound_starts_there_is_no_silence(page: Any) -> None:
    page.keyboard.press("Space")
    page.wait_for_timeout(500)
    gap = page.evaluate(
        """async () => {
          let silent = 0;
          const sounds = [...document.querySelectorAll(".sound audio")];
          const isHeard = (audio) => !audio.paused && audio.volume > 0;
          const before = performance.now();
          document.querySelectorAll(".take .choose")[1].click();
          while (performance.now() - before < 400) {
            const began = performance.now();
            await new Promise(requestAnimationFrame);
            if (!sounds.some(isHeard)) silent += performance.now() - began;
          }
          return silent;
        }"""
    )
    assert gap < 25


def test_the_last_of_many_quick_switches_is_heard(page: Any) -> None:
    page.keyboard.press("Space")
    page.wait_for_timeout(500)
    for key in "2312312312":
        page.keyboard.press(key)
    page.wait_for_function(f"({HEARD})().which === 2")
    page.wait_for_timeout(300)
    assert page.evaluate(HEARD)["n"] == 1
    before = page.evaluate(HEARD)["at"]
    page.keyboard.press("3")
    page.keyboard.press("2")  # which is still heard
    after = page.evaluate(HEARD)
    assert (after["n"], after["which"]) == (1, 2)
    assert 0 <= after["at"] - before < 0.5


def test_a_loop_after_the_end_of_a_shorter_sound_is_not_its_own(page: Any) -> None:
    page.keyboard.press("0")
    page.evaluate("setLoop({from: 10, to: 12})")  # of the source's 16 s; takes have 8 s
    page.keyboard.press("Space")
    page.wait_for_timeout(500)
    page.keyboard.press("1")
    page.wait_for_function(f"({HEARD})().which === 1")
    before = page.evaluate(HEARD)["at"]
    assert 2 <= before < 4.5
    page.wait_for_timeout(2500)
    assert page.evaluate(HEARD)["at"] > before + 2  # goes on
    assert page.locator(".loop:visible").count() == 1


@pytest.mark.parametrize("storage", ["null", "(() => { throw new DOMException('', 'SecurityError'); })()"])
def test_without_a_store_in_the_browser_ratings_last_as_long_as_the_page(
    browser: Any, home: Home, storage: str
) -> None:
    with opened(browser, page_of(home, "song")) as page:
        page.add_init_script(f"Object.defineProperty(window, 'localStorage', {{get: () => {storage}}})")
        page.reload()
        page.keyboard.press("Shift+Digit4")
        with page.expect_download() as download:
            page.click("#download")
        [rating] = json.loads(download.value.path().read_text())["ratings"]
        assert rating["stars"] == 4


def test_a_take_that_was_deleted_is_said_to_be_missing(browser: Any, home: Home, tmp_path: Path) -> None:
    folder = shutil.copytree(page_of(home, "song").parent, tmp_path / "copy")
    with opened(browser, folder / "index.html") as page:
        files = names(page)
    (folder / files[1]).unlink()
    with opened(browser, folder / "index.html") as page:
        page.locator(".take").nth(1).locator(".missing:visible").wait_for()
        page.keyboard.press("Space")
        page.wait_for_timeout(300)
        page.keyboard.press("2")
        page.wait_for_timeout(300)
        assert page.evaluate(HEARD)["which"] == 1  # plays on
        assert page.locator(".missing:visible").count() == 2


def test_keys_seek_loop_and_play_a_join(page: Any) -> None:
    position = "document.querySelectorAll('.sound audio')[1].currentTime"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(position) == pytest.approx(2.0, abs=0.01)
    box = page.locator(".take .wave").first.bounding_box()
    y = box["y"] + 20
    page.mouse.move(box["x"] + 0.5 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.55 * box["width"], y, steps=5)
    page.mouse.up()
    page.keyboard.press("Space")
    for _ in range(5):
        page.wait_for_timeout(250)
        assert 3.8 < page.evaluate(position) < 4.6  # of 8 s
    page.keyboard.press("Escape")
    page.wait_for_timeout(900)
    assert page.evaluate(position) > 4.5
    page.keyboard.press("Space")
    join = page.locator(".take .join").first
    at_s = float(join.get_attribute("data-at"))
    join.click()
    page.wait_for_timeout(300)
    assert page.evaluate(HEARD)["at"] == pytest.approx(at_s - 0.7, abs=0.35)
    page.wait_for_function("![...document.querySelectorAll('audio')].some((audio) => !audio.paused)")


def test_blind_mode_hides_what_a_take_is_and_shuffles(page: Any) -> None:
    by_rank = names(page)
    orders = set()
    for _ in range(12):
        page.keyboard.press("b")
        assert not page.locator(".take .secret:visible").count()
        assert page.locator(".take .number:visible").all_inner_texts() == ["1", "2", "3"]
        shown = names(page)
        orders.add(tuple(shown))
        page.keyboard.press("2")
        chosen = page.eval_on_selector(".take.current", "take => take.dataset.file")
        assert chosen == shown[1]
        page.keyboard.press("b")
        assert names(page) == by_rank
    assert len(orders) > 1
    assert {frozenset(order) for order in orders} == {frozenset(by_rank)}


def test_loudness_is_matched_by_default(page: Any) -> None:
    volumes = (
        "[...document.querySelectorAll('.sound')].map((one) =>"
        " [Number(one.dataset.lufs), one.querySelector('audio').volume])"
    )
    found = page.evaluate(volumes)
    quietest = min(lufs for lufs, _ in found)
    for lufs, volume in found:
        assert volume == pytest.approx(10 ** ((quietest - lufs) / 20), abs=0.001)
    page.uncheck("#match")
    assert {volume for _, volume in page.evaluate(volumes)} == {1}


def test_ratings_stay_in_the_browser_and_are_downloaded(page: Any) -> None:
    files = names(page)
    page.keyboard.press("1")
    page.keyboard.press("Shift+Digit4")
    page.keyboard.press("k")
    page.keyboard.press("2")
    page.keyboard.press("x")
    page.locator(".take [name=note]").nth(2).fill("the [best] 2")
    page.locator(".take [name=note]").nth(2).press("Enter")
    page.locator(".take .clear").nth(1).click()
    page.reload()
    assert page.locator(".take").nth(0).locator("input:checked").count() == 2
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "ratings.json"
    found = json.loads(download.value.path().read_text())
    ratings = {rating["file"]: rating for rating in found["ratings"]}
    assert found["schema"] == 1
    assert set(ratings) == {files[0], files[2]}
    first, third = ratings[files[0]], ratings[files[2]]
    assert (first["stars"], first["kept"], first["note"]) == (4, True, "")
    assert (third["stars"], third["kept"], third["note"]) == (None, None, "the [best] 2")
    assert all(len(rating[name]) == 64 for rating in ratings.values() for name in ("track", "sha256"))


def test_brackets_lead_to_the_tracks_before_and_after(page: Any) -> None:
    here = page.url
    there, back = ("]", "[") if page.locator("#next:visible").count() else ("[", "]")
    page.keyboard.press(there)
    page.wait_for_url(lambda url: url != here)
    page.keyboard.press(back)
    page.wait_for_url(here)


def test_a_folder_alone_still_plays(browser: Any, home: Home, tmp_path: Path) -> None:
    shutil.copytree(page_of(home, "song").parent, tmp_path / "alone")
    with opened(browser, tmp_path / "alone" / "index.html") as page:
        page.wait_for_selector(".missing:visible")
        page.keyboard.press("Space")
        page.wait_for_timeout(300)
        assert page.evaluate(HEARD)["n"] == 1
        page.keyboard.press("0")  # not there
        page.wait_for_timeout(300)
        assert page.evaluate(HEARD)["which"] == 1


# -- all tracks ------------------------------------------------------------------------------------


def test_the_list_is_searched_sorted_and_filtered(browser: Any, home: Home) -> None:
    with opened(browser, home.outbox / "index.html") as page:
        assert set(table(page)) == {HOSTILE, "song.wav", BROKEN}
        page.click("th[data-by=name] button")
        assert table(page) == [HOSTILE, BROKEN, "song.wav"]
        page.click("th[data-by=name] button")
        assert page.get_attribute("th[data-by=name]", "aria-sort") == "descending"
        assert table(page)[0] == "song.wav"
        page.click("th[data-by=score] button")
        assert table(page)[-1] == BROKEN  # which has none
        page.fill("#search", "ONERROR img")
        assert table(page) == [HOSTILE]
        page.evaluate("tracks.rows[0].name = 'Cafe\u0301.wav'")  # two characters
        page.fill("#search", "CAF\u00c9")
        assert table(page) == ["Cafe\u0301.wav"]
        page.reload()
        page.fill("#search", "")
        page.select_option("#state", "failed")
        assert table(page) == [BROKEN]
        assert page.locator(".error").inner_text().startswith("failed: ")
        page.select_option("#state", "")
        page.select_option("#engine", "remix")
        assert set(table(page)) == {HOSTILE, "song.wav"}
        assert page.inner_text("#count") == "2 of 3 tracks"


def test_the_list_plays_the_best_take(browser: Any, home: Home) -> None:
    with opened(browser, home.outbox / "index.html") as page:
        playing = "!document.getElementById('audio').paused && document.getElementById('audio').currentTime"
        page.get_by_role("button", name="Play song.wav").click()
        page.wait_for_function(playing)
        page.get_by_role("button", name="Play song.wav").click()
        assert not page.evaluate(playing)


def test_a_click_on_the_map_plays(browser: Any, home: Home) -> None:
    with opened(browser, home.outbox / "index.html") as page:
        assert page.locator("#map circle").count() == 2 * (1 + 3)
        assert page.locator("#map circle.is-source").count() == 2
        page.locator("#map circle:not(.is-source)").first.click(force=True)
        page.wait_for_function("document.getElementById('audio').currentTime > 0")
        assert page.inner_text("#playing").startswith("Playing ")
        page.locator("#map circle.is-source").first.click(force=True)
        page.wait_for_function("document.getElementById('audio').src.includes('/inbox/done/')")


def test_ten_tracks_with_forty_takes_are_gone_through_by_the_keyboard_alone(
    browser: Any, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    home.configure({"name": "near", "count": 2}, {"name": "far", "count": 2}, gallery={"enabled": True})
    for n in range(10):
        write_music(home.inbox / f"track {n}.wav", seed=n, seconds=4.0)
    process(home, "once")
    with opened(browser, home.outbox / "index.html") as page:
        first_link = "document.activeElement.matches('#tracks tbody tr:first-child a')"
        while not page.evaluate(first_link):
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        for n in range(10):
            page.wait_for_function(
                "[...document.querySelectorAll('.take audio')].every((one) => one.readyState > 0)"
            )
            page.keyboard.press("Space")
            for take in range(4):
                page.keyboard.press(str(take + 1))
                page.wait_for_function("document.querySelector('.take.current audio').volume > 0")
                page.keyboard.press(f"Shift+Digit{1 + (n + take) % 5}")
                page.keyboard.press("k" if take == n % 4 else "x")
            if n < 9:
                before = page.url
                page.keyboard.press("]")
                page.wait_for_url(lambda url, before=before: url != before)
        while page.evaluate("document.activeElement.id") != "download":
            page.keyboard.press("Tab")
        with page.expect_download() as download:
            page.keyboard.press("Enter")
        ratings = json.loads(download.value.path().read_text())["ratings"]
    assert len(ratings) == 40
    assert len({rating["track"] for rating in ratings}) == 10
    assert sum(rating["kept"] for rating in ratings) == 10


# -- for everybody ---------------------------------------------------------------------------------

LIGHT, DARK = {"color_scheme": "light"}, {"color_scheme": "dark"}
PHONE = {"viewport": {"width": 360, "height": 740}}


@pytest.mark.parametrize("options", [LIGHT, DARK, LIGHT | PHONE], ids=["light", "dark", "phone"])
@pytest.mark.parametrize("which", ["index", "track", "hostile", "blind"])
def test_pages_are_accessible_and_fit_their_width(
    browser: Any, home: Home, which: str, options: dict[str, Any]
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    paths = {"index": home.outbox / "index.html", "hostile": page_of(home, "_img")}
    with opened(browser, paths.get(which, page_of(home, "song")), **options) as page:
        if which == "blind":
            page.keyboard.press("b")
        page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
        rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
        results = Axe().run(page, options={"runOnly": rules})
        assert results.violations_count == 0, results.generate_report()
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) == 0
        assert not page.locator("img").count()


def test_everything_is_reached_by_the_keyboard_and_shows_its_focus(page: Any) -> None:
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        focus = page.evaluate(
            """() => {
              const one = document.activeElement;
              const shown = one.matches("[type=radio]") ? one.nextElementSibling : one;
              const name = one.id || one.className || one.name || one.tagName;
              return [name, getComputedStyle(shown).outlineStyle];
            }"""
        )
        seen.add(focus[0])
        if focus[0] != "BODY":
            assert focus[1] != "none", focus
    assert {"play", "blind", "download", "choose", "wave", "join", "note", "clear"} <= seen


def test_what_has_the_focus_is_never_below_the_header(page: Any) -> None:
    page.set_viewport_size({"width": 800, "height": 500})
    page.evaluate("document.querySelector('h1').textContent += ' and a long name'.repeat(12)")
    seen = 0
    for key in ["Tab"] * 40 + ["Shift+Tab"] * 30:
        page.keyboard.press(key)
        hidden = page.evaluate(
            """() => {
              const one = document.activeElement;
              if (one === document.body || one.closest("header")) return null;
              const box = one.getBoundingClientRect();
              const shown = document.elementFromPoint(box.left + 3, box.top + box.height / 2);
              return Boolean(shown?.closest("header"));
            }"""
        )
        assert not hidden
        seen += hidden is False
    assert seen > 40
