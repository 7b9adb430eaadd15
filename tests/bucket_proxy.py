"""An HTTP proxy on loopback that answers as a bucket does on a bad day.

Each request is forwarded over a connection of its own. What happens to it is chosen by a seeded random
generator, or by `fault` for all of them. Counts what passes.
"""

from __future__ import annotations

import random
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

PASS = "pass"
CUT_BEFORE = "cut before"  # the request never arrives
CUT_AFTER = "cut after"  # the request is carried out, its answer is lost
CUT_WITHIN = "cut within"  # half of the answer arrives
DELAY = "delay"
BUSY = "503"
REFUSE = "412"  # although no condition may be violated
EXPIRED = "expired"
DENIED = "denied"
UNCONDITIONAL = "unconditional"  # conditions are dropped, as by a store that doesn't know them
FAULTS = (CUT_BEFORE, CUT_AFTER, CUT_WITHIN, DELAY, BUSY, REFUSE)
DELAY_S = 0.2
CONDITIONS = (b"if-match", b"if-none-match")
CODES = {
    BUSY: (503, "SlowDown"),
    REFUSE: (412, "PreconditionFailed"),
    EXPIRED: (400, "ExpiredToken"),
    DENIED: (403, "SignatureDoesNotMatch"),
}


@dataclass
class Proxy:
    target: int  # port
    share: float = 0.0  # of requests that meet a fault chosen at random
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    fault: str | None = None  # of all requests
    met: Counter[str] = field(default_factory=Counter)  # requests by what happened to them
    passed: Counter[str] = field(default_factory=Counter)  # requests that were carried out: "PUT /bucket/key"
    port: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def choose(self) -> str:
        with self._lock:
            chosen = self.fault or (self.rng.choice(FAULTS) if self.rng.random() < self.share else PASS)
            self.met[chosen] += 1
        return chosen

    def serve(self, client: socket.socket) -> None:
        head, body = received(client)
        if not head:
            return
        fault = self.choose()
        if fault == CUT_BEFORE:
            return
        if fault in CODES:
            client.sendall(answer(*CODES[fault], has_body=not head.startswith(b"HEAD")))
            return
        if fault == DELAY:
            time.sleep(DELAY_S)
        response = forwarded(self.target, without(head, (b"connection",)), body, fault)
        status = int(response.split(b" ", 2)[1]) if response.startswith(b"HTTP/") else 0
        if 200 <= status < 300:
            line = head.split(b"\r\n", 1)[0].split(b" ")
            with self._lock:
                self.passed[f"{line[0].decode()} {line[1].decode().split('?')[0]}"] += 1
        if fault == CUT_WITHIN:
            client.sendall(response[: len(response) // 2])
        elif fault != CUT_AFTER:
            client.sendall(response)


def received(client: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of one request."""
    data = b""
    while b"\r\n\r\n" not in data:
        block = client.recv(1 << 16)
        if not block:
            return b"", b""
        data += block
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [
        line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
    ]
    while lengths and len(body) < int(lengths[0]):
        body += client.recv(1 << 16)
    return head, body


def without(head: bytes, names: tuple[bytes, ...]) -> bytes:
    lines = head.split(b"\r\n")
    return b"\r\n".join(line for line in lines if line.split(b":")[0].lower() not in names)


def forwarded(port: int, head: bytes, body: bytes, fault: str) -> bytes:
    if fault == UNCONDITIONAL:
        head = without(head, CONDITIONS)
    with socket.create_connection(("127.0.0.1", port)) as server:
        server.sendall(head + b"\r\nConnection: close\r\n\r\n" + body)
        blocks = []
        while block := server.recv(1 << 16):
            blocks.append(block)
    return b"".join(blocks)


def answer(status: int, code: str, *, has_body: bool) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>so it is</Message></Error>".encode() if has_body else b""
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


@contextmanager
def proxy_to(port: int, **settings: object) -> Iterator[Proxy]:
    proxy = Proxy(port, **settings)  # type: ignore[arg-type]

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                proxy.serve(self.request)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
