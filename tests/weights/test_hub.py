"""Finding and fetching weights, in a cache laid out as huggingface_hub does it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fake_hub import hub_at, serve

from pipeline.errors import BadCheckpoint, FolderUnusable, MissingPackage, MissingWeights
from pipeline.weights.hub import FETCH_COMMAND, KNOWN_REVISIONS, CachedModel, Weights, cached, fetch, locate
from pipeline.weights.layout import fingerprint

MODEL = "facebook/musicgen-melody"
COMMIT, OTHER_COMMIT = "0" * 39 + "1", "0" * 39 + "2"
CONFIG = json.dumps({"model_type": "musicgen_melody"}).encode()


def safetensors(n_bytes: int = 64, fill: int = 0) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [n_bytes], "data_offsets": [0, n_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([fill]) * n_bytes


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}).encode()


FILES = {
    "config.json": CONFIG,
    "model.safetensors": safetensors(),
    "preprocessor_config.json": b"{}",
    "tokenizer.json": b"{}",
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARDED = {
    "config.json": CONFIG,
    "model.safetensors.index.json": index(
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    ),
    "model-00001-of-00002.safetensors": safetensors(10),
    "model-00002-of-00002.safetensors": safetensors(20),
    "preprocessor_config.json": b"{}",
}
# What facebook/musicgen-melody has on its main branch; the contents differ, or they'd share a blob.
PUBLISHED = {
    name: SHARDED.get(name) or json.dumps({"of": name}).encode()
    for name in (
        *SHARDED,
        *(".gitattributes", "README.md", "compression_state_dict.bin", "state_dict.bin", "spiece.model"),
        *("generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    )
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def cache_snapshot(
    cache: Path,
    files: dict[str, bytes],
    *,
    model: str = MODEL,
    commit: str = COMMIT,
    ref: str | None = "main",
) -> Path:
    """As the library does it: blobs, links to them in the snapshot, the branch's commit in refs."""
    repo = cache / f"models--{model.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    for name, content in files.items():
        blob = repo / "blobs" / f"{commit}-{name}"
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    if ref:
        (repo / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    return snapshot


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {key: value for key, value in files.items() if key != name}


needs_library = pytest.mark.skipif(
    find_spec("huggingface_hub") is None, reason="huggingface_hub is not in the core install"
)


class TestFolders:
    @pytest.mark.parametrize("files", [FILES, SHARDED], ids=["one file", "shards"])
    def test_a_complete_folder_is_found_with_its_fingerprint(
        self, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        folder = write(tmp_path / "mine", files)
        assert locate(str(folder)) == Weights(folder, str(folder), fingerprint(folder))
        assert fetch(str(folder)) == locate(str(folder))

    def test_a_folder_that_isnt_there_is_none(self, tmp_path: Path) -> None:
        assert locate(str(tmp_path / "gone")) is None
        with pytest.raises(MissingWeights, match="no folder"):
            fetch(str(tmp_path / "gone"))

    @pytest.mark.parametrize(
        ("files", "sentence"),
        [
            ({}, "no config.json"),
            (without(FILES, "model.safetensors"), "model.safetensors missing"),
            (without(FILES, "preprocessor_config.json"), "preprocessor_config.json missing"),
            (
                without(SHARDED, "model-00002-of-00002.safetensors"),
                "model-00002-of-00002.safetensors missing",
            ),
            (without(FILES, "model.safetensors") | {"pytorch_model.bin": b""}, "pytorch_model.bin"),
            (FILES | {"model.safetensors": safetensors()[:-1]}, "cut off or damaged"),
            (FILES | {"model.safetensors": b""}, "cut off or not a safetensors file"),
            (FILES | {"model.safetensors": b"PK" * 99}, "not a safetensors file"),
            (SHARDED | {"model.safetensors.index.json": b"{}"}, "does not name the files of the weights"),
            (
                SHARDED | {"model.safetensors.index.json": index("../x")},
                "does not name the files of the weights",
            ),
            (SHARDED | {"model.safetensors.index.json": b"{"}, "not readable JSON"),
        ],
    )
    def test_an_unusable_folder_says_what_is_wrong(
        self, tmp_path: Path, files: dict[str, bytes], sentence: str
    ) -> None:
        folder = write(tmp_path / "mine", files)
        for find in (locate, fetch):
            with pytest.raises(BadCheckpoint) as caught:
                find(str(folder))
            assert sentence in str(caught.value)
            assert str(folder) in str(caught.value)

    def test_the_fingerprint_is_the_same_for_a_copy_and_ignores_other_files(self, tmp_path: Path) -> None:
        one, two = write(tmp_path / "a", FILES), write(tmp_path / "b", FILES | {"notes.md": b"hi"})
        assert fingerprint(one) == fingerprint(two)
        assert fingerprint(one).startswith("sha256:")
        assert len(fingerprint(one)) == len("sha256:") + 16

    @pytest.mark.parametrize("name", FILES)
    def test_the_fingerprint_notices_any_change_of_a_small_file(self, tmp_path: Path, name: str) -> None:
        changed = bytearray(FILES[name])
        changed[-1] ^= 1
        one = write(tmp_path / "a", FILES)
        two = write(tmp_path / "b", FILES | {name: bytes(changed)})
        assert fingerprint(one) != fingerprint(two)

    @pytest.mark.parametrize("byte", [0, 10_000_000, 20_000_000 - 1], ids=["first", "middle", "last"])
    def test_the_fingerprint_notices_changes_all_over_a_large_file(self, tmp_path: Path, byte: int) -> None:
        data = bytearray(20_000_000)
        one = write(tmp_path / "a", {"model.safetensors": bytes(data)})
        start = max(0, byte - 700_000)  # as training does: weights change everywhere, not one alone
        data[start : byte + 700_000] = b"\1" * len(data[start : byte + 700_000])
        two = write(tmp_path / "b", {"model.safetensors": bytes(data)})
        assert fingerprint(one) != fingerprint(two)


@needs_library
class TestCache:
    @pytest.mark.parametrize("files", [FILES, SHARDED], ids=["one file", "shards"])
    def test_a_complete_snapshot_is_found_by_branch_and_by_commit(
        self, hub_cache: Path, files: dict[str, bytes]
    ) -> None:
        snapshot = cache_snapshot(hub_cache, files)
        expected = Weights(snapshot, MODEL, COMMIT)
        assert locate(MODEL) == expected
        assert locate(MODEL, "main") == expected
        assert locate(MODEL, COMMIT) == expected

    def test_a_reference_with_a_slash_is_a_revision_too(self, hub_cache: Path) -> None:
        snapshot = cache_snapshot(hub_cache, FILES, ref="refs/pr/3")
        assert locate(MODEL, "refs/pr/3") == Weights(snapshot, MODEL, COMMIT)

    @pytest.mark.parametrize("revision", [OTHER_COMMIT, "v2", "../snapshots", ""])
    def test_another_revision_is_not_taken_instead(self, hub_cache: Path, revision: str) -> None:
        cache_snapshot(hub_cache, FILES, ref=None)
        assert locate(MODEL, revision) is None

    @pytest.mark.parametrize(
        "files",
        [
            *(without(FILES, name) for name in FILES if name != "tokenizer.json"),
            without(SHARDED, SHARDS[0]),
        ],
        ids=["config", "weights", "preprocessor", "shard"],
    )
    def test_a_download_that_was_cut_off_is_not_there(self, hub_cache: Path, files: dict[str, bytes]) -> None:
        cache_snapshot(hub_cache, files)
        assert locate(MODEL) is None

    def test_a_link_to_a_blob_that_is_gone_is_not_there(self, hub_cache: Path) -> None:
        snapshot = cache_snapshot(hub_cache, FILES)
        (snapshot / "model.safetensors").resolve().unlink()
        assert locate(MODEL) is None

    def test_damaged_weights_say_so(self, hub_cache: Path) -> None:
        cache_snapshot(hub_cache, FILES | {"model.safetensors": safetensors()[:-1]})
        with pytest.raises(BadCheckpoint, match="delete it and download it again"):
            locate(MODEL)

    def test_clap_has_its_safetensors_at_a_known_commit(self, hub_cache: Path) -> None:
        """On main it has a pickle alone, as older downloads of it do."""
        clap = "laion/clap-htsat-unfused"
        pickled = {"config.json": b"{}", "pytorch_model.bin": b"", "preprocessor_config.json": b"{}"}
        cache_snapshot(hub_cache, pickled, model=clap)
        assert locate(clap) is None
        snapshot = cache_snapshot(hub_cache, FILES, model=clap, commit=KNOWN_REVISIONS[clap], ref=None)
        assert locate(clap) == Weights(snapshot, clap, KNOWN_REVISIONS[clap])

    def test_every_snapshot_is_listed_with_its_size(self, hub_cache: Path) -> None:
        cache_snapshot(hub_cache, FILES)
        cache_snapshot(hub_cache, {"config.json": b"{}", "pytorch_model.bin": b"123"}, model="a/pickle")
        cache_snapshot(hub_cache, {"tokenizer.json": b"{}"}, model="a/cut-off")
        (hub_cache / "datasets--a--b" / "snapshots" / COMMIT).mkdir(parents=True)
        size = sum(map(len, FILES.values()))
        assert cached() == [
            CachedModel("a/cut-off", COMMIT, "", 2, complete=False),
            CachedModel("a/pickle", COMMIT, "", 5, complete=False),
            CachedModel(MODEL, COMMIT, "musicgen_melody", size, complete=True),
        ]

    def test_an_absent_cache_lists_nothing(self, hub_cache: Path) -> None:
        assert cached() == []


@needs_library
class TestFetch:
    def test_only_safe_files_are_downloaded_and_then_found_without_network(self, hub_cache: Path) -> None:
        with serve(MODEL, COMMIT, PUBLISHED) as server:
            fetched = fetch(MODEL)
        unwanted = {"state_dict.bin", "compression_state_dict.bin", "README.md", ".gitattributes"}
        assert server.downloaded == PUBLISHED.keys() - unwanted
        assert {path.name for path in fetched.folder.iterdir()} == server.downloaded
        assert fetched.revision == COMMIT
        assert locate(MODEL) == fetched

    def test_a_cached_model_is_used_without_a_network(self, hub_cache: Path) -> None:
        snapshot = cache_snapshot(hub_cache, FILES)
        with hub_at(closed_port()):
            assert fetch(MODEL).folder == snapshot

    def test_a_download_cut_off_before_the_tokenizer_is_completed(self, hub_cache: Path) -> None:
        """The cache records which files the hub has; without that record nothing would be found missing."""
        with serve(MODEL, COMMIT, PUBLISHED):
            fetched = fetch(MODEL)
            (fetched.folder / "tokenizer.json").unlink()
            assert locate(MODEL) is None
            assert fetch(MODEL) == fetched
        assert (fetched.folder / "tokenizer.json").is_file()

    def test_a_dead_network_names_the_command_at_once(self, hub_cache: Path) -> None:
        for model in (MODEL, "laion/clap-htsat-unfused"):  # one by its branch, one by a commit
            with (
                hub_at(closed_port()),
                pytest.raises(MissingWeights, match=r"run `python run_pipeline.py models fetch`") as caught,
            ):
                fetch(model)
            assert "\n" not in str(caught.value)

    def test_offline_mode_touches_no_network_and_is_named(self, hub_cache: Path) -> None:
        code = (
            "from pipeline import errors; from pipeline.weights import hub\n"
            f"try: hub.fetch({MODEL!r})\n"
            "except errors.MissingWeights as error: print(error)"
        )
        with serve(MODEL, COMMIT, PUBLISHED) as server:
            variables = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": server.endpoint}
            said = run(code, HF_HUB_CACHE=str(hub_cache), **variables)
        assert "HF_HUB_OFFLINE" in said
        assert FETCH_COMMAND in said
        assert server.asked == []

    def test_unknown_models_and_unknown_revisions_have_different_errors(self, hub_cache: Path) -> None:
        with serve(MODEL, COMMIT, PUBLISHED):
            with pytest.raises(MissingWeights, match="no revision v9"):
                fetch(MODEL, "v9")
            with pytest.raises(MissingWeights, match="no model some/other"):
                fetch("some/other")

    def test_a_model_of_pickles_alone_is_refused_without_downloading_them(self, hub_cache: Path) -> None:
        files = {"config.json": CONFIG, "preprocessor_config.json": b"{}", "pytorch_model.bin": b"pickle"}
        said = r"model.safetensors missing"
        with serve(MODEL, COMMIT, files) as server, pytest.raises(BadCheckpoint, match=said):
            fetch(MODEL)
        assert "pytorch_model.bin" not in server.downloaded

    def test_a_cache_that_cant_be_written_says_so(self, hub_cache: Path) -> None:
        hub_cache.write_bytes(b"")
        with serve(MODEL, COMMIT, PUBLISHED), pytest.raises(FolderUnusable, match="can't be stored"):
            fetch(MODEL)


def test_without_the_hubs_library_nothing_is_in_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # what a failed import leaves
    assert locate(MODEL) is None
    assert cached() == []
    with pytest.raises(MissingPackage, match="needs huggingface_hub: pip install"):
        fetch(MODEL)


def run(code: str, **variables: str) -> str:
    """Run Python in a fresh process, with no variables of the hub's but these."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_", "XDG_"))}
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": root, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def test_a_model_that_was_never_downloaded_is_missed_without_the_hub_s_library(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.weights import hub\n"
        "assert hub.locate('facebook/musicgen-melody') is None\n"
        "print('huggingface_hub' in sys.modules)"
    )
    assert run(code, HF_HUB_CACHE=str(tmp_path)).strip() == "False"
