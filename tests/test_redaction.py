"""What is taken out of a text that people see, and what stays."""

from __future__ import annotations

import logging

import pytest

from cogvideox_factory import redaction
from cogvideox_factory.command_line import print_error
from cogvideox_factory.config import Secret
from cogvideox_factory.messages import AboveBarHandler
from cogvideox_factory.redaction import redacted, without_secrets

SIGNED = "https://u:p@a.example:8/b/c.png?X-Amz-Signature=0a1b#y"


def test_redacted_keeps_what_helps_and_drops_what_may_be_secret() -> None:
    assert redacted(SIGNED) == "https://a.example:8/b/c.png?…"
    assert redacted("http://a.example/\x1b[31m") == "http://a.example/�[31m"
    assert redacted("http://[half/a.png") == "the address"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"see {SIGNED} first", "see https://a.example:8/b/c.png?… first"),
        (f'["{SIGNED}", "b"]', '["https://a.example:8/b/c.png?…", "b"]'),
        (f"{SIGNED}:::HTTP://b.example/d?e|a.png", "https://a.example:8/b/c.png?…:::http://b.example/d?…|a.png"),
        ("ftp and https://a.example/b#c, as written", "ftp and https://a.example/b#c, as written"),
        ("https://[half/a.png?key=1", "the address"),
        ("Bearer hf_abcDEF1 and 'hf_x'", "Bearer hf_… and 'hf_…'"),
        ("a caption: is it? yes: 1/2", "a caption: is it? yes: 1/2"),
    ],
)
def test_addresses_and_tokens_within_a_text(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize("name", redaction.TOKEN_VARIABLES)
def test_tokens_of_the_environment_are_taken_out_whatever_they_look_like(monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, "0123abcd9876")
    assert without_secrets("Illegal header value b'Bearer 0123abcd9876\\n'") == "Illegal header value b'Bearer …\\n'"
    monkeypatch.setenv(name, "a")  # no token: it would make every text unreadable
    assert without_secrets("banana") == "banana"


def test_a_token_given_as_an_option_is_taken_out_whatever_it_looks_like(monkeypatch) -> None:
    monkeypatch.setattr(redaction, "_tokens", set())
    Secret("own-hub-token\n")
    assert without_secrets("sent own-hub-token.") == "sent …."


def test_log_lines_and_errors_show_no_secret(capfd: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "fetched %s with %s", (SIGNED, "hf_secret"), None)
    AboveBarHandler().emit(record)
    print_error(f"--image {SIGNED}: hf_secret")
    shown = capfd.readouterr().err
    assert "fetched https://a.example:8/b/c.png?… with hf_…" in shown and "--image https://a.example" in shown
    assert "0a1b" not in shown and "secret" not in shown
