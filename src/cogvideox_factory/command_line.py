"""A command's options from what was typed: flags, and the YAML file of --config, which becomes flags first.

The declarations stand in `config.py`; tyro turns them into a parser. Rejected: a reader of YAML beside the parser of
flags, in which a value could come to mean something else.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import logging
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from cogvideox_factory import __version__, messages
from cogvideox_factory.config import (
    COMMANDS,
    NEEDLESS,
    MessageOptions,
    UserError,
    nearest,
    option_values,
    read_config,
    walk_options,
)
from cogvideox_factory.redaction import without_secrets

AnyCommand = TypeVar("AnyCommand")
logger = logging.getLogger(__name__)


def parse_command(command_class: type[AnyCommand], name: str, arguments: Sequence[str]) -> AnyCommand:
    """Options of a command from its flags: a flag wins over the YAML of --config, which wins over the default.

    Raises UserError for a YAML file that cannot be used, a value that fails its check, or a required option that is
    missing; exits with code 2 and a message for flags that cannot be parsed. Messages are from now on as the options
    ask for.
    """
    arguments, yaml_file = _take_config_flag(list(arguments))
    first = getattr(command_class, "first_option", None)
    if first and arguments and not arguments[0].startswith("-"):  # RUN_A RUN_B is --run RUN_A RUN_B
        arguments = [f"--{first}", *arguments]
    from_yaml = _flags_from_yaml(yaml_file, command_class) if yaml_file else []
    configure_messages([*from_yaml, *arguments])
    arguments = _drop_needless(arguments, NEEDLESS.get(command_class, {}))
    try:
        with _told_as_error() if messages.are_json() else contextlib.nullcontext():
            options = _parse(command_class, name, [*from_yaml, *arguments])
    except SystemExit as exit_request:
        if not exit_request.code:  # after --help: where a long text ends, one sees the example first
            print(f"Example:\n  {getattr(command_class, 'example', '')}")
        raise
    values = option_values(options)
    for required in getattr(command_class, "required", ()):
        if values[required] in (None, ()):
            example = getattr(command_class, "example", "").split("\n")[0]
            raise UserError(f"--{required} is missing. Example: {example}")
    _check_values(options)
    return options


def configure_messages(arguments: Sequence[str]) -> None:
    """Have messages as these flags ask for, before the parser has read them: what it finds wrong is a message too.
    Values that it will refuse are passed over."""
    choices = {name: typing.get_args(hint) for name, hint in typing.get_type_hints(MessageOptions).items()}
    chosen = option_values(MessageOptions())
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        value = value if equals else following
        if flag.startswith("--") and value in choices.get(name, ()):
            chosen[name] = value
    messages.configure(chosen["log_level"], chosen["log_format"])


@contextlib.contextmanager
def _told_as_error() -> Iterator[None]:
    """What the parser says on standard error before it exits becomes a UserError, whose message is told as all others
    are."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as exit_request:
        if not exit_request.code:
            raise
        raise UserError(_without_box(said.getvalue())) from None


def _without_box(text: str) -> str:
    """What stands in a box that tyro drew, a line for each of its parts, without the title and colours."""
    _, *lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    inner = "\n".join("" if re.fullmatch(r"[\s│╰╯─-]*", line) else line.strip("│ ") for line in lines)
    return "\n".join(" ".join(part.split()) for part in re.split(r"\n{2,}", inner.strip()))


def _parse(command_class: type[AnyCommand], name: str, arguments: list[str]) -> AnyCommand:
    """What tyro makes of the flags. Its messages repeat what was typed and break it into lines, so they are made from
    flags in which no token is."""

    def parse(flags: list[str]) -> AnyCommand:
        return tyro.cli(
            command_class,
            prog=f"cogvideox-factory {name}",
            description=_description(command_class),
            args=flags,
            use_underscores=True,
            # Help stands in docstrings alone; to look for comments, tyro would read all of config.py a class.
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        )

    shown = _without_secrets(arguments)
    if shown == arguments:
        return parse(arguments)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parse(arguments)
    except SystemExit as exit_request:
        if exit_request.code:
            parse(shown)  # the same fault, told without what must not be shown
            raise UserError(
                "an option cannot be read, and what was typed may hold a token; look at --hub_token"
            ) from None
        raise


