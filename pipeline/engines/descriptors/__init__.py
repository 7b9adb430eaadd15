"""Weight-free embedder: statistics of timbre, harmony, rhythm and dynamics as one unit-length vector.

Method: the track is mixed to mono, resampled to 22,050 Hz and cut into windows of 10 s. A tail of 5 s or more
is a separate window, a shorter one is part of the window before it, so every sample is in one window. A
window is scaled to an RMS of 1 (the level of the input has no influence), and the numbers below are computed
from one STFT (Hann, 4096, hop 512); a window's vector depends on its samples alone. The track's vector is the
mean of its windows' vectors, weighted by their lengths and scaled to unit length.

| block    | dims | what                                                         | source                    |
|----------|------|--------------------------------------------------------------|---------------------------|
| timbre   | 13   | MFCC 1 to 13 of 40 mel bands, mean                           | Davis & Mermelstein 1980  |
| motion   | 13   | the same, standard deviation                                 |                           |
| spectrum | 12   | centroid, spread (octaves), flatness (dB): mean, deviation;  | Peeters 2004;             |
|          |      | contrast (dB) in six octaves from 200 Hz, mean               | Jiang et al. 2002         |
| chords   | 15   | magnitudes 1 to 6 of the DFT over the pitch classes, of each | Quinn 2007; Yust 2016     |
|          |      | 0.37 s (mean) and of the window's mean chroma; entropy;      |                           |
|          |      | change from one 0.37 s to the next: mean, deviation          | Harte et al. 2006         |
| key      | 12   | the window's mean chroma, C first, less its mean             | Fujishima 1999            |
| tempo    | 24   | autocorrelation of the onset curve, lags of 37.5 to 300 bpm, | Ellis 2007; Holzapfel &   |
|          |      | eighths of an octave: another tempo is a shift               | Stylianou 2009            |
| pulse    | 5    | clarity, onsets a second, unevenness of the onset curve,     | Lartillot et al. 2008     |
|          |      | share of the onsets below 250 Hz and above 2.5 kHz           |                           |
| dynamics | 6    | loudness (dB): deviation, upper and lower spread, mean step; | EBU Tech 3342 (spread)    |
|          |      | share of quiet frames; crest factor                          |                           |

Transposition leaves `tempo`, `pulse` and `dynamics` unchanged and `chords` nearly so, rotates `key`, and
changes `timbre` a little. Each number is centred, scaled and softly limited by constants in `layout`, which
belong to the version and are not fitted to the tracks that are embedded. On average over music, each block
contributes its share of the squared length, so a cosine of 0 means "as different as two random tracks".

Silence of any length has one and the same vector.
"""

from __future__ import annotations

from pipeline.engines.base import Embedder, EngineCard, EngineSettings, Params

VERSION = "1"


def _load(settings: EngineSettings) -> Embedder:
    from pipeline.engines.descriptors.features import DescriptorsEmbedder

    return DescriptorsEmbedder()


ENGINE = EngineCard(
    name="descriptors",
    stage="embed",
    version=VERSION,
    summary="timbre, harmony, rhythm and dynamics in 10 s windows; no model, far faster than real time",
    params=Params,
    load=_load,
    packages=("numpy", "scipy", "soxr"),
)
