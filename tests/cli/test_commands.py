"""The command line: what each verb says and does, and the exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from home_folder import FAR, NEAR, ROOT, Home, Ran, contents, run, sha256_of, write_music

from pipeline.engines.musicgen import shm

Pipeline = Callable[..., Ran]
PATIENCE_S = 60.0  # for a child that is at work; ends a test that would hang


@pytest.fixture
def pipeline(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quiet: None
) -> Pipeline:
    return lambda *words: run(capsys, monkeypatch, home, *words)


@pytest.fixture
def worked(home: Home, pipeline: Pipeline) -> Home:
    """A home with one track done and one failed."""
    write_music(home.inbox / "song.wav")
    (home.inbox / "letter.mp3").write_text("Dear all, this is not music.\n" * 20)
    assert pipeline("once").code == 1
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
        (["requeue", "nothing", "--stage", "master"], "normalize, embed, generate"),
    ],
)
def test_bad_usage_is_2_and_says_what_is_wrong(pipeline: Pipeline, words: list[str], says: str) -> None:
    ended = pipeline(*words)
    assert (ended.code, ended.out) == (2, "")
    assert says in ended.err


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
def test_demucs_asked_for_and_not_here_is_2_before_any_work(
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


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not in the core install")
def test_weights_of_demucs_are_looked_for_without_importing_anything(home: Home) -> None:
    """An empty package by that name: nothing of it is needed to find that its weights aren't here."""
    packages = home.folder / "packages"
    (packages / "demucs").mkdir(parents=True)
    (packages / "demucs" / "__init__.py").write_text("raise SystemError")
    home.configure(generate={"engine": "musicgen", "variations": [{"name": "clean", "melody": "demucs"}]})
    places = {name: str(home.folder / name) for name in ("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE")}

    ended = home.in_child("plan", env={**places, "PYTHONPATH": str(packages)})
    doctor = home.in_child("doctor", env={**places, "PYTHONPATH": str(packages)})

    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert "hf download adefossez/HTDemucs" in ended.err
    said = doctor.out.splitlines()
    assert any("generate uses: musicgen" in line for line in said)
    assert any(line.startswith("bad") and "hf download" in line for line in said)
    assert any("database" in line for line in said)


