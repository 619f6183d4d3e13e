"""Archives fetched over https: from hosts of an allow-list, at public addresses alone, within limits of size and time.

A name is resolved once for each connection, and the connection goes to the address that was checked: a name server that answers
differently the second time gains nothing (https://owasp.org/www-community/attacks/Server_Side_Request_Forgery).
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from classifier.errors import DataError

MAX_DOWNLOAD_BYTES = 100 * 2**30
SILENCE_S = 60.0
"""How long a host may say nothing, and how long it may take for its status and headers."""
SLOWEST_BYTES_S = 10_000
"""A body must come at this pace, measured over SILENCE_S; a host that sends a byte a minute would hold a machine for days."""
BLOCK_BYTES = 1 << 20
_EMBEDDED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
"""IPv6 addresses that a translator turns into the IPv4 address in their last 32 bits (RFC 6052, RFC 8215)."""
_FAILURES = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException)


def is_public(text: str) -> bool:
    """Whether an IP address belongs to the public Internet, also one that carries an IPv4 address inside."""
    address = ipaddress.ip_address(text)
    inner: Any = None
    if isinstance(address, ipaddress.IPv6Address):
        teredo = address.teredo
        inner = address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)
        if any(address in network for network in _EMBEDDED):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return all(one.is_global and not one.is_multicast for one in (address, *([inner] if inner else [])))


def public_addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    """What ``getaddrinfo`` says of a host. Raises DataError for an unknown host or one with an address that is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as problem:
        remedy = "check the address and the network, or upload the archive to S3 and give that"
        raise DataError(f"host {host!r} was not found ({problem}): {remedy}") from None
    for one in found:
        address = str(one[4][0])
        if not is_public(address):
            raise DataError(f"host {host!r} resolves to the private address {address}: only public hosts are fetched")
    return list(found)


def check_url(url: str, allowed: Sequence[str]) -> None:
    """Raises DataError unless ``url`` is https on the default port of an allowed, public host."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as problem:
        raise DataError(f"{url!r} is not an address ({problem}): use https://, s3://bucket/prefix/ or an archive in S3") from None
    if parts.scheme != "https" or not host:
        raise DataError(f"{url!r} is not an https address: use https://, s3://bucket/prefix/ or an archive in S3")
    if port not in (None, 443) or parts.username is not None:
        raise DataError(f"{url!r} names a port or a user: use a plain https address")
    if host.lower() not in allowed:
        raise DataError(f"host {host!r} is not on the allow-list ({', '.join(allowed) or 'empty'}): add it to allowed_hosts")
    public_addresses(host, 443)


@functools.cache
def tls() -> ssl.SSLContext:
    """The system's certificates, names checked."""
    return ssl.create_default_context()


class _PublicConnection(http.client.HTTPSConnection):
    """Connects to an address that was seen to be public, and bounds the time until the headers are there."""

    _late = False

    def connect(self) -> None:
        if getattr(self, "_tunnel_host", None):
            super().connect()  # through the proxy of whoever runs this machine, which resolves the name itself
            return
        self.sock = tls().wrap_socket(self._reach(), server_hostname=self.host)

    def _reach(self) -> socket.socket:
        problem: OSError = OSError("no address")
        for family, kind, protocol, _, address in public_addresses(self.host, self.port):
            reached = socket.socket(family, kind, protocol)
            reached.settimeout(self.timeout)
            try:
                reached.connect(address)
            except OSError as error:
                reached.close()
                problem = error
            else:
                return reached
        raise problem

    def getresponse(self) -> http.client.HTTPResponse:
        timer = threading.Timer(SILENCE_S, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            answer = super().getresponse()
        finally:
            timer.cancel()
        if self._late:  # http.client takes the end of a connection for the end of the headers
            raise TimeoutError(f"no complete answer within {SILENCE_S:.0f} s")
        return answer

    def _give_up(self) -> None:
        self._late = True
        with contextlib.suppress(OSError, AttributeError):
            self.sock.shutdown(socket.SHUT_RDWR)


class _Https(urllib.request.HTTPSHandler):
    """https through ``_PublicConnection``."""

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PublicConnection, req)


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Every hop must pass the same checks as the first address."""

    max_redirections = 5

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = allowed

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        check_url(newurl, self._allowed)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, allowed: Sequence[str], method: str) -> Any:
    check_url(url, allowed)
    opener = urllib.request.build_opener(_CheckedRedirects(allowed), _Https())
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "image-classifier"})  # noqa: S310 - https only
    return opener.open(request, timeout=SILENCE_S)


def _tag(answer: Any, size: Any) -> str | None:
    tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
    return f"{tag}\0{size}" if tag else None


def fetch(url: str, target: Path, allowed: Sequence[str]) -> str | None:
    """Download ``url``; returns a tag of its content, or None. Raises DataError."""
    try:
        with _open(url, allowed, "GET") as answer:
            size = _copy(answer, target, url)
            return _tag(answer, size)
    except _FAILURES as problem:
        raise DataError(f"{url} could not be fetched ({problem}): check the address, or upload the archive to S3") from None


def _copy(answer: Any, target: Path, url: str) -> int:
    """The body into a file; its bytes. Raises DataError when it is too large, too slow or ends early."""
    announced = answer.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) > MAX_DOWNLOAD_BYTES:
        raise DataError(f"{url} is larger than {MAX_DOWNLOAD_BYTES:,} bytes: put it into S3 instead")
    copied, looked, since = 0, time.monotonic(), 0
    with target.open("wb") as out:
        while block := answer.read1(BLOCK_BYTES):  # what has come, without waiting for a whole block
            copied += len(block)
            if copied > MAX_DOWNLOAD_BYTES:
                raise DataError(f"{url} is larger than {MAX_DOWNLOAD_BYTES:,} bytes: put it into S3 instead")
            out.write(block)
            passed = time.monotonic() - looked
            if passed >= SILENCE_S:
                if copied - since < passed * SLOWEST_BYTES_S:
                    pace = (copied - since) / passed
                    raise DataError(f"{url} sends {pace:.0f} bytes a second: upload the archive to S3 and give that")
                looked, since = time.monotonic(), copied
    if announced.isdigit() and copied != int(announced):
        raise DataError(f"{url} ended after {copied:,} of {int(announced):,} bytes: try again, or upload the archive to S3")
    return copied


def remote_tag(url: str, allowed: Sequence[str]) -> str | None:
    """A tag of an https archive from its headers alone, or None. Raises DataError for an address that is refused."""
    try:
        with _open(url, allowed, "HEAD") as answer:
            return _tag(answer, answer.headers.get("Content-Length"))
    except _FAILURES:
        return None  # the download will say what is wrong
