"""Where in a file the audio lies: between the tags, and in one part for each of several joined files.

FFmpeg reads the containers. What it does not do is done here: find an ID3v2 tag in front of containers other
than MPEG audio, tell a large tag in the middle of joined MP3 or ADTS files from sound, go on from one chained
Ogg stream to another of a different format and from a WAV, Ogg or MP4 file to one behind it, tell whether an
Ogg file ends within a page, and find the `data` chunk of a WAV file behind a chunk whose size is wrong.

Sources: ID3v2.4 (3.1, 3.4), ID3v1 and APEv2; RFC 3533 (6) for Ogg pages; ISO/IEC 14496-12 (4.2) for boxes.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.audio.sniff import is_container, is_mp4
from pipeline.errors import BadAudio

_CHUNK_BYTES = 1 << 20
_OGG_FIRST, _OGG_LAST = 0x02, 0x04
_MAX_PARTS = 1000
_TOO_MANY_PARTS = f"is more than {_MAX_PARTS} files one after another"

Stretch = tuple[int, int]  # first byte, byte behind the last


class Window(io.RawIOBase):
    """Stretches of a file that one decoder reads as one nameless read-only file, and how an Ogg stream ends.

    FFmpeg reads it from C, where an exception is lost: the first OSError is kept in `error`, and the file
    seems to end there, so that the caller can raise it afterwards.
    """

    def __init__(self, file: BinaryIO, *stretches: Stretch) -> None:
        super().__init__()
        self._file = file
        self._stretches = stretches
        self.ends_in_page = False  # the last page is incomplete, or junk follows in place of the last
        self.ends_unmarked = False  # the last page lacks the end-of-stream flag
        self._at = 0
        self.error: OSError | None = None

    def again(self) -> Window:
        """The same stretches, for another decoder: one that is closed closes its window."""
        return Window(self._file, *self._stretches)

    def from_data_chunk(self) -> Window | None:
        """A WAV file without the chunks between `fmt ` and `data`, one of which has a wrong size."""
        head = self.peek(0, _CHUNK_BYTES)
        fmt = head.find(b"fmt ")
        data = head.find(b"data", fmt)
        if not head.startswith(b"RIFF") or min(fmt, data) < 0:
            return None
        start, end = self._stretches[0]
        fmt_end = start + fmt + 8 + head[fmt + 4]
        return Window(self._file, (start, start + 12), (start + fmt, fmt_end), (start + data, end))

    @property
    def size(self) -> int:
        return sum(end - start for start, end in self._stretches)

    @property
    def end(self) -> int:
        """In the file: the byte behind the last stretch."""
        return self._stretches[-1][1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def peek(self, at: int, count: int) -> bytes:
        """Up to `count` bytes from `at` on, without moving the position."""
        position, self._at = self._at, at
        data = self.read(count) or b""
        self._at = position
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        at = self._at
        for start, end in self._stretches:
            if at < end - start:
                break
            at -= end - start
        else:
            return 0
        if self.error:
            return 0
        try:
            data = read_at(self._file, start + at, min(len(view), end - start - at))
        except OSError as e:
            self.error = e
            return 0
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def read_at(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(max(0, at))
    return file.read(max(0, count))


def parts(file: BinaryIO, size: int) -> tuple[list[Window], int]:
    """The parts of an open file of `size` bytes, to be decoded one after another.

    Also returns how many bytes behind the last part are neither tags nor zeros.

    Raises:
        BadAudio: it is more than a thousand joined files.
    """
    if read_at(file, size - 128, 3) == b"TAG":
        size = max(0, size - 128)
    start = _tags_end(file, 0, size)
    head = read_at(file, start, 64)
    if head.startswith(b"fLaC") or not is_container(head):
        return [Window(file, *_between_tags(file, start, size))], 0
    found: list[Window] = []
    while len(found) < _MAX_PARTS:
        is_ogg = head.startswith(b"OggS")
        windows = _ogg_parts(file, start, size) if is_ogg else [Window(file, (start, size))]
        end = windows[-1].end if is_ogg else _container_end(file, start, size)
        following = _tags_end(file, end, size)
        head = read_at(file, following, 64)
        if not is_container(head):
            has_more = any(read_at(file, following, min(_CHUNK_BYTES, size - following)))
            return [*found, *windows], size - following if has_more else 0
        found += windows if is_ogg else [Window(file, (start, end))]
        start = following
    raise BadAudio(_TOO_MANY_PARTS)


def _container_end(file: BinaryIO, start: int, size: int) -> int:
    """The end of the boxes of an MP4 file, or of a WAV file that another one follows; otherwise `size`."""
    head = read_at(file, start, 12)
    if head.startswith(b"RIFF"):
        end = start + 8 + int.from_bytes(head[4:8], "little")
        end += end % 2
        return end if is_container(read_at(file, end, 64)) else size
    end = start if is_mp4(head) else size
    while end < size:
        length, kind, long = struct.unpack(">I4sQ", read_at(file, end, 16).ljust(16, b"\0"))
        if not re.fullmatch(rb"[ -~\xa9]{4}", kind) or (kind == b"ftyp" and end > start):
            return end
        end = end + max(8, long if length == 1 else length) if length else size
    return size


def find(file: BinaryIO, start: int, end: int, pattern: re.Pattern[bytes]) -> Iterator[int]:
    """Where the pattern, of at most 32 bytes, occurs."""
    for at in range(start, end, _CHUNK_BYTES):
        data = read_at(file, at, min(_CHUNK_BYTES + 32, end - at))
        for match in pattern.finditer(data):
            if match.start() < _CHUNK_BYTES:
                yield at + match.start()


def _between_tags(file: BinaryIO, start: int, end: int) -> Iterator[Stretch]:
    """A stream of FLAC, MPEG audio or ADTS frames without the ID3v2 and APEv2 tags in it."""
    for at in find(file, start, end, re.compile(rb"ID3[\2-\4]\0|APETAGEX")):
        tag_start, tag_end = _tag_at(file, at)
        if start <= tag_start < tag_end:
            yield start, tag_start
            start = min(tag_end, end)
    yield start, max(start, end)


def _tags_end(file: BinaryIO, start: int, size: int) -> int:
    """The end of the tags at `start`, of which there may be several."""
    end = start
    while (tag := _tag_at(file, end)) and tag[0] == end < tag[1]:
        end = tag[1]
    return min(end, size)


def _tag_at(file: BinaryIO, at: int) -> Stretch:
    """The tag that an ID3v2 header or an APEv2 header or footer at `at` belongs to; empty if it is none."""
    head = read_at(file, at, 32)
    if re.match(rb"ID3[\2-\4]\0.[\0-\x7f]{4}", head, re.DOTALL):
        length = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        return at, at + 10 + length + (10 if head[5] & 0x10 else 0)
    if len(head) == 32 and head.startswith(b"APETAGEX"):
        length, _, flags = struct.unpack_from("<III", head, 12)
        is_header = flags >> 29 & 1
        return (at, at + 32 + length) if is_header else (at + 32 - length, at + 32)
    return at, at


def _ogg_parts(file: BinaryIO, start: int, end: int) -> list[Window]:
    """One part for each link of the chain; multiplexed streams, whose first pages adjoin, are one link."""
    found: list[Window] = []
    link, last, first_pages_end = start, start, start
    for page in find(file, start, end, re.compile(rb"OggS\0")):
        flags, page_end = _ogg_page(file, page)
        if flags & _OGG_FIRST:
            if page != first_pages_end:
                found.append(_ogg_part(file, link, last, page))
                link = page
            first_pages_end = page_end
        if len(found) > _MAX_PARTS:
            raise BadAudio(_TOO_MANY_PARTS)
        last = page
    return [*found, _ogg_part(file, link, last, end)]


def _ogg_part(file: BinaryIO, start: int, last_page: int, end: int) -> Window:
    flags, page_end = _ogg_page(file, last_page)
    window = Window(file, (start, min(page_end, end)))
    window.ends_unmarked = not flags & _OGG_LAST
    window.ends_in_page = page_end > end or (window.ends_unmarked and page_end < end)
    return window


def _ogg_page(file: BinaryIO, at: int) -> tuple[int, int]:
    """Flags and end of the page at `at`; an incomplete header counts as a page of its whole size."""
    head = read_at(file, at, 27 + 255)
    header, segments = head[:27].ljust(27, b"\xff"), head[27:]
    n_segments = header[26]
    return header[5], at + 27 + n_segments + sum(segments[:n_segments].ljust(n_segments, b"\xff"))
