"""Audio in and out: decoding, resampling, trimming of silence, key and tempo, loudness, writing of files.

The package is cheap to import: av, soxr, scipy, pyloudnorm and python-stretch are imported by the functions
that use them.
"""

from pipeline.audio.decode import DecodeLimits, decode, decode_file
from pipeline.audio.encode import missing_encoder, nearest_rate, sample_rates, write_sound
from pipeline.audio.loudness import (
    Levels,
    amplify,
    gain_to,
    levels,
    loudness_lufs,
    peak_dbfs,
    to_loudness,
    true_peak_dbtp,
)
from pipeline.audio.offset import fade, remove_offset
from pipeline.audio.resampling import resample
from pipeline.audio.silence import trim_silence
from pipeline.audio.sniff import looks_like_audio
from pipeline.audio.stretch import stretch
from pipeline.audio.wav import Marker, write_wav

__all__ = [
    "DecodeLimits",
    "Levels",
    "Marker",
    "amplify",
    "decode",
    "decode_file",
    "fade",
    "gain_to",
    "levels",
    "looks_like_audio",
    "loudness_lufs",
    "missing_encoder",
    "nearest_rate",
    "peak_dbfs",
    "remove_offset",
    "resample",
    "sample_rates",
    "stretch",
    "to_loudness",
    "trim_silence",
    "true_peak_dbtp",
    "write_sound",
    "write_wav",
]
