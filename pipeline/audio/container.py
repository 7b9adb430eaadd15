"""Where in a file the audio lies: between the tags, and in one part for each of several joined files.

FFmpeg reads the containers. What it does not do is done here: find an ID3v2 tag in front of containers other
than MPEG audio, tell a large tag in the middle of joined MP3 or ADTS files from sound, go on from one chained
Ogg stream to another of a different format and from one file to another behind it, tell whether an Ogg file
ends within a page and what its pages hold, and find the `data` chunk of a WAV file behind a chunk whose size
is wrong.

Sources: ID3v2.4 (3.1, 3.4), ID3v1 and APEv2; RFC 3533 (6) for Ogg pages; ISO/IEC 14496-12 (4.2) for boxes.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from pipeline.audio.sniff import begins_frames, is_container, is_mp4
from pipeline.errors import BadAudio

_CHUNK_BYTES = 1 << 20
_OGG_FIRST, _OGG_LAST = 0x02, 0x04
_MAX_PARTS = 1000
_TOO_MANY_PARTS = f"is more than {_MAX_PARTS} files one after another"

_FORMAT_SIZES = (16, 18, 40)  # of a `fmt ` chunk
_LEAST_REST = 64  # bytes behind the end of a container: fewer are padding
# Containers whose header states the length of all that follows: that field's format and place.
_CHUNKED = {b"RIFF": ("<I", 4), b"FORM": (">I", 4), b"RF64": ("<Q", 20), b"BW64": ("<Q", 20)}

Stretch = tuple[int, int]  # first byte, byte behind the last


class _OggPage(NamedTuple):
    start: int
    end: int
    flags: int
    granule: int  # 0 of the pages with headers
    serial: int  # of the stream
    content: int  # bytes of packets


@dataclass
class _OggLink:
    """What its pages say of one link of a chain of Ogg streams."""

    first: _OggPage
    last: _OggPage
    is_single: bool = True  # all pages are of one stream
    packet_bytes: int = 0  # without the headers

    def add(self, page: _OggPage) -> None:
        self.last = page
        self.is_single &= page.serial == self.first.serial
        self.packet_bytes += page.content if page.granule else 0


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
        self.packet_bytes = 0  # of the whole pages of a single Ogg stream, without its headers
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
        if not head.startswith(b"RIFF") or min(fmt, data) < 0 or head[fmt + 4] not in _FORMAT_SIZES:
            return None
        start, end = self._stretches[0]
        fmt_end = start + fmt + 8 + head[fmt + 4]
        return Window(self._file, (start, start + 12), (start + fmt, fmt_end), (start + data, end))

    @property
    def size(self) -> int:
        return sum(end - start for start, end in self._stretches)

    @property
    def start(self) -> int:
        """In the file: the first byte."""
        return self._stretches[0][0]

    @property
    def end(self) -> int:
        """In the file: the byte behind the last."""
        return self._stretches[-1][1]

    def end_at(self, end: int) -> None:
        """End at this byte of the file, which is in the last stretch or its end."""
        self._stretches = (*self._stretches[:-1], (self._stretches[-1][0], end))

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


def parts(file: BinaryIO, size: int) -> tuple[list[Window], Stretch]:
    """The parts of an open file of `size` bytes, to be decoded one after another.

    Also returns what lies behind the last part and is neither tags nor zeros; empty if nothing does.

    Raises:
        BadAudio: it is more than a thousand joined files.
    """
    size = _trailing_tags_start(file, size)
    found: list[Window] = []
    start = _tags_end(file, 0, size)
    while len(found) < _MAX_PARTS:
        windows, end = _container(file, start, size)
        found += windows
        start = _tags_end(file, end, size)
        if not _begins_file(file, start, is_tagged=start > end):
            has_more = size - start >= _LEAST_REST and any(read_at(file, start, _CHUNK_BYTES))
            return found, (start if has_more else size, size)
        found[-1].end_at(end)
    raise BadAudio(_TOO_MANY_PARTS)


def _container(file: BinaryIO, start: int, size: int) -> tuple[list[Window], int]:
    """The parts of the container that begins at `start`, and its end, as far as it can be told."""
    head = read_at(file, start, 64)
    if head.startswith(b"OggS\0"):
        windows = _ogg_parts(file, start, size)
        return windows, windows[-1].end
    if head.startswith(b"fLaC"):
        return _flac_parts(file, start, size), size
    if not is_container(head):
        return [Window(file, *_between_tags(file, start, size))], size
    return [Window(file, (start, size))], _stated_end(file, head, start, size)


def _begins_file(file: BinaryIO, at: int, *, is_tagged: bool) -> bool:
    """Whether another file begins here. MPEG audio and ADTS without a tag in front look like samples."""
    head = read_at(file, at, _LEAST_REST)
    is_file = is_container(head) or (is_tagged and begins_frames(head))
    return is_file and len(head) == _LEAST_REST


def _stated_end(file: BinaryIO, head: bytes, start: int, size: int) -> int:
    """The end of the boxes of an MP4 file, or of a WAV or AIFF file that another one follows; else `size`."""
    if head[:4] in _CHUNKED:
        form, at = _CHUNKED[head[:4]]
        length = 8 + int(struct.unpack_from(form, head, at)[0])
        end = start + length + length % 2
        following = _tags_end(file, end, size)
        return end if _begins_file(file, following, is_tagged=following > end) else size
    end, has_media = start if is_mp4(head) else size, False
    while end < size:
        length, kind, long = struct.unpack(">I4sQ", read_at(file, end, 16).ljust(16, b"\0"))
        is_box = re.fullmatch(rb"[ -~\xa9]{4}", kind) and _tag_at(file, end) == (end, end)
        if not is_box or (kind == b"ftyp" and has_media):
            return end
        has_media = has_media or kind in {b"moov", b"mdat", b"moof"}
        end = end + max(8, long if length == 1 else length) if length else size
    return size


def _flac_parts(file: BinaryIO, start: int, size: int) -> list[Window]:
    """One part for each of joined FLAC files, without tags behind their frames."""
    found: list[Window] = []
    while start < size and len(found) <= _MAX_PARTS:
        frames, is_last = start + 4, False
        while not is_last and frames < size:  # over the blocks of metadata
            header = int.from_bytes(read_at(file, frames, 4).ljust(4, b"\x80"))
            frames, is_last = frames + 4 + (header & 0xFFFFFF), bool(header >> 31)
        frames = min(frames, size)
        end = next(find(file, frames, size, re.compile(rb"fLaC[\0\x80]\0\0\x22")), size)
        found.append(Window(file, (start, frames), *_between_tags(file, frames, end)))
        start = end
    return found


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


def _trailing_tags_start(file: BinaryIO, size: int) -> int:
    """Where the tags at the end begin: ID3v1, its extension, Lyrics3, and APEv2 in front of those."""
    while True:
        begin, tail = size, read_at(file, size - 5120, min(size, 5120))
        if tail[-128:-125] == b"TAG":
            begin -= 128
        elif tail[-227:-223] == b"TAG+":
            begin -= 227
        elif match := re.search(rb"(\d{6})LYRICS200\Z", tail):
            begin -= int(match[1]) + 15
        elif tail.endswith(b"LYRICSEND") and (at := tail.rfind(b"LYRICSBEGIN")) >= 0:
            begin -= len(tail) - at
        elif tail[-32:-24] == b"APETAGEX":
            begin = _tag_at(file, size - 32)[0]
        if not 0 <= begin < size:
            return size
        size = begin


def _tag_at(file: BinaryIO, at: int) -> Stretch:
    """The tag that an ID3 header or an APEv2 header or footer at `at` belongs to; empty if it is none."""
    head = read_at(file, at, 32)
    if head.startswith(b"TAG"):
        return at, at + 128
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
    links: list[_OggLink] = []
    first_pages_end = -1
    for at in find(file, start, end, re.compile(rb"OggS\0")):
        page = _ogg_page(file, at)
        if page.flags & _OGG_FIRST or not links:
            if at != first_pages_end:
                links.append(_OggLink(page, page))
            first_pages_end = page.end
        if len(links) > _MAX_PARTS:
            raise BadAudio(_TOO_MANY_PARTS)
        links[-1].add(page)
    ends = [link.first.start for link in links[1:]] + [end]
    return [_ogg_part(file, link, link_end) for link, link_end in zip(links, ends, strict=True)]


def _ogg_part(file: BinaryIO, link: _OggLink, end: int) -> Window:
    last = link.last
    window = Window(file, (link.first.start, min(last.end, end)))
    window.ends_unmarked = not last.flags & _OGG_LAST
    window.ends_in_page = last.end > end or (window.ends_unmarked and last.end < end)
    if link.is_single:
        window.packet_bytes = link.packet_bytes - (last.content if last.end > end else 0)
    return window


def _ogg_page(file: BinaryIO, at: int) -> _OggPage:
    """The page at `at`; an incomplete header counts as a page of its whole size."""
    head = read_at(file, at, 27 + 255)
    header, segments = head[:27].ljust(27, b"\xff"), head[27:]
    n_segments = header[26]
    content = sum(segments[:n_segments].ljust(n_segments, b"\xff"))
    granule, serial = struct.unpack_from("<qI", header, 6)
    return _OggPage(at, at + 27 + n_segments + content, header[5], granule, serial, content)
