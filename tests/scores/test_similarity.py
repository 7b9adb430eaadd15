"""Similarity to the source: harmony at the same time and anywhere, tempo, key, and the order of them all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tunes import noise, part, play, silence, through_mp3

from pipeline.records import Audio
from pipeline.scores import Scores, Source, analyse_source, score
from pipeline.scores.chroma import HOP, N_FFT, RATE_HZ, compute_chroma
from pipeline.scores.similarity import overall_similarity, subsequence_costs, tempo_agrees


@pytest.fixture(scope="module")
def source() -> Source:
    return analyse_source(play())


@pytest.fixture(scope="module")
def results(source: Source) -> dict[str, Scores]:
    """The scores of sounds that are less and less like the source."""
    sounds = {
        "same": play(),
        "mp3": through_mp3(play()),
        "transposed": play(transpose=3),
        "other": play(tune=5, transpose=6, bpm=93.0, bars=(2, 3, 1, 0, 5, 4, 7, 6)),
        "noise": noise(),
        "silence": silence(),
    }
    return {name: score(source, audio) for name, audio in sounds.items()}


def test_the_same_file_is_as_similar_as_can_be(results: dict[str, Scores]) -> None:
    same = results["same"]
    assert same.similarity == pytest.approx(1.0, abs=1e-5)
    assert (same.chroma, same.tempo_ratio, same.key_agreement) == (1.0, 1.0, 1.0)


def test_similarity_falls_from_the_same_file_to_noise(results: dict[str, Scores]) -> None:
    values = [results[name].similarity for name in ("same", "mp3", "transposed", "other", "noise")]
    assert values == sorted(values, reverse=True)
    assert values[1] > 0.95
    assert values[3] < 0.35
    assert values[4] < 0.1


def test_silence_is_unlike_any_music(results: dict[str, Scores]) -> None:
    silent = results["silence"]
    assert (silent.similarity, silent.chroma) == (0.0, 0.0)
    assert (silent.tempo_ratio, silent.key, silent.key_agreement) == (None, None, None)


def test_bars_in_another_order_are_found_by_warping_alone(source: Source) -> None:
    reordered = score(source, play(bars=(4, 5, 6, 7, 0, 1, 2, 3)))
    other = score(source, play(tune=5, transpose=6))
    assert reordered.chroma is not None and reordered.chroma < 0.6
    assert reordered.chroma_warped is not None and other.chroma_warped is not None
    assert reordered.chroma_warped > 0.8 > other.chroma_warped + 0.2


def test_a_slower_performance_of_the_same_notes_is_found_by_warping(source: Source) -> None:
    slower = score(source, play(bpm=90.0, bars=(0, 1, 2, 3, 4, 5)))
    assert slower.chroma_warped is not None and slower.chroma_warped > 0.8


def test_a_source_without_pitch_has_no_similarity_of_harmony() -> None:
    result = score(analyse_source(silence()), play())
    assert (result.chroma, result.chroma_warped, result.similarity) == (None, None, 0.0)


def test_half_tempo_is_reported_and_tolerated(source: Source) -> None:
    assert source.tempo_bpm == pytest.approx(120.0, rel=0.01)
    result = score(replace(source, tempo_bpm=2 * source.tempo_bpm), play())
    assert (result.tempo_ratio, result.tempo_agrees) == (0.5, True)


def test_another_tempo_does_not_agree(source: Source) -> None:
    result = score(source, play(bpm=80.0))
    assert result.tempo_ratio == pytest.approx(2 / 3, rel=0.02)
    assert result.tempo_agrees is False


@pytest.mark.parametrize(
    ("ratio", "agrees"), [(2.0, True), (1.039, True), (1.05, False), (1.5, False), (3.0, False)]
)
def test_tempos_agree_within_four_percent_of_one_two_or_a_half(ratio: float, agrees: bool) -> None:
    assert tempo_agrees(ratio) is agrees


@pytest.mark.parametrize(("semitones", "agreement"), [(3, 0.0), (7, 0.5)])
def test_a_transposed_piece_is_in_another_key(source: Source, semitones: int, agreement: float) -> None:
    assert score(source, play(transpose=semitones)).key_agreement == agreement


def test_embeddings_are_compared_where_they_are_given(source: Source) -> None:
    vector, other = np.array([1.0, 0.0], np.float32), np.array([0.6, 0.8], np.float32)
    without = score(source, play(transpose=3))
    given = score(source, play(transpose=3), source_vector=vector, vector=other, prompt=-0.6)
    assert (without.embedding, without.prompt) == (None, None)
    assert (given.embedding, given.prompt) == (pytest.approx(0.6), -0.6)
    assert given.similarity != without.similarity


def test_the_overall_similarity_rises_with_each_of_its_parts() -> None:
    low = overall_similarity(0.2, 0.6, 0.4)
    assert (
        0
        < low
        < min(
            overall_similarity(0.3, 0.6, 0.4),
            overall_similarity(0.2, 0.7, 0.4),
            overall_similarity(0.2, 0.6, 0.5),
        )
    )


@pytest.mark.long  # importing librosa compiles its functions
def test_chroma_is_that_of_librosa_s_filters_on_the_power_spectrum() -> None:
    """Within 1e-5 of librosa's, which audiocraft uses, frame by frame."""
    import librosa

    reference = librosa.filters.chroma(sr=RATE_HZ, n_fft=N_FFT, tuning=0.0, n_chroma=12)
    mono = np.random.default_rng(0).standard_normal(8 * N_FFT).astype(np.float32)
    power = np.abs(librosa.stft(mono, n_fft=N_FFT, hop_length=HOP, pad_mode="constant")) ** 2
    expected = reference @ power
    np.testing.assert_allclose(
        compute_chroma(mono), (expected / np.linalg.norm(expected, axis=0)).T, atol=1e-5
    )


@pytest.mark.long  # importing librosa compiles its functions
def test_warping_costs_are_librosa_s() -> None:
    """Within 1e-5 of the subsequence matching by librosa.sequence.dtw, with the same steps and weights."""
    import librosa

    rng = np.random.default_rng(1)
    source, windows = rng.standard_normal((60, 5)), rng.standard_normal((3, 20, 5))
    source /= np.linalg.norm(source, axis=1, keepdims=True)
    windows /= np.linalg.norm(windows, axis=2, keepdims=True)
    found = subsequence_costs(windows.astype(np.float32), source.astype(np.float32))
    for window, cost in zip(windows, found, strict=True):
        total = librosa.sequence.dtw(
            C=1 - window @ source.T, subseq=True, backtrack=False,
            step_sizes_sigma=np.array([[1, 1], [1, 2], [2, 1]]),
            weights_add=np.zeros(3), weights_mul=np.array([1.0, 1.0, 2.0]),
        )  # fmt: skip
        assert cost == pytest.approx(total[-1].min() / len(window), abs=1e-5)


def test_scores_do_not_depend_on_rate_or_channels(source: Source) -> None:
    import soxr

    samples = soxr.resample(play().samples[0], 22050, 48000).astype(np.float32)
    result = score(source, Audio(np.stack([samples, samples]), 48000))
    assert result.similarity > 0.98
    assert result.copy_share > 0.95


def test_a_part_of_the_source_is_close_to_it_without_its_beginning(source: Source) -> None:
    result = score(source, part(play(), 4.0, 12.0))
    assert result.chroma_warped is not None and result.chroma_warped > 0.95


def test_noise_has_no_key_and_a_tune_has_one(source: Source) -> None:
    assert analyse_source(noise()).key is None
    assert source.key is not None
