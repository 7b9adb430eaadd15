"""FFmpeg (through PyAV) as the one decoder: packet by packet, with an account of what was lost.

FFmpeg reads through a file object that this program opened and may open nothing else: playlists and
reference movies name further files and addresses, and anyone may put a file into an inbox.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pipeline.audio.container import Window, find
from pipeline.errors import BadAudio
from pipeline.records import Samples

MIN_RATE_HZ, MAX_RATE_HZ = 8_000, 192_000
MAX_CHANNELS = 8
_BLOCK_FRAMES = 1 << 15
# Containers that FFmpeg may read: audio, and films for their audio. No playlists, raw data or pictures.
_FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,iff,loas,matroska,webm,mov,mp4,m4a,3gp,3g2,"
    "mj2,mp3,mpc,mpc8,mpeg,mpegts,mxf,nut,ogg,oma,rm,spdif,tak,truehd,tta,voc,w64,wav,wv,xwma"
)
# Containers whose header states the duration; for others FFmpeg may guess it from the bit rate.
_STATE_DURATION = {"aiff", "ape", "au", "dsf", "flac", "mov", "mpc8", "ogg", "tak", "tta", "wv"}
# Containers that state to the sample where the audio ends, while FFmpeg may go on with padding or tags.
_STATE_END = {"au", "mov", "ogg"}
_FRAME_STREAMS = {"aac", "mp3"}
_JOINED_SLACK_S = 0.2  # at most encoder delay and padding, which FFmpeg does not remove from joined files
_ASF_SLACK_S = 0.1  # padding of packets that the duration includes
_MOST_PADDING_S = 0.15  # behind the stated end; more is sound behind a wrong statement
_PADDING_BYTES = 1 << 12  # of zeros behind a stream of frames that count as padding
_LATE_S = 0.5  # a stream whose first timestamp is later was recorded from the middle of a broadcast
_GAP_S = 0.02
# The header frame of an MP3 file: MPEG version, sample rate, number of frames by Xing and LAME or Fraunhofer.
_MP3_INFO = re.compile(
    rb"\xff([\xe2-\xff])(.).{10,35}?"
    rb"(?:(?:Xing|Info)\0\0\0(?:[\1\3\5\7\x09\x0b\x0d\x0f](.{4}))?|VBRI.{10}(.{4}))",
    re.DOTALL,
)
_MP3_RATES_HZ = (44100, 48000, 32000, 0)
_HEAD_BYTES = 4096  # more than a frame of MP3 has
_ASF_FILE_SIZE = re.compile(
    rb"\xa1\xdc\xab\x8c\x47\xa9\xcf\x11\x8e\xe4\x00\xc0\x0c\x20\x53\x65.{24}(.{8})", re.DOTALL
)
# Protected sample entries (ISO/IEC 14496-12, 8.12.1) and the content encryption object of ASF.
_ENCRYPTION = re.compile(
    rb"sinf....frma|\xfb\xb3\x11\x22\x23\xbd\xd2\x11\xb4\xb7\x00\xa0\xc9\x55\xfc\x6e", re.DOTALL
)
_STREAMED_SIZES = range(0x7FFFF000, 0x100000000)  # written by programs that do not know the size yet
_UNKNOWN_SIZE = 1 << 40  # the same in fields of 64 bits
# How frames of DTS (ETSI TS 102 114, words of 16 or 14 bits) and bursts of IEC 61937 begin, in both byte
# orders. Single sync words occur in PCM as well, often where one channel is the other's negative.
_SYNC_WORD = re.compile(
    rb"\x7f\xfe\x80\x01|\xfe\x7f\x01\x80|\x1f\xff\xe8\x00|\xff\x1f\x00\xe8|\xf8\x72\x4e\x1f|\x72\xf8\x1f\x4e"
)
_SYNC_SEARCH_S = 10.0
_SYNC_STEP_BYTES = 1024  # frames and bursts hold a multiple of 256 stereo samples


class UndecodableError(Exception):
    """FFmpeg can't make sense of the bytes."""


class Block(NamedTuple):
    """Consecutive samples of one format."""

    samples: Samples  # float32, (samples, channels), full scale at 1
    sample_rate: int  # Hz
    channel_names: tuple[str, ...]  # FFmpeg's; "NONE" where the file does not say


