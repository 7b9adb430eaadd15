"""Two decoders behind one interface: libsndfile (soundfile) and FFmpeg's libraries (PyAV).

Both read through a file object that this program opened. FFmpeg may open nothing else: playlists and
reference movies name further files and addresses, and what an inbox holds is anyone's.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from pipeline.errors import BadAudio
from pipeline.records import Samples

BLOCK_FRAMES = 1 << 12  # what libsndfile has read of a block that breaks off is lost: not too large
SLACK_S = 0.1
MAX_BAD_PACKETS, MAX_BAD_SHARE = 3, 0.01
_UNKNOWN_FRAMES = 1 << 62  # libsndfile gives 2**63 - 1 where a header has no length

# Containers FFmpeg may read: sound, and films for their sound. No playlists, no raw data, no pictures.
_FFMPEG_FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,iff,loas,matroska,webm,mov,mp4,m4a,3gp,3g2,"
    "mj2,mp3,mpc,mpc8,mpeg,mpegts,mxf,nut,ogg,oma,rm,spdif,tak,truehd,tta,voc,w64,wav,wv,xwma"
)
# Containers whose length FFmpeg reads from a header rather than guessing it from the bit rate.
_STATES_LENGTH = {"aiff", "ape", "caf", "dsf", "mov", "mpc8", "tak", "tta", "wav", "w64", "wv"}
# Containers that say to the sample where the sound ends, when its last packet goes on with padding.
_STATES_END = {"mov", "ogg"}


class UndecodableError(Exception):
    """This decoder can't make sense of the bytes; another one may."""


class Reader(Protocol):
    """An opened sound."""

    sample_rate: int  # Hz
    channels: int
    channel_names: Sequence[str] | None  # where each channel belongs; None: unknown
    codec: str
    promised_s: float | None  # length by the header; None where it has none
    slack_s: float  # what a whole file may have less: containers count encoder padding differently

    def blocks(self) -> Iterator[Samples]:
        """Yield float32 (samples, channels) in order; raises UndecodableError where decoding breaks off."""
        ...

    def close(self) -> None: ...


class Window(io.RawIOBase):
    """A read-only stretch of an open file, as a nameless file of its own.

    Decoders call it from C, where an exception is lost or printed: the first OSError is kept in
    `error` and the file seems to end there, so that whoever asked can raise it afterwards.
    """

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        super().__init__()
        self._file = file
        self._start = start
        self._size = max(0, end - start)
        self._at = 0
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._at))
        if not wanted or self.error:
            return 0
        try:
            self._file.seek(self._start + self._at)
            data = self._file.read(wanted)
        except OSError as e:
            self.error = e
            return 0
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


class SndfileReader:
    """What libsndfile reads: here WAV, FLAC and Ogg (Vorbis, Opus, FLAC)."""

    def __init__(self, file: Window) -> None:
        import soundfile

        self._errors = (soundfile.LibsndfileError, RuntimeError)
        try:
            self._sound = soundfile.SoundFile(file, "r")
        except self._errors as e:
            raise UndecodableError(str(e)) from e
        self.sample_rate = int(self._sound.samplerate)
        self.channels = int(self._sound.channels)
        self.channel_names: Sequence[str] | None = None
        self.is_mpeg = self._sound.subtype.startswith("MPEG")
        self.codec = _codec_name(self._sound.format, self._sound.subtype)
        if not 0 < self._sound.frames < _UNKNOWN_FRAMES:  # a stream's header: FFmpeg gets further
            self._sound.close()
            raise UndecodableError("no length")
        self.promised_s: float | None = self._sound.frames / self.sample_rate
        self.slack_s = 0.0 if self._sound.format == "FLAC" else SLACK_S

    def blocks(self) -> Iterator[Samples]:
        while True:
            try:
                block = self._sound.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
            except self._errors as e:
                raise UndecodableError(str(e)) from e
            if not len(block):
                return
            yield block

    def close(self) -> None:
        self._sound.close()


