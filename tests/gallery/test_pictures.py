"""What the pages draw of a sound."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.errors import BadAudio
from pipeline.gallery.pictures import CHROMA_COLUMNS, PEAK_COLUMNS, draw, picture
from pipeline.records import Audio

RATE_HZ = 44100


def tone(frequency_hz: float, seconds: float, level: float = 0.5) -> Audio:
    t = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    mono = (level * np.sin(2 * np.pi * frequency_hz * t)).astype(np.float32)
    return Audio(np.stack([mono, -mono / 2]), RATE_HZ)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def values(packed: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed), np.uint8)


def test_peaks_are_the_largest_magnitudes_of_equal_parts() -> None:
    sound = tone(440.0, 10.0)
    sound.samples[:, : sound.n_samples // 2] = 0
    sound.samples[1, -1] = -2.0  # above full scale
    peaks = values(picture(sound)["peaks"])
    assert len(peaks) == PEAK_COLUMNS
    assert not peaks[: PEAK_COLUMNS // 2 - 1].any()
    assert set(peaks[PEAK_COLUMNS // 2 + 1 : -1]) <= {127, 128}
    assert peaks[-1] == 255


@pytest.mark.parametrize(("frequency_hz", "pitch_class"), [(261.63, 0), (440.0, 9), (493.88, 11)])
@pytest.mark.parametrize("seconds", [0.01, 3.0, 60.0])
def test_the_chromagram_shows_the_pitch_class_in_each_column(
    frequency_hz: float, pitch_class: int, seconds: float
) -> None:
    chroma = values(picture(tone(frequency_hz, seconds))["chroma"]).reshape(-1, 12)
    assert len(chroma) <= CHROMA_COLUMNS
    inner = chroma[1:-1] if len(chroma) > 2 else chroma[:0]
    assert set(inner.argmax(axis=1)) <= {pitch_class}
    assert set(inner.max(axis=1)) <= {255}


def test_files_and_their_bytes_are_drawn_alike_and_what_is_no_sound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tone.flac"
    soundfile.write(path, tone(440.0, 2.0).samples.T, RATE_HZ)
    source, of_file, of_bytes = draw(path, [path, path.read_bytes()])
    assert source == of_file == of_bytes
    for nothing in ((None, [b"no sound"]), (write(tmp_path / "no sound", b"x"), [])):
        with pytest.raises(BadAudio):
            draw(*nothing)


def test_a_source_is_drawn_as_it_is_decoded(tmp_path: Path) -> None:
    """Two MP3 files in one, of which libsndfile reads the first only."""
    parts = []
    for frequency_hz in (440.0, 261.63):
        soundfile.write(part := tmp_path / f"{frequency_hz}.mp3", tone(frequency_hz, 4.0).samples.T, RATE_HZ)
        parts.append(part.read_bytes())
    [drawn] = draw(write(tmp_path / "both.mp3", b"".join(parts)), [])
    classes = values(drawn["chroma"]).reshape(-1, 12).argmax(axis=1)
    assert (classes[1], classes[-2]) == (9, 0)