def test_what_a_killed_run_left_in_memory_is_told_and_removed_once_nobody_goes_on_with_it(
    home: Home, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "ROOT", tmp_path)
    write_music(home.inbox / "song.wav")
    left = shm.folder_of(home.folder / "state" / "engines" / "musicgen")
    left.mkdir(mode=0o700)
    (left / "row-keys").write_bytes(bytes(2_000_000))
    assert f"{left} has 2 MB of a killed run" in " ".join(pipeline("doctor").out.split())
    handle = os.open(left, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # a run has it
    assert "killed run" not in pipeline("doctor").out
    assert pipeline("once").code == 0
    assert left.exists()
    os.close(handle)
    assert pipeline("once").code == 0
    assert not left.exists()
    assert "killed run" not in pipeline("doctor").out


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
    assert str(home.outbox) in ended.err


def test_folders_in_one_another_are_4(home: Home, pipeline: Pipeline) -> None:
    home.configure(folders={"outbox": "inbox/results"})
    assert pipeline("once").code == 4


def test_nothing_to_do_is_0(pipeline: Pipeline) -> None:
    ended = pipeline("once")
    assert (ended.code, "0 done, 0 failed" in ended.out) == (0, True)


# -- questions -------------------------------------------------------------------------------------


def test_status_before_the_first_run_has_the_same_keys_as_after(home: Home, pipeline: Pipeline) -> None:
    before = json.loads(pipeline("status", "--json").out)
    assert not (home.folder / "state").exists()  # asking makes nothing
    write_music(home.inbox / "song.wav")
    pipeline("once")
    after = json.loads(pipeline("status", "--json").out)

    assert before["tracks"] == {"queued": 0, "running": 0, "done": 0, "failed": 0}
    assert after["tracks"] == {"queued": 0, "running": 0, "done": 1, "failed": 0}
    assert before.keys() == after.keys()


def test_status_tells_of_failures(worked: Home, pipeline: Pipeline) -> None:
    facts = json.loads(pipeline("status", "--json").out)

    assert facts["tracks"] == {"queued": 0, "running": 0, "done": 1, "failed": 1}
    [failure] = facts["failures"]
    assert failure.items() >= {"track": "letter.mp3", "stage": "normalize", "attempts": 1}.items()
    assert failure["path"] == str(worked.inbox / "failed" / "letter.mp3")
    text = pipeline("status").out
    assert "0 queued, 0 running, 1 done, 1 failed" in text
    assert f"letter.mp3 in normalize after 1 attempts: {failure['error']}" in text


def test_status_knows_whether_an_instance_is_at_work(worked: Home, pipeline: Pipeline) -> None:
    assert "no instance is running" in pipeline("status").out
    with (worked.folder / "state" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert json.loads(pipeline("status", "--json").out)["instance"] is True


def test_plan_says_what_once_would_do_and_does_nothing(home: Home, pipeline: Pipeline) -> None:
    assert "nothing to do" in pipeline("plan").out
    write_music(home.inbox / "song.wav")

    ended = pipeline("plan")

    assert ended.code == 0
    assert "generate: remix (named in the configuration)" in ended.out
    assert "each track: 2 variations: 01-near.wav, 02-far.wav" in ended.out
    assert "song.wav: new" in ended.out
    assert [path.name for path in home.inbox.iterdir()] == ["song.wav"]
    assert not (home.folder / "state").exists()


def test_plan_knows_what_is_done_and_what_a_change_makes_new(
    home: Home, pipeline: Pipeline, tmp_path: Path
) -> None:
    folder = write_music(tmp_path / "music" / "song.wav").parent
    pipeline("once", folder)

    assert "song.wav: up to date" in pipeline("plan", folder).out
    home.configure(NEAR, {**FAR, "temperature": 1.5})
    assert "song.wav: the configuration has changed: 1 variations" in pipeline("plan", folder).out


def test_show_tells_all_of_one_track_by_name_or_hash(worked: Home, pipeline: Pipeline) -> None:
    sha256 = worked.manifest()["source"]["sha256"]
    facts = json.loads(pipeline("show", sha256[:8], "--json").out)

    assert facts == json.loads(pipeline("show", "song.wav", "--json").out)
    assert (facts["track"], facts["sha256"], facts["state"]) == ("song.wav", sha256, "done")
    assert sorted(unit["stage"] for unit in facts["units"]) == ["embed", "generate", "generate", "normalize"]
    assert [one["outcome"] for one in facts["attempts"]] == ["done"] * 3
    assert facts["files"] == [{"file": "song.wav", "state": "settled"}]
    text = pipeline("show", "letter.mp3").out
    assert "letter.mp3" in text.splitlines()[0]
    assert "failed" in text.splitlines()[0]
    assert "normalize failed: " in text


@pytest.mark.parametrize("verb", ["status", "plan"])
def test_questions_are_answered_without_the_heavy_packages(home: Home, verb: str) -> None:
    home.configure(embed={"engine": "auto"}, generate={"engine": "auto"})
    write_music(home.inbox / "song.wav")
    code = (
        "import sys; from pathlib import Path; from pipeline.cli.commands import main; main(Path('.'));"
        "heavy = {'torch', 'librosa', 'scipy', 'numba', 'transformers', 'torchaudio'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *home.arguments(verb)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout


# -- again -----------------------------------------------------------------------------------------


def test_retry_takes_failed_tracks_again_and_a_mended_cause_lets_them_pass(
    home: Home, pipeline: Pipeline
) -> None:
    home.configure(normalize={"sample_rate": 22050, "max_duration_s": 2.0})
    write_music(home.inbox / "song.wav")
    assert pipeline("once").code == 1
    assert "2" in (home.inbox / "failed" / "song.wav.error.txt").read_text()

    home.configure()
    assert pipeline("retry").out == "song.wav: queued again\n"
    assert "song.wav: queued" in pipeline("plan").out
    assert pipeline("once").code == 0

    assert sorted(str(p.relative_to(home.inbox)) for p in home.inbox.rglob("*") if p.is_file()) == [
        "done/song.wav"
    ]
    assert pipeline("retry").out == "nothing has failed\n"


def test_retry_of_a_track_without_its_source_forgets_nothing_of_it(home: Home, pipeline: Pipeline) -> None:
    home.configure(intake={"settle_s": 0, "after": "delete"})
    write_music(home.inbox / "song.wav")
    pipeline("once")
    pipeline("requeue", "song.wav", "--stage", "generate")
    assert pipeline("once").code == 1  # the source was deleted, as asked

    assert "song.wav: queued again" in pipeline("retry").out

    assert pipeline("show", "song.wav").code == 0


def test_retry_leaves_what_has_not_failed(worked: Home, pipeline: Pipeline) -> None:
    assert pipeline("retry", "song.wav").out == "song.wav: is done, not failed\n"
    assert pipeline("retry", "song.wav", "letter.mp3").out.endswith("letter.mp3: queued again\n")
    assert json.loads(pipeline("status", "--json").out)["tracks"]["queued"] == 1


def test_requeue_of_a_stage_makes_it_again_alone_with_the_same_bytes(
    worked: Home, pipeline: Pipeline
) -> None:
    [folder] = [path for path in worked.folders if path.name.startswith("song--")]
    before, files = worked.finished_at("embed", "generate"), contents(folder)
    [embedded] = worked.finished_at("embed")

    assert pipeline("requeue", "song.wav", "--stage", "generate").out == "song.wav: queued again\n"
    pipeline("once")

    after = worked.finished_at("embed", "generate")
    assert after.keys() == before.keys()
    assert {key for key in after if after[key] == before[key]} == {embedded}
    assert contents(folder) == files
    assert (folder / "manifest.json").exists()


# -- doctor and models -----------------------------------------------------------------------------


def test_doctor_finds_an_altered_file_and_requeue_mends_it(worked: Home, pipeline: Pipeline) -> None:
    [folder] = [path for path in worked.folders if path.name.startswith("song--")]
    wav = folder / "variations" / "01-near.wav"
    sound, before = pipeline("doctor"), sha256_of(wav)
    assert "ok    outbox: all results are as recorded" in sound.out
    assert "ok    database: intact" in sound.out

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


def test_doctor_repairs_on_request_what_is_missing_or_altered(worked: Home, pipeline: Pipeline) -> None:
    [folder] = [path for path in worked.folders if path.name.startswith("song--")]
    before = contents(folder)
    (folder / "variations" / "01-near.wav").unlink()
    (folder / "variations" / ".02-far.wav.part").write_bytes(b"torn")
    assert pipeline("doctor").code == 1

    repaired = pipeline("doctor", "--repair")
    pipeline("once")

    assert "queued again" in repaired.out
    assert pipeline("doctor").code == 0
    assert contents(folder) == before


def test_a_missing_result_is_made_again_at_the_next_start(worked: Home, pipeline: Pipeline) -> None:
    [folder] = [path for path in worked.folders if path.name.startswith("song--")]
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


def test_doctor_says_which_engines_are_used_and_why(pipeline: Pipeline) -> None:
    lines = pipeline("doctor").out.splitlines()
    assert "ok    generate uses: remix: named in the configuration" in lines
    assert "ok    embed uses: descriptors: named in the configuration" in lines
    assert any(line.startswith("ok    decoders: libsndfile") for line in lines)


def test_models_says_what_is_not_here_and_how_to_get_it(home: Home) -> None:
    home.configure(generate={"engine": "auto"})
    nothing_here = {"HF_HOME": str(home.folder / "hub"), "HF_HUB_CACHE": str(home.folder / "hub" / "hub")}

    listed = home.in_child("models", "list", env=nothing_here)
    path = home.in_child("models", "path", "facebook/musicgen-melody", env=nothing_here)

    assert listed.code == 0, listed.err
    assert listed.out.startswith("facebook/musicgen-melody: not on this machine; ")
    assert (path.code, path.out) == (1, "")
    assert "models fetch facebook/musicgen-melody" in path.err


# -- the daemon ------------------------------------------------------------------------------------


def test_watch_takes_what_arrives_and_ends_with_0_when_told_to_stop(home: Home) -> None:
    command = [sys.executable, str(ROOT / "run_pipeline.py"), *home.arguments("watch")]
    with (home.folder / "said").open("w") as said:
        child = subprocess.Popen(command, stderr=said, stdout=said)
    try:
        wait_for(lambda: "watching" in (home.folder / "said").read_text())
        staged = write_music(home.folder / "song.wav")
        staged.replace(home.inbox / "song.wav")
        wait_for((home.inbox / "done" / "song.wav").exists)
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE_S) == 0
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    assert len(home.manifest()["variations"]) == 2
    assert "Traceback" not in (home.folder / "said").read_text()


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_a_home_from_the_environment_is_used(home: Home, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run_pipeline.py"), "status", "--json"]
    write_music(home.inbox / "song.wav")
    home.in_child("once")
    ended = subprocess.run(
        command, env={**os.environ, "PIPELINE_HOME": str(home.folder)}, capture_output=True, check=True
    )
    assert json.loads(ended.stdout)["tracks"]["done"] == 1


def test_a_folder_that_holds_the_outbox_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home")
    home.configure()
    ran = run(capsys, monkeypatch, home, "once", str(home.folder))
    assert ran.code == 2
    assert "lie in one another" in ran.err
