"""An HTTP proxy in front of an S3 server that counts requests and does to them what it is told.

Real sockets on loopback; a connection to it is one to the server. What is injected happens to the
next requests that fit, so many times: nothing is left to chance.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

_PIECE = 64 << 10


class Trouble(StrEnum):
    """What may happen to a request."""

    ERROR = "error"  # (no HEAD) answered by us, with `status` and `code`; the server never sees it
    CUT_REQUEST = "cut-request"  # half of the body reaches the server, then both ends are closed
    CUT_REPLY = "cut-reply"  # half of the reply's body reaches the client
    LOSE_REPLY = "lose-reply"  # the server has done it; the client hears nothing
    LATE = "late"  # the reply comes `seconds` later
    SLOW = "slow"  # the reply's body comes at `bytes_per_s`
    WRONG_BYTES = "wrong-bytes"  # one bit in the middle of the reply's body is turned


@dataclass(kw_only=True)
class Fault:
    """Trouble for the next `times` requests of `methods` whose path and query hold `part`.

    `at_least`: only where the body of the request (with WRONG_BYTES and CUT_REPLY: of the reply)
    has so many bytes.
    """

    trouble: Trouble
    methods: tuple[str, ...] = ("GET", "PUT", "POST", "DELETE", "HEAD")
    part: str = ""
    times: int = 1
    status: int = 500
    code: str = "InternalError"
    seconds: float = 0.0
    bytes_per_s: int = 1 << 20
    at_least: int = 0

    def fits(self, method: str, path: str) -> bool:
        """Whether it is for such a request, and not used up."""
        return self.times > 0 and method in self.methods and self.part in path


@dataclass
class Seen:
    """A request that came. `status` 0: it got no answer."""

    method: str
    path: str  # with the query
    sent_bytes: int  # of the request's body, as its header says
    trouble: Trouble | None
    status: int = 0
    got_bytes: int = 0  # of the reply's body, as its header says


@dataclass
class FaultProxy:
    """`endpoint` stands in for the server's."""

    server: tuple[str, int]
    endpoint: str = ""
    seen: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    mutex: threading.Lock = field(default_factory=threading.Lock)

    def inject(self, trouble: Trouble, **words: object) -> Fault:
        """Trouble to come; the fields of `Fault`."""
        fault = Fault(trouble=trouble, **words)  # type: ignore[arg-type]
        with self.mutex:
            self.faults.append(fault)
        return fault

    def forget(self) -> None:
        """No more trouble, and nothing counted."""
        with self.mutex:
            self.faults.clear()
            self.seen.clear()

    def count(self, method: str = "", part: str = "") -> int:
        """Requests so far, of a method, with `part` in path or query."""
        with self.mutex:
            return sum(1 for s in self.seen if method in ("", s.method) and part in s.path)

    def take(self, method: str, path: str, size: int) -> Fault | None:
        """The trouble of this request, which is then used once."""
        with self.mutex:
            for fault in self.faults:
                of_reply = fault.trouble in (Trouble.WRONG_BYTES, Trouble.CUT_REPLY)
                if fault.fits(method, path) and (of_reply or size >= fault.at_least):
                    fault.times -= 1
                    return fault
        return None

    def give_back(self, fault: Fault) -> None:
        """It was not for this reply."""
        with self.mutex:
            fault.times += 1


@contextmanager
def fault_proxy(endpoint: str) -> Iterator[FaultProxy]:
    """A proxy in front of `http://HOST:PORT` for the block."""
    place = urlsplit(endpoint)
    proxy = FaultProxy((place.hostname or "127.0.0.1", place.port or 80))
    server = _Server(("127.0.0.1", 0), _Connection)
    server.proxy = proxy
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    proxy: FaultProxy
    daemon_threads = True
    block_on_close = False  # clients keep connections open
    request_queue_size = 64


class _Gone(Exception):  # noqa: N818 - no error: how a connection ends
    """This connection ends here."""