class Reader:
    """The best audio stream of one part of a file.

    Raises:
        UndecodableError: FFmpeg finds no container.
        BadAudio: there is no audio stream, or it can't be used.
    """

    def __init__(self, window: Window) -> None:
        self.read_s = 0.0
        self.bad_bytes = 0  # of packets that can't be decoded
        self.has_gaps = False  # something is missing before the end
        self.ends_early = False  # the data ends within a packet, and no header says how much should follow
        self._window = window
        self._file: Any = None
        self._good_bytes = 0
        self._behind_end: list[Samples] = []
        self._is_broken = False  # the container is, at the place where reading stopped
        self._is_integer = False
        self._n_searched = 0  # bytes
        self._sync_words: list[int] = []  # their first bytes
        self._open()
        if self.format == "mp3" and self._first_pos and _MP3_INFO.match(bytes(self._first)):
            self._window.skip = self._first_pos  # FFmpeg looks for the header frame at the beginning only
            self._open()
        elif self.format == "wav" and self._data_goes_on():
            self._open({"ignore_length": "1"})
        self.declared_s = self._declared_s()  # None: not stated
        missing_bytes = self._declared_bytes() - window.size
        self._missing_bytes = missing_bytes if 0 < missing_bytes < _UNKNOWN_SIZE else 0
        if self.format in _FRAME_STREAMS:
            self.begins_late = self._first_pos > 0
        else:
            self.begins_late = self._seconds(self._stream.start_time) > _LATE_S

    def close(self) -> None:
        self._container.close()

    @property
    def missing_s(self) -> float:
        """How much less was read than there should be, by the header or by the bytes that were lost."""
        lost_bytes = self._missing_bytes + (self.bad_bytes if self.declared_s is None else 0)
        lost_s = lost_bytes * self.read_s / max(1, self._good_bytes)
        return max(lost_s, (self.declared_s or 0.0) - self.read_s)

    @property
    def is_noise(self) -> bool:
        """Whether so little can be decoded that it looks like audio by chance."""
        return self.declared_s is None and self.bad_bytes > self._good_bytes

    def is_encrypted(self) -> bool:
        return any(True for _ in find(self._window, 0, self._window.size, _ENCRYPTION))

    def blocks(self) -> Iterator[Block]:
        """All that can be decoded, in order; what can't be is counted and left out, as players do."""
        graph: Any = None
        form = None
        for frame in self._frames():
            if form != (frame.format.name, frame.layout.name, frame.sample_rate):
                yield from self._convert(graph, None)
                try:
                    graph = _to_packed_floats(frame)
                except self._errors as e:
                    raise UndecodableError(str(e)) from e
                form = (frame.format.name, frame.layout.name, frame.sample_rate)
                self._is_integer = frame.format.name.startswith("s")
            yield from self._convert(graph, frame)
        yield from self._convert(graph, None)

    def _open(self, options: dict[str, str] | None = None) -> None:
        """Open the container, or open it anew, and read the first packet."""
        import av

        av.logging.set_level(None)
        self._errors = (av.FFmpegError, ValueError)
        if self._file is not None:
            self.close()
            self._file.detach()  # otherwise it would close the window
        self._window.seek(0)
        self._file = io.BufferedReader(self._window, 1 << 16)
        try:
            self._container = av.open(
                self._file,
                mode="r",
                options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"} | (options or {}),
                metadata_errors="replace",
                io_open=_refuse,
            )
        except self._errors as e:
            raise UndecodableError(str(e)) from e
        self.format = self._container.format.name.split(",")[0]
        self._stream: Any = self._container.streams.best("audio")
        if self._stream is None:
            raise BadAudio("has no audio stream")
        self._context = self._stream.codec_context
        if self._context is None:
            raise BadAudio("has an audio stream in a codec that can't be decoded")
        rate, channels = self._context.sample_rate, self._context.channels
        if rate and not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
            raise BadAudio(f"has a sample rate of {rate} Hz; {MIN_RATE_HZ} to {MAX_RATE_HZ} can be used")
        if channels > MAX_CHANNELS:
            raise BadAudio(f"has {channels} channels; up to {MAX_CHANNELS} can be used")
        self._context.thread_count = 1
        self.codec = str(self._context.codec.canonical_name)
        self._time_base_s = float(self._stream.time_base or 0)
        self._packets = self._container.demux(self._stream)
        self._first = self._next()
        if self._first is None and self._is_broken:
            raise UndecodableError("not one packet can be read")
        self._first_pos = max(0, self._first.pos or 0) if self._first else 0

    def _data_goes_on(self) -> bool:
        """Whether a WAV file has more behind its `data` chunk than in it, and no other chunk there."""
        start = self._first_pos
        head = self._window.peek(start - 8, 8)
        end = start + int.from_bytes(head[4:], "little")
        behind = self._window.peek(end + end % 2, 4)
        goes_on = head[:4] == b"data" and end > start and self._window.size - end > end - start
        return goes_on and not re.match(rb"[ -~]{4}", behind)

    def _next(self) -> Any:
        try:
            return next(self._packets, None)
        except self._errors:
            self._is_broken = True
            return None

    def _frames(self) -> Iterator[Any]:
        packet, last = self._first, b""
        sizes: set[int] = set()  # of all packets but the last
        expected_s, bad = sys.maxsize, False
        while packet is not None:
            try:
                frames = [] if last and self._is_header_frame(packet) else packet.decode()
                self._good_bytes += packet.size
            except self._errors:
                frames, bad = [], True
                self.bad_bytes += packet.size
            for frame in frames:
                at_s = self._seconds(frame.pts)
                self.has_gaps |= bad or at_s > expected_s + _GAP_S
                bad, expected_s = False, at_s + frame.samples / max(1, frame.sample_rate)
                if _is_usable(frame.sample_rate, frame.layout.nb_channels):
                    yield frame
            if packet.size:
                self.ends_early = packet.is_corrupt
                if self.format in _FRAME_STREAMS:
                    sizes |= {len(last)} if last else set()
                    last = bytes(packet)
            packet = self._next()
        if self.format in _FRAME_STREAMS:
            self._finish_frame_stream(last, bad, sizes)
        else:
            is_cut = self.ends_early and self.format == "mov" and not self._stream.frames  # fragments
            breaks_off = self._is_broken or (bad and self.format == "flac")
            self.ends_early = is_cut or (breaks_off and self.declared_s is None)

    def _is_header_frame(self, packet: Any) -> bool:
        """Whether another MP3 file, joined to the first, begins with this packet, which has no audio then."""
        info = _MP3_INFO.match(bytes(packet)) if self.format == "mp3" else None
        if self.declared_s is not None:
            self.declared_s += _mp3_declared_s(info) or 0.0
        return info is not None

    def _finish_frame_stream(self, last: bytes, is_bad: bool, sizes: set[int]) -> None:
        """Find what is missing without a header: FFmpeg passes over bytes that belong to no frame."""
        is_frame = last[:1] == b"\xff" and last[1:2] >= b"\xe0"
        is_short = len(sizes) <= 2 and len(last) < min(sizes, default=0)  # at a constant bit rate
        self.ends_early = self.declared_s is None and is_frame and (is_bad or is_short)
        end = self._window.peek(self._window.size - _PADDING_BYTES, _PADDING_BYTES)
        used = self._first_pos + self._good_bytes + len(end) - len(end.rstrip(b"\0"))
        self.bad_bytes = max(self.bad_bytes, self._window.size - used)

    def _convert(self, graph: Any, frame: Any) -> Iterator[Block]:
        """Push a frame, or with None the end, and pull the blocks that are ready."""
        if graph is None:
            return
        with contextlib.suppress(*self._errors):
            graph.push(frame)
        while (part := self._pull(graph)) is not None:
            names = tuple(channel.name for channel in part.layout.channels)
            samples = self._without_padding(part.to_ndarray().reshape(-1, len(names)), part.sample_rate)
            self._check_bit_stream(samples)
            self.read_s += len(samples) / part.sample_rate
            yield Block(samples, part.sample_rate, names)

    def _pull(self, graph: Any) -> Any:
        try:
            return graph.pull()
        except self._errors:  # it needs more, or it is at its end
            return None

    def _without_padding(self, samples: Samples, sample_rate: int) -> Samples:
        """Hold back what lies behind the stated end, until it is too much to be padding."""
        if self.format not in _STATE_END or self.declared_s is None:
            return samples
        n_left = max(0, round((self.declared_s - self.read_s) * sample_rate))
        self._behind_end.append(samples[n_left:])
        if sum(map(len, self._behind_end)) <= _MOST_PADDING_S * sample_rate:
            return samples[:n_left]
        self.declared_s = None
        return np.concatenate([samples[:n_left], *self._behind_end])

    def _check_bit_stream(self, samples: Samples) -> None:
        """Refuse what FFmpeg tells apart in WAV alone: compressed audio in the place of PCM samples."""
        if self._is_integer and self.read_s < _SYNC_SEARCH_S:
            words = (samples * 32768).astype("<i2").tobytes()
            self._sync_words += [self._n_searched + word.start() for word in _SYNC_WORD.finditer(words)]
            self._n_searched += len(words)
            for first, second, third in zip(*(self._sync_words[k:] for k in range(3)), strict=False):
                if second - first == third - second and (second - first) % _SYNC_STEP_BYTES == 0:
                    raise BadAudio("holds a DTS or Dolby Digital bit stream where its PCM samples should be")

    def _seconds(self, timestamp: int | None) -> float:
        return (timestamp or 0) * self._time_base_s

    def _declared_s(self) -> float | None:
        duration_s = self._seconds(self._stream.duration)
        if self.format == "mp3":
            before = self._window.peek(self._first_pos - _HEAD_BYTES, min(self._first_pos, _HEAD_BYTES))
            stated_s = _mp3_declared_s(_MP3_INFO.search(before))
            if stated_s is None or 0 <= stated_s - duration_s < _JOINED_SLACK_S:
                return None if stated_s is None else duration_s
            return stated_s - _JOINED_SLACK_S
        if self.format in ("asf", "matroska") and not self._container.streams.video:
            duration_s = float(self._container.duration or 0) / 1e6
            return duration_s - (_ASF_SLACK_S if self.format == "asf" else 0.0) if duration_s else None
        if self.format == "avi":
            return self._seconds(self._stream.frames) or None
        if self.codec == "opus" and self.format == "ogg" and duration_s:
            pre_skip = int.from_bytes((self._context.extradata or b"")[10:12], "little")
            return duration_s - max(0.0, self._seconds(self._stream.start_time)) - pre_skip / 48000
        is_stated = self.format in _STATE_DURATION or (self.format == "caf" and "pcm" not in self.codec)
        return duration_s or None if is_stated else None

    def _declared_bytes(self) -> int:
        """The least size that the header states for the data; 0 where it states none."""
        head = self._window.peek(0, _HEAD_BYTES)
        start = self._first_pos
        before = self._window.peek(start - 24, min(start, 24)).rjust(24, b"\0")
        if self.format == "wav" and before[16:20] == b"data":
            is_long = head[12:16] == b"ds64"
            (size,) = struct.unpack("<Q", head[28:36]) if is_long else struct.unpack("<I", before[20:])
            return 0 if size in _STREAMED_SIZES and not is_long else start + int(size)
        if self.format == "w64" and before[:4] == b"data":
            return start - 24 + int(struct.unpack("<Q", before[16:])[0])
        if self.format == "caf" and before[8:12] == b"data":
            return start - 4 + int(struct.unpack(">q", before[12:20])[0])
        if self.format == "avi":
            return 8 + int(struct.unpack("<I", head[4:8])[0])
        stated = _ASF_FILE_SIZE.search(head) if self.format == "asf" else None
        return int.from_bytes(stated[1], "little") if stated else 0


