"""libsndfile: for results of this program, and for the Ogg Vorbis files that FFmpeg does not open.

FFmpeg refuses a stream whose header packets come twice, which libvorbis and the players built on it accept.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.audio.container import Window
from pipeline.audio.ffmpeg import Block, UndecodableError
from pipeline.records import Audio

_BLOCK_FRAMES = 1 << 12  # what has been read of a block is lost where decoding breaks off


def read_whole(file: Path | bytes) -> Audio:
    """A sound at its own rate, of a file or of its bytes: the quickest way, without any repair.

    Raises:
        soundfile.LibsndfileError: libsndfile can't read it.
    """
    import soundfile

    source = io.BytesIO(file) if isinstance(file, bytes) else file
    samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    return Audio(np.ascontiguousarray(samples.T), rate)


class SndfileReader:
    """The counterpart of `ffmpeg.Reader`.

    Raises:
        UndecodableError: libsndfile can't open it either, or it has more channels than are known by place.
    """

    codec = "vorbis"
    bad_bytes = 0
    is_noise = begins_late = ends_early = to_end = False

    def __init__(self, window: Window) -> None:
        import soundfile

        self.window = window
        self.read_to = window.size
        self._errors = (soundfile.LibsndfileError, RuntimeError)
        window.seek(0)
        try:
            self._sound = soundfile.SoundFile(window, "r")
        except self._errors as e:
            raise UndecodableError(str(e)) from e
        if self._sound.subtype != "VORBIS" or self._sound.channels > 2:
            raise UndecodableError("not mono or stereo Vorbis")
        self.missing_s = self._sound.frames / self._sound.samplerate

    def close(self) -> None:
        self._sound.close()

    def blocks(self) -> Iterator[Block]:
        rate, names = int(self._sound.samplerate), ("NONE",) * int(self._sound.channels)
        try:
            while len(samples := self._sound.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                self.missing_s -= len(samples) / rate
                yield Block(samples, rate, names)
        except self._errors:  # the rest is missing
            return
