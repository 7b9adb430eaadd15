"""An interrupted variation goes on where it was, and comes out the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from musicgen_runs import generator_with, made, never
from tones import RequestFn

from pipeline.engines.musicgen.savepoints import Savepoints
from pipeline.errors import Stopped
from pipeline.records import VariationRequest


def interrupted(engine: Any, request: VariationRequest, steps: int) -> None:
    """Stop a request after so many steps."""
    seen: list[int] = []
    results = engine.generate(
        [request], progress=lambda *step: seen.append(step[1]), should_stop=lambda: len(seen) >= steps
    )
    with pytest.raises(Stopped):
        next(results)


def resumed(engine: Any, request: VariationRequest) -> tuple[np.ndarray, int]:
    """The samples, and how many steps were made for them."""
    seen: list[int] = []
    (result,) = engine.generate([request], progress=lambda *step: seen.append(step[1]), should_stop=never)
    return result.audio.samples, len(seen)


@pytest.fixture(scope="module", params=["int8", "float32"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_stopped_request_is_resumed_and_comes_out_the_same(
    musicgen: Any, request_for: RequestFn, tmp_path: Path, kind: str, guidance: float
) -> None:
    request = request_for(duration_s=2.0, guidance=guidance)
    (whole,) = made(generator_with(musicgen.checkpoint, kind), request).values()
    interrupted(generator_with(musicgen.checkpoint, kind, saved=Savepoints(tmp_path)), request, 60)
    assert len(list(tmp_path.iterdir())) == 1
    again = generator_with(musicgen.checkpoint, kind, saved=Savepoints(tmp_path))
    samples, steps = resumed(again, request)
    assert steps == 103 - 60
    assert samples.tobytes() == whole.audio.samples.tobytes()
    assert not list(tmp_path.iterdir())


def test_in_the_second_window_as_well(short_musicgen: Any, request_for: RequestFn, tmp_path: Path) -> None:
    """Windows of 3 s, each going on 1.8 s after the one before."""
    checkpoint, request = short_musicgen.checkpoint, request_for(duration_s=5.0, guidance=1.0)
    (whole,) = made(generator_with(checkpoint, "int8"), request).values()
    interrupted(generator_with(checkpoint, "int8", saved=Savepoints(tmp_path)), request, 180)
    samples, steps = resumed(generator_with(checkpoint, "int8", saved=Savepoints(tmp_path)), request)
    assert steps < 100
    assert samples.tobytes() == whole.audio.samples.tobytes()


def test_a_kill_costs_what_came_after_the_last_saving(
    musicgen: Any, request_for: RequestFn, tmp_path: Path
) -> None:
    """A copy of the file as it stands after each step: what a kill would leave."""
    request, left = request_for(duration_s=12.0, guidance=1.0), tmp_path / "left"
    left.mkdir()
    (tmp_path / "live").mkdir()

    def progress(request_id: str, done: int, total: int) -> None:
        if done == 520:
            for path in (tmp_path / "live").iterdir():
                shutil.copy(path, left)

    engine = generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path / "live"))
    (whole,) = engine.generate([request], progress=progress, should_stop=never)
    samples, steps = resumed(generator_with(musicgen.checkpoint, "int8", saved=Savepoints(left)), request)
    assert steps == 603 - 500  # saved every 5 s, 250 steps
    assert samples.tobytes() == whole.audio.samples.tobytes()


@pytest.mark.parametrize("change", [{"seed": 8}, {"temperature": 0.5}, {"prompt": "slow piano"}], ids=str)
def test_tokens_of_another_request_are_not_taken(
    musicgen: Any, request_for: RequestFn, tmp_path: Path, change: dict
) -> None:
    interrupted(generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path)), request_for(), 10)
    _, steps = resumed(
        generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path)), request_for(**change)
    )
    assert steps == 28


def test_tokens_of_another_precision_are_not_taken(
    musicgen: Any, request_for: RequestFn, tmp_path: Path
) -> None:
    interrupted(generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path)), request_for(), 10)
    _, steps = resumed(
        generator_with(musicgen.checkpoint, "float32", saved=Savepoints(tmp_path)), request_for()
    )
    assert steps == 28


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 cut off", b"no archive"], ids=["empty", "cut", "other"]
)
def test_a_damaged_file_is_begun_anew(
    musicgen: Any, request_for: RequestFn, tmp_path: Path, content: bytes
) -> None:
    saved = Savepoints(tmp_path)
    interrupted(generator_with(musicgen.checkpoint, "int8", saved=saved), request_for(), 10)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    _, steps = resumed(generator_with(musicgen.checkpoint, "int8", saved=saved), request_for())
    assert steps == 28
