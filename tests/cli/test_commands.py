"""The command line: the output, the effect and the exit codes of each command."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
from home_folder import FAR, NEAR, ROOT, Home, RunResult, contents, run, sha256_of, write_music
from ray_setup import NEEDS_RAY

import pipeline as pipeline_package
from pipeline.app import App
from pipeline.cli.commands import main
from pipeline.cli.doctor import Check
from pipeline.cli.status import status_facts, status_text
from pipeline.config import load_config
from pipeline.service.health import Health
from pipeline.store.schema import TrackState
from pipeline.store.store import Store

Pipeline = Callable[..., RunResult]
TIMEOUT_S = 60.0  # for a child process; ends a test that would hang


@pytest.fixture
def pipeline(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    isolated: None,
) -> Pipeline:
    """The program in this process, in the home that the test asks for: `processed` or `home`."""
    name = "processed" if "processed" in request.fixturenames else "home"
    home = request.getfixturevalue(name)
    return lambda *words: run(capsys, monkeypatch, home, *words)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Path]:
    """A home with one track done and one failed, and a copy of it."""
    home = Home(tmp_path_factory.mktemp("processed") / "home")
    home.configure()
    write_music(home.inbox / "song.wav")
    (home.inbox / "letter.mp3").write_text("Dear all, this is not music.\n" * 20)
    ended = home.in_child("once")
    assert ended.code == 1, ended.err
    copy = home.folder.with_name("copy")
    shutil.copytree(home.folder, copy)
    return home, copy


@pytest.fixture
def processed(template: tuple[Home, Path]) -> Home:
    """A home with one track done and one failed, at the path that its database knows."""
    home, copy = template
    shutil.rmtree(home.folder)
    shutil.copytree(copy, home.folder)
    return home


# -- exit codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dance"], "No such command"),
        (["once", "--loud"], "No such option"),
        (["once", "no/such/folder"], "is not a folder"),
        (["show"], "Missing argument"),
        (["show", "nothing"], "nothing has been processed"),
        (["requeue", "nothing"], "there is no track 'nothing'"),
        (["requeue", "nothing", "--stage", "master"], "'normalize', 'embed', 'generate', 'embed-variations'"),
    ],
)
def test_bad_usage_is_2_and_says_what_is_wrong(pipeline: Pipeline, words: list[str], says: str) -> None:
    ended = pipeline(*words)
    assert (ended.code, ended.out) == (2, "")
    assert says in ended.err


def test_a_folder_that_holds_the_outbox_is_refused(home: Home, pipeline: Pipeline) -> None:
    ended = pipeline("once", home.folder)
    assert (ended.code, "must not lie in one another" in ended.err) == (2, True)


@pytest.mark.parametrize("verb", ["once", "watch", "plan", "status", "doctor"])
def test_an_unknown_key_is_2_with_file_path_and_nearest_key(
    home: Home, pipeline: Pipeline, verb: str
) -> None:
    home.configure(generate={"duration": 3})
    ended = pipeline(verb)
    assert ended.code == 2
    for words in ("settings.yaml", "generate.duration", "duration_s"):
        assert words in ended.err


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not in the core install")
def test_a_named_engine_without_its_weights_is_2_and_says_how_to_get_them(home: Home) -> None:
    home.configure(generate={"engine": "musicgen"})
    write_music(home.inbox / "song.wav")

    ended = home.in_child(
        "once",
        env={
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(home.folder / "hub"),
            "HF_HUB_CACHE": str(home.folder / "hub"),
        },
    )

    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert "run_pipeline.py models fetch" in ended.err
    assert (home.inbox / "song.wav").exists()
    assert list(home.outbox.iterdir()) == []


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not in the core install")
@pytest.mark.parametrize("verb", ["once", "plan"])
def test_demucs_that_is_configured_and_not_installed_is_2_before_any_work(
    home: Home, pipeline: Pipeline, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "demucs", None)
    variations = [{"name": "plain"}, {"name": "clean", "melody": ["mix", "demucs"]}]
    home.configure(generate={"engine": "musicgen", "variations": variations})
    write_music(home.inbox / "song.wav")

    ended = pipeline(verb)

    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert "melody: demucs needs demucs: pip install demucs==" in ended.err
    assert (home.inbox / "song.wav").exists()
    assert any("pip install demucs==" in line for line in pipeline("doctor").out.splitlines())


def test_a_key_that_the_library_is_missing_for_is_2_before_any_work(
    home: Home, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "python_stretch", None)
    home.configure({"name": "plain"}, {"name": "higher", "transpose": 2})
    write_music(home.inbox / "song.wav")

    ended = pipeline("once")

    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert "transpose and speed need python-stretch==0.3.1: pip install python-stretch==" in ended.err
    assert (home.inbox / "song.wav").exists()
    home.configure({"name": "plain", "transpose": 0})
    assert pipeline("plan").code == 0


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not in the core install")
def test_weights_of_demucs_are_looked_for_without_importing_anything(
    home: Home, pipeline: Pipeline, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name that can't be imported is enough to find that its weights are missing."""
    packages = home.folder / "packages"
    (packages / "demucs").mkdir(parents=True)
    (packages / "demucs" / "__init__.py").write_text("raise SystemError")
    home.configure(generate={"engine": "musicgen", "variations": [{"name": "clean", "melody": "demucs"}]})
    monkeypatch.setenv("TORCH_HOME", str(home.folder / "torch"))
    monkeypatch.syspath_prepend(packages)

    ended, doctor = pipeline("plan"), pipeline("doctor")

    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert "hf download adefossez/HTDemucs" in ended.err
    said = doctor.out.splitlines()
    assert any("generate uses: musicgen" in line for line in said)
    assert any(line.startswith("bad") and "hf download" in line for line in said)
    assert any("database" in line for line in said)


