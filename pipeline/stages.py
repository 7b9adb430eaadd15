"""The stages as functions of values: no paths, no clock, no database.

normalize → embed → generate, of which the last two are the engines' own methods. `change` gives a variation
its source in another key or tempo. `finish` checks every variation and gives it its final form before it is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import Normalize, Output
from pipeline.errors import BadAudio, EngineFailure
from pipeline.records import SILENT_BELOW_DBFS, Audio, Variation, VariationRequest, cut

if TYPE_CHECKING:
    from pipeline.audio import Levels
    from pipeline.music.beats import Beats

NORMALIZE_VERSION = "4"  # raised when the same file would get other normalized samples or another record
CHANGE_VERSION = "1"  # raised when the same change, or another version of its library, gives other samples
# By format, raised when the same variation would be written as different bytes
OUTPUT_VERSIONS: Mapping[str, str] = {"wav": "5", "flac": "5", "mp3": "6", "opus": "5"}
# Share and least seconds made beyond the asked length to choose a loop from. 4 s of it are faded in a remix.
# The contexts of seams of 16 s have a similarity of 0.1 with 7 s and of 0.33 with 14 s.
LOOP_EXTRA, LOOP_EXTRA_S = 0.2, 12.0
BARS_EXTRA_S = 4.0  # half a bar of seven beats at 55 a minute, the slowest
BAR_FADE_S = 0.03  # before the bar line at which the sound ends


@dataclass(frozen=True, eq=False)
class Normalized:
    """A source as every engine receives it."""

    audio: Audio
    levels: Levels
    source_lufs: float  # loudness of the source file, without silence at its ends


def normalize(decoded: Audio, settings: Normalize) -> Normalized:
    """Trim silence, remove an offset and set the loudness of audio decoded at `settings.sample_rate`.

    Raises:
        BadAudio: it is silent, or too short without its silence.
    """
    from pipeline import audio

    trimmed = _trimmed(decoded, settings)
    if audio.remove_offset(trimmed) is not trimmed:
        # It may hide silence that has it, and silence that does not would get the opposite offset.
        trimmed = _trimmed(audio.remove_offset(_trimmed(decoded, settings, keep_s=0.0)), settings)
    levels = audio.levels(trimmed)
    gain_db = audio.gain_to(levels, target_lufs=settings.loudness_lufs, ceiling_dbtp=settings.true_peak_dbtp)
    return Normalized(audio.amplify(trimmed, gain_db), levels.amplified(gain_db), levels.loudness_lufs)


def _trimmed(sound: Audio, settings: Normalize, **keep: float) -> Audio:
    """Without silence at its ends, if the settings say so; `keep`: see `trim_silence`."""
    from pipeline import audio

    if not settings.trim_silence:
        return sound
    trimmed = audio.trim_silence(sound, threshold_dbfs=settings.trim_below_dbfs, **keep)
    if trimmed.duration_s < settings.min_duration_s:
        raise BadAudio(
            f"is {trimmed.duration_s:.2f} s long without its silence: at least"
            f" {settings.min_duration_s:g} s are needed"
        )
    return trimmed


def change(source: Audio, settings: Normalize, *, transpose: int = 0, speed: float = 1.0) -> Audio:
    """The normalized source in another key or tempo (see `pipeline.audio.stretch`), normalized again."""
    from pipeline import audio

    changed = audio.stretch(source, transpose=transpose, speed=speed)
    return audio.to_loudness(
        changed, target_lufs=settings.loudness_lufs, ceiling_dbtp=settings.true_peak_dbtp
    )


@dataclass(frozen=True, eq=False)
class Finished:
    """A variation as it is written."""

    audio: Audio
    loudness_lufs: float
    details: Mapping[str, Any]  # the engine's, for the manifest
    bars: int | None  # of a loop, or up to the bar line at which it ends
    loop: Mapping[str, Any] | None  # of a loop: how alike both ends are, for the manifest
    own_beats: Beats | None = None  # see `Variation`; their times are those before the sound was cut

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        from pipeline import audio

        return {
            **({"bars": self.bars} if self.bars is not None else {}),
            **({"loop": dict(self.loop)} if self.loop is not None else {}),
            "duration_s": self.audio.duration_s,
            "sample_rate": self.audio.sample_rate,
            "channels": self.audio.channels,
            "peak_dbfs": round(audio.peak_dbfs(self.audio), 2),
            "loudness_lufs": round(self.loudness_lufs, 2),
            "details": dict(self.details),
        }


def engine_duration_s(length_s: float, settings: Output) -> float:
    """How much an engine has to make for a variation of this length: loops and bars are cut from more."""
    if settings.loop:
        return length_s + max(LOOP_EXTRA * length_s, LOOP_EXTRA_S)
    return length_s + (BARS_EXTRA_S if settings.length == "bars" else 0.0)


def finish(
    variation: Variation,
    request: VariationRequest,
    settings: Output,
    *,
    length_s: float,
    source_lufs: float,
    on_step: Callable[[], None] = lambda: None,
) -> Finished:
    """Check a generator's result and give it its final form.

    Args:
        length_s: the asked length; `request.duration_s` is the `engine_duration_s` of it.
        source_lufs: the loudness of the source file.
        on_step: called between the steps; what it raises ends the work.

    Raises:
        EngineFailure: it has the wrong length, samples that are not finite, or no sound.
    """
    import numpy as np

    from pipeline import audio

    made = _checked(variation.audio, request)
    rate = audio.nearest_rate(settings.format, settings.sample_rate or made.sample_rate)
    on_step()
    made = audio.remove_offset(audio.resample(made, rate))
    on_step()
    shaped, start_s, facts = _shaped(made, settings, length_s, variation.own_beats)
    on_step()
    leveled, loudness = _leveled(shaped, settings, source_lufs, on_step)
    if not np.isfinite(loudness):
        raise EngineFailure("the engine made sound that is too quiet to measure")
    return Finished(
        audio=leveled,
        loudness_lufs=loudness,
        details=_moved(variation.details, made, start_s, leveled.duration_s),
        own_beats=variation.own_beats,
        **facts,
    )


def _checked(made: Audio, request: VariationRequest) -> Audio:
    import numpy as np

    from pipeline import audio

    expected = round(request.duration_s * made.sample_rate)
    if made.n_samples != expected:
        raise EngineFailure(f"the engine made {made.n_samples} samples instead of {expected}")
    if not np.isfinite(made.samples).all():
        raise EngineFailure("the engine made samples that are not finite")
    if audio.peak_dbfs(made) < SILENT_BELOW_DBFS:
        raise EngineFailure("the engine made silence")
    return made


def _shaped(
    made: Audio, settings: Output, length_s: float, beats: Beats | None
) -> tuple[Audio, float, dict[str, Any]]:
    """The sound in its final length with its fades, where it begins in `made`, and facts on bars and loop.

    `beats`: if they are known.
    """
    from pipeline import audio
    from pipeline.music.analysis import analyse
    from pipeline.music.loops import bar_line, cut_loop, find_loop

    if settings.loop:
        found = find_loop(made, analyse(made, beats), length_s)
        return cut_loop(made, found), found.start / made.sample_rate, {"bars": found.bars, "loop": found.seam}
    fade_out_s, bars = settings.fade_out_s, None
    if settings.length == "bars" and (line := bar_line(analyse(made, beats), length_s)):
        (length_s, bars), fade_out_s = line, max(fade_out_s, BAR_FADE_S)
    cut_to = Audio(cut(made.samples, 0, round(length_s * made.sample_rate)), made.sample_rate)
    faded = audio.fade(cut_to, in_s=settings.fade_in_s, out_s=fade_out_s)
    return faded, 0.0, {"bars": bars, "loop": None}


def _moved(details: Mapping[str, Any], made: Audio, start_s: float, duration_s: float) -> Mapping[str, Any]:
    """The engine's details of what is left of `made`: `duration_s` from `start_s` on.

    The times of the joins count from there, and those cut away are left out. `start_s` is where that is in
    the source, and an `ending` that was cut away is "cut".
    """
    if "joins" not in details:
        return details
    joins = [{**join, "out_s": round(join["out_s"] - start_s, 6)} for join in details["joins"]]
    moved = {**details, "joins": [join for join in joins if 0 < join["out_s"] < duration_s]}
    if "start_s" in details:
        offsets_s = [join["to_s"] - join["out_s"] for join in joins if join["out_s"] <= 0]
        moved["start_s"] = round([details["start_s"] + start_s, *offsets_s][-1], 3)
    if "ending" in details and start_s + duration_s < made.duration_s - BAR_FADE_S:
        moved["ending"] = "cut"
    return moved


def _leveled(
    shaped: Audio, settings: Output, source_lufs: float, on_step: Callable[[], None]
) -> tuple[Audio, float]:
    """The sound at the asked loudness, and its loudness in LUFS."""
    from pipeline import audio
    from pipeline.audio.limiter import limit_to_loudness

    target_lufs = source_lufs if settings.loudness_lufs == "source" else settings.loudness_lufs
    ceiling_dbtp = settings.true_peak_dbtp
    if settings.limiter:
        limited = limit_to_loudness(
            shaped,
            target_lufs=target_lufs,
            ceiling_dbtp=ceiling_dbtp,
            is_loop=settings.loop,
            on_step=on_step,
        )
        return limited, audio.loudness_lufs(limited)
    levels = audio.levels(shaped)
    gain_db = audio.gain_to(levels, target_lufs=target_lufs, ceiling_dbtp=ceiling_dbtp)
    return audio.amplify(shaped, gain_db), levels.amplified(gain_db).loudness_lufs
