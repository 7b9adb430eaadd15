"""The metrical level of the beat: which multiple or fraction of a pulse it is, and how many make a bar.

A pulse that was followed through a track may be any level of the meter, or one and a half of it. So the track is
divided into ticks, PULSE_TICKS to a pulse, which takes changes of tempo out, and every candidate for the beat is
judged together with the bar above it (Klapuri et al. 2006, "Analysis of the meter of acoustic musical signals"):
music repeats its pattern of onsets and its harmony after one and two bars of the true meter, beats have stronger
accents than what is between them, and tempos near PREFERRED_BPM are more likely (van Noorden and Moelants 1999,
"Resonance in the perception of musical pulse").

Compound meters count in dotted beats, four to a bar: two bars of 6/8 are taken as one of 12/8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft
from scipy.ndimage import uniform_filter1d

from pipeline.music.features import means_between, mean_chroma
from pipeline.music.spectra import FRAME_RATE_HZ, TONE_RATE_HZ, Doubles, Spectra

PULSE_TICKS = 12  # divisible by 2, 3 and 4
BEAT_TICKS = (4, 6, 8, 9, 12, 16, 18, 24, 36)  # candidates: from a third of the pulse to three pulses
METERS = {
    4: 0.0,
    3: 0.5,
    5: 1.0,
    7: 1.0,
}  # beats a bar, and how much more its evidence has to be than for four
SLOWEST_BPM, FASTEST_BPM = 55.0, 215.0
PREFERRED_BPM = 118.0
LONGEST_TICKS = 2 * max(METERS) * max(BEAT_TICKS)  # two bars of the slowest beat
ONSET_MEAN_TICKS = 4 * PULSE_TICKS  # onset strengths are taken relative to their mean over so long
# Weights of the evidence
BEAT, BAR, TWO_BARS = 1.0, 2.0, 4.0  # similarity of the onsets after a beat, a bar, two bars
HARMONY = 2.0  # similarity of the chroma after two bars
ACCENT = 2.0  # mean accent of the beats, in standard deviations
TEMPO = 3.0  # per squared octave from the preferred tempo


@dataclass(frozen=True)
class Level:
    """A candidate for the beat, in ticks."""

    beat: int
    phase: int  # of the first beat: 0 <= phase < beat
    meter: int  # beats a bar
    clarity: float  # mean similarity of the onsets after a bar and after two, -1 to 1
    score: float


@dataclass(frozen=True, eq=False)
class _Evidence:
    onsets: Doubles  # (lags,): similarity of onsets so many ticks apart, 1 at lag 0
    harmony: Doubles  # (lags,): the same of chroma
    accents: Doubles  # (3, ticks): low onsets, all onsets, changes of harmony; in standard deviations


def find_level(spectra: Spectra, ticks_s: Doubles) -> Level:
    """The most likely beat and meter of a track with a tick at each of these times, (ticks,)."""
    evidence = _evidence(spectra, ticks_s)
    tick_s = float(np.median(np.diff(ticks_s)))
    beats = [n for n in BEAT_TICKS if SLOWEST_BPM <= 60.0 / (n * tick_s) <= FASTEST_BPM]
    return max((_level(evidence, tick_s, n, m) for n in beats for m in METERS), key=lambda level: level.score)


def _evidence(spectra: Spectra, ticks_s: Doubles) -> _Evidence:
    middles_s = 0.5 * (ticks_s[1:] + ticks_s[:-1])
    edges_s = np.concatenate([[2 * ticks_s[0] - middles_s[0]], middles_s, [2 * ticks_s[-1] - middles_s[-1]]])
    onsets = means_between(spectra.band_onsets, edges_s * FRAME_RATE_HZ).astype(np.float64)
    onsets = _standardized(onsets - uniform_filter1d(onsets, ONSET_MEAN_TICKS, axis=1, mode="nearest"))
    chroma = mean_chroma(spectra.pitches, edges_s * TONE_RATE_HZ).astype(np.float64)
    changes = _changes(chroma, PULSE_TICKS // 2)
    accents = np.stack([onsets[0], onsets.sum(axis=0), changes])
    return _Evidence(
        _similarity(onsets), _similarity(chroma - chroma.mean(axis=1, keepdims=True)), _standardized(accents)
    )


def _level(evidence: _Evidence, tick_s: float, beat: int, meter: int) -> Level:
    bar = beat * meter
    after_bar, after_two = _at(evidence.onsets, bar), _at(evidence.onsets, 2 * bar)
    n = evidence.accents.shape[1] // beat * beat
    accents = evidence.accents[:, :n].reshape(3, -1, beat).mean(axis=1)
    phase = int(np.argmax(accents.sum(axis=0)))
    octaves = np.log2(60.0 / (beat * tick_s) / PREFERRED_BPM)
    score = (
        BEAT * _at(evidence.onsets, beat)
        + BAR * after_bar
        + TWO_BARS * after_two
        + HARMONY * _at(evidence.harmony, 2 * bar)
        + ACCENT * accents[1, phase]
        - TEMPO * octaves**2
        - METERS[meter]
    )
    return Level(beat, phase, meter, 0.5 * (after_bar + after_two), float(score))


def _at(similarity: Doubles, lag: int) -> float:
    """The similarity at a lag; 0 for lags that were not observed."""
    return float(similarity[lag]) if lag < similarity.size else 0.0


def _similarity(rows: Doubles) -> Doubles:
    """Autocorrelation of (rows, ticks) for lags up to half the length, divided by the overlap; 1 at lag 0."""
    n = rows.shape[1]
    spectrum = scipy.fft.rfft(rows, scipy.fft.next_fast_len(2 * n), axis=1)
    raw = scipy.fft.irfft((np.abs(spectrum) ** 2).sum(axis=0))[: min(n // 2, LONGEST_TICKS + 1)]
    mean = raw / (n - np.arange(raw.size))
    return np.asarray(mean / max(float(mean[0]), 1e-12))


def _changes(chroma: Doubles, reach: int) -> Doubles:
    """Cosine distance of the mean chroma of `reach` ticks before each tick and of those from it on, (ticks,)."""
    n = chroma.shape[1]
    sums = np.cumsum(np.pad(chroma, ((0, 0), (reach + 1, reach)), mode="edge"), axis=1)
    before, after = (
        sums[:, reach : reach + n] - sums[:, :n],
        sums[:, 2 * reach :][:, :n] - sums[:, reach:][:, :n],
    )
    lengths = np.linalg.norm(before, axis=0) * np.linalg.norm(after, axis=0)
    return np.asarray(1.0 - (before * after).sum(axis=0) / np.maximum(lengths, 1e-9))


def _standardized(rows: Doubles) -> Doubles:
    centred = rows - rows.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(centred.std(axis=1, keepdims=True), 1e-9))
