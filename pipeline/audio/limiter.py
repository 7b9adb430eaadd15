"""A look-ahead limiter for true peaks.

The gain is reduced as much as the largest peak within the look-ahead demands, released at an even rate, and
smoothed by a window no longer than the look-ahead, so that no peak passes (Hämäläinen 2002, "Smoothing of
the control signal without clipped output in digital peak limiters", DAFx-02). Peaks are those of BS.1770-4
at 4 times the sample rate. Channels share one gain, so that the stereo image stays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import maximum_filter1d, uniform_filter1d

from pipeline.audio.loudness import MARGIN_DB, PHASES, amplify, interpolated, loudness_lufs
from pipeline.records import Audio, Samples

LOOK_AHEAD_S = 0.005  # to either side of a peak: a period of 200 Hz, so that the bass is hardly distorted
RELEASE_DB_PER_S = 40.0
WRAP_S = 1.0  # of the other end of a loop that is limited along with each end
MAX_PASSES, TOLERANCE_LU = 10, 0.1  # limiting costs loudness, which the next pass adds to its gain


def limit_to_loudness(
    audio: Audio,
    *,
    target_lufs: float,
    ceiling_dbtp: float,
    is_loop: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Audio:
    """Scale to the target loudness and limit true peaks to `MARGIN_DB` below the ceiling.

    Where nothing exceeds the ceiling, this is a gain alone. Sound that would have to be limited ever harder
    stays below the target. In a loop, the gain runs from the end into the start. `on_step` is called several
    times in each pass, and may raise.
    """
    gain_db, limited = 0.0, audio
    missing_lu = target_lufs - loudness_lufs(audio)
    if np.isinf(missing_lu):
        return audio
    for _ in range(MAX_PASSES):
        gain_db += missing_lu
        limited = _limit(amplify(audio, gain_db), ceiling_dbtp - MARGIN_DB, is_loop, on_step)
        missing_lu = target_lufs - loudness_lufs(limited)
        if abs(missing_lu) <= TOLERANCE_LU:
            break
    return limited


def _limit(audio: Audio, ceiling_dbtp: float, is_loop: bool, on_step: Callable[[], None]) -> Audio:
    rate, around = audio.sample_rate, round(WRAP_S * audio.sample_rate) if is_loop else 0
    samples = np.pad(audio.samples, ((0, 0), (around, around)), mode="wrap") if is_loop else audio.samples
    excess_db = 20 * np.log10(np.maximum(_true_peaks(samples, on_step), 1e-9)) - ceiling_dbtp
    rise = np.arange(excess_db.size) * (RELEASE_DB_PER_S / rate)
    released = np.maximum.accumulate(np.maximum(excess_db, 0.0) + rise) - rise
    reach = max(1, round(LOOK_AHEAD_S * rate))
    on_step()
    held = maximum_filter1d(released, 2 * reach + 3)  # wider than both windows together
    reduction_db = uniform_filter1d(uniform_filter1d(held, reach + 1), reach + 1)
    gain = (10.0 ** (-reduction_db / 20)).astype(np.float32)
    return Audio(audio.samples * gain[around : gain.size - around], rate)


def _true_peaks(samples: Samples, on_step: Callable[[], None]) -> Samples:
    """The largest magnitude near each sample, of any channel, between the samples too; (samples,)."""
    peaks = np.abs(samples).max(axis=0)
    n_taps = PHASES.shape[1]
    for channel in samples:
        padded = np.pad(channel, (n_taps // 2, n_taps - 1 - n_taps // 2))
        for phase in PHASES:
            on_step()
            np.maximum(peaks, np.abs(interpolated(padded, phase)), out=peaks)
    return np.asarray(peaks)
