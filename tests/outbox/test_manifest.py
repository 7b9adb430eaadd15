"""What the manifest says of a source."""

from __future__ import annotations

import numpy as np

from pipeline.audio import Levels
from pipeline.outbox.manifest import normalized_record
from pipeline.records import Audio, SourceInfo
from pipeline.stages import Normalized


def test_notes_on_the_source_are_there_only_if_there_is_something_to_note() -> None:
    sound = Audio(np.full((1, 44100), 0.1, dtype=np.float32), 44100)
    normalized = Normalized(sound, Levels(-14.0, -6.0), source_lufs=-20.0)
    plain = normalized_record(SourceInfo(1.0, 44100, 1, "flac"), normalized)["source"]
    assert plain == {
        "duration_s": 1.0, "sample_rate": 44100, "channels": 1, "codec": "flac", "loudness_lufs": -20.0,
    }  # fmt: skip
    noted = normalized_record(SourceInfo(1.0, 44100, 1, "flac", ("0.09 s are missing",)), normalized)
    assert noted["source"] == {**plain, "notes": ["0.09 s are missing"]}
