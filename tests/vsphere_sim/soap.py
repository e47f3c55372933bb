"""The SOAP endpoint: requests to calls, results and faults to answers.

pyVmomi has both directions of its serialisers for clients; here they are used the other way round.
"""

from __future__ import annotations

import http.cookies
import http.server
import io
import re
import ssl
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http import HTTPStatus
from typing import Any, Protocol
from xml.parsers import expat

from pyVmomi import SoapAdapter, VmomiSupport, vmodl

from tests.vsphere_sim.messages import Answer, Request

VERSION = "vim.version.version11"  # what our client speaks: 6.5
_NAMESPACE = "urn:vim25"
_COOKIE = "vmware_soap_session"
_VERSIONS = (
    b'<?xml version="1.0"?><namespaces version="1.0"><namespace><name>urn:vim25</name>'
    b"<version>8.0.1.0</version><priorVersions><version>6.7</version><version>6.5</version>"
    b"</priorVersions></namespace></namespaces>"
)
_BODY = re.compile(r"<(?:\w+:)?Body>\s*<(?:\w+:)?(\w+)[\s>]")
_THIS = re.compile(r'<_this[^>]*\btype="(\w+)"[^>]*>([^<]*)</_this>')
# reading one property of an object is a method that no type lists
_FETCH = VmomiSupport.Object(
    name="Fetch", wsdlName="Fetch", version=VERSION, isTask=False, result=object,
    methodResult=object,
    params=(VmomiSupport.Object(name="prop", type=str, version=VERSION, flags=0),),
)  # fmt: skip


class SoapFault(Exception):  # noqa: N818 - its name in the protocol
    """A fault of the API, as an answer."""

    def __init__(self, fault: Any, message: str = "") -> None:
        super().__init__(message)
        self.fault = fault
        if message:
            fault.msg = message


class Service(Protocol):
    """What answers calls."""

    def call(self, session: str, reference: Any, method: str, arguments: dict[str, Any]) -> Any:
        """The result of a method of the object `reference`. Raises SoapFault. Thread safe."""
        ...

    def answer(self, request: Request) -> Answer:
        """To what is no SOAP. Thread safe."""
        ...


@cache
def _method(kind: Any, name: str) -> Any:
    if name == "Fetch":
        return _FETCH
    return next((m for m in kind._GetMethodList() if m.wsdlName == name), None)


@cache
def _request_type(method: Any) -> Any:
    """A data type with the method's parameters as its fields, for pyVmomi to read into."""
    make = VmomiSupport.Object
    this = make(name="_this", type=VmomiSupport.ManagedObject, version=method.version, flags=0)
    fields = [
        this,
        *(
            make(
                name=p.name,
                type=p.type,
                version=p.version,
                flags=p.flags | VmomiSupport.F_OPTIONAL,
            )
            for p in method.params
        ),
    ]
    return type(
        "Request",
        (VmomiSupport.DataObject,),
        {
            "_propList": fields,
            "_propInfo": {field.name: field for field in fields},
            "_wsdlName": method.wsdlName,
            "_version": method.version,
        },
    )


class _Request(SoapAdapter.ExpatDeserializerNSHandlers):  # type: ignore[misc]
    """Hands the element in the envelope's body to pyVmomi's deserialiser."""

    def __init__(self, name: str, kind: Any) -> None:
        super().__init__()
        self._name = name
        self._kind = kind
        self._reader = SoapAdapter.SoapDeserializer(None)
        self._begun = False

    def read(self, data: bytes) -> Any:
        self.parser = expat.ParserCreate(namespace_separator=SoapAdapter.NS_SEP)
        self.parser.buffer_text = True
        SoapAdapter.SetHandlers(self.parser, SoapAdapter.GetHandlers(self))
        self.parser.Parse(data, True)
        return self._reader.GetResult()

    def StartElementHandler(self, tag: str, attributes: Any) -> None:
        """Of an element outside: begin with the one that is the call."""
        if not self._begun and tag.rsplit(SoapAdapter.NS_SEP, maxsplit=1)[-1] == self._name:
            self._begun = True
            self._reader.Deserialize(self.parser, self._kind, False, self.nsMap)
            self._reader.StartElementHandler(tag, attributes)

    def EndElementHandler(self, tag: str) -> None:
        """Of an element outside."""

    def CharacterDataHandler(self, data: str) -> None:
        """Between elements outside."""


class _Writer(SoapAdapter.SoapSerializer):  # type: ignore[misc]
    """Servers name a reference's type ManagedObjectReference, pyVmomi as a client ManagedObject."""

    def _QName(self, kind: Any, namespace: Any) -> Any:
        attribute, name = super()._QName(kind, namespace)
        return attribute, name + "Reference" if kind is VmomiSupport.ManagedObject else name


def _names() -> dict[str, str]:
    names: dict[str, str] = SoapAdapter.SOAP_NSMAP.copy()
    names[_NAMESPACE] = ""
    return names


def serialized(value: Any) -> str:
    """A value as XML: equal for equal values."""
    out = io.StringIO()
    field = VmomiSupport.Object(
        name="value", type=object, version=VERSION, flags=VmomiSupport.F_OPTIONAL
    )
    _Writer(out, VERSION, _names()).Serialize(value, field)
    return out.getvalue()


