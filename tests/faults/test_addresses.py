"""Row 9: a data set's address that leads inside, or to a host that never ends."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from classifier import downloads, sources
from classifier.errors import DataError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fault_table import Landed

from infra.pipeline import definition
from infra.verify import walk
from infra.verify.configurations import config_of

pytestmark = pytest.mark.fault(9)

PUBLIC = "93.184.216.34"
INSIDE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "169.254.170.2",  # noqa: S104
    "192.0.0.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fc00::1",
    "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a9fe:a9fe::", "2001:0:4136:e378:8000:63bf:80ff:fffe",
]  # fmt: skip
"""Loopback, link-local (AWS's metadata among them), private, shared, multicast, reserved; also inside IPv6."""
HOSTS = ["good.example", "inside.example", "turns.example"]

# --- what is connected to, by Python's own audit events: they cannot be got around ---------------------------------------------

_connections: list[Any] = []
sys.addaudithook(lambda event, values: _connections.append(values[1]) if event == "socket.connect" else None)


@pytest.fixture
def connections() -> list[Any]:
    _connections.clear()
    return _connections


def answer(*addresses: str) -> list[Any]:
    families = {4: socket.AF_INET, 6: socket.AF_INET6}
    return [
        (families[ipaddress.ip_address(one).version], socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (one, 443)) for one in addresses
    ]


def names(monkeypatch: pytest.MonkeyPatch, known: dict[str, Callable[[], list[Any]]]) -> None:
    """A name server with these names."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: known[host]())


@pytest.mark.parametrize("address", INSIDE)
def test_a_name_that_leads_inside_is_not_connected_to(tmp_path, monkeypatch, connections, landed: Landed, address: str):
    names(monkeypatch, {"inside.example": lambda: answer(address)})
    with pytest.raises(DataError, match="resolves to the private address"):
        sources.open_source("https://inside.example/x.zip", HOSTS, tmp_path)
    with pytest.raises(DataError, match="resolves to the private address"):
        sources.archive_tag("https://inside.example/x.zip", HOSTS)
    assert connections == []
    landed(2)


def test_one_private_address_among_public_ones_is_enough(tmp_path, monkeypatch, connections, landed: Landed):
    names(monkeypatch, {"inside.example": lambda: answer(PUBLIC, "10.0.0.1")})
    with pytest.raises(DataError, match=r"private address 10\.0\.0\.1"):
        sources.open_source("https://inside.example/x.zip", HOSTS, tmp_path)
    assert connections == []
    landed()


@pytest.mark.parametrize("address", INSIDE)
def test_an_address_in_the_place_of_a_name_is_not_connected_to(tmp_path, connections, landed: Landed, address: str):
    shown = f"[{address}]" if ":" in address else address
    for allowed in ([], [address]):
        with pytest.raises(DataError):
            sources.open_source(f"https://{shown}/x.zip", allowed, tmp_path)
        landed()
    assert connections == []


@pytest.mark.parametrize("text", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost", "localhost.", "LOCALHOST"])
def test_other_spellings_of_this_machine_are_not_connected_to(tmp_path, connections, landed: Landed, text: str):
    with pytest.raises(DataError):
        sources.open_source(f"https://{text}/x.zip", [text.lower()], tmp_path)
    assert connections == []
    landed()


@pytest.mark.parametrize(
    "uri",
    [
        "http://good.example/x.zip", "ftp://good.example/x.zip", "gopher://good.example/x.zip", "data:application/zip,x.zip",
        "https://good.example:8443/x.zip", "https://good.example:22/x.zip", "https://user@good.example/x.zip",
        "https://:@good.example/x.zip", "https://good.example@127.0.0.1/x.zip", "https://good.example\\@127.0.0.1/x.zip",
        "https://127.0.0.1\\good.example/x.zip", "https://good.example:99999/x.zip", "https://[::1/x.zip", "https:///x.zip",
        "https://good.example%00.evil.example/x.zip", "//good.example/x.zip", "javascript:x.zip", "https://good.example.evil.example/x.zip",
    ],
)  # fmt: skip
def test_other_schemes_ports_users_and_spellings_are_refused(tmp_path, monkeypatch, connections, landed: Landed, uri: str):
    names(monkeypatch, {"good.example": lambda: answer(PUBLIC)})
    with pytest.raises(DataError):
        sources.open_source(uri, HOSTS, tmp_path)
    assert connections == []
    landed()


def test_a_name_that_turns_between_check_and_connection_is_not_connected_to(tmp_path, monkeypatch, connections, landed: Landed):
    """DNS rebinding: public when it is checked, private when it is used."""
    answers: Iterator[list[Any]] = iter([answer(PUBLIC), answer("127.0.0.1")])
    names(monkeypatch, {"turns.example": lambda: next(answers)})
    with pytest.raises(DataError, match=r"private address 127\.0\.0\.1"):
        sources.open_source("https://turns.example/x.zip", HOSTS, tmp_path)
    assert next(answers, None) is None, "it was not asked a second time"
    assert connections == []
    landed()


def test_a_connection_goes_to_the_address_that_was_checked(tmp_path, monkeypatch, connections, landed: Landed):
    """A name server that turns on the third question is not asked a third time."""
    answers: Iterator[list[Any]] = iter([answer("203.0.114.9"), answer("203.0.114.9"), answer("127.0.0.1")])
    names(monkeypatch, {"turns.example": lambda: next(answers)})
    monkeypatch.setattr(downloads, "SILENCE_S", 0.2)
    with pytest.raises(DataError, match="could not be fetched"):
        sources.open_source("https://turns.example/x.zip", HOSTS, tmp_path)
    assert [one[0] for one in connections] == ["203.0.114.9"]
    landed()


# --- a host that is allowed and hostile ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for good.example."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "good.example")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("good.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "good.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + made.public_bytes(pem))
    return path


Behave = Callable[[ssl.SSLSocket], None]


class Host:
    """good.example on this machine; counts what it is asked."""

    def __init__(self, certificate: Path) -> None:
        self.behave: Behave = lambda _: None
        self.asked: list[bytes] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._listener = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except ssl.SSLError:
                continue
            except OSError:
                return
            threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: ssl.SSLSocket) -> None:
        with client, contextlib.suppress(OSError):
            self.asked.append(client.recv(65536))
            self.behave(client)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # or the thread waits on, and may accept on the next host's socket
        self._thread.join()
        self._listener.close()


@pytest.fixture
def host(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """good.example is allowed, and this one address counts as public; everything else is as it is."""
    served = Host(certificate)
    here = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", served.port))
    names(monkeypatch, {"good.example": lambda: [here], "inside.example": lambda: answer("169.254.169.254")})
    public = downloads.is_public
    monkeypatch.setattr(downloads, "is_public", lambda text: text == "127.0.0.1" or public(text))
    context = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(downloads, "tls", lambda: context)
    yield served
    served.close()


def said(head: str, body: bytes = b"") -> Behave:
    return lambda client: client.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)


def fetched(tmp_path: Path) -> bytes:
    downloads.fetch("https://good.example/x.zip", tmp_path / "x.zip", HOSTS)
    return (tmp_path / "x.zip").read_bytes()


def test_an_honest_host_is_fetched_from(tmp_path, host: Host, landed: Landed):
    """Otherwise the refusals below would say nothing."""
    host.behave = said("HTTP/1.1 200 OK\nContent-Length: 5\nETag: t", b"hello")
    assert fetched(tmp_path) == b"hello"
    assert downloads.remote_tag("https://good.example/x.zip", HOSTS) == "t\x005"
    landed()


@pytest.mark.parametrize(
    "target",
    [
        "https://inside.example/x.zip", "https://169.254.169.254/latest/meta-data/x.zip", "http://169.254.169.254/x.zip",
        "http://good.example/x.zip", "file:///etc/passwd", "ftp://good.example/x.zip", "https://127.0.0.1/x.zip",
        "https://[::1]/x.zip", "https://good.example:22/x.zip", "https://user@good.example/x.zip", "//inside.example/x.zip",
    ],
)  # fmt: skip
def test_a_redirect_is_checked_like_the_first_address(tmp_path, host: Host, connections, landed: Landed, target: str):
    for code in (301, 302, 303, 307, 308):
        host.behave = said(f"HTTP/1.1 {code} Moved\nLocation: {target}\nContent-Length: 0\nConnection: close")
        with pytest.raises(DataError):
            fetched(tmp_path)
        landed()
    assert len(host.asked) == 5
    assert {one[:2] for one in connections} == {("127.0.0.1", host.port)}


def test_redirects_come_to_an_end(tmp_path, host: Host, landed: Landed):
    host.behave = said("HTTP/1.1 302 Found\nLocation: https://good.example/x.zip\nContent-Length: 0\nConnection: close")
    with pytest.raises(DataError, match="could not be fetched"):
        fetched(tmp_path)
    assert 2 <= len(host.asked) <= 7
    landed()


def endless(client: ssl.SSLSocket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        client.sendall(b"\0" * 65536)


def dripping(client: ssl.SSLSocket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        client.sendall(b"\0")
        time.sleep(0.02)


def slow_headers(client: ssl.SSLSocket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        client.sendall(b"X: y\r\n")
        time.sleep(0.02)


def silent(client: ssl.SSLSocket) -> None:
    time.sleep(30)


def short(client: ssl.SSLSocket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"\0" * 10)


def broken_chunks(client: ssl.SSLSocket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nno\r\n")


def huge_headers(client: ssl.SSLSocket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 10_000_000 + b"\r\n\r\n")


def not_http(client: ssl.SSLSocket) -> None:
    client.sendall(b"\0" * 100 + b"\r\n\r\n")


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        (endless, "larger than 20,000,000 bytes"),
        (said("HTTP/1.1 200 OK\nContent-Length: 20000001"), "larger than 20,000,000 bytes"),
        (dripping, "bytes a second"),
        (slow_headers, "could not be fetched"),
        (silent, "could not be fetched"),
        (short, "ended after 10 of 1,000 bytes"),
        (broken_chunks, "could not be fetched"),
        (huge_headers, "could not be fetched"),
        (not_http, "could not be fetched"),
    ],
)  # fmt: skip
def test_a_host_that_never_ends_is_cut_off(tmp_path, monkeypatch, host: Host, landed: Landed, behave: Behave, words: str):
    monkeypatch.setattr(downloads, "MAX_DOWNLOAD_BYTES", 20_000_000)
    monkeypatch.setattr(downloads, "SILENCE_S", 1.0)
    host.behave = behave
    started = time.monotonic()
    with pytest.raises(DataError, match=words):
        fetched(tmp_path)
    assert time.monotonic() - started < 10
    assert host.asked, "nobody came"
    landed()


def test_a_host_with_another_name_in_its_certificate_is_refused(tmp_path, monkeypatch, host: Host, landed: Landed):
    here = socket.getaddrinfo("good.example", 443)
    names(monkeypatch, {"turns.example": lambda: here})
    with pytest.raises(DataError, match="certificate"):
        downloads.fetch("https://turns.example/x.zip", tmp_path / "x.zip", HOSTS)
    assert host.asked == []
    landed()


@pytest.mark.parametrize(
    "source",
    [
        "file:///etc/", "file:///proc/self/environ", "http://good.example/x.zip", "https://169.254.169.254/x.zip",
        "s3://somebody-elses/x/", "https://vision.example@127.0.0.1/x.zip",
    ],
)  # fmt: skip
def test_the_state_machine_refuses_such_a_source_before_anything_starts(landed: Landed, source: str):
    machine = walk.Walk(definition(config_of({"stage": "dev"})), walk.Account())
    last, output = machine.run({"source": source})
    assert last == "InvalidInput"
    assert repr(source)[1:-1] in output["Cause"]
    assert not machine.asked
    landed()
