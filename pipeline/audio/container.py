"""Where in a file the audio lies: between the tags, and in one part for each chained Ogg stream.

FFmpeg reads the containers. What it does not do is done here: find an ID3v2 tag in front of containers other
than MPEG audio, tell a large tag in the middle of joined MP3 or ADTS files from sound, go on from one chained
Ogg stream to another of a different format, and tell whether an Ogg file ends within a page.

Sources: ID3v2.4 (3.1, 3.4), ID3v1 and APEv2; RFC 3533 (6) for Ogg pages.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.audio.sniff import is_container
from pipeline.errors import BadAudio

_CHUNK_BYTES = 1 << 20
_OGG_FIRST, _OGG_LAST = 0x02, 0x04
_MAX_PARTS = 1000

Stretch = tuple[int, int]  # first byte, byte behind the last


class Window(io.RawIOBase):
    """Stretches of a file that one decoder reads as one nameless read-only file, and how an Ogg stream ends.

    FFmpeg reads it from C, where an exception is lost: the first OSError is kept in `error`, and the file
    seems to end there, so that the caller can raise it afterwards.
    """

    def __init__(
        self, file: BinaryIO, *stretches: Stretch, ends_in_page: bool = False, ends_unmarked: bool = False
    ) -> None:
        super().__init__()
        self._file = file
        self._stretches = stretches
        self.ends_in_page = ends_in_page  # the last page is incomplete, or junk follows in place of the last
        self.ends_unmarked = ends_unmarked  # the last page lacks the end-of-stream flag
        self._at = 0
        self.error: OSError | None = None

    def again(self) -> Window:
        """The same stretches, for another decoder: one that is closed closes its window."""
        return Window(
            self._file,
            *self._stretches,
            ends_in_page=self.ends_in_page,
            ends_unmarked=self.ends_unmarked,
        )

    @property
    def size(self) -> int:
        return sum(end - start for start, end in self._stretches)

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


def parts(file: BinaryIO, size: int) -> list[Window]:
    """The parts of an open file of `size` bytes, to be decoded one after another.

    Raises:
        BadAudio: there are more than a thousand chained Ogg streams.
    """
    start = _tags_end(file, size)
    head = read_at(file, start, 64)
    if head.startswith(b"OggS"):
        return _ogg_parts(file, start, size)
    if is_container(head):
        return [Window(file, (start, size))]
    return [Window(file, *_between_tags(file, start, size))]


def find(file: BinaryIO, start: int, end: int, pattern: re.Pattern[bytes]) -> Iterator[int]:
    """Where the pattern, of at most 32 bytes, occurs."""
    for at in range(start, end, _CHUNK_BYTES):
        data = read_at(file, at, min(_CHUNK_BYTES + 32, end - at))
        for match in pattern.finditer(data):
            if match.start() < _CHUNK_BYTES:
                yield at + match.start()


def _between_tags(file: BinaryIO, start: int, end: int) -> Iterator[Stretch]:
    """A stream of MPEG audio or ADTS frames without the ID3v2, APEv2 and last ID3v1 tags in it."""
    if read_at(file, end - 128, 3) == b"TAG":
        end -= 128
    for at in find(file, start, end, re.compile(rb"ID3[\2-\4]\0|APETAGEX")):
        tag_start, tag_end = _tag_at(file, at)
        if start <= tag_start < tag_end:
            yield start, tag_start
            start = min(tag_end, end)
    yield start, max(start, end)


def _tags_end(file: BinaryIO, size: int) -> int:
    """The end of the tags in front, of which there may be several."""
    end = 0
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
        if len(found) == _MAX_PARTS:
            raise BadAudio(f"is more than {_MAX_PARTS} Ogg streams one after another")
        last = page
    return [*found, _ogg_part(file, link, last, end)]


def _ogg_part(file: BinaryIO, start: int, last_page: int, end: int) -> Window:
    flags, page_end = _ogg_page(file, last_page)
    is_unmarked = not flags & _OGG_LAST
    is_cut = page_end > end or (is_unmarked and page_end < end)
    return Window(file, (start, min(page_end, end)), ends_in_page=is_cut, ends_unmarked=is_unmarked)


def _ogg_page(file: BinaryIO, at: int) -> tuple[int, int]:
    """Flags and end of the page at `at`; an incomplete header counts as a page of its whole size."""
    head = read_at(file, at, 27 + 255)
    header, segments = head[:27].ljust(27, b"\xff"), head[27:]
    n_segments = header[26]
    return header[5], at + 27 + n_segments + sum(segments[:n_segments].ljust(n_segments, b"\xff"))