def _envelope(inner: str) -> bytes:
    adapter = SoapAdapter
    parts = [
        adapter.XML_HEADER, "\n", adapter.SOAP_ENVELOPE_START, adapter.SOAP_BODY_START, inner,
        adapter.SOAP_BODY_END, adapter.SOAP_ENVELOPE_END,
    ]  # fmt: skip
    return "".join(parts).encode()


def _answer(method: Any, value: Any) -> bytes:
    inner = ""
    if value is not None and method.result is not VmomiSupport.GetVmodlType("void"):
        out = io.StringIO()
        field = VmomiSupport.Object(
            name="returnval", type=method.result, version=VERSION, flags=VmomiSupport.F_OPTIONAL
        )
        _Writer(out, VERSION, _names()).Serialize(value, field)
        inner = out.getvalue()
    name = f"{method.wsdlName}Response"
    return _envelope(f'<{name} xmlns="{_NAMESPACE}">{inner}</{name}>')


def _fault_answer(fault: Any) -> bytes:
    name = VmomiSupport.GetWsdlName(type(fault)) + "Fault"
    field = VmomiSupport.Object(name=name, type=object, version=VERSION, flags=0)
    detail = SoapAdapter.SerializeFaultDetail(fault, field, VERSION, _names())
    if "xmlns=" not in detail.partition(">")[0]:
        detail = detail.replace(f"<{name}", f'<{name} xmlns="{_NAMESPACE}"', 1)
    text = SoapAdapter.XmlEscape(fault.msg or VmomiSupport.GetWsdlName(type(fault)))
    return _envelope(
        f"<soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>{text}</faultstring>"
        f"<detail>{detail}</detail></soapenv:Fault>"
    )


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the simulator notes the calls."""

    def do_GET(self) -> None:
        """Versions of the API, which clients may ask for first; files."""
        if self.path == "/sdk/vimServiceVersions.xml":
            self._reply(200, _VERSIONS, "")
        else:
            self._other()

    def do_PUT(self) -> None:
        """A file."""
        self._other()

    def do_DELETE(self) -> None:
        """A session of the REST API."""
        self._other()

    def _other(self) -> None:
        request = Request(
            method=self.command,
            target=self.path,
            headers=dict(self.headers.items()),
            body=self._body(),
            session=self._session(),
        )
        answer = self.server.service.answer(request)
        self.send_response(answer.status, answer.status.phrase)
        for name, value in {"Content-Type": answer.kind, **answer.headers}.items():
            self.send_header(name, value)
        if answer.status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def _session(self) -> str:
        cookie = http.cookies.SimpleCookie(self.headers.get("Cookie") or "").get(_COOKIE)
        return cookie.value if cookie else ""

    def _body(self) -> bytes:
        """RFC 9112, 7.1: some clients send chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = bytearray()
        while True:
            size = int(self.rfile.readline().partition(b";")[0], 16)
            found += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                return bytes(found)

    def do_POST(self) -> None:
        """One call."""
        if self.path.partition("?")[0] not in ("/sdk", "/sdk/"):
            self._other()
            return
        data = self._body()
        session = self._session() or str(uuid.uuid4())
        try:
            self._reply(200, self._call(data, session), session)
        except SoapFault as error:
            self._reply(500, _fault_answer(error.fault), session)

    def _call(self, data: bytes, session: str) -> bytes:
        text = data.decode()
        body, this = _BODY.search(text), _THIS.search(text)
        if body is None or this is None:
            raise SoapFault(vmodl.fault.InvalidRequest(), "no call in the request")
        kind = VmomiSupport.GuessWsdlType(this[1])
        method = _method(kind, body[1])
        if method is None:
            raise SoapFault(vmodl.fault.MethodNotFound(receiver=kind(this[2]), method=body[1]))
        request = _Request(body[1], _request_type(method)).read(data)
        arguments = {p.name: getattr(request, p.name) for p in method.params}
        return _answer(method, self.server.service.call(session, kind(this[2]), body[1], arguments))

    def _reply(self, status: int, data: bytes, session: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/xml; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        if session:
            cookie = f'{_COOKIE}="{session}"; Path=/; HttpOnly; Secure'
            self.send_header("Set-Cookie", cookie)
        self.end_headers()
        self.wfile.write(data)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, service: Service, context: ssl.SSLContext, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.service = service
        self._context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        """The handshake belongs to the connection's own thread."""
        try:
            with self._context.wrap_socket(request, server_side=True) as wrapped:
                _Handler(wrapped, client_address, self)
        except (ssl.SSLError, ConnectionError):
            return  # a client that does not trust us

    def shutdown_request(self, request: Any) -> None:
        """The connection may be gone already."""
        try:
            super().shutdown_request(request)
        except OSError:
            return


@contextmanager
def served(service: Service, context: ssl.SSLContext, port: int = 0) -> Iterator[int]:
    """The port of 127.0.0.1 on which the service answers; 0: any that is free."""
    server = _Server(service, context, port)
    thread = threading.Thread(target=server.serve_forever, name="vsphere simulator", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
