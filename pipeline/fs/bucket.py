"""Files below a prefix of a bucket, by obstore (S3, Google Cloud Storage, Azure); see `Files`.

An object appears whole or not at all, so there are no temporary names. There is no rename: a move is a copy
that is verified, then a deletion. Credentials, region and endpoint come from the variables that obstore
reads (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …) and are in no message, as an answer's own text may quote them.

Every call is made again after a short wait if the bucket does not answer or asks to wait. So an answer may
be to the second of two equal writes: a conditional write that was refused is compared with what is there.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import quote

from pipeline.errors import BadAudio, BucketAway, ConfigError, FolderUnusable, LeaseLost
from pipeline.fs.copying import READ_BYTES, FileChanged, FileIdentity, names_like, write_errors
from pipeline.fs.files import Entry, holds, with_url

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")
INSTALL_COMMAND = 'pip install ".[s3]"'
PROBE = ".probe-"  # how the name of an object begins by which conditions are tried out
SHA256 = "variations-sha256"  # the attribute of an object in which this program stores its hash
AFTER_ALL = "\U0010ffff"  # sorts behind every name
PAUSES_S = (0.2, 0.5, 1.0, 2.0)  # before each further try of a call
WRITE_TRIES = 5  # of a conditional write that is refused though its condition holds
TIMEOUTS = {"connect_timeout": "5s", "read_timeout": "20s", "timeout": "600s"}
OBSTORE_RETRIES = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
CREDENTIALS = (  # one of them says where those for S3 come from; otherwise obstore asks a cloud's address
    "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_METADATA_ENDPOINT", "AWS_SKIP_SIGNATURE",
)  # fmt: skip
DENIED_CODES = ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied")
OF_ONE_OBJECT = {  # codes that say nothing about other objects
    "InvalidObjectState": "it is in a class of storage from which it has to be restored first",
    "KeyTooLongError": "its key would be too long",
    "EntityTooLarge": "it is too large",
}
MOST_COPIED_BYTES = 5 << 30  # by one call, at Amazon
CLOUD_VARIABLES = ("AWS_", "GOOGLE_", "AZURE_")

_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d+)")


def without_credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for a process that has no business with any bucket."""
    return {name: value for name, value in environment.items() if not name.startswith(CLOUD_VARIABLES)}


class Refused(Exception):
    """A condition of a call does not hold: there is another object, or one where none should be."""


class Permission(Protocol):
    """What an instance needs to list and write: see `pipeline.fs.lease.Lease`."""

    def check(self) -> None:
        """Raises LeaseLost or BucketAway: it does not hold, or can't be known to hold."""


