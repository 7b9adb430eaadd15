"""A sound file of any kind to samples at one rate, block by block, within limits.

libsndfile reads WAV, FLAC and Ogg, FFmpeg all the rest and what libsndfile won't; which of
them is decided by the first bytes, never by the file's name. Each block is mixed down to at most two
channels, checked and resampled before the next one is read, so memory holds the result and little else,
however far a small file unpacks.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import deque
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from pipeline.audio import wholeness
from pipeline.audio.cut import Cut
from pipeline.audio.downmix import MAX_CHANNELS, downmix_matrix, mix_down
from pipeline.audio.readers import FFmpegReader, Reader, SndfileReader, UndecodableError, Window
from pipeline.audio.resampling import QUALITY
from pipeline.errors import BadAudio
from pipeline.records import Audio, Samples, SourceInfo

SLAB_FRAMES = 1 << 17  # large enough for the allocator to hand each slab back to the system
MIN_RATE_HZ, MAX_RATE_HZ = 8_000, 192_000


_SNDFILE_KINDS = ("wav", "flac", "ogg")


@dataclass(frozen=True)
class DecodeLimits:
    """What is refused, so that no file can fill memory or waste a night."""

    min_duration_s: float = 1.0
    max_duration_s: float = 1200.0
    max_bytes: int = 1_000_000_000  # of the file
    accept_truncated: bool = False  # take what is there of a file that is cut off


def decode(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes], *, sample_rate: int, limits: DecodeLimits
) -> tuple[Audio, SourceInfo]:
    """Read a file as float32 (1 or 2 channels, samples) at `sample_rate` Hz, and what it was before.

    Raises:
        BadAudio: it is not sound, damaged or outside the limits; the message lacks the file's name.
        OSError: the file is not there any more or the device fails, which is not the file's fault.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: not to hang on a pipe
    except PermissionError as e:
        raise BadAudio("can't be read: permission denied") from e
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise BadAudio("is not a file but a folder, a pipe or a device")
    with os.fdopen(fd, "rb") as file:
        return decode_file(file, status.st_size, sample_rate=sample_rate, limits=limits)


def decode_file(
    file: BinaryIO, size: int, *, sample_rate: int, limits: DecodeLimits
) -> tuple[Audio, SourceInfo]:
    """`decode` of an open file of `size` bytes."""
    if size == 0:
        raise BadAudio("is empty: it has 0 bytes")
    if size > limits.max_bytes:
        raise BadAudio(f"is too big: {size:,} bytes, the limit is {limits.max_bytes:,}")
    found = wholeness.inspect(file, size)
    if found.cut and found.cut.present_s is not None and not limits.accept_truncated:
        raise BadAudio(found.cut.sentence())
    window = Window(file, found.start, found.end)
    try:
        with contextlib.closing(_open_reader(window, found, limits)) as reader:
            return _read_all(reader, found, sample_rate, limits)
    except UndecodableError as e:
        if found.cut:
            raise BadAudio(found.cut.sentence()) from e
        raise BadAudio("is not audio in a format that can be read") from e
    finally:
        if window.error:  # whatever the decoder made of it, the device failed
            raise window.error


def _open_reader(window: Window, found: wholeness.Found, limits: DecodeLimits) -> Reader:
    """libsndfile for what it does best, FFmpeg for the rest.

    MPEG audio is FFmpeg's: libsndfile decodes it to the same samples through mpg123, which writes its
    complaints, some about sound files, to the terminal. So is what is cut off, of which FFmpeg saves
    more, and Ogg of more than two channels, of which FFmpeg knows where each belongs.
    """
    salvage = found.cut is not None or (limits.accept_truncated and found.kind == "flac")
    if found.kind in _SNDFILE_KINDS and not salvage:
        with contextlib.suppress(UndecodableError):
            sound = SndfileReader(window)
            if not sound.is_mpeg and (found.kind != "ogg" or sound.channels <= 2):
                return sound
            sound.close()
    window.seek(0)
    return FFmpegReader(window)


