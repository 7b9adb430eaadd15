"""Decoding of an audio file of any kind to samples at one rate, within limits.

FFmpeg is the decoder, and libsndfile is that of the few Ogg Vorbis files that FFmpeg does not open. The first
bytes decide about the format, never the name. Each block is mixed down to at most two channels, checked and
resampled before the next one is read, so that memory holds the result and little else, however far a small
file unpacks.

What is accepted:

- A file that a player plays whole. Tags, padding and junk around the audio, size fields that are off, a
  missing end-of-stream mark, a recording from the middle of a broadcast, and changes of sample rate or
  channels on the way are no damage.
- A file that lacks little: up to 0.1 s, or up to 1 % of its duration but no more than 5 s. The notes on the
  source in the manifest say what is missing.
- With `accept_truncated`, whatever can be decoded, again with a note.

All else is refused. What is missing is the duration that the header states less what was decoded. Where it
states none, it is estimated from the bytes that could not be decoded or that should follow. If a stream
without a stated duration ends within a packet or a page, nobody knows how much is missing, and it is refused
as well, unless it also begins in the middle.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from pipeline.audio.container import Window, find, parts
from pipeline.audio.downmix import downmix_matrix, mix_down
from pipeline.audio.ffmpeg import Block, Reader, UndecodableError
from pipeline.audio.resampling import QUALITY
from pipeline.audio.sndfile import SndfileReader
from pipeline.audio.sniff import describe
from pipeline.errors import BadAudio
from pipeline.records import Audio, Samples, SourceInfo

MISSING_SHARE, MISSING_LEAST_S, MISSING_MOST_S = 0.01, 0.1, 5.0  # what may be missing: see above
NOTED_S = 0.025  # a block of Vorbis that the start of a recording costs is shorter, a frame of MP3 longer
NOTED_SILENCE_SHARE, NOTED_SILENCE_S = 0.1, 1.0
_HEAD_BYTES = 4096
# Protected sample entries (ISO/IEC 14496-12, 8.12.1) and the content encryption object of ASF.
_ENCRYPTION = re.compile(
    rb"sinf....frma|\xfb\xb3\x11\x22\x23\xbd\xd2\x11\xb4\xb7\x00\xa0\xc9\x55\xfc\x6e", re.DOTALL
)

AnyReader = Reader | SndfileReader


@dataclass(frozen=True)
class DecodeLimits:
    """What is refused, so that no file can fill the memory or take hours."""

    min_duration_s: float = 1.0
    max_duration_s: float = 1200.0
    max_bytes: int = 1_000_000_000  # of the file
    accept_truncated: bool = False  # take what can be decoded of a file that is cut off or damaged


def decode(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes], *, sample_rate: int, limits: DecodeLimits
) -> tuple[Audio, SourceInfo]:
    """Read a file as float32 (1 or 2 channels, samples) at `sample_rate` Hz, and what it was before.

    Raises:
        BadAudio: it is not audio, damaged or outside the limits; the message lacks the file's name.
        OSError: the file does not exist any more or the device fails, which is not the file's fault.
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
    sink = _Sink(sample_rate, limits.max_duration_s)
    found, rest = parts(file, size)
    head = found[0].peek(0, _HEAD_BYTES)
    readers = [reader for window in found if (reader := _decode_part(window, sink))]
    problem = _problem(readers, len(found), sink.read_s)
    is_noise = any(reader.is_noise for reader in readers)
    is_empty = not sink.read_s or not readers
    if (problem or is_noise or is_empty) and any(find(file, 0, size, _ENCRYPTION)):
        raise BadAudio("is encrypted (copy protection) and can't be decoded")
    if is_empty or is_noise:
        raise BadAudio(
            describe(head)
            if len(readers) < len(found) or any(reader.bad_bytes for reader in readers)
            else "has no sound in it: not one sample can be decoded"
        )
    if problem and not limits.accept_truncated:
        raise BadAudio(f"{problem} (normalize.accept_truncated: true takes what is there)")
    if sink.read_s < limits.min_duration_s - NOTED_S:
        raise BadAudio(f"is too short: {sink.read_s:.2f} s, at least {limits.min_duration_s:g} s are needed")
    notes = [problem] if problem else _notes(readers, sink.read_s)
    left_out = rest[1] - max(rest[0], found[-1].start + readers[-1].read_to)
    if left_out > 0:
        notes.append(f"{left_out} bytes behind its end, of another kind, were left out")
    rate, channels = sink.main_format
    info = SourceInfo(sink.read_s, rate, channels, readers[0].codec, (*notes, *sink.notes()))
    return Audio(sink.finish(), sample_rate), info


def _decode_part(window: Window, sink: _Sink) -> AnyReader | None:
    """The reader after it has read everything; None if FFmpeg can't make sense of the part."""
    try:
        with contextlib.closing(_open(window)) as reader:
            window = reader.window
            for block in reader.blocks():
                sink.add(block)
        return reader
    except UndecodableError:
        return None
    finally:
        if window.error:  # whatever the decoder made of it, the device failed
            raise window.error


def _open(window: Window) -> AnyReader:
    try:
        reader = Reader(window)
    except UndecodableError:
        if window.peek(0, 4) == b"OggS":
            return SndfileReader(window)
        if not (repaired := window.from_data_chunk()):
            raise
        return Reader(repaired)
    if not reader.goes_on():
        return reader
    reader.close()
    return Reader(window.again(), to_end=True)


