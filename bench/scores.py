"""What each score gives for a track that was changed in a known way: the tables of docs/scores.md.

    python bench/scores.py FILE FILE [FILE ...]

Against each file are scored: the file itself, changes of it, noise, silence, the next file, and a remix.
The tables have the means over the files. Needs requirements.txt, as librosa transposes and stretches.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import librosa  # noqa: E402
import numpy as np  # noqa: E402
import soundfile  # noqa: E402

from pipeline.audio import DecodeLimits, decode  # noqa: E402
from pipeline.engines.descriptors.features import DescriptorsEmbedder  # noqa: E402
from pipeline.engines.remix.generator import RemixGenerator  # noqa: E402
from pipeline.records import Audio, Samples, Variation, VariationRequest  # noqa: E402
from pipeline.scores import Scores, Source, analyse_source, score  # noqa: E402

RATE = 44100
REMIX_S = 30.0
CLOSENESS = ("similarity", "chroma", "chroma_warped", "embedding", "tempo_ratio", "tempo_agrees",
             "key_agreement", "copy_share", "copy_longest_s")  # fmt: skip
FAULTS = ("worst_seam", "silent_share", "clipped_share", "dc_offset", "flatness", "entropy", "noise_share",
          "stuck_share", "true_peak_dbtp", "loudness_lufs")  # fmt: skip


def changes() -> dict[str, Callable[[Samples], Samples]]:
    """Names of changes and what they do to samples, (channels, samples)."""
    return {
        "the same file": lambda x: x,
        "6 dB quieter": lambda x: x * 10 ** (-6 / 20),
        "6 dB above full scale, clipped": lambda x: np.clip(x / np.abs(x).max() * 10 ** (6 / 20), -1, 1),
        "MP3": through_mp3,
        "transposed by 3 semitones": lambda x: librosa.effects.pitch_shift(x, sr=RATE, n_steps=3),
        "half tempo": lambda x: librosa.effects.time_stretch(x, rate=0.5),
        "white noise": lambda x: 0.1 * np.random.default_rng(0).standard_normal(x.shape),
        "silence": np.zeros_like,
    }


def through_mp3(samples: Samples) -> Samples:
    file = io.BytesIO()
    soundfile.write(file, samples.T, RATE, format="MP3")
    file.seek(0)
    decoded: Samples = soundfile.read(file, dtype="float32", always_2d=True)[0].T
    return decoded


def remix_of(audio: Audio) -> Variation:
    request = VariationRequest("1", "1", audio, REMIX_S, seed=1)
    generator = RemixGenerator(audio.sample_rate)
    [made] = generator.generate([request], progress=lambda *_: None, should_stop=lambda: False)
    assert isinstance(made, Variation), made
    return made


def scored(audio: Audio, source: Source, source_vector: Samples, joins_s: tuple[float, ...] = ()) -> Scores:
    vector = DescriptorsEmbedder().embed(audio, should_stop=lambda: False).track
    return score(source, audio, joins_s=joins_s, source_vector=source_vector, vector=vector)


def results_of(audio: Audio, other: Audio) -> dict[str, Scores]:
    """The scores of a track's changes against it."""
    began = time.perf_counter()
    source = analyse_source(audio)
    print(f"  analysis: {time.perf_counter() - began:.2f} s", file=sys.stderr)
    vector = DescriptorsEmbedder().embed(audio, should_stop=lambda: False).track
    sounds = {
        name: Audio(np.ascontiguousarray(change(audio.samples), np.float32), audio.sample_rate)
        for name, change in changes().items()
    }
    remix = remix_of(audio)
    joins_s = tuple(join["out_s"] for join in remix.details["joins"])
    sounds = {**dict(list(sounds.items())[:-2]), "another track": other, **dict(list(sounds.items())[-2:])}
    found = {name: scored(sound, source, vector) for name, sound in sounds.items()}
    began = time.perf_counter()
    found[f"a remix of {REMIX_S:.0f} s"] = score_remix = scored(remix.audio, source, vector, joins_s)
    print(f"  scores of the remix: {time.perf_counter() - began:.2f} s", file=sys.stderr)
    print(f"  its joins: {[round(join.quality, 2) for join in score_remix.joins]}", file=sys.stderr)
    return found


def table(names: tuple[str, ...], results: list[dict[str, Scores]]) -> str:
    """A Markdown table: a row for each sound, a column for each measure."""
    lines = [f"| sound | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for sound in results[0]:
        cells = [_cell([one[sound].as_json()[name] for one in results]) for name in names]
        lines.append(f"| {sound} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[object]) -> str:
    values = [value["quality"] if isinstance(value, dict) else value for value in values if value is not None]
    if not values:
        return "none"
    if isinstance(values[0], bool):
        return f"{sum(values)} of {len(values)}"
    return f"{mean(values):.3g}"


def main() -> None:
    limits = DecodeLimits()
    tracks = [decode(Path(name), sample_rate=RATE, limits=limits)[0] for name in sys.argv[1:]]
    results = []
    for name, audio, other in zip(sys.argv[1:], tracks, [*tracks[1:], tracks[0]], strict=True):
        print(f"{Path(name).name}: {audio.duration_s:.0f} s", file=sys.stderr)
        results.append(results_of(audio, other))
    print(table(CLOSENESS, results), table(FAULTS, results), sep="\n\n")


if __name__ == "__main__":
    main()
