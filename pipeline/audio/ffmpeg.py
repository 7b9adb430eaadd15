"""FFmpeg (through PyAV) as the one decoder: packet by packet, with an account of what was lost.

FFmpeg reads through a file object that this program opened and may open nothing else: playlists and
reference movies name further files and addresses, and anyone may put a file into an inbox.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pipeline.audio.container import Window
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
_STATE_DURATION = {"aiff", "ape", "au", "caf", "dsf", "flac", "mov", "mpc8", "ogg", "tak", "tta", "wv"}
# Containers that state to the sample where the audio ends, while FFmpeg may go on with padding or tags.
_STATE_END = {"au", "mov", "ogg"}
_FRAME_STREAMS = {"aac", "mp3"}
_ASF_SLACK_S = 0.1  # padding of packets that the duration includes
_MOST_PADDING_S = 0.15  # behind the stated end; more is sound behind a wrong statement
_LATE_S = 0.5  # a stream whose first timestamp is later was recorded from the middle of a broadcast
# The header frame of an MP3 file with the number of frames, by Xing and LAME or by Fraunhofer.
_MP3_INFO = re.compile(
    rb"\xff[\xe2-\xff].{11,36}?"
    rb"(?:(?:Xing|Info)\0\0\0(?:[\1\3\5\7\x09\x0b\x0d\x0f](.{4}))?|VBRI.{10}(.{4}))",
    re.DOTALL,
)
_HEAD_BYTES = 4096  # more than a frame of MP3 has
_STREAMED_SIZES = range(0x7FFFF000, 0x100000000)  # written by programs that do not know the size yet
_UNKNOWN_SIZE = 1 << 40  # the same in fields of 64 bits
# How frames of DTS (ETSI TS 102 114, words of 16 or 14 bits) and bursts of IEC 61937 begin, in both byte
# orders. Single sync words occur in PCM as well, often where one channel is the other's negative.
_SYNC_WORD = re.compile(
    rb"\x7f\xfe\x80\x01|\xfe\x7f\x01\x80|\x1f\xff\xe8\x00|\xff\x1f\x00\xe8|\xf8\x72\x4e\x1f|\x72\xf8\x1f\x4e"
)
_SYNC_SEARCH_S = 10.0
_CHUNK = re.compile(rb"(?!RIFF|data)[ -~]{4}|ID3")
_PADDING_SEARCH_BYTES = 1 << 20
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

    def __init__(self, window: Window, *, to_end: bool = False) -> None:
        """`to_end`: read a WAV file on beyond the stated end of its data."""
        import av

        av.logging.set_level(None)
        self.to_end = to_end
        self.read_s = 0.0
        self.bad_bytes = 0  # of packets that can't be decoded
        self.read_to = 0  # in the window: the end of the last packet
        self.ends_early = False  # the data ends within a packet, and no header says how much should follow
        self.window = window
        self._errors = (av.FFmpegError, ValueError)
        self._good_bytes = 0
        self._good_packets = self._stated_packets = 0  # without header frames; stated by those of MP3 files
        self._behind_end: list[Samples] = []
        self._is_broken = False  # the container is, at the place where reading stopped
        self._is_integer = False
        buffered = io.BufferedReader(window, 1 << 16)
        try:
            self._container = av.open(
                buffered,
                mode="r",
                options={
                    "format_whitelist": _FORMATS,
                    "protocol_whitelist": "none",
                    "ignore_length": str(int(to_end)),
                },
                metadata_errors="replace",
                io_open=_refuse,
            )
        except self._errors as e:
            buffered.detach()  # otherwise it would close the window
            raise UndecodableError(str(e)) from e
        self.format = self._container.format.name.split(",")[0]
        self._stream: Any = self._container.streams.best("audio")
        if self._stream is None:
            raise BadAudio("has no audio stream")
        context = self._stream.codec_context
        if context is None:
            raise BadAudio("has an audio stream in a codec that can't be decoded")
        rate, channels = context.sample_rate, context.channels
        if rate and not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
            raise BadAudio(f"has a sample rate of {rate} Hz; {MIN_RATE_HZ} to {MAX_RATE_HZ} can be used")
        if channels > MAX_CHANNELS:
            raise BadAudio(f"has {channels} channels; up to {MAX_CHANNELS} can be used")
        context.thread_count = 1
        self.codec = str(context.codec.canonical_name)
        self._time_base_s = float(self._stream.time_base or 0)
        self._packets = self._container.demux(self._stream)
        self._first = self._next()
        if self._first is None and self._is_broken:
            self.close()
            buffered.detach()
            raise UndecodableError("not one packet can be read")
        self._first_pos = max(0, self._first.pos or 0) if self._first else 0
        self._declared_s = self._stated_s()  # None: not stated
        self._declared_bytes = self._stated_bytes()
        self._bytes_behind = self._count_behind()
        if self.format in _FRAME_STREAMS:
            self.begins_late = self._first_pos > 0
        else:
            self.begins_late = self._seconds(self._stream.start_time) > _LATE_S

    def close(self) -> None:
        self._container.close()
        self._container = self._stream = self._packets = self._first = None  # they hold the decoder's memory

    def goes_on(self) -> bool:
        """Whether there is sound behind the stated end of a WAV file, which can be read on."""
        return self.format == "wav" and self._bytes_behind > 0

    def _count_behind(self) -> int:
        """Bytes of sound behind the stated end of WAV, W64 or CAF data: not chunks, tags or zeros."""
        end = self._declared_bytes
        rate_bytes = (self._stream.codec_context.bit_rate or 0) / 8
        if not self._first_pos < end < self.window.size - _MOST_PADDING_S * rate_bytes:
            return 0
        # Chunks follow at once, behind a pad byte, or in W64 at a multiple of 8 bytes.
        if any(_CHUNK.match(self.window.peek(at, 4)) for at in {end, end + end % 2, end + -end % 8}):
            return 0
        is_padding = not self.window.peek(end, _PADDING_SEARCH_BYTES).strip(b"\0")
        return 0 if is_padding else self.window.size - end

    @property
    def missing_s(self) -> float:
        """How much less was read than there should be, by the header or by the bytes that were lost."""
        lost_bytes = max(0, self._declared_bytes - self.window.size)
        if self.format != "wav":  # which is read on
            lost_bytes += self._bytes_behind
        if self.format == "ogg":  # FFmpeg drops damaged pages
            lost_bytes += max(0, self.window.packet_bytes - self._good_bytes)
        if self._declared_s is None:
            lost_bytes += self.bad_bytes
        lost_s = lost_bytes * self.read_s / max(1, self._good_bytes)
        if self.format == "mp3":  # in packets, as joined files may have different rates
            packet_s = self.read_s / max(1, self._good_packets)
            return max(lost_s, (self._stated_packets - self._good_packets) * packet_s)
        return max(lost_s, (self._declared_s or 0.0) - self.read_s)

    @property
    def is_noise(self) -> bool:
        """Whether so little can be decoded that it looks like audio by chance."""
        return self._declared_s is None and self.bad_bytes > 2 * self._good_bytes

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

    def _next(self) -> Any:
        try:
            return next(self._packets, None)
        except self._errors:
            self._is_broken = True
            return None

    def _frames(self) -> Iterator[Any]:
        packet, last, is_bad = self._first, b"", False
        excess = 0  # bytes behind the frame of a FLAC packet: the last one holds all that follows
        sizes: set[int] = set()  # of all packets but the last
        while packet is not None:
            is_header = self._is_header_frame(packet)
            self.read_to = max(self.read_to, (packet.pos or 0) + packet.size)
            try:
                frames = [] if is_header else packet.decode()
                failed = packet.is_corrupt and self.format == "mov"
            except self._errors:
                frames, failed = [], True
            for frame in frames:
                is_usable = MIN_RATE_HZ <= frame.sample_rate <= MAX_RATE_HZ
                if is_usable and frame.layout.nb_channels <= MAX_CHANNELS:  # else it is damaged
                    yield frame
            if failed:
                self.bad_bytes += packet.size
            else:
                if self.format == "flac" and frames:
                    excess = max(0, packet.size - _largest_flac_frame(frames[0]))
                self._good_bytes += packet.size
                self._good_packets += bool(packet.size) and not is_header
            if packet.size:
                is_bad = failed
                if self.format in _FRAME_STREAMS:
                    sizes |= {len(last)} if last else set()
                    last = bytes(packet)
            packet = self._next()
        self.bad_bytes += excess
        if self.format in _FRAME_STREAMS:  # FFmpeg passes over bytes that belong to no frame
            self.bad_bytes = max(self.bad_bytes, self.window.size - self._first_pos - self._good_bytes)
            is_frame = last[:1] == b"\xff" and last[1:2] >= b"\xe0"
            is_short = len(sizes) <= 2 and len(last) < min(sizes, default=0)  # at a constant bit rate
            is_bad = is_frame and (is_bad or is_short)
        # FFmpeg estimates the duration of an ASF file whose size is not the stated one.
        is_stated = self.format != "asf" and (self._declared_s or self._declared_bytes)
        self.ends_early = not is_stated and (is_bad or self._is_broken)

    def _is_header_frame(self, packet: Any) -> bool:
        """Whether this packet is the header frame of an MP3 file behind another or behind junk."""
        info = _MP3_INFO.match(bytes(packet)) if self.format == "mp3" else None
        if info and (self._declared_s is not None or packet is self._first):
            self._stated_packets += _mp3_packets(info)
            self._declared_s = self._stated_packets * self._seconds(packet.duration)
        return info is not None

    def _convert(self, graph: Any, frame: Any) -> Iterator[Block]:
        """Push a frame, or with None the end, and pull the blocks that are ready."""
        if graph is None:
            return
        with contextlib.suppress(*self._errors):
            graph.push(frame)
        while True:
            try:
                part = graph.pull()
            except self._errors:  # it needs more, or it is at its end
                return
            names = tuple(channel.name for channel in part.layout.channels)
            samples = self._without_padding(part.to_ndarray().reshape(-1, len(names)), part.sample_rate)
            if self._is_integer and self.read_s < _SYNC_SEARCH_S:
                _check_bit_stream(samples)
            self.read_s += len(samples) / part.sample_rate
            yield Block(samples, part.sample_rate, names)

    def _without_padding(self, samples: Samples, sample_rate: int) -> Samples:
        """Hold back what lies behind the stated end, until it is too much to be padding."""
        if self.format not in _STATE_END or self._declared_s is None:
            return samples
        n_left = max(0, round((self._declared_s - self.read_s) * sample_rate))
        self._behind_end.append(samples[n_left:])
        if sum(map(len, self._behind_end)) <= _MOST_PADDING_S * sample_rate:
            return samples[:n_left]
        self._declared_s = None
        return np.concatenate([samples[:n_left], *self._behind_end])

    def _seconds(self, timestamp: int | None) -> float:
        return (timestamp or 0) * self._time_base_s

    def _stated_s(self) -> float | None:
        duration_s = self._seconds(self._stream.duration)
        if self.format == "mp3":
            before = self._before_first(_HEAD_BYTES)
            if info := _MP3_INFO.search(before) or _MP3_INFO.match(self.window.peek(0, _HEAD_BYTES)):
                self._stated_packets = _mp3_packets(info)
            return self._stated_packets * self._seconds(self._first.duration) or None
        if self.format in ("asf", "matroska") and not self._container.streams.video:
            duration_s = float(self._container.duration or 0) / 1e6
            return duration_s - (_ASF_SLACK_S if self.format == "asf" else 0.0) if duration_s else None
        if self.format == "avi" or (self.format == "caf" and "pcm" in self.codec):
            return self._seconds(self._stream.frames) or None
        if self.codec == "opus" and self.format == "ogg" and duration_s:
            pre_skip = int.from_bytes((self._stream.codec_context.extradata or b"")[10:12], "little")
            return duration_s - max(0.0, self._seconds(self._stream.start_time)) - pre_skip / 48000
        if self.format == "mov" and not self._stream.frames:  # what was found of its fragments
            return None
        return duration_s or None if self.format in _STATE_DURATION else None

    def _stated_bytes(self) -> int:
        """The least size of a file that holds all of its `data` chunk; 0 where the header does not tell."""
        head, before = self.window.peek(0, 36), self._before_first(24).rjust(24, b"\0")
        if self.format == "wav" and before[16:20] == b"data":
            is_long = head[12:16] == b"ds64"
            (size,) = struct.unpack("<Q", head[28:36]) if is_long else struct.unpack("<I", before[20:])
        elif self.format == "w64" and before[:4] == b"data":
            size = struct.unpack("<Q", before[16:])[0] - 24
        elif self.format == "caf" and before[8:12] == b"data":
            size = struct.unpack(">Q", before[12:20])[0] - 4  # without the edit count
        else:
            return 0
        return 0 if size in _STREAMED_SIZES or size > _UNKNOWN_SIZE else self._first_pos + int(size)

    def _before_first(self, count: int) -> bytes:
        """Up to `count` bytes before the first packet."""
        start = max(0, self._first_pos - count)
        return self.window.peek(start, self._first_pos - start)


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


def _check_bit_stream(samples: Samples) -> None:
    """Refuse what FFmpeg tells apart in WAV alone: compressed audio in the place of PCM samples."""
    found = [word.start() for word in _SYNC_WORD.finditer((samples * 32768).astype("<i2").tobytes())]
    for first, second, third in zip(found, found[1:], found[2:], strict=False):
        if second - first == third - second and (second - first) % _SYNC_STEP_BYTES == 0:
            raise BadAudio("holds a DTS or Dolby Digital bit stream where its PCM samples should be")


def _largest_flac_frame(frame: Any) -> int:
    """Bytes that no FLAC frame exceeds: a sample has 33 bits at most (RFC 9639, 9.2)."""
    return 5 * int(frame.samples * frame.layout.nb_channels) + 64


def _refuse(url: str, flags: int, options: object) -> object:
    raise ValueError("an audio file may not open other files")


def _mp3_packets(info: re.Match[bytes]) -> int:
    """The number of packets that the header frame of an MP3 file states; 0 for none."""
    return int.from_bytes(info[1] or info[2] or b"")
