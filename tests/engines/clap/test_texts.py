"""Texts as queries, with a small random checkpoint of CLAP in the real file format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from home_folder import Home, run, write_music

pytestmark = pytest.mark.long


@pytest.mark.usefixtures("isolated")
def test_similar_compares_texts_with_the_vectors_of_the_library(
    home: Home, clap_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home.configure(embed={"engine": "clap", "model": str(clap_folder)})
    write_music(home.inbox / "song.wav")
    assert run(capsys, monkeypatch, home, "once").code == 0

    ended = run(capsys, monkeypatch, home, "similar", "--text", "slow piano", "--not-text", "drums", "--json")

    assert ended.code == 0, ended.err
    hits = json.loads(ended.out)
    assert len(hits) == 3
    assert [hit["similarity"] for hit in hits] == sorted((hit["similarity"] for hit in hits), reverse=True)
    record = home.manifest()["variation_embeddings"]
    assert (record["engine"], record["revision"][:7]) == ("clap", "sha256:")
    [matrix] = (home.folder / "state" / "vectors").glob("clap-*[0-9a-f].npy")
    assert np.load(matrix).shape == (3, record["dim"])