def _problem(readers: list[AnyReader], n_parts: int, read_s: float) -> str:
    """Why the file is not accepted as it is; empty if it is."""
    missing_s = sum(reader.missing_s for reader in readers)
    total_s = read_s + missing_s
    if len(readers) < n_parts:
        return f"is damaged: {n_parts - len(readers)} of the streams it is chained of can't be decoded"
    if missing_s > min(max(MISSING_SHARE * total_s, MISSING_LEAST_S), MISSING_MOST_S):
        return f"is cut off or damaged: {read_s:.1f} s of {total_s:.1f} s can be decoded"
    early = _ends_early(readers)
    if early and not any(reader.begins_late for reader in readers):
        return f"is cut off: {early} after {read_s:.1f} s"
    return ""


def _notes(readers: list[AnyReader], read_s: float) -> list[str]:
    """What is worth knowing about an accepted file."""
    notes = []
    missing_s = sum(reader.missing_s for reader in readers)
    bad_bytes = sum(reader.bad_bytes for reader in readers)
    if missing_s > NOTED_S:
        notes.append(f"{missing_s:.2f} s of {read_s + missing_s:.2f} s are missing or can't be decoded")
    elif bad_bytes:
        notes.append(f"{bad_bytes} bytes that can't be decoded were left out")
    if early := _ends_early(readers):
        notes.append(f"{early} after {read_s:.1f} s")
    elif any(reader.window.ends_unmarked for reader in readers):
        notes.append("the end-of-stream mark is missing")
    if any(reader.to_end for reader in readers):
        notes.append("the header states an end before that of the sound")
    return notes


def _ends_early(readers: list[AnyReader]) -> str:
    """What is incomplete at an end where nothing tells how much is missing; empty if nothing is."""
    if any(reader.window.ends_in_page for reader in readers):
        return "its last page is incomplete"
    return "the end of its last frame is missing" if any(reader.ends_early for reader in readers) else ""


class _Sink:
    """Mixes down, checks and resamples block after block, and holds the result."""

    def __init__(self, sample_rate: int, max_duration_s: float) -> None:
        self._sample_rate = sample_rate
        self._max_duration_s = max_duration_s
        self._n_read: Counter[tuple[int, int]] = Counter()  # samples by sample rate and channel count
        self._silent_s = 0.0  # digital silence since the last sound
        self._format: tuple[int, tuple[str, ...]] | None = None
        self._matrix: Samples | None = None
        self._stream: Any = None
        self._blocks: deque[Samples] = deque()  # at the wanted rate: float32 (samples, channels)

    @property
    def read_s(self) -> float:
        return sum(n / rate for (rate, _), n in self._n_read.items())

    @property
    def main_format(self) -> tuple[int, int]:
        """The sample rate in Hz and the number of channels of the longest part of the file."""
        return max(self._n_read, key=lambda form: self._n_read[form] / form[0])

    def notes(self) -> list[str]:
        notes = []
        formats = [
            f"{rate} Hz, {channels} ch"
            for (rate, channels), n in self._n_read.items()
            if n > MISSING_LEAST_S * rate
        ]
        if len(formats) > 1:
            notes.append(f"the format changes on the way: {'; '.join(formats)}")
        if self._silent_s > max(NOTED_SILENCE_S, NOTED_SILENCE_SHARE * self.read_s):
            notes.append(f"the last {self._silent_s:.1f} s are digital silence")
        return notes

    def add(self, block: Block) -> None:
        samples, rate, names = block
        if self._format != (rate, names):
            self._begin(rate, names)
        if self._matrix is not None:
            samples = mix_down(samples, self._matrix)
        self._check_finite(samples, rate)
        self._n_read[rate, len(names)] += len(samples)
        if self.read_s > self._max_duration_s:
            raise BadAudio(f"is too long: more than {self._max_duration_s:g} s")
        self._silent_s = 0.0 if samples[-1:].any() or samples.any() else self._silent_s + len(samples) / rate
        self._store(samples)

    def finish(self) -> Samples:
        """Everything, float32 (channels, samples); each block is released when it has been copied."""
        self._end()
        channels = max(block.shape[1] for block in self._blocks)
        whole = np.empty((channels, sum(map(len, self._blocks))), dtype=np.float32)
        at = 0
        while self._blocks:
            block = self._blocks.popleft()
            whole[:, at : at + len(block)] = block.T  # mono among stereo goes to both channels
            at += len(block)
        return whole

    def _begin(self, rate: int, names: tuple[str, ...]) -> None:
        """Go on with samples of another format."""
        self._end()
        self._format = rate, names
        self._matrix = downmix_matrix(names)
        self._stream = None
        if rate != self._sample_rate:
            import soxr

            self._stream = soxr.ResampleStream(
                rate, self._sample_rate, min(len(names), 2), dtype="float32", quality=QUALITY
            )

    def _end(self) -> None:
        if self._stream is not None:
            self._store(np.zeros((0, self._blocks[-1].shape[1]), dtype=np.float32), last=True)

    def _store(self, samples: Samples, *, last: bool = False) -> None:
        if self._stream is not None:
            samples = self._stream.resample_chunk(np.ascontiguousarray(samples), last=last)
        self._blocks.append(samples)

    def _check_finite(self, samples: Samples, rate: int) -> None:
        finite = np.isfinite(samples)
        if not finite.all():
            at_s = self.read_s + int(np.argmin(finite.all(axis=1))) / rate
            raise BadAudio(f"has a sample that is not a finite number at {at_s:.3f} s")
