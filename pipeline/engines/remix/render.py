"""Renders a path at the track's own rate and channels, with the splices of `pipeline.music.splice`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.engines.remix.analysis import Analysis
from pipeline.engines.remix.path import BeatPath
from pipeline.music.splice import GUARD_S, alignment, crossfade
from pipeline.records import Audio, Samples, cut

BEATLESS_FADE_S = 0.6  # least crossfade without beats
FADE_IN_S = 0.01  # before the first beat, unless the path starts at the track's start
FADE_OUT_S = 4.0  # of a result without an ending
MAX_FADE_OUT_SHARE = 0.2  # of its length
DECAY_FADE_S = 0.4  # of an ending whose decay is longer than the result


@dataclass(frozen=True)
class Join:
    """One join of the result, in seconds."""

    out_s: float  # where in the result
    from_s: float  # where the source was left
    to_s: float  # where it was entered, after alignment
    points: tuple[int, int]


@dataclass(frozen=True)
class _Piece:
    """A stretch of the source in the output, in samples: source sample = output sample + offset."""

    at: int  # output sample of its join
    offset: int
    fade: tuple[int, int]  # output samples of the crossfade with the piece before


def render(
    audio: Audio, track: Analysis, path: BeatPath, n_samples: int, crossfade_s: float
) -> tuple[Samples, tuple[Join, ...]]:
    """The path's first n_samples, float32, (channels, n_samples), and the joins in them."""
    pieces = _pieces(audio, track, path, n_samples, crossfade_s)
    source, rate = audio.samples, audio.sample_rate
    out = np.zeros((audio.channels, n_samples), np.float32)
    stops = [piece.fade[0] for piece in pieces[1:]] + [n_samples]
    for k, (piece, stop) in enumerate(zip(pieces, stops, strict=True)):
        first = piece.fade[1]
        out[:, first:stop] = cut(source, first + piece.offset, stop + piece.offset)
        if k > 0:
            _mix(out, audio, pieces[k - 1].offset, piece)
    _fade_ends(out, path, source.shape[1] - pieces[-1].offset, rate)
    joins = zip(pieces[1:], pieces, path.joins, strict=False)
    return out, tuple(
        Join(new.at / rate, (new.at + old.offset) / rate, (new.at + new.offset) / rate, points)
        for new, old, points in joins
    )


def first_s(path: BeatPath) -> float:
    """What the result begins with, in seconds of the source: the fade ends before the first attack."""
    return max(0.0, path.start_s - FADE_IN_S)


def _pieces(
    audio: Audio, track: Analysis, path: BeatPath, n_samples: int, crossfade_s: float
) -> list[_Piece]:
    """The pieces of the output; joins are aligned, and no fade is longer than half of the pieces it joins."""
    rate, has_beat = audio.sample_rate, track.tempo_bpm is not None
    length = round((crossfade_s if has_beat else max(crossfade_s, BEATLESS_FADE_S)) * rate)
    # The analysis, at another rate, may end a sample or two later than the sound.
    points = np.minimum(np.round(track.points_s * rate).astype(np.int64), audio.n_samples)
    pieces = [_Piece(0, round(first_s(path) * rate), (0, 0))]
    for k, (leave, enter) in enumerate(path.joins):
        offset = pieces[-1].offset
        at = int(points[leave]) - offset
        if at >= n_samples:
            break
        left, entered = int(points[leave]), int(points[enter])
        shift = alignment(audio.mono_channels, left, entered, rate, has_beat=has_beat)
        offsets = (offset, entered + shift - at)
        next_leave = int(points[path.joins[k + 1][0]]) if k + 1 < len(path.joins) else audio.n_samples
        longest = min(at - pieces[-1].at, next_leave - offsets[1] - at) // 2
        if at + offsets[1] > 0:
            longest = min(longest, at + offsets[1])  # only sound can be faded in
        fade = _fade(at, offsets, audio.n_samples, min(length, longest), round(GUARD_S * rate))
        pieces.append(_Piece(at, offsets[1], (min(fade[0], n_samples), min(fade[1], n_samples))))
    return pieces


def _fade(at: int, offsets: tuple[int, int], n_source: int, length: int, guard: int) -> tuple[int, int]:
    """Output samples of a crossfade, which ends `guard` before the join, so that no attack is faded."""
    enters_start = at + offsets[1] <= 0  # nothing lies before the track's start that could be faded in
    if enters_start and at + offsets[0] >= n_source:
        return at, at  # from the end of a loop to its start
    if enters_start:
        return at - length // 2, at
    guard = min(guard, length)
    return max(0, at - length - guard), at - guard


def _mix(out: Samples, audio: Audio, old_offset: int, piece: _Piece) -> None:
    """Write the piece's crossfade with the one before it.

    At a cut without one, from the end of a loop to its start, the last sample is held and faded over GUARD_S
    unless the start goes on from it, as sound that stops at once clicks.
    """
    start, stop = piece.fade
    if start < stop:
        out[:, start:stop] = crossfade(audio, start + old_offset, start + piece.offset, stop - start)
        return
    spread = out[:, start : start + round(GUARD_S * audio.sample_rate)]
    if start > 0 and spread.shape[1]:
        fade = np.cos(0.5 * np.pi * np.arange(spread.shape[1]) / spread.shape[1]) ** 2
        last = out[:, start - 1 : start]
        stops = np.abs(last - spread[:, :1]) >= 0.5 * np.abs(last)
        spread += np.where(stops, last, 0.0) * fade


def _fade_ends(out: Samples, path: BeatPath, source_end: int, rate: int) -> None:
    """Fade a beginning or an end inside of sound; `source_end`: output sample at which the source ends."""
    n = out.shape[1]
    if path.start_s > 0:
        fade_in = min(round(FADE_IN_S * rate), n)
        out[:, :fade_in] *= np.sin(0.5 * np.pi * np.arange(fade_in) / fade_in) ** 2
    if source_end == n and path.to_ending:
        return
    length_s = DECAY_FADE_S if path.to_ending else min(FADE_OUT_S, MAX_FADE_OUT_SHARE * n / rate)
    stop = min(n, source_end)
    fade_out = min(round(length_s * rate), stop)
    if path.to_ending and source_end < n:
        fade_out = min(fade_out, round(FADE_IN_S * rate))
    out[:, stop - fade_out : stop] *= np.cos(0.5 * np.pi * (np.arange(fade_out) + 1) / fade_out) ** 2
