"""An S3 server on loopback, homes whose inbox and outbox are in it, and what is in its buckets."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from home_folder import Home, RunResult, contents, write_music
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

REGION = "us-east-1"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "not-so-secret"}


@dataclass(frozen=True)
class BucketServer:
    """The server's address, and the way to its buckets without the program."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def variables(self, *, port: int | None = None) -> dict[str, str]:
        """The environment of a program that uses this server, perhaps by way of a proxy's port."""
        url = f"http://127.0.0.1:{port or self.port}"
        return {**KEYS, "AWS_REGION": REGION, "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}

    def made_bucket(self, name: str) -> Bucket:
        from moto.s3.models import s3_backends

        s3_backends["123456789012"]["aws"].create_bucket(name, REGION)
        return self.bucket(name)

    def bucket(self, name: str) -> Bucket:
        store = S3Store(
            name,
            endpoint=self.url,
            region=REGION,
            access_key_id="test",
            secret_access_key="test",
            client_options={"allow_http": True},
        )
        return Bucket(name, store)


@dataclass(frozen=True)
class Bucket:
    name: str
    store: S3Store

    def put(
        self, key: str, content: bytes, *, parts: bool = False, attributes: dict[str, str] | None = None
    ) -> None:
        """Upload an object, perhaps in parts, as tools do with large files: then its ETag is no MD5."""
        options: Any = {"use_multipart": parts, "chunk_size": 5 << 20, "attributes": attributes}
        obstore.put(self.store, key, content, **options)

    def fill(self, keys: Iterable[str]) -> None:
        """Make many objects whose content is their key, without the way over the network."""
        from moto.s3.models import s3_backends

        for key in keys:
            s3_backends["123456789012"]["aws"].put_object(self.name, key, key.encode())

    def get(self, key: str) -> bytes:
        return bytes(obstore.get(self.store, key).bytes())

    def delete(self, *keys: str) -> None:
        obstore.delete(self.store, keys)

    def clear(self) -> None:
        keys = [one["path"] for page in obstore.list(self.store) for one in page]
        obstore.delete(self.store, keys)

    def listed(self, below: str | None = None) -> list[str]:
        """The keys without those of leases."""
        found = [one["path"] for page in obstore.list(self.store, below) for one in page]
        return [key for key in found if not key.split("/")[-1].startswith((".lease", ".probe-"))]

    def mirror(self, home: Home) -> None:
        """Copy the inbox and the outbox to the folders of these names in the home."""
        for below, folder in (("in", home.inbox), ("out", home.outbox)):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for key in self.listed(below):
                path = folder / key[len(below) + 1 :]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.get(key))

    def sha256(self, below: str) -> dict[str, str]:
        """Hashes of what is below a prefix but the manifests (they have dates), by the rest of the key."""
        keys = [key for key in self.listed(below) if not key.endswith("/manifest.json")]
        return {key[len(below) + 1 :]: hashlib.sha256(self.get(key)).hexdigest() for key in keys}

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Without dates, by folder of the outbox."""
        found = {}
        for key in self.listed("out"):
            if key.endswith("/manifest.json"):
                found[key.split("/")[1]] = json.loads(self.get(key))
                del found[key.split("/")[1]]["created_at"]
        return found


@contextmanager
def bucket_server() -> Iterator[BucketServer]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    try:
        yield BucketServer(port)
    finally:
        server.stop()


@dataclass
class BucketHome:
    """A home whose inbox and outbox are in a bucket."""

    home: Home
    bucket: Bucket
    sources: Path  # what was put into the inbox

    @classmethod
    def at(cls, folder: Path, bucket: Bucket, *, has_tracks: bool = True) -> BucketHome:
        """A home with two tracks in its inbox, or none."""
        made = cls(Home(folder), bucket, folder.with_name(f"{folder.name}-sources"))
        made.configure()
        if has_tracks:
            write_music(made.sources / "a.wav", seed=1)
            write_music(made.sources / "al bum" / "b ü+%20.wav", seed=2)
            upload(bucket, made.sources)
        return made

    def configure(self, **sections: Any) -> None:
        configure(self.home, self.bucket, **sections)

    def run(self, *words: str, **env: str) -> RunResult:
        return self.home.in_child(*words, env=env)

    @property
    def state(self) -> Path:
        return self.home.folder / "state"


def configure(home: Home, bucket: Bucket, **sections: Any) -> None:
    folders = {"inbox": f"s3://{bucket.name}/in", "outbox": f"s3://{bucket.name}/out"}
    home.configure(**{"folders": folders, "gates": {"max_shared": None}, **sections})


def upload(bucket: Bucket, folder: Path) -> dict[str, str]:
    """Put every file below a folder into the inbox; returns their hashes by path."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            bucket.put(f"in/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return contents(folder)


def aged(bucket: Bucket, *keys: str, by_s: float) -> None:
    """Make objects older than they are, as if nobody had written them for so long."""
    from moto.s3.models import s3_backends

    for key in keys:
        found = s3_backends["123456789012"]["aws"].get_bucket(bucket.name).keys[key]
        found.last_modified -= timedelta(seconds=by_s)
