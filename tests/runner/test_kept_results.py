"""Results that a person has kept, where another configuration has no place for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from runner_setup import RunnerSetup, StubGenerator, noise, with_variation

from pipeline.outbox.outbox import Outbox
from pipeline.ratings.export import export_kept
from pipeline.records import Failure, Variation, VariationRequest
from pipeline.store.schema import Rating


def test_they_are_set_aside_and_still_exported_and_others_are_removed(
    setup: RunnerSetup, tmp_path: Path
) -> None:
    [sha256] = setup.add_tracks("a.wav")
    setup.runner().drain()
    folder = setup.workspace.outbox / setup.track(sha256).folder
    kept, dropped = setup.manifest(sha256)["variations"]
    content = (folder / kept["file"]).read_bytes()
    for record, is_kept in ((kept, True), (dropped, False)):
        rating = Rating(record["sha256"], sha256, record["file"], None, is_kept, "")
        setup.store.rate([rating], now=1.0)

    other = with_variation(setup, seed=99, count=2)
    for _ in range(2):  # the second time nothing changes
        setup.store.requeue(sha256, now=setup.now)
        other.runner().drain()
        [aside] = (folder / "kept").iterdir()
        assert aside.name == f"01-v-{kept['sha256'][:8]}.wav"
        assert aside.read_bytes() == content
        published = {record["sha256"] for record in setup.manifest(sha256)["variations"]}
        assert len(published) == 2 and not published & {kept["sha256"], dropped["sha256"]}
        assert len(list((folder / "variations").iterdir())) == 2

    outbox = Outbox(setup.workspace.outbox_files)
    (tmp_path / "daw").mkdir()
    [copy] = export_kept(setup.store, outbox, tmp_path / "daw")
    assert (copy.state, copy.file) == ("copied", "a - 01 v.wav")
    assert (tmp_path / "daw" / copy.file).read_bytes() == content


def test_one_that_is_rated_while_the_others_are_made_is_set_aside_as_well(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    setup.runner().drain()
    folder = setup.workspace.outbox / setup.track(sha256).folder
    record = setup.manifest(sha256)["variations"][1]

    def rate_first(request: VariationRequest) -> Variation | Failure:
        setup.store.rate([Rating(record["sha256"], sha256, record["file"], 5, True, "")], now=1.0)
        return noise(request)

    setup.store.requeue(sha256, now=setup.now)
    with_variation(setup, seed=99, count=2).runner(StubGenerator(rate_first)).drain()
    assert [path.name for path in (folder / "kept").iterdir()] == [f"02-v-{record['sha256'][:8]}.wav"]


def test_a_copy_that_a_killed_run_was_writing_is_no_result_and_is_removed(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    setup.runner().drain()
    folder, outbox = setup.track(sha256).folder, Outbox(setup.workspace.outbox_files)
    part = setup.workspace.outbox / folder / "kept" / ".01-v-0123abcd.wav.part"
    part.parent.mkdir()
    part.write_bytes(b"half of it")
    assert outbox.files_set_aside(folder) == []
    setup.store.requeue(sha256, now=setup.now)
    with_variation(setup, seed=99, count=2).runner().drain()
    assert not part.exists()


def test_what_the_new_configuration_makes_as_well_stays_where_it_is(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    setup.runner().drain()
    for record in setup.manifest(sha256)["variations"]:
        setup.store.rate([Rating(record["sha256"], sha256, record["file"], None, True, "")], now=1.0)
    setup.store.requeue(sha256, now=setup.now)
    with_variation(setup, count=3).runner().drain()
    assert len(setup.manifest(sha256)["variations"]) == 3
    assert not (setup.workspace.outbox / setup.track(sha256).folder / "kept").exists()


@pytest.fixture
def setup(tmp_path: Path) -> RunnerSetup:
    return RunnerSetup.at(tmp_path / "home")