def _read_all(
    reader: Reader, found: wholeness.Found, sample_rate: int, limits: DecodeLimits
) -> tuple[Audio, SourceInfo]:
    if not MIN_RATE_HZ <= reader.sample_rate <= MAX_RATE_HZ:
        raise BadAudio(
            f"has a sample rate of {reader.sample_rate} Hz; {MIN_RATE_HZ} to {MAX_RATE_HZ} can be used"
        )
    if not 1 <= reader.channels <= MAX_CHANNELS:
        raise BadAudio(f"has {reader.channels} channels; up to {MAX_CHANNELS} can be used")
    sink = _Sink(reader, sample_rate, limits.max_duration_s)
    broken: UndecodableError | None = None
    try:
        for block in reader.blocks():
            sink.add(block)
    except UndecodableError as e:
        broken = e
    present_s = sink.n_read / reader.sample_rate
    if not limits.accept_truncated:
        cut = found.cut or _shortfall(reader, found, present_s)
        if cut:
            raise BadAudio(cut.sentence(present_s)) from broken
        if broken:
            raise BadAudio(f"is damaged: it can't be decoded after {present_s:.1f} s") from broken
    if sink.n_read == 0:
        raise BadAudio("has no sound in it: not one sample can be decoded") from broken
    if present_s < limits.min_duration_s:
        raise BadAudio(f"is too short: {present_s:.2f} s, at least {limits.min_duration_s:g} s are needed")
    info = SourceInfo(present_s, reader.sample_rate, reader.channels, reader.codec)
    return Audio(sink.finish(), sample_rate), info


def _shortfall(reader: Reader, found: wholeness.Found, present_s: float) -> Cut | None:
    promised_s = found.promised_s if reader.promised_s is None else reader.promised_s
    if found.kind == "ogg":  # libsndfile counts no further than it gets
        promised_s = found.promised_s
    if promised_s is None or present_s >= promised_s - reader.slack_s:
        return None
    return Cut(promised_s, present_s, what="cut off or damaged")


class _Sink:
    """Mixes down, checks and resamples block after block, and keeps the result."""

    def __init__(self, reader: Reader, sample_rate: int, max_duration_s: float) -> None:
        self.n_read = 0  # samples per channel at the source's rate
        self._rate = reader.sample_rate
        self._max_duration_s = max_duration_s
        self._matrix = downmix_matrix(reader.channels, reader.channel_names)
        self._channels = min(reader.channels, 2)
        self._stream = None
        if sample_rate != reader.sample_rate:
            import soxr

            self._stream = soxr.ResampleStream(
                reader.sample_rate, sample_rate, self._channels, dtype="float32", quality=QUALITY
            )
        self._slabs: deque[Samples] = deque()  # float32 (SLAB_FRAMES, channels) each, the last partly filled
        self._n_kept = 0

    def add(self, block: Samples) -> None:
        """Take float32 (samples, channels)."""
        if self._matrix is not None:
            block = mix_down(block, self._matrix)
        self._check_finite(block)
        self.n_read += len(block)
        if self.n_read > self._max_duration_s * self._rate:
            raise BadAudio(f"is too long: more than {self._max_duration_s:g} s")
        self._keep(block, last=False)

    def finish(self) -> Samples:
        """Everything, float32 (channels, samples); the slabs are let go one by one as they are copied."""
        self._keep(np.zeros((0, self._channels), dtype=np.float32), last=True)
        whole = np.empty((self._channels, self._n_kept), dtype=np.float32)
        for at in range(0, self._n_kept, SLAB_FRAMES):
            part = whole[:, at : at + SLAB_FRAMES]
            part[...] = self._slabs.popleft()[: part.shape[1]].T
        return whole

    def _keep(self, block: Samples, *, last: bool) -> None:
        if self._stream is not None:
            block = self._stream.resample_chunk(np.ascontiguousarray(block), last=last)
        while len(block):
            at = self._n_kept % SLAB_FRAMES
            if at == 0:
                self._slabs.append(np.empty((SLAB_FRAMES, self._channels), dtype=np.float32))
            part, block = block[: SLAB_FRAMES - at], block[SLAB_FRAMES - at :]
            self._slabs[-1][at : at + len(part)] = part
            self._n_kept += len(part)

    def _check_finite(self, block: Samples) -> None:
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            at_s = (self.n_read + int(np.argmin(finite))) / self._rate
            raise BadAudio(f"has a sample that is not a finite number at {at_s:.3f} s")
