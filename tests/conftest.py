"""Fixtures of all tests, and which tests run in the same process."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from home_folder import Home
from runner_setup import RunnerSetup
from xdist.scheduler import LoadFileScheduling

from pipeline.executors.ray_environment import AUTO, set_environment

if TYPE_CHECKING:
    from bucket_server import Bucket, BucketServer

set_environment(AUTO)  # before any test imports Ray, which other packages do as well

_BUCKETS = itertools.count()  # the numbers of the buckets that tests have made


class OneProcessForMusicgen(LoadFileScheduling):
    """The tests of a file run in one process, where they share fixtures, and so do all tests of MusicGen.

    Its kernels take half a minute to compile, and two processes that fill numba's cache at once could mix its
    entries up.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "musicgen" if "musicgen" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneProcessForMusicgen:
    return OneProcessForMusicgen(config, log)


# A test with one of these fixtures gets the marker, and runs where the package is installed.
MARKERS = {"need_demucs": "demucs", "need_audiocraft": "audiocraft", "need_audiobox": "audiobox"}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in MARKERS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKERS[fixture])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape names that aren't text in the log of a test, as xdist's processes exchange only text."""
    report = yield
    report.sections = [(title, _as_text(content)) for title, content in report.sections]
    if report.failed and (error := str(report.longrepr)) != _as_text(error):
        report.longrepr = _as_text(error)
    return report


def _as_text(content: str) -> str:
    return content.encode(errors="backslashreplace").decode()


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unset the caller's variables for the command line in this process, and remove its log handlers."""
    for name in ("DEVICE", "PIPELINE_HOME"):
        monkeypatch.delenv(name, raising=False)
    log = logging.getLogger("pipeline")
    before = log.level, log.propagate, list(log.handlers)
    yield
    for handler in [handler for handler in log.handlers if handler not in before[2]]:
        log.removeHandler(handler)
        handler.close()
    log.level, log.propagate = before[:2]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, for the library in this process, which reads the variable when imported."""
    folder = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    if find_spec("huggingface_hub"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.configure()
    return made


@pytest.fixture
def setup(tmp_path: Path) -> RunnerSetup:
    return RunnerSetup.at(tmp_path)


@pytest.fixture(scope="session")
def server() -> Iterator[BucketServer]:
    """An S3 server on loopback."""
    if not (find_spec("moto") and find_spec("obstore")):
        pytest.skip("needs obstore and moto's S3 server, which make test-all installs")
    from bucket_server import bucket_server

    with bucket_server() as made:
        yield made


@pytest.fixture
def bucket(server: BucketServer, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket of the server, to which the environment of this process leads."""
    for name, value in server.variables().items():
        monkeypatch.setenv(name, value)
    return server.made_bucket(f"bucket-{next(_BUCKETS)}")
