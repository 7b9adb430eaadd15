"""What `pip install` brings: from a checkout's lists of requirements, and as a package."""

from __future__ import annotations

import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from zipfile import ZipFile

import pytest
from home_folder import ROOT

from pipeline import __version__
from pipeline.audio.stretch import REQUIREMENT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DYNAMIC = PROJECT["tool"]["setuptools"]["dynamic"]
PIN = re.compile(r"([\w.-]+)==(\S+?)(; .+)?")


def lines(name: str) -> list[str]:
    """A list of requirements without its comments."""
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    """The packages that a list pins itself, with their versions; every requirement is pinned, and once."""
    found = [PIN.fullmatch(line) for line in lines(name) if not line.startswith("-")]
    assert all(found), name
    versions = {match[1].lower(): match[2] for match in found if match}
    assert len(versions) == len(found), name
    return versions


def test_every_requirement_is_pinned_in_one_list() -> None:
    lists = ("core", "models", "ray", "s3", "search", "audiocraft", "bench")
    named = [package for name in lists for package in pins(f"requirements-{name}.txt")]
    named += pins("requirements.txt")
    assert len(named) == len(set(named))


def test_the_library_for_key_and_tempo_is_asked_for_as_it_is_required() -> None:
    name, version = REQUIREMENT.split("==")
    assert pins("requirements-core.txt")[name] == version


def test_the_package_requires_what_a_checkout_does() -> None:
    extras = DYNAMIC["optional-dependencies"]
    assert DYNAMIC["dependencies"]["file"] == ["requirements-core.txt"]
    assert extras["models"]["file"] == ["requirements-models.txt"]
    assert extras["ray"]["file"] == ["requirements-ray.txt"]
    assert extras["s3"]["file"] == ["requirements-s3.txt"]
    assert extras["search"]["file"] == ["requirements-search.txt"]
    assert extras["audiocraft"]["file"] == ["requirements-models.txt", "requirements-audiocraft.txt"]
    included = [line for line in lines("requirements.txt") if line.startswith("-")]
    assert included == ["-r requirements-core.txt", "-r requirements-models.txt"]


def test_the_cpu_build_has_the_same_versions_of_torch_and_torchaudio() -> None:
    models = pins("requirements-models.txt")
    assert pins("requirements-cpu.txt") == {name: f"{models[name]}+cpu" for name in ("torch", "torchaudio")}
    included = [line for line in lines("requirements-cpu.txt") if line.startswith("-r")]
    assert included == ["-r requirements-core.txt", "-r requirements-models.txt"]


def test_the_command_variations_starts_without_arguments() -> None:
    [(name, place)] = PROJECT["project"]["scripts"].items()
    assert name == "variations"
    inspect.signature(pkgutil.resolve_name(place)).bind()


def test_the_package_has_the_configuration_of_the_checkout() -> None:
    packaged = resources.files("pipeline.cli").joinpath("template", "default.yaml")
    assert packaged.read_bytes() == (ROOT / "config" / "default.yaml").read_bytes()


@pytest.mark.long
def test_the_wheel_has_the_program_and_its_files_only(tmp_path: Path) -> None:
    """Built in a copy, as a build leaves its folder behind."""
    checkout, target = tmp_path / "checkout", tmp_path / "site"
    checkout.mkdir()
    for name in ("pipeline", "config"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True)
    for path in [
        ROOT / "pyproject.toml",
        *ROOT.glob("requirements*.txt"),
        ROOT / "README.md",
        ROOT / "LICENSE",
    ]:
        shutil.copy(path, checkout)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(checkout)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "pipeline",
        f"instrumental_variations-{__version__}.dist-info",
    }
    data = [name for name in names if name.startswith("pipeline/") and not name.endswith(".py")]
    config = [str(path.relative_to(ROOT / "config")) for path in (ROOT / "config").rglob("*.yaml")]
    template = [f"pipeline/cli/template/{file}" for file in config]
    pages = [str(path.relative_to(ROOT)) for path in (ROOT / "pipeline/gallery/templates").iterdir()]
    assert sorted(data) == sorted([*template, *pages, "pipeline/demo/paper-lanterns.ogg"])
    install = ["install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    ran = subprocess.run(
        [str(target / "bin" / "variations"), "--version"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={"PYTHONPATH": str(target)},
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.split()[-1:]) == (0, [__version__]), ran.stderr