def _without_secrets(arguments: Sequence[str]) -> list[str]:
    """Arguments without tokens and signatures of addresses, and without the values of flags whose names are like
    --hub_token."""
    shown: list[str] = []
    is_secret = False
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, _ = argument.partition("=")
            is_secret = _is_like_hub_token(flag[2:].replace("-", "_").lower())
            shown.append(f"{flag}=…" if equals and is_secret else without_secrets(argument))
        else:
            shown.append("…" if is_secret else without_secrets(argument))
    return shown


def _is_like_hub_token(name: str) -> bool:
    return name != "id_token" and ("token" in name or bool(difflib.get_close_matches(name, ["hub_token"])))


def _take_config_flag(arguments: list[str]) -> tuple[list[str], Path | None]:
    """Arguments without --config, and its value."""
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag != "--config":
            continue
        if not equals:
            if index + 1 == len(arguments):
                raise UserError("--config needs a YAML file")
            value = arguments[index + 1]
        return arguments[:index] + arguments[index + (1 if equals else 2) :], Path(value)
    return arguments, None


def _drop_needless(arguments: list[str], needless: dict[str, str]) -> list[str]:
    """Arguments without the flags that have become needless and their values."""
    kept: list[str] = []
    is_dropping = False
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0]
            is_dropping = name in needless
            if is_dropping:
                logger.info("--%s is no longer needed: %s", name, needless[name])
        if not is_dropping:
            kept.append(argument)
    return kept


def _flags_from_yaml(path: Path, command_class: type) -> list[str]:
    """A YAML file as flags, so that a value means the same in both places and is checked by the same parser."""
    own = option_values(command_class())
    known = {name for command in COMMANDS.values() for name in option_values(command())}
    known |= {name for needless in NEEDLESS.values() for name in needless}  # config.yaml of an earlier version has them
    flags: list[str] = []
    for name, value in read_config(path).items():
        if name == "version":  # of the program that wrote a run's config.yaml
            continue
        if name not in known:
            raise UserError(f"{path}: unknown option {name}{nearest(str(name), sorted(known))}")
        if name not in own or value is None:  # a recipe serves several commands
            continue
        if isinstance(value, bool) and not isinstance(own[name], bool):
            value = "yes" if value else "no"  # YAML takes a bare yes or no for a truth value
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)] if value else []
        elif isinstance(value, dict):
            raise UserError(f"{path}: {name} must be a value or a list of values, not a mapping")
        else:
            flags.append(f"--{name}={value}")
    return flags


def _check_values(options: Any) -> None:
    for owner, name, annotation in walk_options(options):
        value = getattr(owner, name)
        for check in _checks(annotation):
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                complaint = check.complaint(number)
                if complaint:
                    raise UserError(f"--{name} {number}: {complaint}")


def _checks(annotation: Any) -> Iterator[Any]:
    """The checks in the metadata of an annotation, however deep the aliases nest."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        for part in typing.get_args(annotation):
            yield from _checks(part)
    elif typing.get_origin(annotation) is Annotated:
        inner, *metadata = typing.get_args(annotation)
        yield from _checks(inner)
        yield from (item for item in metadata if hasattr(item, "complaint"))


def _description(command_class: type) -> str:
    lines = inspect.cleandoc(command_class.__doc__ or "")
    lines += "\n\nAny option can also stand in a YAML file given with --config; a flag wins over the file."
    return lines


def overview() -> str:
    """The text of `cogvideox-factory --help`."""
    width = max(map(len, COMMANDS)) + 2
    rows = [
        f"  {name:<{width}}{' '.join((cls.__doc__ or '').split(chr(10) * 2)[0].split())}"
        for name, cls in COMMANDS.items()
    ]
    return "\n".join(
        [
            "CogVideoX Factory: fine-tune CogVideoX video models on your own clips.",
            "",
            "usage: cogvideox-factory COMMAND [OPTIONS]",
            "",
            *rows,
            "",
            "`cogvideox-factory COMMAND --help` explains the options of a command.",
            f"Version {__version__}.",
            "",
            "Example:",
            "  cogvideox-factory demo",
        ]
    )


def print_error(message: str) -> None:
    """What went wrong, on standard error."""
    messages.tell(message, "error: ")
