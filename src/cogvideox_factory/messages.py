"""How messages reach people and programs: plain lines, or JSON lines, on standard error.

Modules log as usual; only the commands' entry point and what draws progress bars know of the form. Rejected: a JSON
form of each message beside its text, in the modules that send it.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys

from tqdm import tqdm

from cogvideox_factory.redaction import without_secrets

PACKAGE = logging.getLogger("cogvideox_factory")


class AboveBarHandler(logging.Handler):
    """Writes log lines to standard error, above a bar that is being drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if not isinstance(self.formatter, JsonLines):  # which has done it, before what a redaction could tear
            text = without_secrets(text)
        tqdm.write(text, file=sys.stderr)


class JsonLines(logging.Formatter):
    """A message as one JSON object on one line: time (UTC), level, message, and what else the message carries as a
    mapping in `extra={"fields": …}`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": without_secrets(record.getMessage().strip()),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = without_secrets(self.formatException(record.exc_info))
        return json.dumps(line)  # ASCII alone, which any standard error can take


def configure(level: str = "info", form: str = "text") -> None:
    """From now on messages of this level and above are shown, as text or as json.

    As JSON, so are the warnings of other libraries that log in Python's way.
    """
    handler = AboveBarHandler()
    everything = logging.getLogger()
    for logger in (PACKAGE, everything):
        for earlier in [known for known in logger.handlers if isinstance(known, AboveBarHandler)]:
            logger.removeHandler(earlier)
    if form == "json":
        handler.setFormatter(JsonLines())
        everything.addHandler(handler)
    else:
        PACKAGE.addHandler(handler)
    logging.captureWarnings(form == "json")
    PACKAGE.setLevel(level.upper())


def are_json() -> bool:
    """Whether messages are for programs."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def tell(message: str, prefix: str = "") -> None:
    """How a command ended, for a person as one line after `prefix`; shown at every level."""
    if are_json():
        PACKAGE.error("%s", message)
    else:
        print(without_secrets(f"cogvideox-factory: {prefix}{message}"), file=sys.stderr)
