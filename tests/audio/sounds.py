"""Sound files for the tests, generated when they are needed."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

from pipeline.records import Samples

# Kinds of files that FFmpeg can write: name -> (container, codec, sample rate, options).
FFMPEG_FILES: dict[str, tuple[str, str, int, dict[str, str]]] = {
    "aac-index-last": ("ipod", "aac", 44100, {}),
    "aac-index-first": ("mp4", "aac", 44100, {"movflags": "+faststart"}),
    "aac-fragments": ("mp4", "aac", 44100, {"movflags": "+frag_keyframe+empty_moov"}),
    "aac-adts": ("adts", "aac", 44100, {}),
    "alac": ("ipod", "alac", 44100, {}),
    "mp3": ("mp3", "libmp3lame", 44100, {}),
    "mp2": ("mp2", "mp2", 44100, {}),
    "opus": ("ogg", "libopus", 48000, {}),
    "webm": ("webm", "libopus", 48000, {}),
    "mka": ("matroska", "flac", 44100, {}),
    "wma": ("asf", "wmav2", 44100, {}),
    "aiff": ("aiff", "pcm_s16be", 44100, {}),
    "caf": ("caf", "pcm_s16le", 44100, {}),
    "w64": ("w64", "pcm_s16le", 44100, {}),
    "au": ("au", "pcm_s16be", 44100, {}),
    "avi": ("avi", "pcm_s16le", 44100, {}),
    "wavpack": ("wv", "wavpack", 44100, {}),
    "rf64": ("wav", "pcm_s24le", 44100, {"rf64": "always"}),
}


def tones(seconds: float, rate: int, channels: int = 2) -> Samples:
    """A sine of another pitch in every channel, 0.4 of full scale, float32 (samples, channels)."""
    t = np.arange(round(seconds * rate)) / rate
    rows = [0.4 * np.sin(2 * np.pi * (220 + 110 * channel) * t) for channel in range(channels)]
    return np.stack(rows, axis=1).astype(np.float32)


def sndfile_bytes(samples: Samples, rate: int, container: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def ffmpeg_bytes(path: Path, name: str, seconds: float = 3.0) -> tuple[bytes, Samples, int]:
    """The bytes of one of FFMPEG_FILES, the samples that went in and their rate."""
    container, codec, rate, options = FFMPEG_FILES[name]
    samples = tones(seconds, rate)
    return encoded(path, samples, rate, container, codec, options=options), samples, rate


def encoded(
    path: Path,
    samples: Samples,
    rate: int,
    container: str,
    codec: str,
    *,
    layout: str = "stereo",
    options: dict[str, str] | None = None,
) -> bytes:
    """float32 (samples, channels) as FFmpeg encodes it, by way of a file at `path`."""
    with av.open(str(path), "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=rate, bit_rate=128_000, layout=layout)
        context = stream.codec_context
        context.format = stream.codec.audio_formats[0]
        context.open()
        for frame in _frames(samples, rate, context.format.name, layout, context.frame_size or 4096):
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path.read_bytes()


def _frames(samples: Samples, rate: int, sample_format: str, layout: str, size: int) -> list[av.AudioFrame]:
    convert = av.AudioResampler(format=sample_format, layout=layout, rate=rate)
    frames = []
    for start in range(0, len(samples), size):
        packed = np.ascontiguousarray(samples[start : start + size]).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        frames += convert.resample(frame)
    return frames


def wav_bytes(pcm: bytes, channels: int, *, mask: int | None = None, before_data: bytes = b"") -> bytes:
    """A 16-bit WAV of 44.1 kHz; with a channel mask, WAVE_FORMAT_EXTENSIBLE."""
    code = 1 if mask is None else 0xFFFE
    form = struct.pack("<HHIIHH", code, channels, 44100, 44100 * channels * 2, channels * 2, 16)
    if mask is not None:
        form += struct.pack("<HHI", 22, 16, mask) + bytes.fromhex("0100000000001000800000aa00389b71")
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + before_data
    body += b"data" + struct.pack("<I", len(pcm)) + pcm
    return b"RIFF" + struct.pack("<I", len(body)) + body


def id3v2(body: bytes) -> bytes:
    """A tag with `body` as its content, e.g. cover art."""
    size = bytes(len(body) >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\0\0" + size + body


def apev2(n_bytes: int = 100) -> bytes:
    """A tag with header and footer."""
    item = struct.pack("<II", n_bytes, 0) + b"Title\0" + b"x" * n_bytes
    header, footer = (
        b"APETAGEX" + struct.pack("<IIII8x", 2000, len(item) + 32, 1, flags)
        for flags in (0xA0000000, 0x80000000)
    )
    return header + item + footer


def silent_video(path: Path, container: str, codec: str, n_frames: int = 25) -> bytes:
    """A small video (or with one frame, a picture) without an audio stream."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        for index in range(n_frames):
            picture = np.full((64, 64, 3), index * 5, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path.read_bytes()
