"""The metrical level of the beat: which multiple or fraction of a pulse it is, and how many make a bar.

A pulse that was followed through a track may be any level of the meter, or one and a half of it. So the
track is divided into ticks, PULSE_TICKS to a pulse, which takes changes of tempo out, and every candidate
for the beat is judged together with the bar above it (Klapuri et al. 2006, "Analysis of the meter of
acoustic musical signals"): music repeats its pattern of onsets and its harmony after one and two bars of
the true meter, beats have stronger accents than what is between them, and tempos near PREFERRED_BPM are
more likely (van Noorden and Moelants 1999, "Resonance in the perception of musical pulse").

Bar lines are where timbre and harmony differ most from what was before (Foote 2000, "Automatic audio
segmentation using a measure of audio novelty"), on every scale from half a beat to a bar, where low onsets
are strong, and a beat before a backbeat. This places the beats too, as off-beats may have stronger onsets.

Compound meters count in dotted beats, four to a bar: two bars of 6/8 are taken as one of 12/8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft
from scipy.ndimage import uniform_filter1d

from pipeline.music.features import mean_chroma, means_between
from pipeline.music.spectra import FRAME_RATE_HZ, TONE_RATE_HZ, Doubles, Spectra

PULSE_TICKS = 12  # divisible by 2, 3 and 4
# Candidates for the beat: a third of the pulse to three pulses; its octaves alone once the pulse is the beat
BEAT_TICKS, OCTAVE_TICKS = (4, 6, 8, 9, 12, 16, 18, 24, 36), (6, 12, 24)
METERS = {4: 0.0, 3: 0.5, 5: 0.5, 7: 0.5}  # beats a bar: by how much the evidence must exceed that of four
SLOWEST_BPM, FASTEST_BPM = 55.0, 215.0
PREFERRED_BPM = 118.0
LONGEST_TICKS = 4 * max(METERS) * max(BEAT_TICKS)  # four bars of the slowest beat
ONSET_MEAN_TICKS = 4 * PULSE_TICKS  # onset strengths are taken relative to their mean over so long
# Weights of the evidence; similarities are relative to that of the bars which repeat best
BEAT, BAR, TWO_BARS = 1.0, 2.0, 4.0  # similarity of the onsets after a beat, a bar, two bars
HARMONY = 2.0  # similarity of the chroma after two bars, or, for the meter, after four less FOUR_BARS
FOUR_BARS = 0.3  # four bars of a wrong meter are more often like each other by chance
ACCENT = 2.0  # mean accent of the beats, in standard deviations
TEMPO = 3.0  # per squared octave from the preferred tempo
# Weights of the evidence for bar lines, each in standard deviations
TIMBRE_CHANGE, HARMONY_CHANGE, LOW_ONSET, BACKBEAT = 3.0, 0.7, 0.8, 1.1


@dataclass(frozen=True)
class Level:
    """A candidate for the beat, in ticks."""

    beat: int
    meter: int  # beats a bar
    clarity: float  # mean similarity of the onsets after a bar and after two, -1 to 1
    score: float

    @property
    def bar(self) -> int:
        return self.meter * self.beat


@dataclass(frozen=True, eq=False)
class Rhythm:
    """What the choice is made by, per tick."""

    tick_s: float
    onsets: Doubles  # (3, ticks): in the low, middle and high band, in standard deviations
    mel: Doubles  # (N_MEL, ticks)
    chroma: Doubles  # (12, ticks)
    onsets_after: Doubles  # (lags,): similarity of onsets so many ticks apart, 1 at lag 0
    harmony_after: Doubles  # (lags,): the same of chroma


def measure_rhythm(spectra: Spectra, ticks_s: Doubles) -> Rhythm:
    """The rhythm of a track with a tick at each of these times, (ticks,)."""
    middles_s = 0.5 * (ticks_s[1:] + ticks_s[:-1])
    edges_s = np.concatenate([[2 * ticks_s[0] - middles_s[0]], middles_s, [2 * ticks_s[-1] - middles_s[-1]]])
    onsets = means_between(spectra.band_onsets, edges_s * FRAME_RATE_HZ).astype(np.float64)
    onsets = _standardized(onsets - uniform_filter1d(onsets, ONSET_MEAN_TICKS, axis=1, mode="nearest"))
    chroma = mean_chroma(spectra.pitches, edges_s * TONE_RATE_HZ).astype(np.float64)
    return Rhythm(
        tick_s=float(np.median(np.diff(ticks_s))),
        onsets=onsets,
        mel=means_between(spectra.mel, edges_s * FRAME_RATE_HZ).astype(np.float64),
        chroma=chroma,
        onsets_after=_similarity(onsets),
        harmony_after=_similarity(chroma - chroma.mean(axis=1, keepdims=True)),
    )


def find_level(rhythm: Rhythm, beat_ticks: tuple[int, ...]) -> Level:
    """The most likely beat, of so many ticks, and meter."""
    beats = [n for n in beat_ticks if SLOWEST_BPM <= 60.0 / (n * rhythm.tick_s) <= FASTEST_BPM]
    bars = [n * meter * count for n in beats for meter in METERS for count in (1, 2)]
    best = max(0.1, *(_at(rhythm.onsets_after, bar) for bar in bars))
    likeliest = max(
        (_level(rhythm, n, m, best) for n in beats for m in METERS), key=lambda level: level.score
    )
    same_beat = (_level(rhythm, likeliest.beat, meter, best, four_bars=True) for meter in METERS)
    return max(same_beat, key=lambda level: level.score)


def find_bar_line(rhythm: Rhythm, level: Level) -> int:
    """The tick of the first bar line: 0 <= tick < level.bar."""
    low, middle, _ = rhythm.onsets
    reaches = (level.beat // 2, level.beat, 2 * level.beat, level.bar)
    evidence = _folded(
        TIMBRE_CHANGE * _changes(rhythm.mel, reaches)
        + HARMONY_CHANGE * _changes(rhythm.chroma, reaches)
        + LOW_ONSET * low,
        level.bar,
    )
    if level.meter % 2 == 0:
        backbeat = np.roll(_folded(middle, 2 * level.beat), -level.beat)
        evidence = evidence + BACKBEAT * np.tile(backbeat, level.meter // 2)
    return int(np.argmax(evidence))


def _level(rhythm: Rhythm, beat: int, meter: int, best: float, *, four_bars: bool = False) -> Level:
    """One candidate. With `four_bars`, which tells meters apart but not tempos, four bars may repeat, too."""
    bar = beat * meter
    after_bar = _at(rhythm.onsets_after, bar)
    after_two = _at(rhythm.onsets_after, 2 * bar, otherwise=after_bar)
    harmony = _at(rhythm.harmony_after, 2 * bar)
    if four_bars:
        harmony = max(harmony, _at(rhythm.harmony_after, 4 * bar, otherwise=FOUR_BARS) - FOUR_BARS)
    similarity = (
        BEAT * _at(rhythm.onsets_after, beat) + BAR * after_bar + TWO_BARS * after_two + HARMONY * harmony
    )
    accent = _folded(_standardized(rhythm.onsets.sum(axis=0)), beat).max()
    octaves = np.log2(60.0 / (beat * rhythm.tick_s) / PREFERRED_BPM)
    score = similarity / best + ACCENT * accent - TEMPO * octaves**2 - METERS[meter]
    return Level(beat, meter, 0.5 * (after_bar + after_two), float(score))


def _folded(values: Doubles, period: int) -> Doubles:
    """Means of the values at every position in the period, (period,)."""
    return np.asarray(values[: values.size // period * period].reshape(-1, period).mean(axis=0))


def _at(similarity: Doubles, lag: int, otherwise: float = 0.0) -> float:
    """The similarity at a lag; `otherwise` for lags that were not observed."""
    return float(similarity[lag]) if lag < similarity.size else otherwise


def _similarity(rows: Doubles) -> Doubles:
    """Autocorrelation of (rows, ticks) for lags up to half the length, divided by the overlap; 1 at lag 0."""
    n = rows.shape[1]
    spectrum = scipy.fft.rfft(rows, scipy.fft.next_fast_len(2 * n), axis=1)
    raw = scipy.fft.irfft((np.abs(spectrum) ** 2).sum(axis=0))[: min(n // 2, LONGEST_TICKS + 1)]
    mean = raw / (n - np.arange(raw.size))
    return np.asarray(mean / max(float(mean[0]), 1e-12))


def _changes(rows: Doubles, reaches: tuple[int, ...]) -> Doubles:
    """How much the mean of `reach` ticks before each tick differs from that of those from it on, (ticks,).

    Squared distances, in standard deviations, summed over the reaches; in standard deviations again.
    """
    n = rows.shape[1]
    total = np.zeros(n)
    for reach in reaches:
        sums = np.cumsum(np.pad(rows, ((0, 0), (reach + 1, reach)), mode="edge"), axis=1)
        before = sums[:, reach : reach + n] - sums[:, :n]
        after = sums[:, 2 * reach : 2 * reach + n] - sums[:, reach : reach + n]
        total += _standardized(((after - before) ** 2).sum(axis=0))
    return _standardized(total)


def _standardized(values: Doubles) -> Doubles:
    """Without their mean and of unit standard deviation along the last axis."""
    centred = values - values.mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.maximum(centred.std(axis=-1, keepdims=True), 1e-9))
