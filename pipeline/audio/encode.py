"""Writing FLAC, MP3 and Opus with FFmpeg's encoders; equal arguments give equal bytes.

FFmpeg and not libsndfile, which writes no tags beyond its own few and draws the serial number of an Ogg
stream at random. FFmpeg's `bitexact` leaves versions out of the files, and the serial number is set here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, BinaryIO, Literal

import numpy as np

from pipeline.audio.wav import BitDepth, Marker, check_full_scale, to_int16, to_int24, write_wav
from pipeline.records import Audio, Samples

Format = Literal["wav", "flac", "mp3", "opus"]
_BLOCK_FRAMES = 4096  # given to an encoder that has no frame size of its own
# LAME multiplies what it encodes at 160 kbit/s or less by this, against clipping (its presets.c): mono, and
# stereo below 32 kHz, as MPEG-2 has no more.
_LAME_SCALE, _MPEG1_RATE_HZ = 0.95, 32_000


@dataclass(frozen=True)
class _Encoder:
    container: str
    codec: str
    sample_format: str | None  # None: by bit depth
    bits_per_s: int | None = None  # of each channel
    options: Mapping[str, str] = field(default_factory=dict)
    tag_names: Mapping[str, str] = field(default_factory=dict)  # where they are not ours


# 320 kbit/s is the most that MP3 has, and 192 are transparent in Opus (Xiph's Opus Recommended Settings).
_ENCODERS: Mapping[str, _Encoder] = {
    "flac": _Encoder("flac", "flac", None),
    "mp3": _Encoder("mp3", "libmp3lame", "fltp", 160_000, tag_names={"BPM": "TBPM", "KEY": "TKEY"}),
    "opus": _Encoder("ogg", "libopus", "flt", 96_000, options={"serial_offset": "0"}),
}


def missing_encoder(format_name: str) -> str | None:
    """FFmpeg's name of the encoder of a format, if the installed PyAV lacks it."""
    import av

    if format_name == "wav":
        return None
    codec = _ENCODERS[format_name].codec
    return None if codec in av.codecs_available else codec


def sample_rates(format_name: str) -> list[int]:
    """The sample rates in Hz that a format can have, rising; empty: any."""
    import av

    if format_name == "wav":
        return []
    return sorted(av.codec.Codec(_ENCODERS[format_name].codec, "w").audio_rates or ())


def nearest_rate(format_name: str, sample_rate: int) -> int:
    """The sample rate itself, or else the next higher one that the format can have, or its highest."""
    rates = sample_rates(format_name)
    return next((rate for rate in rates if rate >= sample_rate), rates[-1] if rates else sample_rate)


def write_sound(
    file: BinaryIO,
    audio: Audio,
    *,
    format_name: Format,
    bit_depth: BitDepth,
    tags: Mapping[str, str],
    markers: Sequence[Marker] = (),
    is_loop: bool = False,
) -> None:
    """Write `audio` as a complete file of this format; see `write_wav` and `write_encoded`.

    Only WAV files have markers and say that they are loops otherwise than by tags.
    """
    if format_name == "wav":
        write_wav(file, audio, bit_depth=bit_depth, tags=tags, markers=markers, is_loop=is_loop)
    else:
        write_encoded(file, audio, format_name=format_name, bit_depth=bit_depth, tags=tags)


def write_encoded(
    file: BinaryIO, audio: Audio, *, format_name: Format, bit_depth: BitDepth, tags: Mapping[str, str]
) -> None:
    """Write `audio` as a complete FLAC, MP3 or Opus file to a seekable `file`.

    MP3 has 160 kbit/s for each channel and Opus 96; FLAC has `bit_depth` bits, rounded or dithered as
    in WAV files. Decoders give the same number of samples back. Tags are written as UTF-8.

    Raises:
        ValueError: a sample is not finite or outside [-1, 1].
    """
    import av

    check_full_scale(audio)
    encoder = _ENCODERS[format_name]
    layout = "mono" if audio.channels == 1 else "stereo"
    options = {"fflags": "+bitexact", **encoder.options}
    with av.open(file, "w", format=encoder.container, options=options) as container:
        container.metadata.update({encoder.tag_names.get(name, name): text for name, text in tags.items()})
        stream = container.add_stream(encoder.codec, rate=audio.sample_rate, layout=layout)
        context = stream.codec_context
        context.flags |= av.codec.context.Flags.bitexact
        context.format = encoder.sample_format or ("s16" if bit_depth == 16 else "s32")
        if encoder.bits_per_s is not None:
            context.bit_rate = encoder.bits_per_s * audio.channels
        context.open()
        dither = np.random.default_rng(0)  # fixed, so that equal samples give equal bytes
        size, gain = context.frame_size or _BLOCK_FRAMES, _gain(audio, format_name)
        for start in range(0, audio.n_samples, size):
            block = _as_format(gain * audio.samples[:, start : start + size], context.format.name, dither)
            frame = av.AudioFrame.from_ndarray(block, format=context.format.name, layout=layout)
            frame.sample_rate, frame.pts = audio.sample_rate, start
            frame.time_base = Fraction(1, audio.sample_rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _gain(audio: Audio, format_name: Format) -> np.float32:
    """What the samples are multiplied by, so that they are decoded as loud as they are."""
    is_scaled = format_name == "mp3" and (audio.channels == 1 or audio.sample_rate < _MPEG1_RATE_HZ)
    return np.float32(1 / _LAME_SCALE if is_scaled else 1.0)


def _as_format(block: Samples, sample_format: str, dither: np.random.Generator) -> Any:
    """The block as an array of one of FFmpeg's sample formats; 24 bits are the upper ones of s32."""
    if sample_format == "fltp":
        return np.ascontiguousarray(block)
    frames: Any = np.ascontiguousarray(block.T)
    if sample_format == "s16":
        frames = to_int16(frames, dither)
    elif sample_format == "s32":
        frames = to_int24(frames) << 8
    return frames.reshape(1, -1)
