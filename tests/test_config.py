"""The configuration: what is accepted, and what is refused with which message."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from pipeline.config import Config, load_config
from pipeline.errors import ConfigError

DEFAULT_FILE = Path(__file__).parents[1] / "config" / "default.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def load(file: Path, text: str, **env: str) -> Config:
    file.write_text(text, encoding="utf-8")
    return load_config(file, env=env)


def complaint(file: Path, text: str, **env: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, text, **env)
    return str(caught.value)


def variation(entry: str, *, engine: str = "auto") -> str:
    return f"generate: {{engine: {engine}, variations: [{{name: a, {entry}}}]}}"


def test_the_defaults_of_the_main_settings() -> None:
    config = load_config(None, env={})

    assert (config.device, config.intake.after) == ("cpu", "move")
    assert (config.folders.inbox, config.folders.outbox, config.folders.state) == ("inbox", "outbox", "state")
    assert (config.generate.engine, config.embed.engine, config.judge.engine) == ("auto", "auto", "none")
    assert (config.output.loudness_lufs, config.output.true_peak_dbtp) == (-14.0, -1.0)


def test_the_file_that_explains_every_key_says_what_the_defaults_are() -> None:
    written = yaml.safe_load(DEFAULT_FILE.read_text(encoding="utf-8"))

    assert load_config(DEFAULT_FILE, env={}) == load_config(None, env={})
    for name, field in Config.model_fields.items():
        assert name in written
        if isinstance(field.default, BaseModel):
            assert set(written[name]) == set(type(field.default).model_fields)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}"])
def test_an_empty_file_is_the_default(file: Path, text: str) -> None:
    assert load(file, text) == load_config(None, env={})


def test_what_a_file_says_wins_and_the_rest_stays_default(file: Path) -> None:
    config = load(file, "intake: {after: keep, ignore: ['*.bak']}\ngenerate: {duration_s: source}")

    assert (config.intake.after, config.intake.ignore) == ("keep", ("*.bak",))
    assert config.generate.duration_s == "source"
    assert config.intake.settle_s == Config().intake.settle_s


@pytest.mark.parametrize(
    ("text", "where", "nearest"),
    [
        ("devise: cpu", "devise", "device"),
        ("normalize: {loudnes_lufs: -14}", "normalize.loudnes_lufs", "loudness_lufs"),
        ("generate: {durations: 30}", "generate.durations", "duration_s"),
        (variation("temprature: 0.8"), "generate.variations[0].temprature", "temperature"),
        (variation("sed: 3"), "generate.variations[0].sed", "seed"),
    ],
)
def test_an_unknown_key_names_the_file_the_key_and_the_nearest(
    file: Path, text: str, where: str, nearest: str
) -> None:
    assert complaint(file, text).startswith(f"{file}: {where}: unknown key; did you mean {nearest!r}?")


def test_an_unknown_key_that_is_like_none_lists_what_is_allowed(file: Path) -> None:
    assert complaint(file, "retry: {zzz: 1}") == (
        f"{file}: retry.zzz: unknown key (allowed: backoff_s, max_attempts, max_backoff_s)"
    )


@pytest.mark.parametrize("key", ["float", "int", "str"])
def test_an_unknown_key_named_like_a_type_is_still_named(file: Path, key: str) -> None:
    assert complaint(file, f"output: {{{key}: 1}}").startswith(f"{file}: output.{key}: unknown key")
    assert complaint(file, f"{key}: 1").startswith(f"{file}: {key}: unknown key")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threads: 1.5", "threads: must be a valid integer, not 1.5"),
        ("threads: 0", "threads: must be greater than or equal to 1, not 0"),
        ("device: mps", 'device: must be cpu, cuda or cuda:N, not "mps"'),
        ("folders: {inbox: 3}", "folders.inbox: must be a valid string, not 3: put it in quotes"),
        ('folders: {inbox: ""}', 'folders.inbox: must not be empty'),
        (r'folders: {outbox: "a\0b"}', r'folders.outbox: must not contain a NUL character, not "a\u0000b"'),
        ('embed: {model: ""}', 'embed.model: must not be empty'),
        (
            "generate: {variations: [{name: a, seed: 0123}]}",
            "line 1, column 41: 0123 would be read as an octal number: write it without the leading zero",
        ),
        (
            "intake: {marker: done}",
            'intake.marker: must begin with a dot and have no slash, such as .done, not "done"',
        ),
        ("normalize: []", "normalize: must be a mapping of keys, not []"),
        ("normalize:", "normalize: must be a mapping of keys, not null"),
        ("normalize: {trim_silence: 1}", "normalize.trim_silence: must be a valid boolean, not 1"),
        ("normalize: {loudness_lufs: .nan}", "normalize.loudness_lufs: must be a finite number, not NaN"),
        ("normalize: {max_duration_s: 0.5}", "normalize.max_duration_s: 0.5 is below min_duration_s, 1"),
        ("gates: {similarity: [1, 0]}", "gates.similarity: must have the lower end first, not [1, 0]"),
        ("normalize: {loudness_lufs: 1}", "normalize.loudness_lufs: must be less than or equal to 0, not 1"),
        ("intake: {ignore: '*.txt'}", 'intake.ignore: must be a list, not "*.txt"'),
        ("intake: {after: burn}", "intake.after: must be 'move', 'delete' or 'keep', not \"burn\""),
        (
            "generate: {duration_s: 0}",
            "generate.duration_s: must be greater than or equal to 0.1 or must be 'source', not 0",
        ),
        (
            "generate: {variations: []}",
            "generate.variations: must not be empty",
        ),
        ("generate: {variations: [{}]}", "generate.variations[0].name: is required"),
        (
            "generate: {musicgen: {precison: int8}}",
            "generate.musicgen.precison: unknown key; did you mean 'precision'?"
            " (allowed: max_memory_gb, precision)",
        ),
        (
            "generate: {musicgen: {max_memory_gb: 0}}",
            "generate.musicgen.max_memory_gb: must be greater than 0, not 0",
        ),
        ("generate: {musicgen: int8}", 'generate.musicgen: must be a mapping of keys, not "int8"'),
        (
            "generate: {engine: mg}",
            'generate.engine: must be one of auto, musicgen, remix, audiocraft, not "mg"',
        ),
        ('embed: {engine: remix}', 'embed.engine: must be one of auto, clap, descriptors, not "remix"'),
        ("judge: {engine: auto}", 'judge.engine: must be one of none, audiobox, not "auto"'),
        (variation("count: 0"), "generate.variations[0].count: must be greater than or equal to 1, not 0"),
        (variation("seed: -1"), "generate.variations[0].seed: must be greater than or equal to 0, not -1"),
    ],
)  # fmt: skip
def test_an_ill_typed_value_is_refused_with_what_is_allowed(file: Path, text: str, message: str) -> None:
    assert complaint(file, text) == f"{file}: {message}"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", r"a\\b", r"a\nb"])
def test_a_variation_name_that_is_no_file_name_is_refused(file: Path, name: str) -> None:
    said = complaint(file, f'generate: {{variations: [{{name: "{name}"}}]}}')
    assert said.startswith(
        f"{file}: generate.variations[0].name: must not begin with a dot or contain a slash"
    )


def test_all_problems_are_reported_at_once_one_a_line(file: Path) -> None:
    lines = complaint(file, "threads: x\nretry: {max_attempts: 0, zzz: 1}").splitlines()

    assert len(lines) == 3
    assert all(line.startswith(f"{file}: ") for line in lines)


def test_a_key_given_twice_is_refused_with_its_line(file: Path) -> None:
    said = complaint(file, "device: cpu\nretry:\n  backoff_s: 1\n  backoff_s: 2\n")
    assert said == f"{file}: line 4, column 3: the key 'backoff_s' is given twice"


# -- YAML as people write it ------------------------------------------------------------------------


def test_merge_keys_take_over_what_is_not_given_and_earlier_bases_win(file: Path) -> None:
    base = "x-slow: &slow {max_attempts: 9, backoff_s: 60}\n.often: &often {max_attempts: 5}\n"
    one = load(file, base + "retry: {<<: *slow, backoff_s: 2}").retry
    two = load(file, base + "retry:\n  <<: [*often, *slow]\n  max_backoff_s: 70").retry
    assert (one.max_attempts, one.backoff_s) == (9, 2.0)
    assert (two.max_attempts, two.backoff_s, two.max_backoff_s) == (5, 60.0, 70.0)


def test_a_base_that_is_itself_merged_is_not_taken_for_duplicate_keys(file: Path) -> None:
    base = "x-bases: {deep: &b {<<: &a {backoff_s: 1, max_attempts: 7}, backoff_s: 2}}\n"
    retry = load(file, base + "retry: {<<: *b}").retry
    assert (retry.backoff_s, retry.max_attempts) == (2.0, 7)


def test_a_duplicate_beside_a_merge_key_is_still_refused(file: Path) -> None:
    base = "x-a: &a {backoff_s: 1}\n"
    assert "'backoff_s' is given twice" in complaint(
        file, base + "retry: {<<: *a, backoff_s: 2, backoff_s: 3}"
    )
    assert "'<<' is given twice" in complaint(file, base + "retry: {<<: *a, <<: *a}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (variation("seed: 2024-01-01"), 'must be a valid integer, not "2024-01-01"'),
        ("generate: {variations: [{name: 2024-01-01}]}", 'valid string, not "2024-01-01": put it in quotes'),
        ("generate: {variations: [{name: no}]}", "must be a valid string, not false: put it in quotes"),
        ("generate: {variations: [{name: 808}]}", "must be a valid string, not 808: put it in quotes"),
        ("generate: {duration_s: .inf}", "must be a finite number"),
    ],
)
def test_a_value_that_yaml_reads_as_another_type_is_explained(file: Path, text: str, message: str) -> None:
    assert message in complaint(file, text)


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("off", False), ("True", True)])
def test_yes_no_on_and_off_are_true_and_false(file: Path, word: str, value: bool) -> None:
    assert load(file, f"normalize: {{trim_silence: {word}}}").normalize.trim_silence is value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device: " + "[" * 3000 + "]" * 3000, "recursion"),
        ("\n".join(" " * i + "a:" for i in range(3000)), "recursion"),
        ("retry: {<<: 3}", "expected a mapping or list of mappings for merging"),
        ("threads: " + "9" * 5000, "can't be read as YAML"),
        ("threads: !!int x", "can't be read as YAML"),
        ("device: !!python/object:os.system x", "could not determine a constructor"),
        ("device: *x", "line 1, column 9: found undefined alias 'x'"),
        ("retry:\n\tbackoff_s: 1", "line 2, column 1: YAML does not allow tabs here: use spaces"),
        ("device: cpu\n---\ndevice: cpu", "expected a single document in the stream"),
        ("retry: {x-a: 1}", "retry.x-a: unknown key"),
    ],
)
def test_a_broken_or_malicious_file_is_refused_in_one_line(file: Path, text: str, message: str) -> None:
    said = complaint(file, text)
    assert said.startswith(f"{file}: ")
    assert message in said
    assert len(said.splitlines()) == 1
    assert len(said) < 300


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_with_a_byte_order_mark_and_windows_line_ends_is_read(file: Path, encoding: str) -> None:
    file.write_bytes("retry:\r\n  backoff_s: 3\r\ndevice: cuda\r\n".encode(encoding))
    config = load_config(file, env={})
    assert (config.retry.backoff_s, config.device) == (3.0, "cuda")


@pytest.mark.parametrize("data", [bytes(range(256)), b"\0", "device: é".encode("latin-1")])
def test_a_file_that_is_not_text_is_refused(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"mine\.yaml: .* unacceptable character"):
        load_config(file, env={})


@pytest.mark.parametrize("text", ["a: [", "- device", "just text", "1: 2", "? [a]\n: b"])
def test_a_file_that_is_no_mapping_of_named_keys_is_refused_by_name(file: Path, text: str) -> None:
    assert complaint(file, text).startswith(f"{file}:")


def test_a_file_that_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: can't be read: No such file"):
        load_config(tmp_path / "none.yaml", env={})


def test_device_in_the_environment_wins_over_the_file(file: Path) -> None:
    assert load(file, "device: cpu", DEVICE="cuda:1").device == "cuda:1"
    assert load(file, "device: cuda", DEVICE="").device == "cuda"
    assert load_config(None, env={"DEVICE": "cuda"}).device == "cuda"
    assert "device: must be cpu, cuda or cuda:N" in complaint(file, "", DEVICE="gpu")


def test_a_parameter_is_checked_against_the_engine_that_would_take_it(file: Path) -> None:
    text = variation("crossfade_ms: 1000", engine="remix")
    assert complaint(file, text) == (
        f"{file}: generate.variations[0].crossfade_ms: must be less than or equal to 500 for remix, not 1000"
    )
    assert "must be a valid number for remix" in complaint(
        file, variation("temperature: hot", engine="remix")
    )


def test_auto_checks_a_parameter_against_every_engine_it_may_choose(file: Path) -> None:
    text = variation("temperature: 3")
    assert complaint(file, text).endswith("temperature: must be less than or equal to 2 for remix, not 3")
    load(file, variation("temperature: 3", engine="musicgen"))


def test_a_parameter_of_another_engine_is_allowed(file: Path) -> None:
    config = load(file, variation("top_k: 50, min_segment_beats: 4", engine="remix"))
    assert config.generate.variations[0].model_extra == {"top_k": 50, "min_segment_beats": 4}


def test_each_value_of_a_sweep_is_checked(file: Path) -> None:
    load(file, variation("temperature: [0.5, 1]"))
    assert "must be less than or equal to 500 for remix, not 501" in complaint(
        file, variation("crossfade_ms: [40, 501]")
    )
    assert "an empty list sweeps over nothing" in complaint(file, variation("temperature: []"))


@pytest.mark.parametrize("engine", ["auto", "remix", "musicgen", "audiocraft"])
def test_the_default_variations_suit_every_engine(file: Path, engine: str) -> None:
    assert load(file, f"generate: {{engine: {engine}}}").generate.variations == Config().generate.variations


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("similarity: 1.5", "[0].similarity: must be less than or equal to 1, not 1.5"),
        ("similarity: near", "[0].similarity: must be a valid number, not \"near\""),
        ("duration_s: [10, 0]", "[0].duration_s: must be greater than or equal to 0.1 or must be 'source'"),
        ("musicgen: 3", "[0].musicgen: must be a mapping of parameters, not 3"),
        ("musicgen: {topk: 3}", "[0].musicgen.topk: unknown key; did you mean 'top_k'?"),
        ("remix: {temperature: 3}", "[0].remix.temperature: must be less than or equal to 2, not 3"),
        ("temperature: {low: 1, high: 3, steps: 2}", "temperature: must be less than or equal to 2 for"),
        ("temperature: {low: 0.5}", "[0].temperature: must be a value, a list or a range {low, high, steps}"),
        ("temperature: {low: 0.5, high: 1}", "[0].expand: a range needs steps, unless its values are drawn"),
        ("temperature: [1, 2], crossfade_ms: [9, 8, 7], expand: zip", "zip needs lists of one length, not"),
        ("keep: best 0 of 3", "[0].keep: must be as in: best 2 of 6, not \"best 0 of 3\""),
        ("keep: best 5 of 3", "[0].keep: can't keep 5 of 3"),
        ("keep: best 1 of 3, count: 2", "[0].keep: says how many results there are"),
        ("gates: {similarity: [0.6, 0.4]}", "[0].gates.similarity: "),
        (
            "temperature: {low: 0, high: 1, steps: 99}, crossfade_ms: {low: 5, high: 9, steps: 99}",
            "[0].expand: these are 9801 combinations; 1000 are the most",
        ),
        ("expand: all", "[0].expand: must be 'grid' or 'zip' or "),
        ("expand: {random: 0}", "[0].expand.random: must be greater than or equal to 1, not 0"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_refused_with_its_place(file: Path, entry: str, expected: str) -> None:
    assert expected in complaint(file, variation(entry))


def test_a_preset_replaces_lists_and_single_settings(file: Path, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("generate: {variations: [{name: p}]}\noutput: {bit_depth: 16}\n")
    file.write_text(
        "generate: {duration_s: 5, variations: [{name: a}, {name: b}]}\noutput: {loudness_lufs: -20}\n"
    )

    made = load_config(file, preset=preset, env={})

    assert [spec.name for spec in made.generate.variations] == ["p"]
    assert made.generate.duration_s == 5
    assert (made.output.bit_depth, made.output.loudness_lufs) == (16, -20)


def test_a_wrong_preset_is_named(file: Path, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("output: {bitdepth: 16}")
    file.write_text("")
    with pytest.raises(ConfigError, match=rf"{file} with {preset}: output.bitdepth: unknown key"):
        load_config(file, preset=preset, env={})


def test_a_config_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().device = "cuda"


def test_the_hash_depends_on_the_values_and_not_on_how_they_are_written(file: Path) -> None:
    one = load(file, "retry: {max_attempts: 2}\ndevice: cpu")
    same = load(file, "# a comment\ndevice: cpu\nretry:\n  max_attempts: 2\n  backoff_s: 10\n")
    other = load(file, "retry: {max_attempts: 4}")

    assert one.sha256 == same.sha256
    assert one.sha256 != other.sha256
    assert len(one.sha256) == 64


def test_the_canonical_form_reads_back_as_the_same_config(file: Path) -> None:
    config = load(file, variation("seed: 0, temperature: [0.5, 1.0]"))
    assert load(file, config.canonical()) == config


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "format: opus, sample_rate: 44100",
            "output.sample_rate: opus has 8000, 12000, 16000, 24000, 48000, not",
        ),
        ("format: mp3, sample_rate: 96000", "output.sample_rate: mp3 has 8000, "),
        ("format: flac, bit_depth: float", "output.bit_depth: flac has 16 or 24 bits"),
        ("loop: true, fade_out_s: 1.0", "output.loop: a loop has no fades"),
        ("format: aac", "output.format: must be 'wav', 'flac', 'mp3' or 'opus', not"),
    ],
)
def test_output_that_does_not_go_together_is_refused_with_what_is_possible(
    file: Path, output: str, message: str
) -> None:
    assert message in complaint(file, f"output: {{{output}}}")


def test_a_format_whose_encoder_is_not_installed_is_refused_by_name(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("av.codecs_available", set())
    assert "has no encoder libopus" in complaint(file, "output: {format: opus}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{kind: ray, address: somewhere}", 'executor.address: must be auto or host:port, not "somewhere"'),
        ("{address: 'a:1'}", "executor.address: is for kind: ray alone"),
        (
            "{kind: inline, resources_per_worker: {cpu: 2}}",
            "executor.resources_per_worker: is for kind: ray alone",
        ),
        (
            "{kind: ray, resources_per_worker: {cpu: 0}}",
            "executor.resources_per_worker.cpu: must be greater than 0",
        ),
        ("{kind: ray, resources_per_worker: {gpu: 1}}", "no engine would use it, since device is cpu"),
    ],
)
def test_what_does_not_go_together_for_ray_is_refused(file: Path, text: str, sentence: str) -> None:
    assert sentence in complaint(file, f"executor: {text}")


def test_ray_chooses_the_gpu_and_needs_one_for_cuda(file: Path) -> None:
    assert "device: must be cpu or cuda with executor: ray" in complaint(
        file, "{device: 'cuda:1', executor: ray}"
    )
    text = "{device: cuda, executor: {kind: ray, resources_per_worker: {gpu: 0}}}"
    assert "must be above 0, since device is cuda" in complaint(file, text)
    assert load(file, "{device: cuda, executor: {kind: ray, address: 'head:6379'}}").executor.kind == "ray"
