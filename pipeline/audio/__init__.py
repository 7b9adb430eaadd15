"""Sound in and out: decoding, resampling, trimming, loudness, WAV.

Cheap to import: soundfile, av, soxr, scipy and pyloudnorm are imported by the functions that use them.
"""

from pipeline.audio.decode import DecodeLimits, decode
from pipeline.audio.loudness import loudness_lufs, peak_dbfs, to_loudness, true_peak_dbtp
from pipeline.audio.resampling import resample
from pipeline.audio.silence import trim_silence
from pipeline.audio.sniff import looks_like_audio
from pipeline.audio.wav import read_wav_tags, write_wav

__all__ = [
    "DecodeLimits",
    "decode",
    "looks_like_audio",
    "loudness_lufs",
    "peak_dbfs",
    "read_wav_tags",
    "resample",
    "to_loudness",
    "trim_silence",
    "true_peak_dbtp",
    "write_wav",
]