@dataclass
class BucketFiles:
    """A bucket and a prefix. While there is a `lease`, nothing is listed or written without it."""

    root: Path
    lease: Permission | None = field(default=None, compare=False)

    @property
    def url(self) -> str:
        return with_url(str(self.root))

    @cached_property
    def _store(self) -> ObjectStore:
        """The connection, which is made at the first call.

        Raises:
            ConfigError: obstore is not installed.
            FolderUnusable: the environment has no credentials, or settings that can't be used.
        """
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as e:
            raise ConfigError(f"{self.url} needs the package obstore: {INSTALL_COMMAND}") from e
        if self.url.startswith("s3:") and not any(os.environ.get(name) for name in CREDENTIALS):
            raise FolderUnusable(
                f"{self.url} can't be used without credentials: set AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY"
            )
        allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
        options: Any = {**TIMEOUTS, "allow_http": allow_http}
        retries: Any = OBSTORE_RETRIES
        try:
            return from_url(quote(self.url, safe=":/"), client_options=options, retry_config=retries)
        except (BaseError, ValueError) as e:
            raise FolderUnusable(f"{self.url} can't be used: {_first_line(e)}") from None

    # -- calls -----------------------------------------------------------------------------------

    def _call(self, call: Callable[[], T], *, has_condition: bool = False, is_write: bool = False) -> T:
        """Make a call, again if need be; one that writes only as long as there is the lease.

        Raises:
            FileNotFoundError: there is no such object.
            OSError: this object alone can't be used, see OF_ONE_OBJECT.
            Refused: the condition of a call that has one does not hold.
            BucketAway, FolderUnusable: the bucket can't be used, for a time or until somebody helps.
        """
        for pause_s in (*PAUSES_S, None):
            if is_write:
                self._check_lease()
            try:
                with self._named_errors():
                    return call()
            except Refused as e:
                if has_condition:
                    raise
                fault = BucketAway(f"{self.url} refuses a call that has no condition: {e}")
            except BucketAway as e:
                fault = e
            if pause_s is not None:
                time.sleep(pause_s)
        raise fault

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        from obstore import exceptions

        store = self._store  # outside, as its own errors are named already
        try:
            yield
        except FileNotFoundError as e:
            if "<Code>NoSuchKey</Code>" not in str(e):
                self._refuse_missing_bucket(store)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url) from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as e:
            raise Refused(_first_line(e)) from None
        except exceptions.InvalidPathError as e:
            text = _first_line(e)
            raise FolderUnusable(f"{self.url} has an object whose name can't be used: {text}") from None
        except exceptions.BaseError as e:
            raise self._fault(e) from None

    def _fault(self, error: Exception) -> FolderUnusable | OSError:
        from obstore import exceptions

        found = _CODE.search(str(error))
        code = found[1] if found else ""
        if code in OF_ONE_OBJECT:
            return OSError(errno.EIO, OF_ONE_OBJECT[code], self.url)
        if code == "NoSuchBucket":
            return FolderUnusable(
                f"{self.url}: there is no such bucket: make it, or correct the configuration"
            )
        denials = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        if code in DENIED_CODES or isinstance(error, denials):
            return FolderUnusable(
                f"access to {self.url} was denied ({_first_line(error)}): check the credentials in the"
                " environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN) and their rights"
            )
        if code == "NotImplemented":
            return FolderUnusable(f"{self.url} lacks an operation that is needed: conditional writes")
        return BucketAway(f"{self.url} can't be reached: {_first_line(error)}")

    def _refuse_missing_bucket(self, store: ObjectStore) -> None:
        """A missing bucket may be answered like a missing object, but not by a listing."""
        import obstore

        try:
            next(iter(obstore.list(store, chunk_size=1)), None)
        except Exception as e:
            raise self._fault(e) from None

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _entry(self, found: ObjectMeta) -> Entry:
        identity = FileIdentity(found["size"], 0, 0, found["e_tag"] or "")
        modified_s = found["last_modified"].timestamp()
        return Entry(self.root / found["path"], identity, modified_s, modified_s)

    # -- reading ---------------------------------------------------------------------------------

    def prepare(self) -> None:
        next(self.entries(self.root), None)

    def is_away(self) -> bool:
        return False  # every other call raises if it is

    def find(self, path: Path) -> Entry | None:
        import obstore

        try:
            return self._entry(self._call(lambda: obstore.head(self._store, self._key(path))))
        except FileNotFoundError:
            return None

    def is_link(self, path: Path) -> bool:
        return False

    def entries(self, folder: Path, *, without: Collection[str] = ()) -> Iterator[Entry]:
        self._check_lease()
        prefix: str | None = self._key(folder)
        prefix, offset = (None if prefix == "." else prefix), None
        while True:
            for entry in self._listed(prefix, offset):
                if entry.path == folder:  # the marker that some tools make for an empty folder
                    continue
                name, *rest = entry.path.relative_to(folder).parts
                if rest and name in without:
                    offset = f"{prefix}/{name}/{AFTER_ALL}" if prefix else f"{name}/{AFTER_ALL}"
                    break
                yield entry
            else:
                return

    def _listed(self, prefix: str | None, offset: str | None) -> Iterator[Entry]:
        """The objects in the order of their keys; an error costs only its page another try.

        A page comes while the one before it is worked on.
        """
        import obstore

        def begun() -> tuple[Any, Future[Any]]:
            pages = iter(obstore.list(self._store, prefix, offset=offset, chunk_size=1000))
            return pages, pool.submit(self._next_page, pages)

        with ThreadPoolExecutor(1) as pool:
            n_tries, (pages, ahead) = 0, begun()
            while True:
                try:
                    page = ahead.result()
                except BucketAway:
                    if n_tries == len(PAUSES_S):
                        raise
                    time.sleep(PAUSES_S[n_tries])
                    n_tries, (pages, ahead) = n_tries + 1, begun()
                    continue
                if page is None:
                    return
                n_tries, ahead = 0, pool.submit(self._next_page, pages)
                for found in page:
                    yield self._entry(found)
                offset = page[-1]["path"]

    def _next_page(self, pages: Iterator[Any]) -> Any:
        with self._named_errors():
            return next(pages, None)

    def folders(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[Path, list[Entry] | OSError]]:
        def folder_of(entry: Entry) -> Path | None:
            *above, _ = entry.path.relative_to(self.root).parts
            for n, name in enumerate(above, 1):
                if name.startswith("."):
                    break
                if is_wanted(name):
                    return self.root.joinpath(*above[:n])
            return None

        for folder, entries in itertools.groupby(self.entries(self.root), folder_of):
            if folder is not None:
                yield folder, list(entries)

    def read(self, path: Path) -> bytes:
        import obstore

        return self._call(lambda: bytes(obstore.get(self._store, self._key(path)).bytes()))

    def sha256_of(self, path: Path) -> str:
        """The hash that was stored with the object by this program; otherwise that of its content."""
        import obstore

        def hashed() -> str:
            sha = hashlib.sha256()
            for block in obstore.get(self._store, self._key(path)).stream(min_chunk_size=READ_BYTES):
                sha.update(block)
            return sha.hexdigest()

        got = self._call(lambda: obstore.get(self._store, self._key(path), options={"head": True}))
        return str(got.attributes.get(SHA256) or self._call(hashed))

    def copy_in(
        self,
        path: Path,
        target: Path,
        *,
        expected: FileIdentity | None = None,
        follow: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> str | None:
        try:
            copy = partial(self._copied_in, path, target, expected, should_stop)
            return self._call(copy, has_condition=True)
        except FileNotFoundError as e:
            raise BadAudio("can't be read: there is no such object") from e
        except Refused as e:
            raise FileChanged(path) from e

    def _copied_in(
        self, path: Path, target: Path, expected: FileIdentity | None, should_stop: Callable[[], bool]
    ) -> str | None:
        import obstore

        options: Any = {"if_match": expected.etag} if expected else {}
        got = obstore.get(self._store, self._key(path), options=options)
        if expected and self._entry(got.meta).identity != expected:
            raise FileChanged(path)
        sha, n_bytes = hashlib.sha256(), 0
        with write_errors(target):
            copy = target.open("wb")
        with copy:
            for block in got.stream(min_chunk_size=READ_BYTES):
                if should_stop():
                    return None
                sha.update(block)
                n_bytes += len(block)
                with write_errors(target):
                    copy.write(block)
                    copy.flush()
        if n_bytes != got.meta["size"]:
            raise BucketAway(f"{with_url(str(path))} ended after {n_bytes} of {got.meta['size']} bytes")
        return sha.hexdigest()

    # -- writing ---------------------------------------------------------------------------------

    def _check_lease(self) -> None:
        if self.lease is not None:
            self.lease.check()

    def place(self, path: Path) -> None:
        return None

    def write(self, path: Path, content: bytes | memoryview) -> str:
        content = bytes(content)
        self._call(lambda: self._put(path, content, "overwrite"), is_write=True)
        return hashlib.sha256(content).hexdigest()

    def _put(self, path: Path, content: bytes, mode: Any) -> FileIdentity:
        """Write an object and compare what the bucket then has."""
        import obstore

        attributes: Any = {SHA256: hashlib.sha256(content).hexdigest()}
        put = obstore.put(
            self._store, self._key(path), content, attributes=attributes, mode=mode, use_multipart=False
        )
        if not self._has_content(path, content):
            raise BucketAway(f"{with_url(str(path))}: the bucket returned other bytes than were written")
        return FileIdentity(len(content), 0, 0, put["e_tag"] or "")

    def _has_content(self, path: Path, content: bytes) -> bool:
        """Whether an object has this content, by its ETag if that is an MD5, and otherwise by reading it."""
        import obstore

        found = obstore.head(self._store, self._key(path))
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found["size"] != len(content):
            return False
        if found["e_tag"] == f'"{md5}"':
            return True
        return bytes(obstore.get(self._store, self._key(path)).bytes()) == content

    def write_over(self, path: Path, content: bytes, known: Entry | None) -> None:
        self._check_lease()
        if self.write_if(path, content, known.identity if known else None) is None:
            raise LeaseLost(f"another instance has written {with_url(str(path))}")

    def write_if(self, path: Path, content: bytes, known: FileIdentity | None) -> FileIdentity | None:
        """Write an object over the known one, or, if that is None, where there is none.

        Returns:
            What was written; None if something else is there.
        """
        for _ in range(WRITE_TRIES):
            try:
                mode = "create" if known is None else self._only_over(path, known)
                return self._call(partial(self._put, path, content, mode), has_condition=True)
            except (Refused, FileNotFoundError):  # the latter: there is none to write over
                found = self.find(path)
            if found is not None and self._call(lambda: self._has_content(path, content)):
                return found.identity  # the refused write was the second one of two
            if (found.identity if found else None) != known:
                return None
        raise BucketAway(f"{with_url(str(path))}: the bucket refuses to write it, though its condition holds")

    def _only_over(self, path: Path, known: FileIdentity) -> Any:
        """The condition that an object is the known one; some stores want its version for that."""
        import obstore

        found = self._call(lambda: obstore.head(self._store, self._key(path)))
        if self._entry(found).identity != known:
            raise Refused(path)
        return {name: found[name] for name in ("e_tag", "version") if found[name]}

    def check_conditions(self, name: str) -> float:
        """Check that the bucket honours the conditions of writes; returns the time by its clock.

        Args:
            name: of this caller alone. A killed one leaves an object, which its next call removes.

        Raises:
            FolderUnusable: it ignores them, so that two instances could overwrite each other's results.
        """
        path = self.root / f"{PROBE}{name}"
        try:
            self.delete(path)
            first = self.write_if(path, b"1", None)
            second = self.write_if(path, b"2", first)
            refused = self.write_if(path, b"3", None), self.write_if(path, b"4", first)
            found = self.find(path)
        finally:
            self.delete(path)
        if first is None or second is None or refused != (None, None) or found is None:
            raise FolderUnusable(
                f"{self.url} ignores the conditions of writes (If-None-Match, If-Match), so that two"
                " instances could overwrite each other's results: use a store that honours them"
            )
        return found.modified_s

    def note(self, path: Path, text: str) -> None:
        self.write(path, text.encode(errors="backslashreplace"))

    def move(self, path: Path, target: Path) -> None:
        self._check_lease()
        source = self.find(path)
        if source is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), with_url(str(path)))
        self._copy(source, target, None)
        self.delete(path)

    def _copy(self, source: Entry, target: Path, sha256: str | None) -> None:
        """Copy an object, and verify the copy: by its ETag, or, if that says nothing, by its content."""
        import obstore

        if source.size > MOST_COPIED_BYTES:
            raise OSError(errno.EFBIG, "it is larger than the 5 GB that can be copied", with_url(str(target)))
        copy = partial(obstore.copy, self._store, self._key(source.path), self._key(target))
        self._call(copy, is_write=True)
        made = self.find(target)
        is_same = made is not None and made.size == source.size
        if is_same and made and made.identity.etag != source.identity.etag:
            is_same = self.sha256_of(target) == (sha256 or self.sha256_of(source.path))
        if not is_same:
            self.delete(target)
            raise FileChanged(errno.EBUSY, "it has changed while it was copied", with_url(str(source.path)))

    def move_to_free_name(self, path: Path, target: Path, *, sha256: str) -> Path:
        """A copy that a killed run has left at one of the names is taken as the copy."""
        self._check_lease()
        source = self.find(path)
        if source is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), with_url(str(path)))
        for candidate in names_like(target):
            there = self.find(candidate)
            if there is None:
                self._copy(source, candidate, sha256)
                break
            if holds(self, there, source.identity, sha256):
                break
        now = self.find(path)
        if now is not None and now.identity == source.identity:  # otherwise it is another file's already
            self.delete(path)
        return candidate

    def delete(self, path: Path) -> None:
        import obstore

        self._call(lambda: obstore.delete(self._store, self._key(path)), is_write=True)

    def flush(self, folder: Path) -> None:
        pass

    def prune(self, folder: Path, top: Path) -> None:
        pass


def _first_line(error: Exception) -> str:
    """The cause in a few words, without what the server says about the request."""
    code, status = _CODE.search(str(error)), _STATUS.search(str(error))
    if code or status:
        return ", ".join(found[1] for found in (code, status) if found)
    return str(error).split("\n", 1)[0].rpartition(" - ")[2] or type(error).__name__
