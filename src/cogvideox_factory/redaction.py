"""Keeps secrets out of what is shown: tokens, and what gives access in the addresses of the web.

It stands before everything that people see or hand around: log lines, errors, reports, JSON. Rejected: to leave it to
each message; libraries write messages too, and quote the header or the address that they stumble over.
"""

from __future__ import annotations

import os
import re
import urllib.parse

# Variables that hold tokens of the services a run speaks to.
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
# What is shorter is no token, and might stand in any text.
SHORTEST_TOKEN = 8
HUB_TOKEN = re.compile(r"hf_\w+")
# To the end of the word, but not into what may follow it in a list of addresses.
ADDRESS = re.compile(r"https?://(?:(?!:::|https?://)[^\s\"'<>|])+", re.IGNORECASE)
_tokens: set[str] = set()


def remember_token(token: str) -> None:
    """Take this text out of everything that `without_secrets` sees from now on."""
    _tokens.add(token.strip())


def without_secrets(text: str) -> str:
    """A text without tokens, known by their form or as the environment's and the options', and with its addresses as
    `redacted` gives them."""
    for token in {*_tokens, *(os.environ.get(name, "").strip() for name in TOKEN_VARIABLES)}:
        if len(token) >= SHORTEST_TOKEN:
            text = text.replace(token, "…")
    text = HUB_TOKEN.sub("hf_…", text)
    return ADDRESS.sub(lambda match: redacted(match[0]) if gives_access(match[0]) else match[0], text)


def gives_access(address: str) -> bool:
    """Whether an address holds a user, a password or a query, of which a signature may be a part."""
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError:  # nobody can say what is in it
        return True
    return bool(parts.query) or "@" in parts.netloc


def redacted(address: str) -> str:
    """An address without user, password and query."""
    try:
        parts = urllib.parse.urlsplit(address)
        place = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "the address"
    shown = f"{parts.scheme}://{place}{parts.path}" + ("?…" if parts.query else "")
    return "".join(character if character.isprintable() else "�" for character in shown)
