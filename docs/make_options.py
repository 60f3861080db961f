"""Writes docs/options.md, the table of every option, from the declarations themselves. A test keeps it true."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cogvideox_factory.config import COMMANDS, NEEDLESS

PAGE = Path(__file__).parent / "options.md"
INTRODUCTION = """\
# Every option

Made from the declarations in `src/cogvideox_factory/config.py` by `docs/make_options.py`; `cogvideox-factory COMMAND
--help` says the same. Each option can also stand in a YAML file given with `--config`. A switch is turned off, where a
YAML file has turned it on, by `--no_` before its name.
"""


class Option(NamedTuple):
    """A row of the table."""

    name: str
    aliases: tuple[str, ...]
    default: str
    help: str


def groups() -> dict[str, tuple[str, dict[str, Option], list[str]]]:
    """Title → what the group is about, its options, and the commands that take it."""
    found: dict[str, tuple[str, dict[str, Option], list[str]]] = {}
    for command, command_class in COMMANDS.items():
        for title, group_class in _groups_of(command, command_class):
            about = " ".join((inspect.getdoc(group_class) or "").split("\n\n")[0].split())
            _, options, commands = found.setdefault(title, (about, {}, []))
            options.update((option.name, option) for option in _options_of(group_class))
            commands.append(command)
    found["Message options"] = found.pop("Message options")  # of every command, and the least of what people look for
    return found


def _groups_of(command: str, command_class: type) -> Iterator[tuple[str, type]]:
    hints = typing.get_type_hints(command_class)
    for item in dataclasses.fields(command_class):
        if dataclasses.is_dataclass(hints[item.name]):
            words = re.findall(r"[A-Z][a-z]+", hints[item.name].__name__)  # the last of which is Options
            yield " ".join(words).capitalize(), hints[item.name]
    yield f"Of `{command}` alone", command_class


def _options_of(group_class: type) -> Iterator[Option]:
    hints = typing.get_type_hints(group_class, include_extras=True)
    for item in dataclasses.fields(group_class):
        arguments = [part for part in _metadata(hints[item.name]) if hasattr(part, "help_behavior_hint")]
        help_text = next((part.help for part in arguments if part.help), None)
        if help_text is None:  # a group within a command
            continue
        aliases = tuple(alias for part in arguments for alias in part.aliases or ())
        yield Option(item.name, aliases, _spell(item.default), help_text)


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation)[1:] if typing.get_origin(annotation) is typing.Annotated else ()


def _spell(default: Any) -> str:
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return f"`{' '.join(map(str, default))}`"
    return f"`{default}`"


def page() -> str:
    """The whole text of docs/options.md."""
    parts = [INTRODUCTION]
    for title, (about, options, commands) in sorted(groups().items(), key=lambda item: item[0].startswith("Of `")):
        taken_by = ", ".join(f"`{command}`" for command in commands)
        heading = f"## {title}\n\n{about}" + ("" if title.startswith("Of `") else f" Taken by {taken_by}.")
        rows = ["| option | default | what it does |", "|---|---|---|"]
        for option in options.values():
            names = ", ".join(f"`{name}`" for name in (f"--{option.name}", *option.aliases))
            rows.append(f"| {names} | {option.default} | {option.help.replace('|', chr(92) + '|')} |")
        parts.append(heading + "\n\n" + "\n".join(rows) + "\n" if options else "")
    rows = ["| option | command | what happens instead |", "|---|---|---|"]
    names = {command_class: command for command, command_class in COMMANDS.items()}
    for command_class, needless in NEEDLESS.items():
        rows += [f"| `--{name}` | `{names[command_class]}` | {reason} |" for name, reason in needless.items()]
    parts.append(
        "## No longer needed\n\nAccepted, so that existing scripts run, and without effect.\n\n"
        + "\n".join(rows)
        + "\n"
    )
    return "\n".join(part for part in parts if part)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
