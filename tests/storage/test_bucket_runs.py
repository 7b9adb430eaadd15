"""The program with an inbox and an outbox in a bucket, against an S3 server on loopback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from home_folder import Home, contents, write_music

if TYPE_CHECKING:
    from bucket_server import Bucket, BucketHome, BucketServer

pytestmark = pytest.mark.long  # needs a package that only test-all installs


@pytest.fixture
def setup(bucket: Bucket, tmp_path: Path) -> BucketHome:
    from bucket_server import BucketHome

    return BucketHome.at(tmp_path / "home", bucket)


def locally(setup: BucketHome, folder: Path) -> Home:
    """The same tracks with folders on the disk, done."""
    home = Home(folder)
    home.configure(gates={"max_shared": None})
    shutil.copytree(setup.sources, home.inbox, dirs_exist_ok=True)
    assert home.in_child("once").code == 0
    return home


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_a_bucket_gets_the_same_bytes_as_a_folder(setup: BucketHome, tmp_path: Path, executor: str) -> None:
    setup.configure(executor=executor)
    ended = setup.run("once")

    assert ended.code == 0, ended.err
    assert f"results are in s3://{setup.bucket.name}/out" in ended.out
    home = locally(setup, tmp_path / "local")
    assert setup.bucket.sha256("out") == contents(home.outbox)
    assert setup.bucket.sha256("in") == contents(home.inbox)
    for folder, manifest in setup.bucket.manifests().items():
        wanted = json.loads((home.outbox / folder / "manifest.json").read_text())
        differs = {key for key in wanted if manifest.get(key) != wanted[key]}
        assert differs <= {"created_at", "config_sha256"}


def test_what_is_done_is_not_done_again(setup: BucketHome) -> None:
    assert setup.run("once").code == 0
    before = setup.bucket.sha256("out"), setup.bucket.manifests()

    ended = setup.run("once")

    assert (ended.code, ended.out.split(";")[0]) == (0, "0 done, 0 failed")
    assert (setup.bucket.sha256("out"), setup.bucket.manifests()) == before


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_the_gallery_is_published_like_every_other_file(setup: BucketHome, executor: str) -> None:
    setup.configure(executor=executor, gallery={"enabled": True})
    assert setup.run("once").out.endswith(f"open s3://{setup.bucket.name}/out/index.html\n")
    before = setup.bucket.sha256("out")
    pages = sorted(name for name in before if name.endswith(".html"))
    assert pages == sorted(["index.html", *(f"{folder}/index.html" for folder in setup.bucket.manifests())])
    assert "tracks.js" in before
    assert setup.run("once").code == 0
    assert setup.run("gallery").out.startswith("2 pages written")
    assert setup.bucket.sha256("out") == before


def test_a_known_object_is_listed_and_never_fetched_again(setup: BucketHome, server: BucketServer) -> None:
    from bucket_proxy import proxy_to

    setup.configure(intake={"settle_s": 0, "after": "keep"})
    assert setup.run("once").code == 0
    write_music(setup.sources / "new" / "c.wav", seed=3)
    setup.bucket.put("in/c.wav", (setup.sources / "new" / "c.wav").read_bytes())

    with proxy_to(server.port) as proxy:
        ended = setup.run("once", **server.variables(port=proxy.port))

    assert ended.out.startswith("1 done, 0 failed, 2 up to date"), ended.out
    fetched = [line for line in proxy.passed if line.startswith("GET") and "/in/" in line and ".wav" in line]
    assert fetched == [f"GET /{setup.bucket.name}/in/c.wav"]


def test_a_file_that_cannot_be_used_is_moved_with_the_reason_beside_it(setup: BucketHome) -> None:
    setup.bucket.put("in/bad.wav", b"no music")
    assert setup.run("once").code == 1
    assert setup.bucket.listed("in/failed") == ["in/failed/bad.wav", "in/failed/bad.wav.error.txt"]
    assert b"is not audio" in setup.bucket.get("in/failed/bad.wav.error.txt")


@pytest.mark.parametrize("after", ["move", "keep", "delete"])
def test_a_lost_state_is_recorded_again_and_nothing_is_made_twice(setup: BucketHome, after: str) -> None:
    setup.configure(intake={"settle_s": 0, "after": after})
    assert setup.run("once").code == 0
    before = setup.bucket.sha256("out"), setup.bucket.manifests()
    shutil.rmtree(setup.state)

    rebuilt, ended = setup.run("rebuild"), setup.run("once")

    assert "2 tracks recorded" in rebuilt.out
    assert ended.code == 0, ended.err
    assert ended.out.startswith("0 done, 0 failed")
    assert (setup.bucket.sha256("out"), setup.bucket.manifests()) == before
    store = setup.home.store()
    assert [unit["seconds"] for track in store.tracks() for unit in store.units_of(track.sha256)] == [
        0.0
    ] * 10
    store.close()


def test_a_changed_parameter_makes_only_what_it_affects_and_results_are_renamed(setup: BucketHome) -> None:
    assert setup.run("once").code == 0
    before = setup.home.finished_at("generate")
    first, second = {"name": "far", "temperature": 1.0}, {"name": "new", "temperature": 0.7}
    setup.configure(generate={"variations": [first, second]}, intake={"settle_s": 0})
    # Sources that were archived are not scanned, so the tracks are asked for.
    for name in ("a.wav", "b ü"):
        assert setup.run("requeue", name).code == 0

    ended = setup.run("once")

    assert ended.code == 0, ended.err
    assert len(setup.home.finished_at("generate").items() - before.items()) == 4  # two made, two renamed
    for folder in setup.bucket.manifests():
        names = sorted(key.rpartition("/")[2] for key in setup.bucket.listed(f"out/{folder}/variations"))
        assert names == ["01-far.wav", "02-new.wav"]
    assert setup.run("doctor").code == 0


def test_results_that_were_removed_or_replaced_are_made_again(setup: BucketHome) -> None:
    assert setup.run("once").code == 0
    before = setup.bucket.sha256("out")
    one, other = [key for key in setup.bucket.listed("out") if key.endswith(".wav")][:2]
    setup.bucket.delete(one)
    setup.bucket.put(other, setup.bucket.get(other)[:-1] + b"?")
    assert setup.run("doctor").code == 1

    assert setup.run("once").code == 0

    assert setup.bucket.sha256("out") == before


def test_gc_removes_old_results_and_archived_sources(setup: BucketHome) -> None:
    assert setup.run("once").code == 0
    setup.bucket.put(f"out/{next(iter(setup.bucket.manifests()))}/notes.txt", b"mine")
    setup.configure(retention={"outbox_days": 0, "archive_days": 0})

    assert "4 removed" in setup.run("gc").out

    assert [key.rpartition("/")[2] for key in setup.bucket.listed()] == ["notes.txt"]
    assert setup.run("once").out.startswith("0 done, 0 failed")


def test_gc_removes_old_unfinished_work_of_engines(setup: BucketHome) -> None:
    from bucket_server import aged

    assert setup.run("once").code == 0
    old, new = (f"out/.engines/musicgen/unfinished/{name}.tokens.npz" for name in ("old", "new"))
    for key in (old, new):
        setup.bucket.put(key, b"tokens")
    aged(setup.bucket, old, by_s=30 * 86400)
    before = setup.bucket.listed()
    assert setup.run("doctor").code == 0
    setup.configure(retention={"work_days": 7})

    assert "1 removed" in setup.run("gc").out

    assert set(before) - set(setup.bucket.listed()) == {old}


def test_a_folder_of_the_disk_is_processed_into_a_bucket(setup: BucketHome) -> None:
    ended = setup.run("once", str(setup.sources))
    assert ended.code == 0, ended.err
    assert len(setup.bucket.manifests()) == 2
    assert setup.bucket.listed("in") == ["in/a.wav", "in/al bum/b ü+%20.wav"]
    assert len(contents(setup.sources)) == 2


# -- a start that can't succeed ----------------------------------------------------------------------


def test_a_missing_bucket_ends_with_4(setup: BucketHome, server: BucketServer) -> None:
    setup.bucket = server.bucket("not-there")
    setup.configure()
    ended = setup.run("once")
    assert ended.code == 4
    assert "s3://not-there/in: there is no such bucket" in ended.err
    assert "Traceback" not in ended.err


def test_no_credentials_end_with_4(setup: BucketHome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    ended = setup.run("once")
    assert ended.code == 4
    assert "set AWS_ACCESS_KEY_ID" in ended.err


def test_wrong_credentials_end_with_4(setup: BucketHome, server: BucketServer) -> None:
    from bucket_proxy import DENIED, proxy_to

    with proxy_to(server.port, fault=DENIED) as proxy:
        for verb in ("once", "watch"):
            ended = setup.run(verb, **server.variables(port=proxy.port))
            assert ended.code == 4
            assert "was denied (SignatureDoesNotMatch, 403): check the credentials" in ended.err


def test_a_store_that_ignores_conditions_is_refused(setup: BucketHome, server: BucketServer) -> None:
    from bucket_proxy import UNCONDITIONAL, proxy_to

    with proxy_to(server.port, fault=UNCONDITIONAL) as proxy:
        for verb, code in (("once", 4), ("doctor", 1)):
            ended = setup.run(verb, **server.variables(port=proxy.port))
            assert ended.code == code
            assert "ignores the conditions of writes" in ended.out + ended.err
    assert setup.bucket.manifests() == {}


def test_a_key_that_cannot_be_used_is_named(setup: BucketHome) -> None:
    from moto.s3.models import s3_backends

    s3_backends["123456789012"]["aws"].put_object(setup.bucket.name, "in/a//b.wav", b"x")
    ended = setup.run("once")
    assert ended.code == 4
    assert "has an object whose name can't be used" in ended.err
    assert "in/a//b.wav" in ended.err


# -- secrets -----------------------------------------------------------------------------------------


def test_no_secret_is_written_anywhere(setup: BucketHome, server: BucketServer) -> None:
    from bucket_server import KEYS

    assert setup.run("once").code == 0
    assert setup.run("doctor").code == 0
    written = [path.read_bytes() for path in setup.home.folder.rglob("*") if path.is_file()]
    written += [setup.bucket.get(key) for key in setup.bucket.listed() if key.endswith("manifest.json")]
    assert not any(secret.encode() in content for secret in KEYS.values() for content in written)


def test_takes_are_made_again_from_a_bucket(setup: BucketHome) -> None:
    assert setup.run("once").code == 0
    before = setup.bucket.sha256("out"), setup.bucket.sha256("in")

    ended = setup.run("reproduce", "--all")

    assert (ended.code, ended.out) == (0, "4 the same, 0 different, 0 can't be tried\n")
    folder = next(iter(setup.bucket.manifests()))
    ended = setup.run("reproduce", f"s3://{setup.bucket.name}/out/{folder}/manifest.json")
    assert ended.code == 0, ended.out
    assert ended.out.startswith(f"s3://{setup.bucket.name}/out/{folder}/variations/01-near.wav: the same\n")
    assert (setup.bucket.sha256("out"), setup.bucket.sha256("in")) == before


def test_what_was_kept_is_copied_from_a_bucket(setup: BucketHome, tmp_path: Path) -> None:
    assert setup.run("once").code == 0
    entries = [
        {
            "track": made["source"]["sha256"],
            "file": one["file"],
            "sha256": one["sha256"],
            "stars": 3,
            "kept": True,
        }
        for made in setup.bucket.manifests().values()
        for one in made["variations"]
    ]
    ratings = tmp_path / "ratings.json"
    ratings.write_text(json.dumps({"schema": 1, "ratings": entries}))
    assert setup.run("rate", str(ratings)).out == "4 ratings stored\n"
    ended = setup.run("export", "--kept", str(tmp_path / "daw"))
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "4 copied")
    assert set(contents(tmp_path / "daw").values()) == {entry["sha256"] for entry in entries}


def test_similar_reads_the_vectors_of_a_bucket_once(setup: BucketHome, server: BucketServer) -> None:
    from bucket_proxy import proxy_to

    assert setup.run("once").code == 0
    hits = json.loads(setup.run("similar", "a.wav", "--json").out)
    outbox = f"s3://{setup.bucket.name}/out/"
    variations = [hit["file"] for hit in hits if hit["file"].startswith(outbox)]
    assert len(variations) == 4
    assert len(hits) == 5

    with proxy_to(server.port) as proxy:
        again = setup.run("similar", "a.wav", "--json", **server.variables(port=proxy.port))
        variation = setup.run("similar", variations[0], "--json", **server.variables(port=proxy.port))

    assert json.loads(again.out) == hits
    assert not [line for line in proxy.passed if line.endswith(".npz")]
    assert variation.code == 0, variation.err
    assert variations[0] not in variation.out
    assert len(json.loads(variation.out)) == 5, variation.err
