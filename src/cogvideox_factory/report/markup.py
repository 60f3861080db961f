"""The pieces of HTML that pages are made of.

Whatever comes from a file passes through `text` or `number` on its way in.

Rejected: a template library, one more package to trust and to install for a few tables.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("page.css").read_text("utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text("utf-8")


def page(kind: str, title: str, summary: str, sections: Sequence[str]) -> str:
    """A whole page. `summary` and `sections` are markup, `kind` and `title` are not."""
    # With this policy the browser itself refuses to fetch anything and to run any script but ours.
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)} · CogVideoX Factory</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="quiet">CogVideoX Factory · {text(kind)}</p>
<h1>{text(title)}</h1>
{summary}
</header>
<main>
{"".join(sections)}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def text(value: object) -> str:
    return escape(str(value))


def number(value: float) -> str:
    shown = f"{value:.3e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return re.sub(r"\.?0*e\+?(-?)0*", r"e\1", shown)  # 1e-4, not 1.000e-04


def section(title: str, *parts: str) -> str:
    return "\n".join(["<section>", f"<h2>{title}</h2>", *parts, "</section>\n"])


def quiet(sentence: object) -> str:
    return f'<p class="quiet">{text(sentence)}</p>'


def note(sentence: object) -> str:
    return f'<p class="note">{text(sentence)}</p>'


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Headings and cells are texts. A wide table scrolls in its own frame and leaves the page as wide as the phone."""
    head = "".join(f'<th scope="col">{text(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    wide = ' class="wide"' if len(headings) > 3 else ""
    return f"<div{wide}><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>"