class FFmpegReader:
    """What FFmpeg reads: the best sound stream of the container."""

    def __init__(self, file: Window) -> None:
        import av

        av.logging.set_level(None)
        self._errors = (av.FFmpegError, ValueError)
        try:
            self._container = av.open(
                io.BufferedReader(file, 1 << 16),
                mode="r",
                options={"format_whitelist": _FFMPEG_FORMATS, "protocol_whitelist": "none"},
                metadata_errors="replace",
                io_open=_refuse,
            )
        except self._errors as e:
            raise UndecodableError(str(e)) from e
        stream = self._container.streams.best("audio")
        if stream is None:
            self._container.close()
            raise BadAudio("has no audio stream")
        self._stream: Any = stream
        context = stream.codec_context
        if context is None:
            self._container.close()
            raise UndecodableError("no decoder")
        self.sample_rate = int(context.sample_rate)
        self.channels = int(context.channels)
        self.channel_names: Sequence[str] | None = tuple(channel.name for channel in context.layout.channels)
        self.codec = str(context.codec.canonical_name)
        self.promised_s = self._stated_s(_STATES_LENGTH)
        self.slack_s = SLACK_S
        self._converter = av.AudioResampler(format="flt")

    def _stated_s(self, formats: set[str]) -> float | None:
        """The stream's length by its header, if the container is one of `formats`."""
        if formats.isdisjoint(self._container.format.name.split(",")) or not self._stream.duration:
            return None
        return float(self._stream.duration * self._stream.time_base)

    def blocks(self) -> Iterator[Samples]:
        """See `Reader`.

        A packet that can't be decoded while later ones can is left out, as players do; more than a few
        such packets, or a last one, break the decoding off.
        """
        end_s = self._stated_s(_STATES_END)
        left = sys.maxsize if end_s is None else round(end_s * self.sample_rate)
        n_good = n_bad = 0
        error: Exception | None = None
        packets = self._container.demux(self._stream)
        while (packet := self._next(packets)) is not None:
            try:
                frames = packet.decode()
            except self._errors as e:
                error, n_bad = e, n_bad + 1
                continue
            for frame in frames:
                n_good, error = n_good + 1, None
                block = self._packed(frame)[:left]
                left -= len(block)
                yield block
        if error is not None or n_bad > max(MAX_BAD_PACKETS, n_good * MAX_BAD_SHARE):
            raise UndecodableError(str(error)) from error

    def _next(self, packets: Iterator[Any]) -> Any:
        try:
            return next(packets, None)
        except self._errors as e:
            raise UndecodableError(str(e)) from e

    def _packed(self, frame: Any) -> Samples:
        """One decoded frame as float32 (samples, channels), full scale at 1.

        FFmpeg does the conversion: PyAV 18.1's `to_ndarray` reads a plane too many, out of bounds, from
        frames of eight planar channels.
        """
        if (frame.sample_rate, frame.layout.nb_channels) != (self.sample_rate, self.channels):
            raise BadAudio("changes its sample rate or its number of channels on the way")
        parts = [part.to_ndarray() for part in self._converter.resample(frame)]
        return np.concatenate(parts, axis=1).reshape(-1, self.channels)

    def close(self) -> None:
        self._container.close()


def _refuse(url: str, flags: int, options: object) -> object:
    raise PermissionError("a sound file may not open other files")


def _codec_name(container: str, subtype: str) -> str:
    """FFmpeg's name of what libsndfile calls e.g. WAV and PCM_24."""
    pcm = {"PCM_U8": "pcm_u8", "PCM_S8": "pcm_s8", "PCM_16": "pcm_s16", "PCM_24": "pcm_s24",
           "PCM_32": "pcm_s32", "FLOAT": "pcm_f32", "DOUBLE": "pcm_f64"}  # fmt: skip
    if container == "FLAC":
        return "flac"
    if subtype in pcm:
        return pcm[subtype] + ("be" if container == "AIFF" else "" if subtype.endswith("8") else "le")
    return {"MPEG_LAYER_III": "mp3", "MPEG_LAYER_II": "mp2", "MPEG_LAYER_I": "mp1"}.get(
        subtype, subtype.lower()
    )
