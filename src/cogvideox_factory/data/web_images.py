"""An image from the web, fetched without trusting the server, the name service, or the file.

Every name is resolved once and the connection goes to the very address that was judged, so that a name which changes
its answer in between (DNS rebinding) gains nothing. Rejected: an HTTP client library, which resolves names itself; it
would also take the connection through a proxy, where no address can be judged at all.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cogvideox_factory.config import UserError
from cogvideox_factory.redaction import redacted

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 65536
KEPT_IN_PATHS = "/%:@!$&'()*+,;=~-._"  # what a path or query may hold as it is; the rest is quoted
# IPv6 addresses that stand for an IPv4 address in their last four bytes: what a network without IPv4 translates.
NAT64 = ipaddress.ip_network("64:ff9b::/96")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Limits:
    """What a transfer may take."""

    num_bytes: int = 32 * 2**20
    seconds: float = 60.0  # of the whole transfer with its redirects, not of a single read
    num_redirects: int = 3
    num_pixels: int = 64 * 10**6


class _Refused(Exception):
    """Why an image was not taken."""


def fetch_image(address: str, *, allow_private: bool = False, limits: Limits | None = None) -> bytes:
    """The bytes of an image file at an http or https address, of a kind in `FORMATS` and readable to its end.

    Private, loopback, link-local, reserved and multicast addresses are refused unless `allow_private`.
    Raises UserError that names the address, without what may be secret in it, and the reason.
    """
    limits = limits or Limits()
    deadline = time.monotonic() + limits.seconds
    target = address
    try:
        for _ in range(limits.num_redirects + 1):
            content, location = _request(target, allow_private, limits, deadline)
            if location is None:
                _check_image(content, limits)
                return content
            target = urllib.parse.urljoin(target, location)
        raise _Refused(f"more than {limits.num_redirects} redirects")
    except _Refused as refused:
        reason = str(refused)
    except (OSError, http.client.HTTPException, ValueError) as error:
        # Past the deadline whatever went wrong did so because the connection was cut.
        reason = " ".join(str(error).split()) or type(error).__name__
        if time.monotonic() >= deadline:
            reason = f"took longer than {limits.seconds:g} s"
    through = "" if target == address else f" (redirected to {redacted(target)})"
    raise UserError(f"{redacted(address)}{through}: {reason}; download the image yourself and give its path")


def is_public(address: IPAddress) -> bool:
    """Whether an address is of the public internet, also where it stands for another one."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _request(address: str, allow_private: bool, limits: Limits, deadline: float) -> tuple[bytes, str | None]:
    """The body of an answer, or where it redirects to."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _Refused("is no http or https address")
    if parts.username is not None or parts.password is not None:
        raise _Refused("has a user or password in it, which is not supported")
    is_secure = parts.scheme == "https"
    port = parts.port or (443 if is_secure else 80)
    place = _resolve(parts.hostname, port, allow_private, deadline)
    path = urllib.parse.quote(parts.path or "/", safe=KEPT_IN_PATHS)
    query = f"?{urllib.parse.quote(parts.query, safe=KEPT_IN_PATHS + '?')}" if parts.query else ""
    connection = http.client.HTTPConnection(parts.hostname, port)
    with _connected(place, parts.hostname if is_secure else None, deadline) as connection.sock:
        headers = {"User-Agent": "cogvideox-factory", "Accept": "image/*", "Connection": "close"}
        connection.request("GET", path + query, headers=headers | {"Host": _host_header(parts)})
        answer = connection.getresponse()
        if answer.status in REDIRECTS:
            location = answer.getheader("Location")
            if not location:
                raise _Refused("redirects to nowhere")
            return b"", location.encode("latin-1", "replace").decode("utf-8", "replace")  # as browsers read it
        if answer.status != 200:
            raise _Refused(f"the server answers {answer.status} {answer.reason}")
        content = _read(answer, limits)
        if time.monotonic() >= deadline:  # a cut connection looks like the end of a body without a length
            raise TimeoutError
        return content, None


def _host_header(parts: urllib.parse.SplitResult) -> str:
    """The name that was asked for, as the server must be told it."""
    assert parts.hostname is not None
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname.encode("idna").decode()
    return name if parts.port is None else f"{name}:{parts.port}"


def _resolve(host: str, port: int, allow_private: bool, deadline: float) -> tuple[int, Any]:
    """Family and socket address of a host. One name service call: what it gives is judged, and then connected to."""
    found = _ask_name_service(host, port, deadline)
    if not allow_private:
        for *_, place in found:
            if not is_public(ipaddress.ip_address(str(place[0]).partition("%")[0])):
                raise _Refused(
                    f"{host} is {place[0]}, an address within a private network (--allow_private_addresses permits it)"
                )
    family, _, _, _, place = found[0]
    return family, place


def _ask_name_service(host: str, port: int, deadline: float) -> list[tuple[Any, ...]]:
    """All answers for a host, in a thread of its own: the system's call takes no time limit, and minutes where no name
    server answers. A thread that is given up ends with that call, or with the program."""
    answers: queue.SimpleQueue[list[tuple[Any, ...]] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=max(deadline - time.monotonic(), 0))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise _Refused(f"the name {host} is not known ({answer})") from answer
    return answer


@contextlib.contextmanager
def _connected(place: tuple[int, Any], tls_name: str | None, deadline: float) -> Iterator[socket.socket]:
    """A connection that is cut at the deadline, however busily the other side keeps it alive until then."""
    seconds_left = deadline - time.monotonic()
    if seconds_left <= 0:
        raise TimeoutError
    family, socket_address = place
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.settimeout(seconds_left)
    try:
        connection.connect(socket_address)
        if tls_name is not None:
            context = ssl.create_default_context()
            connection = context.wrap_socket(connection, server_hostname=tls_name, do_handshake_on_connect=False)
        # The plain shutdown, which also wakes a thread that waits within TLS.
        cut = threading.Timer(max(deadline - time.monotonic(), 0), _cut, [connection])
        cut.daemon = True
        cut.start()
        try:
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            yield connection
        finally:
            cut.cancel()
    finally:
        connection.close()


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _read(answer: http.client.HTTPResponse, limits: Limits) -> bytes:
    """The whole body. Raises _Refused where it is too large or shorter than announced."""
    too_large = f"is larger than {limits.num_bytes / 2**20:g} MiB"
    announced = answer.length
    if announced is not None and announced > limits.num_bytes:
        raise _Refused(too_large)
    content = bytearray()
    while chunk := answer.read1(CHUNK_BYTES):
        content += chunk
        if len(content) > limits.num_bytes:
            raise _Refused(too_large)
    if announced is not None and len(content) < announced:
        raise OSError(f"the connection ended after {len(content)} of {announced} bytes")
    return bytes(content)


def _check_image(content: bytes, limits: Limits) -> None:
    """Raises _Refused where the bytes are no image of a known kind, too many pixels, or cut short."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is told below
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > limits.num_pixels:
                    raise _Refused(f"has {image.width}×{image.height} pixels, more than {limits.num_pixels:,}")
                image.load()
    except Image.DecompressionBombError as error:
        raise _Refused(f"has more than {limits.num_pixels:,} pixels") from error
    except _Refused:
        raise
    except Exception as error:  # decoders raise whatever they stumble over
        raise _Refused(f"is no image that can be read ({', '.join(FORMATS)}; {error})") from error
