"""Images from a server on this machine, and every way in which a server may not be trusted."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogvideox_factory.config import UserError
from cogvideox_factory.data.web_images import FORMATS, Limits, fetch_image, is_public

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """A web server on loopback; `answers` says what each path does. `done` is set when the test is over."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, str]] = []  # path and Host header
        self.done = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append((self.path, self.headers["Host"]))
                with contextlib.suppress(OSError):  # the client has seen enough
                    server.answers[self.path.partition("?")[0]](self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_address[1]
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def at(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def sends(self, path: str, content: bytes, kind: str = "image/png", length: int | None = None) -> str:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Type", kind)
            handler.send_header("Content-Length", str(len(content) if length is None else length))
            handler.end_headers()
            handler.wfile.write(content)

        self.answers[path] = answer
        return self.at(path)

    def redirects(self, path: str, location: str) -> str:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(302)
            handler.send_header("Location", location)
            handler.end_headers()

        self.answers[path] = answer
        return self.at(path)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.thread.start()
    yield server
    server.done.set()
    server.http.shutdown()
    server.http.server_close()


def picture(kind: str = "PNG", size: tuple[int, int] = (48, 32)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def fetch(address: str, **limits: Any) -> bytes:
    return fetch_image(address, allow_private=True, limits=Limits(**limits))


def resolver(monkeypatch: pytest.MonkeyPatch, *answers: tuple[str, int]) -> list[str]:
    """A name service that gives one answer after another; the names that it was asked for."""
    asked: list[str] = []
    left = list(answers)

    def resolve(host: str, port: int, *arguments: Any, **options: Any) -> list[tuple[Any, ...]]:
        asked.append(host)
        place, at = left.pop(0)
        family = socket.AF_INET6 if ":" in place else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (place, at))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


# --- what is taken ---


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_comes_back_byte_for_byte_whatever_the_server_calls_it(server: Server, kind: str) -> None:
    content = picture(kind)
    assert fetch(server.sends("/image", content, "text/html")) == content


def test_a_body_without_a_length_is_read_to_its_end(server: Server) -> None:
    content = picture()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content)

    server.answers["/image"] = answer
    assert fetch(server.at("/image")) == content


def test_redirects_are_followed_and_names_with_spaces_are_quoted(server: Server) -> None:
    content = picture()
    server.sends("/a%20b/%C3%BC.png", content)
    server.redirects("/second", "/a b/ü.png?signed=yes".encode().decode("latin-1"))
    assert fetch(server.redirects("/first", "second")) == content
    assert fetch(server.at("/a b/ü.png?x=1 2")) == content
    assert server.requests[-1][0] == "/a%20b/%C3%BC.png?x=1%202"


def test_the_connection_goes_to_the_one_answer_of_the_name_service(server: Server, monkeypatch) -> None:
    """A second question could get another answer, and so an address that nobody judged."""
    content = picture()
    server.sends("/image", content)
    asked = resolver(monkeypatch, ("127.0.0.1", server.port))
    assert fetch("http://images.example:8000/image") == content
    assert asked == ["images.example"]
    assert server.requests == [("/image", "images.example:8000")]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
@pytest.mark.parametrize("name", ["images.example", "other.example"])
def test_https_checks_the_certificate_for_the_name_not_for_the_address(
    server: Server, tmp_path: Path, monkeypatch, name: str
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=images.example", "-addext", "subjectAltName=DNS:images.example", "-days", "2"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    content = picture()
    server.sends("/image", content)
    resolver(monkeypatch, ("127.0.0.1", server.port))
    if name == "images.example":
        assert fetch(f"https://{name}/image") == content
        assert server.requests == [("/image", name)]
    else:
        with pytest.raises(UserError, match=r"https://other.example/image: .*certificate"):
            fetch(f"https://{name}/image")
        assert server.requests == []


# --- where it may come from ---


PRIVATE = [
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
    *("240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
    *("::1", "::", "fe80::1", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::10.0.0.1", "64:ff9b::7f00:1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public_are_refused(address: str, monkeypatch) -> None:
    assert not is_public(ipaddress.ip_address(address))
    resolver(monkeypatch, (address, 80))
    with pytest.raises(UserError, match=r"http://images.example/image: .* private network"):
        fetch_image("http://images.example/image")


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_public_addresses_are_not(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_this_machine_is_refused_however_it_is_spelled(server: Server, host: str) -> None:
    server.sends("/image", picture())
    with pytest.raises(UserError, match=r"private network|is not known"):
        fetch_image(f"http://{host}:{server.port}/image")
    assert server.requests == []


def test_one_private_answer_among_public_ones_is_enough(monkeypatch) -> None:
    def resolve(*arguments: Any, **options: Any) -> list[tuple[Any, ...]]:
        places = [("93.184.216.34", 80), ("10.0.0.1", 80)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(UserError, match="private network"):
        fetch_image("http://images.example/image")


def test_a_redirect_to_a_private_address_is_refused(server: Server, monkeypatch) -> None:
    content = picture()
    server.sends("/secret", content)
    address = server.redirects("/first", f"http://10.0.0.1:{server.port}/secret")
    # The first hop counts as public here, so that only the second can be what is refused.
    from cogvideox_factory.data import web_images

    monkeypatch.setattr(web_images, "is_public", lambda place: place.is_loopback)
    with pytest.raises(UserError, match=r"/first \(redirected to http://10\.0\.0\.1.*private network"):
        fetch_image(address)
    assert [path for path, _ in server.requests] == ["/first"]


# --- what is refused ---


def test_an_endless_body_is_cut_off(server: Server) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not server.done.is_set():
            handler.wfile.write(b"x" * 65536)

    server.answers["/image"] = answer
    with pytest.raises(UserError, match=r"/image: is larger than 1 MiB"):
        fetch(server.at("/image"), num_bytes=2**20)


def test_a_body_that_is_announced_as_too_large_is_not_read(server: Server) -> None:
    address = server.sends("/image", b"", length=2**40)  # and then nothing comes: reading would wait for ever
    with pytest.raises(UserError, match=r"is larger than 32 MiB"):
        fetch(address)


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 100 C\r\n\r\n"])
def test_a_server_that_drips_is_cut_off(server: Server, begin: bytes) -> None:
    """Every read succeeds, in the answer's first line, its headers and its body alike; the whole never ends."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(begin)
        while not server.done.wait(0.01):
            handler.wfile.write(b"x")

    server.answers["/image"] = answer
    with pytest.raises(UserError, match=r"/image: took longer than 0\.2 s"):
        fetch(server.at("/image"), seconds=0.2)


def test_a_server_that_says_nothing_is_cut_off(server: Server) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        server.done.wait()

    server.answers["/image"] = answer
    with pytest.raises(UserError, match=r"took longer than 0\.2 s"):
        fetch(server.at("/image"), seconds=0.2)


def test_a_name_service_that_does_not_answer_is_not_waited_for(monkeypatch) -> None:
    is_over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: is_over.wait())
    try:
        with pytest.raises(UserError, match=r"http://images.example/image: took longer than 0\.2 s"):
            fetch("http://images.example/image", seconds=0.2)
    finally:
        is_over.set()


def test_a_redirect_loop_ends(server: Server) -> None:
    with pytest.raises(UserError, match="more than 3 redirects"):
        fetch(server.redirects("/loop", "/loop"))
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<html>Not an image</html>", "is no image"),
        (b"", "is no image"),
        (picture()[:-200], "is no image"),
        (picture("JPEG")[:400], "is no image"),
        (picture("TIFF"), "is no image"),
        (picture("PNG", (64, 64)), "has 64×64 pixels, more than 4,000"),
    ],
)
def test_what_is_no_image_of_a_known_kind_is_refused(server: Server, content: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        fetch(server.sends("/image", content, "image/png"), num_pixels=4000)


def test_a_decompression_bomb_is_refused_by_its_header(server: Server) -> None:
    file = io.BytesIO()
    Image.new("1", (14000, 14000)).save(file, "PNG")  # 196 million pixels in 24 kilobytes
    with pytest.raises(UserError, match="pixels"):
        fetch(server.sends("/image", file.getvalue()))


def test_a_transfer_that_breaks_off_is_told(server: Server) -> None:
    content = picture()
    with pytest.raises(UserError, match=rf"ended after {len(content)} of {len(content) + 9} bytes"):
        fetch(server.sends("/image", content, length=len(content) + 9))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("ftp://example.org/image.png", "ftp://example.org/image.png: is no http or https address"),
        ("file:///etc/passwd", "is no http or https address"),
        ("http:///image.png", "is no http or https address"),
        ("http://example.org:port/", "ort"),
        ("http://user:secret@example.org/a.png", "http://example.org/a.png: has a user or password in it"),
        ("http://no-such-name.invalid/a.png?key=secret", r"http://no-such-name.invalid/a.png\?…: .* not known"),
        ("http://[half/a.png", "the address"),
    ],
)
def test_other_addresses_are_refused_and_no_secret_is_repeated(address: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        fetch(address)
    assert "secret" not in str(refused.value)


def test_the_servers_refusal_is_told(server: Server) -> None:
    server.answers["/image"] = lambda handler: handler.send_error(404)
    with pytest.raises(UserError, match=r"/image: the server answers 404 Not Found"):
        fetch(server.at("/image"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="refused"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/image")
