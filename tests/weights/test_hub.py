"""Finding and fetching weights, in a cache laid out as huggingface_hub does it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import serve

from pipeline.errors import BadCheckpoint, FolderUnusable, MissingWeights
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


class TestCache:
    @pytest.mark.parametrize("files", [FILES, SHARDED], ids=["one file", "shards"])
    def test_a_complete_snapshot_is_found_by_branch_and_by_commit(
        self, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        snapshot = cache_snapshot(tmp_path, files)
        expected = Weights(snapshot, MODEL, COMMIT)
        assert locate(MODEL, cache_dir=tmp_path) == expected
        assert locate(MODEL, "main", tmp_path) == expected
        assert locate(MODEL, COMMIT, tmp_path) == expected

    def test_a_reference_with_a_slash_is_a_revision_too(self, tmp_path: Path) -> None:
        snapshot = cache_snapshot(tmp_path, FILES, ref="refs/pr/3")
        assert locate(MODEL, "refs/pr/3", tmp_path) == Weights(snapshot, MODEL, COMMIT)

    @pytest.mark.parametrize("revision", [OTHER_COMMIT, "v2", "../snapshots", ""])
    def test_another_revision_is_not_taken_instead(self, tmp_path: Path, revision: str) -> None:
        cache_snapshot(tmp_path, FILES, ref=None)
        assert locate(MODEL, revision, tmp_path) is None

    @pytest.mark.parametrize(
        "files",
        [
            *(without(FILES, name) for name in FILES if name != "tokenizer.json"),
            without(SHARDED, SHARDS[0]),
        ],
        ids=["config", "weights", "preprocessor", "shard"],
    )
    def test_a_download_that_was_cut_off_is_not_there(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        cache_snapshot(tmp_path, files)
        assert locate(MODEL, cache_dir=tmp_path) is None

    def test_a_link_to_a_blob_that_is_gone_is_not_there(self, tmp_path: Path) -> None:
        snapshot = cache_snapshot(tmp_path, FILES)
        (snapshot / "model.safetensors").resolve().unlink()
        assert locate(MODEL, cache_dir=tmp_path) is None

    def test_damaged_weights_say_so(self, tmp_path: Path) -> None:
        cache_snapshot(tmp_path, FILES | {"model.safetensors": safetensors()[:-1]})
        with pytest.raises(BadCheckpoint, match="delete it and download it again"):
            locate(MODEL, cache_dir=tmp_path)

    def test_clap_has_its_safetensors_at_a_known_commit(self, tmp_path: Path) -> None:
        """On main it has a pickle alone, as older downloads of it do."""
        clap = "laion/clap-htsat-unfused"
        pickled = {"config.json": b"{}", "pytorch_model.bin": b"", "preprocessor_config.json": b"{}"}
        cache_snapshot(tmp_path, pickled, model=clap)
        assert locate(clap, cache_dir=tmp_path) is None
        snapshot = cache_snapshot(tmp_path, FILES, model=clap, commit=KNOWN_REVISIONS[clap], ref=None)
        assert locate(clap, cache_dir=tmp_path) == Weights(snapshot, clap, KNOWN_REVISIONS[clap])

    def test_every_snapshot_is_listed_with_its_size(self, tmp_path: Path) -> None:
        cache_snapshot(tmp_path, FILES)
        cache_snapshot(tmp_path, {"config.json": b"{}", "pytorch_model.bin": b"123"}, model="a/pickle")
        cache_snapshot(tmp_path, {"tokenizer.json": b"{}"}, model="a/cut-off")
        (tmp_path / "datasets--a--b" / "snapshots" / COMMIT).mkdir(parents=True)
        size = sum(map(len, FILES.values()))
        assert cached(tmp_path) == [
            CachedModel("a/cut-off", COMMIT, "", 2, complete=False),
            CachedModel("a/pickle", COMMIT, "", 5, complete=False),
            CachedModel(MODEL, COMMIT, "musicgen_melody", size, complete=True),
        ]

    def test_an_absent_cache_lists_nothing(self, tmp_path: Path) -> None:
        assert cached(tmp_path / "none") == []

    @pytest.mark.parametrize(
        "env",
        [
            {},
            {"HF_HOME": "{tmp}/home"},
            {"HF_HUB_CACHE": "{tmp}/cache", "HF_HOME": "{tmp}/home"},
            {"HUGGINGFACE_HUB_CACHE": "{tmp}/old"},
            {"XDG_CACHE_HOME": "{tmp}/xdg"},
            {"HF_HUB_CACHE": "~/mine/$USER_PART", "USER_PART": "x"},
        ],
        ids=lambda env: "+".join(env) or "none",
    )
    def test_the_cache_is_where_the_library_has_it(self, tmp_path: Path, env: dict[str, str]) -> None:
        """Reference: huggingface_hub's own constant, in a fresh process with the same variables."""
        pytest.importorskip("huggingface_hub")
        code = (
            "from huggingface_hub.constants import HF_HUB_CACHE; from pipeline.weights.hub import hub_cache; "
            "print(HF_HUB_CACHE); print(hub_cache())"
        )
        variables = {name: value.replace("{tmp}", str(tmp_path)) for name, value in env.items()}
        theirs, ours = run(code, **variables).splitlines()
        assert ours == theirs