def _to_packed_floats(frame: Any) -> Any:
    """A filter graph from frames like this one to blocks of float32 with full scale at 1.

    FFmpeg converts, because PyAV 18.1's `to_ndarray` reads out of bounds from frames of eight planar
    channels; and PyAV's `AudioResampler` does not do it, because its graph has threads.
    """
    import av.filter

    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add(
        "abuffer",
        sample_rate=str(frame.sample_rate),
        sample_fmt=frame.format.name,
        channel_layout=frame.layout.name,
        time_base=f"1/{frame.sample_rate}",
    )
    graph.link_nodes(source, graph.add("aformat", "sample_fmts=flt"), graph.add("abuffersink")).configure()
    graph.set_audio_frame_size(_BLOCK_FRAMES)
    return graph


def _is_usable(sample_rate: int, channels: int) -> bool:
    return MIN_RATE_HZ <= sample_rate <= MAX_RATE_HZ and channels <= MAX_CHANNELS


def _mp3_declared_s(info: re.Match[bytes] | None) -> float | None:
    """The duration that the header frame of an MP3 file states, encoder delay and padding included."""
    if info is None or not (count := int.from_bytes(info[3] or info[4] or b"", "big")):
        return None
    version, rate_hz = info[1][0] >> 3 & 3, _MP3_RATES_HZ[info[2][0] >> 2 & 3]
    samples, divisor = {3: (1152, 1), 2: (576, 2), 0: (576, 4)}.get(version, (0, 1))
    return count * samples * divisor / rate_hz if rate_hz else None


def _refuse(url: str, flags: int, options: object) -> object:
    raise ValueError("an audio file may not open other files")