@pytest.mark.parametrize("verb", ["once", "watch"])
def test_a_held_lock_is_3(home: Home, pipeline: Pipeline, verb: str) -> None:
    (home.folder / "state").mkdir()
    with (home.folder / "state" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        ended = pipeline(verb)
    assert ended.code == 3
    assert "another instance (process 4711)" in ended.err


def test_a_lock_that_nobody_holds_is_no_hindrance(home: Home, pipeline: Pipeline) -> None:
    (home.folder / "state").mkdir()
    (home.folder / "state" / "lock").write_text("4711")
    assert pipeline("once").code == 0


@pytest.mark.parametrize("verb", ["once", "watch"])
def test_an_outbox_that_is_a_file_is_4(home: Home, pipeline: Pipeline, verb: str) -> None:
    home.outbox.write_text("not a folder")
    ended = pipeline(verb)
    assert ended.code == 4
    assert ended.err == f"the outbox {home.outbox} (folders.outbox) can't be used: it is not a folder\n"


def test_folders_in_one_another_are_4(home: Home, pipeline: Pipeline) -> None:
    home.configure(folders={"outbox": "inbox/results"})
    assert pipeline("once").code == 4


def test_nothing_to_do_is_0(pipeline: Pipeline) -> None:
    ended = pipeline("once")
    assert (ended.code, "0 done, 0 failed" in ended.out) == (0, True)


# -- reports ---------------------------------------------------------------------------------------


def test_status_before_the_first_run_has_the_same_keys_as_after(home: Home, pipeline: Pipeline) -> None:
    before = json.loads(pipeline("status", "--json").out)
    assert not (home.folder / "state").exists()  # `status` creates nothing
    write_music(home.inbox / "song.wav")
    pipeline("once")
    after = json.loads(pipeline("status", "--json").out)

    assert before["tracks"] == {"queued": 0, "running": 0, "done": 0, "failed": 0}
    assert after["tracks"] == {"queued": 0, "running": 0, "done": 1, "failed": 0}
    assert before.keys() == after.keys()


def test_status_shows_failures(processed: Home, pipeline: Pipeline) -> None:
    facts = json.loads(pipeline("status", "--json").out)

    assert facts["tracks"] == {"queued": 0, "running": 0, "done": 1, "failed": 1}
    [failure] = facts["failures"]
    assert failure.items() >= {"track": "letter.mp3", "stage": "normalize", "attempts": 1}.items()
    assert failure["path"] == str(processed.inbox / "failed" / "letter.mp3")
    text = pipeline("status").out
    assert "0 queued, 0 running, 1 done, 1 failed" in text
    assert f"letter.mp3 in normalize after 1 attempt: {failure['error']}" in text


@pytest.mark.parametrize(("wait_s", "is_waiting"), [(60.0, True), (1e8, False)])
def test_status_says_what_is_waited_for_but_for_waits_of_a_clock_that_was_set_back(
    processed: Home, pipeline: Pipeline, wait_s: float, is_waiting: bool
) -> None:
    with closing(Store(processed.folder / "state" / "pipeline.db")) as store:
        [song] = store.tracks(TrackState.DONE)
        store.requeue(song.sha256, now=time.time())
        store.claim([song])
        store.release(song.sha256, not_before=time.time() + wait_s)
    facts = json.loads(pipeline("status", "--json").out)
    assert [one["track"] for one in facts["waiting"]] == ["song.wav"] * is_waiting
    assert facts["queue"] == ["song.wav"]
    assert ("waiting until" in pipeline("status").out) == is_waiting


def test_status_knows_whether_an_instance_is_running(processed: Home, pipeline: Pipeline) -> None:
    assert "no instance is running" in pipeline("status").out
    with (processed.folder / "state" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert json.loads(pipeline("status", "--json").out)["instance"] is True


def test_once_says_how_many_files_wait_for_their_marker(home: Home, pipeline: Pipeline) -> None:
    home.configure(intake={"settle_s": 0, "marker": ".done"})
    write_music(home.inbox / "song.wav")
    assert "0 done, 0 failed, 1 have no marker file yet" in pipeline("once").out


def test_plan_says_what_once_would_do_and_does_nothing(home: Home, pipeline: Pipeline) -> None:
    assert "nothing to do" in pipeline("plan").out
    write_music(home.inbox / "song.wav")

    ended = pipeline("plan")

    assert ended.code == 0
    assert "generate: remix (named in the configuration)" in ended.out
    assert "each track: 2 variations\n  01-near.wav: " in ended.out
    assert "no estimate of the time, as remix has made nothing here yet" in ended.out
    assert "song.wav: new" in ended.out
    assert [path.name for path in home.inbox.iterdir()] == ["song.wav"]
    assert not (home.folder / "state").exists()


def test_plan_knows_what_is_done_and_what_a_change_makes_new(
    home: Home, pipeline: Pipeline, tmp_path: Path
) -> None:
    folder = write_music(tmp_path / "music" / "song.wav").parent
    pipeline("once", folder)

    out = pipeline("plan", folder).out
    assert "song.wav: up to date" in out and "nothing to do" in out
    home.configure(NEAR, {**FAR, "temperature": 1.5})
    assert "song.wav: the configuration has changed: 1 variations" in pipeline("plan", folder).out


def test_plan_counts_results_of_an_earlier_configuration_that_another_one_has_replaced(
    home: Home, pipeline: Pipeline, tmp_path: Path
) -> None:
    folder = write_music(tmp_path / "music" / "song.wav").parent
    pipeline("once", folder)
    home.configure(NEAR, {**FAR, "temperature": 1.5})
    pipeline("once", folder)

    home.configure(NEAR, FAR)
    out = pipeline("plan", folder).out
    assert "song.wav: the configuration has changed: 1 variations, embed-variations" in out
    assert "to do: variations: 1, tracks: 1" in out


def test_plan_shows_what_a_sweep_expands_to_and_estimates_the_time_from_earlier_work(
    home: Home, pipeline: Pipeline
) -> None:
    write_music(home.inbox / "song.wav")
    pipeline("once")
    with closing(Store(home.folder / "state" / "pipeline.db")) as store:
        [song] = store.tracks(TrackState.DONE)
        for stage, made in [("normalize", {}), ("generate", {"engine": "remix", "duration_s": 4.0})]:
            store.finish_unit(stage, sha256=song.sha256, stage=stage, result=made, seconds=1e6, now=0.0)
    write_music(home.inbox / "new.wav", seed=1)
    sweep = {"similarity": [0.9, 0.4], "duration_s": [3.0, 5.0]}
    home.configure({"name": "a", **sweep, "transpose": -2, "speed": 1.1})

    out = pipeline("plan").out

    assert "each track: 4 variations" in out
    assert re.search(r"  0\d-a.wav: 5 s, similarity 0.9, transpose -2, speed 1.1, temperature", out)
    assert re.search(r"variations: 4, tracks: 1, time: about \d+\.\d h, by what such work took here", out)


def test_once_and_show_say_which_variations_fail_their_gates(home: Home, pipeline: Pipeline) -> None:
    write_music(home.inbox / "song.wav")
    home.configure(gates={"similarity": [0.0, 0.01], "retries": 0})
    assert "1 done, 0 failed, 2 variations fail their gates (see `show`)" in pipeline("once").out
    text = pipeline("show", "song.wav").out
    assert text.count(" s, fails its gates: its similarity to the source is ") == 2
    assert pipeline("once").out.startswith("0 done, 0 failed; ")
    (home.inbox / "done" / "song.wav").rename(home.inbox / "song.wav")
    home.configure()
    assert "1 done, 0 failed; " in pipeline("once").out
    assert "fails" not in pipeline("show", "song.wav").out


def test_plan_divides_the_time_among_as_many_workers_as_ran_last(home: Home, pipeline: Pipeline) -> None:
    write_music(home.inbox / "song.wav")
    pipeline("once")
    with closing(Store(home.folder / "state" / "pipeline.db")) as store:
        [song] = store.tracks(TrackState.DONE)
        made = {"engine": "remix", "duration_s": 4.0}
        store.finish_unit("x", sha256=song.sha256, stage="generate", result=made, seconds=1e6, now=0.0)
    for seed in (1, 2):
        write_music(home.inbox / f"{seed}.wav", seed=seed)

    hours = []
    for n_workers in (1, 2):
        Health(home.folder / "state" / "health.json").note(workers=[{"makes": True}] * n_workers)
        hours.append(float(re.search(r"about (\d+\.\d) h", pipeline("plan").out)[1]))  # type: ignore[index]
    assert hours[1] == pytest.approx(hours[0] / 2, rel=0.01)


def test_plan_names_the_conflict_copies_of_sync_tools(home: Home, pipeline: Pipeline) -> None:
    write_music(home.inbox / "song (conflicted copy 2024-01-01).wav", seed=1)
    write_music(home.inbox / "song.wav")
    planned = {line.split(": ")[0]: line for line in pipeline("plan").out.splitlines()}
    assert "a track of its own" in planned["song (conflicted copy 2024-01-01).wav"]
    assert "a track of its own" not in planned["song.wav"]


def test_show_has_everything_about_one_track_by_name_or_hash(processed: Home, pipeline: Pipeline) -> None:
    sha256 = processed.manifest()["source"]["sha256"]
    facts = json.loads(pipeline("show", sha256[:8], "--json").out)

    assert facts == json.loads(pipeline("show", "song.wav", "--json").out)
    assert (facts["track"], facts["sha256"], facts["state"]) == ("song.wav", sha256, "done")
    stages = ["embed", "embed-variations", "generate", "generate", "normalize"]
    assert sorted(unit["stage"] for unit in facts["units"]) == stages
    assert [one["outcome"] for one in facts["attempts"]] == ["done"] * 4
    assert facts["files"] == [{"file": "song.wav", "state": "settled"}]
    text = pipeline("show", "letter.mp3").out
    assert "letter.mp3" in text.splitlines()[0]
    assert "failed" in text.splitlines()[0]
    assert re.search(r"normalize .* failed, process \d+: ", text)


def test_status_and_plan_import_nothing_heavy(processed: Home) -> None:
    heavy = ["torch", "librosa", "scipy", "numba", "transformers", "torchaudio", "numpy", "av", "soundfile"]
    heavy += ["soxr", "pyloudnorm", "sqlite_utils", "rich", "watchdog", "huggingface_hub"]
    code = f"""if True:
        import sys
        from pipeline.cli import main
        for verb in ("status", "plan"):
            sys.argv = ["run_pipeline.py", *{processed.arguments()!r}, verb]
            assert main() == 0
        sys.exit(" ".join(set({heavy!r}) & set(sys.modules)))
    """
    processed.configure(embed={"engine": "auto"}, generate={"engine": "auto"})
    write_music(processed.inbox / "new.wav")
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.stderr.strip() == ""
    assert "1 done, 1 failed" in ended.stdout
    assert "new.wav: new" in ended.stdout


def test_plan_says_that_a_result_which_was_deleted_is_made_again(processed: Home, pipeline: Pipeline) -> None:
    assert "made again" not in pipeline("plan").out
    [folder] = processed.folders
    shutil.rmtree(folder)
    assert [line for line in pipeline("plan").out.splitlines() if line.endswith("made again")] == [
        f"{folder.name}: manifest.json is missing or damaged: made again"
    ]
    processed.configure(retention={"redo_missing": False})
    assert "made again" not in pipeline("plan").out


def test_a_part_of_the_name_is_enough_for_show_and_retry(processed: Home, pipeline: Pipeline) -> None:
    assert pipeline("show", "SON").out.startswith("song.wav (")
    assert pipeline("retry", "lett").out == "letter.mp3: queued again\n"
    ended = pipeline("requeue", ".")
    assert ended.code == 2
    assert "song.wav (" in ended.err and "letter.mp3 (" in ended.err


# -- retry and requeue -----------------------------------------------------------------------------


def test_a_failed_track_is_done_after_its_cause_is_corrected_and_a_retry(
    home: Home, pipeline: Pipeline
) -> None:
    home.configure(normalize={"sample_rate": 22050, "max_duration_s": 2.0})
    write_music(home.inbox / "song.wav")
    assert pipeline("once").code == 1
    assert "2" in (home.inbox / "failed" / "song.wav.error.txt").read_text()

    home.configure()
    assert pipeline("retry").out == "song.wav: queued again\n"
    assert pipeline("plan").out.count("song.wav: queued") == 1
    assert pipeline("once").code == 0

    assert sorted(str(p.relative_to(home.inbox)) for p in home.inbox.rglob("*") if p.is_file()) == [
        "done/song.wav"
    ]
    assert pipeline("retry").out == "nothing has failed\n"


def test_a_source_removed_after_the_requeue_fails_the_track_and_its_results_stay(
    processed: Home, pipeline: Pipeline
) -> None:
    before = contents(processed.outbox)
    pipeline("requeue", "song.wav", "--stage", "generate")
    (processed.inbox / "done" / "song.wav").unlink()
    ended = pipeline("once")
    assert (ended.code, "put it in the inbox again" in ended.err) == (1, True)

    assert "song.wav: queued again" in pipeline("retry").out

    assert contents(processed.outbox) == before
    assert pipeline("show", "song.wav").code == 0


def test_retry_leaves_what_has_not_failed(processed: Home, pipeline: Pipeline) -> None:
    assert pipeline("retry", "song.wav").out == "song.wav: is done, not failed\n"
    assert pipeline("retry", "song.wav", "letter.mp3").out.endswith("letter.mp3: queued again\n")
    assert json.loads(pipeline("status", "--json").out)["tracks"]["queued"] == 1


def test_retry_says_that_a_source_is_gone(processed: Home, pipeline: Pipeline) -> None:
    (processed.inbox / "failed" / "letter.mp3").unlink()
    gone = "letter.mp3: queued again; its source is gone: put it in the inbox first\n"
    assert pipeline("retry").out == gone


def test_requeue_of_a_stage_repeats_that_stage_alone_with_the_same_bytes(
    processed: Home, pipeline: Pipeline
) -> None:
    [folder] = [path for path in processed.folders if path.name.startswith("song--")]
    before, files = processed.finished_at("embed", "generate"), contents(folder)
    [embedded] = processed.finished_at("embed")

    assert pipeline("requeue", "song.wav", "--stage", "generate").out == "song.wav: queued again\n"
    pipeline("once")

    after = processed.finished_at("embed", "generate")
    assert after.keys() == before.keys()
    assert {key for key in after if after[key] == before[key]} == {embedded}
    assert contents(folder) == files
    assert (folder / "manifest.json").exists()


# -- doctor and models -----------------------------------------------------------------------------


@pytest.mark.long  # starts a cluster
@NEEDS_RAY
def test_doctor_shows_the_nodes_of_the_ray_cluster(home: Home, pipeline: Pipeline) -> None:
    home.configure(executor={"kind": "ray", "resources_per_worker": {"cpu": 0.5}})
    ended = pipeline("doctor")
    assert ended.code == 0, ended.out
    [node] = [line for line in ended.out.splitlines() if "ray node 127.0.0.1" in line]
    assert f"instrumental-variations {pipeline_package.__version__}, numpy {numpy.__version__}" in node
    assert "with 0.5 CPUs each (cluster: auto)" in ended.out


def test_requeue_of_a_track_without_its_source_is_refused(processed: Home, pipeline: Pipeline) -> None:
    (processed.inbox / "done" / "song.wav").unlink()
    for words in (["requeue", "song.wav"], ["requeue", "song.wav", "--stage", "generate"]):
        ended = pipeline(*words)
        assert (ended.code, ended.out) == (1, "")
        assert ended.err == "song.wav: its source is gone: put it in the inbox first\n"
    assert "1 done" in pipeline("status").out


def test_doctor_finds_an_altered_file_and_requeue_repairs_it(processed: Home, pipeline: Pipeline) -> None:
    [folder] = [path for path in processed.folders if path.name.startswith("song--")]
    wav = folder / "variations" / "01-near.wav"
    healthy, before = pipeline("doctor"), sha256_of(wav)
    assert "ok    outbox: all results are as recorded" in healthy.out
    assert "ok    database: intact" in healthy.out

    data = bytearray(wav.read_bytes())
    data[-100] ^= 1
    wav.write_bytes(data)
    ended = pipeline("doctor")
    assert ended.code == 1
    assert f"bad   {folder.name}: variations/01-near.wav is altered" in ended.out

    pipeline("requeue", "song.wav")
    pipeline("once")
    assert "ok    outbox: all results are as recorded" in pipeline("doctor").out
    assert sha256_of(wav) == before


def test_doctor_repairs_on_request_what_is_missing_or_altered(processed: Home, pipeline: Pipeline) -> None:
    [folder] = [path for path in processed.folders if path.name.startswith("song--")]
    before = contents(folder)
    (folder / "variations" / "01-near.wav").unlink()
    (folder / "variations" / ".02-far.wav.part").write_bytes(b"torn")
    assert pipeline("doctor").code == 1

    repaired = pipeline("doctor", "--repair")
    pipeline("once")

    assert "queued again" in repaired.out
    assert pipeline("doctor").code == 0
    assert contents(folder) == before


@pytest.mark.parametrize("arguments", [(), ("--repair",)])
def test_doctor_takes_no_result_for_lost_while_the_disk_of_the_outbox_is_away(
    processed: Home, pipeline: Pipeline, arguments: tuple[str, ...]
) -> None:
    shutil.rmtree(processed.outbox)
    processed.outbox.mkdir()
    with closing(Store(processed.folder / "state" / "pipeline.db")) as store:
        store.set_fact("outbox mount", str(processed.outbox))
    said = pipeline("doctor", *arguments)
    assert "isn't mounted now" in said.out
    assert "missing" not in said.out
    assert "1 done, 1 failed" in pipeline("status").out


@pytest.mark.parametrize("arguments", [("plan",), ("rebuild",), ("reproduce", "--all")])
def test_no_verb_takes_the_outbox_for_empty_while_its_disk_is_away(
    processed: Home, pipeline: Pipeline, arguments: tuple[str, ...]
) -> None:
    with closing(Store(processed.folder / "state" / "pipeline.db")) as store:
        store.set_fact("outbox mount", str(processed.outbox))
    shutil.rmtree(processed.outbox)
    said = pipeline(*arguments)
    assert said.code == 4
    assert "isn't mounted now" in said.err


def test_while_doctor_repairs_status_shows_no_report_of_an_earlier_instance(
    processed: Home, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(app: App, *, repair: bool) -> list[Check]:
        seen.append(status_facts(app))
        return []

    earlier = Health(processed.folder / "state" / "health.json")
    earlier.note(mode="polling")
    earlier.degraded("disk", "1 MB is free")
    monkeypatch.setattr("pipeline.cli.doctor.run_checks", look)

    assert pipeline("doctor", "--repair").code == 0
    assert [(facts["instance"], facts["mode"], facts["degraded"]) for facts in seen] == [(True, None, [])]


def test_doctor_shows_the_engines_that_the_workers_of_a_running_instance_have_loaded(
    home: Home, pipeline: Pipeline
) -> None:
    workspace = App.open(home.folder, None).workspace
    workspace.prepare()
    musicgen = {"where": "node 10.0.0.4, GPU 0", "loaded": ["clap (laion/clap)", "musicgen (a/b)"]}
    with workspace.locked():
        Health(workspace.health).note(workers=[musicgen, {"where": "process 2", "loaded": []}])
        while_it_runs = pipeline("doctor").out
    assert "worker (node 10.0.0.4, GPU 0): has clap (laion/clap), musicgen (a/b) loaded" in while_it_runs
    assert "ok    worker (process 2): has no engine loaded" in while_it_runs
    assert "worker (" not in pipeline("doctor").out


def test_status_says_what_each_worker_does(home: Home) -> None:
    facts = status_facts(App.open(home.folder, None))
    busy = {
        "where": "process 1",
        "track": "a.mp3",
        "stage": "generate",
        "engine": "remix",
        "steps_per_s": 9.5,
    }
    idle = {"where": "process 2", "track": None, "stage": None, "engine": None, "steps_per_s": None}
    assert status_text({**facts, "workers": [busy, idle]}).splitlines()[2:] == [
        "worker (process 1): a.mp3: generate by remix, 9.5 steps/s",
        "worker (process 2): has nothing to do",
    ]


def test_a_missing_result_is_made_again_at_the_next_start(processed: Home, pipeline: Pipeline) -> None:
    [folder] = [path for path in processed.folders if path.name.startswith("song--")]
    before = contents(folder)
    (folder / "embedding.npz").unlink()

    pipeline("once")

    assert contents(folder) == before


def test_gc_says_what_it_would_remove_and_removes_just_that(home: Home, pipeline: Pipeline) -> None:
    home.configure(retention={"outbox_days": 0, "archive_days": 0})
    write_music(home.inbox / "song.wav")
    pipeline("once")
    (home.outbox / "notes.txt").write_text("mine")
    before = contents(home.folder)

    said = pipeline("gc", "--dry-run")
    assert (
        contents(home.folder).items()
        >= {k: v for k, v in before.items() if not k.startswith("state")}.items()
    )
    did = pipeline("gc")

    assert "would be removed" in said.out and said.out.count("outbox:") == did.out.count("outbox:") == 1
    assert [path.name for path in home.outbox.iterdir()] == ["notes.txt"]
    assert not (home.inbox / "done" / "song.wav").exists()
    assert pipeline("once").out.startswith("0 done")  # what was removed on purpose is not made again


def test_with_a_damaged_database_nothing_is_processed_and_doctor_says_what_to_do(
    processed: Home, pipeline: Pipeline
) -> None:
    write_music(processed.inbox / "new.wav", seed=7)
    (processed.folder / "state" / "pipeline.db").write_bytes(b"this is no database " * 1000)

    for command in ("once", "status"):
        ran = pipeline(command)
        assert (ran.code, ran.err.count("\n")) == (4, 1)
        assert "pipeline.db is damaged" in ran.err
    doctor = pipeline("doctor")
    assert doctor.code == 1
    assert "bad   database: the database" in doctor.out
    assert "ok    decoders" in doctor.out
    assert (processed.inbox / "new.wav").exists()


@pytest.mark.parametrize("size", [4096, 200])  # the first page alone, and less than a page
def test_doctor_names_a_damaged_database_and_checks_the_rest(
    processed: Home, pipeline: Pipeline, size: int
) -> None:
    database = processed.folder / "state" / "pipeline.db"
    database.write_bytes(b"not a database" * 1000 if size == 200 else database.read_bytes()[:size])

    ended = pipeline("doctor")

    assert (ended.code, ended.err) == (1, "")
    [line] = [line for line in ended.out.splitlines() if line.startswith("bad")]
    assert line.startswith(f"bad   database: the database {database} is damaged (")
    assert "move it away" in line
    assert "ok    generate uses: remix" in ended.out


def test_doctor_names_a_database_that_lacks_a_table(processed: Home, pipeline: Pipeline) -> None:
    with closing(sqlite3.connect(processed.folder / "state" / "pipeline.db")) as database:
        database.execute("DROP TABLE units")
    ended = pipeline("doctor")
    assert (ended.code, ended.err) == (1, "")
    assert "bad   database: the database can't be used: no such table: units" in ended.out


def test_doctor_goes_on_after_a_check_that_failed(home: Home, pipeline: Pipeline) -> None:
    home.outbox.write_text("not a folder")
    ended = pipeline("doctor")
    assert ended.code == 1
    assert f"bad   folders: the outbox {home.outbox}" in ended.out
    assert "ok    generate uses: remix" in ended.out
    assert "ok    database: not created yet" in ended.out


def test_doctor_names_a_decoder_that_cannot_be_imported(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    ended = pipeline("doctor")
    assert ended.code == 1
    assert "bad   decoders: a package can't be imported: import of soundfile" in ended.out
    assert "ok    database: not created yet" in ended.out


def test_doctor_says_which_engines_are_used_and_why(pipeline: Pipeline) -> None:
    lines = pipeline("doctor").out.splitlines()
    assert "ok    generate uses: remix: named in the configuration" in lines
    assert "ok    embed uses: descriptors: named in the configuration" in lines
    assert any(line.startswith("ok    decoders: FFmpeg") for line in lines)


def test_models_says_which_models_are_missing_and_how_to_get_them(
    home: Home, pipeline: Pipeline, hub_cache: Path
) -> None:
    home.configure(generate={"engine": "auto"})

    listed, path = pipeline("models", "list"), pipeline("models", "path", "facebook/musicgen-melody")

    assert listed.code == 0, listed.err
    assert listed.out.startswith("facebook/musicgen-melody: not on this machine; ")
    assert (path.code, path.out) == (1, "")
    assert "models fetch facebook/musicgen-melody" in path.err


# -- the daemon ------------------------------------------------------------------------------------


def test_watch_takes_what_arrives_and_ends_with_0_when_asked_to_stop(home: Home) -> None:
    command = [sys.executable, str(ROOT / "run_pipeline.py"), *home.arguments("watch")]
    with (home.folder / "said").open("w") as said:
        child = subprocess.Popen(command, stderr=said, stdout=said)
    try:
        wait_for(lambda: "watching" in (home.folder / "said").read_text())
        staged = write_music(home.folder / "song.wav")
        staged.replace(home.inbox / "song.wav")
        wait_for((home.inbox / "done" / "song.wav").exists)
        child.send_signal(signal.SIGTERM)
        assert child.wait(TIMEOUT_S) == 0
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    assert len(home.manifest()["variations"]) == 2
    assert "Traceback" not in (home.folder / "said").read_text()


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


# -- the home --------------------------------------------------------------------------------------


@pytest.fixture
def variations(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isolated: None
) -> Pipeline:
    """The installed command, without a home of its own."""

    def run_it(*words: str | Path) -> RunResult:
        monkeypatch.setattr(sys, "argv", ["variations", *map(str, words)])
        capsys.readouterr()
        code = main()
        return RunResult(code, *capsys.readouterr())

    return run_it


def test_a_home_from_the_environment_is_used(
    processed: Home, variations: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(processed.folder))
    assert json.loads(variations("status", "--json").out)["tracks"]["done"] == 1


def test_without_a_name_the_current_folder_is_the_home(
    home: Home, variations: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home.folder)
    assert "nothing to do" in variations("plan").out
    monkeypatch.chdir(home.inbox)
    ended = variations("plan")
    assert ended.code == 2
    assert ended.err.endswith(f"make one with `variations init {home.inbox}`\n")


@pytest.mark.parametrize(
    ("verb", "there", "problem"),
    [
        ("once", "absent", "does not exist"),
        ("watch", "empty", "is not a home"),
        ("plan", "file", "is not a folder"),
        ("status", "absent", "does not exist"),
        ("doctor", "empty", "is not a home"),
        ("retry", "absent", "does not exist"),
    ],
)
def test_a_mistyped_home_is_refused_and_nothing_is_made(
    variations: Pipeline, tmp_path: Path, verb: str, there: str, problem: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))

    ended = variations("--home", tmp_path / there, verb)

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"{tmp_path / there} {problem}")
    assert f"`variations init {tmp_path / there}`" in ended.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_configuration_does_not_make_up_for_a_home_that_is_not_there(
    home: Home, variations: Pipeline, tmp_path: Path
) -> None:
    ended = variations("--home", tmp_path / "hoem", "--config", home.folder / "settings.yaml", "once")
    assert (ended.code, (tmp_path / "hoem").exists()) == (2, False)


def test_init_makes_a_home_that_works_and_never_touches_one(variations: Pipeline, tmp_path: Path) -> None:
    made = variations("init", tmp_path / "music" / "new")
    home = tmp_path / "music" / "new"
    assert (made.code, made.err) == (0, "")
    assert f"variations --home {home} once" in made.out
    assert sorted(path.name for path in home.iterdir()) == ["config", "inbox", "outbox", "state"]
    assert load_config(home / "config" / "default.yaml", env={}) == load_config(None, env={})
    assert variations("--home", home, "plan").code == 0
    for preset in (home / "config" / "presets").iterdir():
        assert variations("--home", home, "--preset", preset.stem, "plan").code == 0

    (home / "config" / "default.yaml").write_text("device: cpu\n")
    again = variations("init", home)
    assert (again.code, "is a home already" in again.err) == (2, True)
    assert (home / "config" / "default.yaml").read_text() == "device: cpu\n"


def test_a_preset_wins_over_the_configuration_of_its_home(home: Home, pipeline: Pipeline) -> None:
    home.configure(generate={"duration_s": 3.0}, output={"bit_depth": 16})
    presets = home.folder / "config" / "presets"
    presets.mkdir(parents=True)
    (presets / "mine.yaml").write_text("generate: {variations: [{name: x, similarity: 0.5}]}")
    write_music(home.inbox / "song.wav")

    assert pipeline("--preset", "mine", "once").code == 0

    [made] = home.manifest()["variations"]
    assert (made["name"], made["duration_s"], made["similarity"]) == ("x", 3.0, 0.5)
    missing = pipeline("--preset", "yours", "plan")
    assert (missing.code, "there is no preset yours: there are ambient-bed, " in missing.err) == (2, True)


def test_the_version_is_the_packages_own(variations: Pipeline) -> None:
    assert variations("--version").out == f"{pipeline_package.__version__}\n"


def test_completion_is_for_the_name_that_the_program_was_started_by(
    variations: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_VARIATIONS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "variations sta")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        variations()
    assert capsys.readouterr().out == "status\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show"], "TRACK <str> Part of a track's name, or the start of its hash."),
        (["retry"], "Parts of names, or the starts of hashes; default: all that failed."),
        (["models", "fetch"], "Hub ids; default: the models that the configuration can use."),
        (["models", "path"], "MODEL <str> The hub id."),
    ],
)
def test_the_help_of_a_command_says_what_its_argument_is(
    pipeline: Pipeline, words: list[str], says: str
) -> None:
    assert says in " ".join(pipeline(*words, "--help").out.split())
