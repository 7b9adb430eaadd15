"""The settings in a take's record and tags: only what differs, and enough to make the take again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.config import Config, Normalize, Output
from pipeline.outbox.settings import ANY_SOURCE, UNSAID, Settings

CHANGED: dict[str, dict[str, Any]] = {
    "normalize": {"sample_rate": 22050, "trim_silence": False},
    "output": {"format": "opus", "bit_depth": 16, "loudness_lufs": "source", "fade_in_s": 1},
}


def test_files_of_the_built_in_configuration_say_nothing() -> None:
    config = Config()
    length_s = config.generate.duration_s
    assert length_s != "source"
    assert Settings(config.normalize, config.output, length_s).said() == {}


def test_what_differs_is_said_and_read_again_from_json() -> None:
    settings = Settings(Normalize(**CHANGED["normalize"]), Output(**CHANGED["output"]), 12.3456789012345)
    said = settings.said()
    assert said == {**CHANGED, "length_s": 12.3456789012345}
    read = Settings.of(json.loads(json.dumps(said)))
    assert (read.said(), read.output) == (said, settings.output)


def test_every_setting_is_said_if_it_differs_unless_it_only_decides_which_sources_are_taken() -> None:
    assert UNSAID["normalize"].keys() | ANY_SOURCE.keys() == Normalize.model_fields.keys()
    assert UNSAID["output"].keys() == Output.model_fields.keys()


@pytest.mark.parametrize("said", [{"mastering": {}}, {"output": {"dither": "new"}}])
def test_settings_of_a_newer_version_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mastering|dither"):
        Settings.of(said)