class _Connection(socketserver.StreamRequestHandler):
    """One client; its requests go over one connection to the server."""

    server: _Server
    upstream: http.client.HTTPConnection
    timeout = 120
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Request after request."""
        self.upstream = http.client.HTTPConnection(*self.server.proxy.server, timeout=120)
        try:
            while self._exchange():
                pass
        except (_Gone, OSError, http.client.HTTPException):
            pass  # either end has closed; the other one sees it by ours
        finally:
            self.upstream.close()
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _exchange(self) -> bool:
        line = self.rfile.readline(65537).decode("latin-1").split()
        if len(line) != 3:
            return False
        method, path = line[0], line[1]
        headers = http.client.parse_headers(self.rfile)
        size = int(headers.get("Content-Length", 0))
        fault = self.server.proxy.take(method, path, size)
        seen = Seen(method, path, size, None if fault is None else fault.trouble)
        with self.server.proxy.mutex:  # before the answer: whoever has that may count
            self.server.proxy.seen.append(seen)
        if fault is not None and fault.trouble is Trouble.ERROR:
            seen.status = fault.status
            self._refuse(fault, size, headers)
            return True
        self._forward(method, path, headers, size, fault)
        reply = self.upstream.getresponse()
        if fault is not None and fault.trouble is Trouble.LOSE_REPLY:
            reply.read()
            raise _Gone
        seen.status, seen.got_bytes = reply.status, int(reply.headers.get("Content-Length", 0))
        self._answer(reply, method, fault)
        return True

    def _refuse(self, fault: Fault, size: int, headers: http.client.HTTPMessage) -> None:
        """A client that asked first, whether it may send its body, does not send it."""
        if "Expect" not in headers:
            self._take_in(size)
        text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code></Error>".encode()
        head = f"HTTP/1.1 {fault.status} Trouble\r\nContent-Length: {len(text)}\r\n\r\n"
        self.wfile.write(head.encode() + text)

    def _take_in(self, size: int) -> None:
        while size:
            piece = self.rfile.read(min(size, _PIECE))
            if not piece:
                raise _Gone
            size -= len(piece)

    def _forward(
        self, method: str, path: str, headers: http.client.HTTPMessage, size: int,
        fault: Fault | None,
    ) -> None:  # fmt: skip
        self.upstream.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if name.lower() != "expect":
                self.upstream.putheader(name, value)
        self.upstream.endheaders()
        if "Expect" in headers:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        left, cut = size, fault is not None and fault.trouble is Trouble.CUT_REQUEST
        while left > (size // 2 if cut else 0):
            piece = self.rfile.read(min(left, _PIECE, max(1, size // 2)))
            if not piece:
                raise _Gone
            self.upstream.send(piece)
            left -= len(piece)
        if cut:
            raise _Gone

    def _answer(self, reply: http.client.HTTPResponse, method: str, fault: Fault | None) -> None:
        body = reply.read()
        trouble = fault.trouble if fault else None
        of_body = trouble in (Trouble.WRONG_BYTES, Trouble.CUT_REPLY)
        if fault and of_body and len(body) < max(1, fault.at_least):
            self.server.proxy.give_back(fault)
            trouble = None
        if fault and trouble is Trouble.LATE:
            time.sleep(fault.seconds)
        head = f"HTTP/1.1 {reply.status} {reply.reason}\r\n"
        for name, value in reply.headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                head += f"{name}: {value}\r\n"
        length = reply.headers.get("Content-Length", len(body)) if method == "HEAD" else len(body)
        head += f"Content-Length: {length}\r\n\r\n"
        self.wfile.write(head.encode("latin-1"))
        if trouble is Trouble.WRONG_BYTES:
            middle = len(body) // 2
            body = body[:middle] + bytes((body[middle] ^ 4,)) + body[middle + 1 :]
        if trouble is Trouble.CUT_REPLY:
            self.wfile.write(body[: len(body) // 2])
            raise _Gone
        if fault and trouble is Trouble.SLOW:
            self._slowly(body, fault.bytes_per_s)
        else:
            self.wfile.write(body)

    def _slowly(self, body: bytes, bytes_per_s: int) -> None:
        piece = max(1, bytes_per_s // 20)
        for at in range(0, len(body), piece):
            self.wfile.write(body[at : at + piece])
            time.sleep(piece / bytes_per_s)