class TestFetch:
    def test_only_safe_files_are_downloaded_and_then_found_without_network(self, tmp_path: Path) -> None:
        pytest.importorskip("huggingface_hub")
        with serve(MODEL, COMMIT, PUBLISHED) as server:
            fetched = fetch(MODEL, cache_dir=tmp_path, endpoint=server.endpoint, progress=False)
        unwanted = {"state_dict.bin", "compression_state_dict.bin", "README.md", ".gitattributes"}
        assert server.downloaded == PUBLISHED.keys() - unwanted
        assert {path.name for path in fetched.folder.iterdir()} == server.downloaded
        assert fetched.revision == COMMIT
        assert locate(MODEL, cache_dir=tmp_path) == fetched

    def test_what_is_cached_serves_when_the_network_is_gone(self, tmp_path: Path) -> None:
        pytest.importorskip("huggingface_hub")
        snapshot = cache_snapshot(tmp_path, FILES)
        assert fetch(MODEL, cache_dir=tmp_path, endpoint=closed_port()).folder == snapshot

    def test_a_download_cut_off_before_the_tokenizer_is_completed(self, tmp_path: Path) -> None:
        """The library notes what the hub has; without that note the lack would go unnoticed."""
        pytest.importorskip("huggingface_hub")
        with serve(MODEL, COMMIT, PUBLISHED) as server:
            fetched = fetch(MODEL, cache_dir=tmp_path, endpoint=server.endpoint, progress=False)
            (fetched.folder / "tokenizer.json").unlink()
            assert locate(MODEL, cache_dir=tmp_path) is None
            assert fetch(MODEL, cache_dir=tmp_path, endpoint=server.endpoint, progress=False) == fetched
        assert (fetched.folder / "tokenizer.json").is_file()

    def test_a_dead_network_names_the_command_at_once(self, tmp_path: Path) -> None:
        pytest.importorskip("huggingface_hub")
        for model in (MODEL, "laion/clap-htsat-unfused"):  # one by its branch, one by a commit
            with pytest.raises(MissingWeights, match=r"run `python run_pipeline.py models fetch`") as caught:
                fetch(model, cache_dir=tmp_path, endpoint=closed_port())
            assert "\n" not in str(caught.value)

    def test_offline_mode_touches_no_network_and_is_named(self, tmp_path: Path) -> None:
        pytest.importorskip("huggingface_hub")
        code = (
            "import sys; from pathlib import Path\n"
            "from pipeline import errors; from pipeline.weights import hub\n"
            "try: hub.fetch(sys.argv[1], cache_dir=Path(sys.argv[2]))\n"
            "except errors.MissingWeights as error: print(error)"
        )
        with serve(MODEL, COMMIT, PUBLISHED) as server:
            said = run(code, MODEL, str(tmp_path), HF_HUB_OFFLINE="1", HF_ENDPOINT=server.endpoint)
        assert "HF_HUB_OFFLINE" in said
        assert FETCH_COMMAND in said
        assert server.asked == []

    def test_unknown_models_and_unknown_revisions_have_different_errors(self, tmp_path: Path) -> None:
        pytest.importorskip("huggingface_hub")
        with serve(MODEL, COMMIT, PUBLISHED) as server:
            with pytest.raises(MissingWeights, match="no revision v9"):
                fetch(MODEL, "v9", tmp_path, endpoint=server.endpoint)
            with pytest.raises(MissingWeights, match="no model some/other"):
                fetch("some/other", None, tmp_path, endpoint=server.endpoint)

    def test_a_model_of_pickles_alone_is_refused_without_downloading_them(self, tmp_path: Path) -> None:
        pytest.importorskip("huggingface_hub")
        files = {"config.json": CONFIG, "preprocessor_config.json": b"{}", "pytorch_model.bin": b"pickle"}
        said = r"at revision main: .*model.safetensors missing"
        with serve(MODEL, COMMIT, files) as server, pytest.raises(BadCheckpoint, match=said):
            fetch(MODEL, cache_dir=tmp_path, endpoint=server.endpoint, progress=False)
        assert "pytorch_model.bin" not in server.downloaded

    def test_a_cache_that_cant_be_written_says_so(self, tmp_path: Path) -> None:
        pytest.importorskip("huggingface_hub")
        (tmp_path / "file").write_bytes(b"")
        with (
            serve(MODEL, COMMIT, PUBLISHED) as server,
            pytest.raises(FolderUnusable, match="can't be stored"),
        ):
            fetch(MODEL, cache_dir=tmp_path / "file", endpoint=server.endpoint, progress=False)


def test_locating_needs_neither_torch_nor_the_hubs_library(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.weights import hub\n"
        "hub.locate('facebook/musicgen-melody'); hub.cached()\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    assert run(code, HF_HOME=str(tmp_path)).strip() == "[]"


def run(code: str, *args: str, **variables: str) -> str:
    """Run Python in a fresh process, with no variables of the hub's but these."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_", "XDG_"))}
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**inherited, "PYTHONPATH": root, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout
