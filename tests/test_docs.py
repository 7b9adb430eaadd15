"""The documentation is compared with the program: its examples run, and its links lead to files."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from home_folder import ROOT, Home, run, write_music

import pipeline.engines

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def documented_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine shown in docs/architecture.md, as a module of the package."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / "varispeed.py").write_text(code)
    monkeypatch.setattr(pipeline.engines, "__path__", [*pipeline.engines.__path__, str(folder)])
    pipeline.engines.cards.cache_clear()
    yield
    pipeline.engines.cards.cache_clear()


@pytest.mark.usefixtures("documented_engine", "isolated")
def test_the_engine_of_the_documentation_makes_variations(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home.configure({"name": "slow", "semitones": [-3, 4]}, generate={"engine": "varispeed"})
    write_music(home.inbox / "a.wav")
    assert run(capsys, monkeypatch, home, "once").code == 0
    made = home.manifest()["variations"]
    assert [(one["engine"], one["params"]["semitones"]) for one in made] == [
        ("varispeed", -3),
        ("varispeed", 4),
    ]


@pytest.mark.usefixtures("documented_engine", "isolated")
def test_its_parameters_are_checked_like_any_other_engine_s(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home.configure({"name": "slow", "semitones": 99}, generate={"engine": "varispeed"})
    refused = run(capsys, monkeypatch, home, "once")
    assert refused.code == 2
    assert "generate.variations[0].semitones: must be less than or equal to 12 for varispeed" in refused.err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        file, _, heading = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), target
        slugs = {
            re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in found.read_text().splitlines()
            if line.startswith("#")
        }
        assert not heading or heading in slugs, target


def test_the_readme_is_short_and_shows_every_engine() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 1200
    for name in pipeline.engines.cards():
        assert f"`{name}`" in readme


def test_modules_named_in_the_documentation_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`(pipeline/[\w/]+(?:\.py|/))`", page.read_text()):
            assert (ROOT / name).exists() or name.endswith("varispeed.py"), f"{page.name}: {name}"


def test_the_page_of_the_configuration_is_what_the_models_say() -> None:
    """`python docs/make_configuration.py` writes it; every key needs a comment in config/default.yaml."""
    made = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == made
