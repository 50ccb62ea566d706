"""A run's config: a YAML preset, then dotted overrides, checked field by field."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from dalle_mini_impl.errors import UserError, one_line

Config = TypeVar("Config")
PACKAGE = Path(__file__).parent
PRESETS = "configs"


def load_config(
    config_class: type[Config], arguments: Sequence[str], *, description: str
) -> tuple[Config, str | None]:
    """Read ``--config FILE``, then ``--section.field VALUE`` overrides.

    Args:
        config_class: A run's dataclass.
        arguments: The command line without the program.
        description: First line of ``--help``.

    Returns:
        The config, and the value of ``--resume``. A leading ``~`` is the home folder in both.

    Raises:
        UserError: If a key is unknown, a required field is missing, or a value does not fit.
    """
    if not {"-h", "--help"}.isdisjoint(arguments):  # else the fields' docstrings only cost time
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
    arguments = _with_preset_found(arguments)
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML preset; see configs/*/*.yaml")
    parser.add_argument(
        "--resume", type=str | None, default=None, help="latest, or a checkpoint folder"
    )
    parser.add_class_arguments(config_class, as_positional=False)
    try:
        parsed = parser.instantiate(parser.parse_args(list(arguments)))
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"config: {one_line(error)}; expected a YAML file in UTF-8") from None
    except (ArgumentError, ValueError, TypeError) as error:
        reason = _dotted(_in_our_words(one_line(error)), config_class)
        raise UserError(
            f"{_file_of(reason, arguments)}{reason}; --help lists all options"
        ) from None
    # What is left are the fields of the dataclass, its sections already built.
    values: dict[str, Any] = vars(parsed)
    resume = values.pop("resume")
    values.pop("config", None)
    try:
        config = _with_home_expanded(config_class(**values))
    except ValueError as error:
        reason = one_line(error)
        raise UserError(f"{_file_of(reason, arguments)}{reason}") from None
    return config, resume and os.path.expanduser(resume)


def read_config(config_class: type[Config], path: str | Path) -> Config:
    """Read a preset without overrides; raises as ``load_config``."""
    return load_config(config_class, ["--config", str(path)], description="")[0]


def find_preset(path: str | Path) -> Path:
    """Find ``configs/...``: below the working folder, else among the presets of the package."""
    path = Path(path).expanduser()
    if path.exists() or path.parts[:1] != (PRESETS,):
        return path
    # A wheel has them in the package; a checkout without links has them next to it.
    for folder in (PACKAGE, PACKAGE.parent):
        if (folder / path).exists():
            return folder / path
    return path


def _with_preset_found(arguments: Sequence[str]) -> list[str]:
    found = list(arguments)
    for index, argument in enumerate(found):
        if argument.startswith("--config="):
            found[index] = f"--config={find_preset(argument.removeprefix('--config='))}"
        elif index and found[index - 1] == "--config":
            found[index] = str(find_preset(argument))
    return found


def _with_home_expanded(config: Any) -> Any:
    """Expand ``~`` at the start of every text; the shell does not in YAML or after a ``=``."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _with_home_expanded(value)
        elif isinstance(value, str) and value.startswith("~"):
            changes[field.name] = os.path.expanduser(value)
        elif isinstance(value, dict):
            changes[field.name] = {os.path.expanduser(key): item for key, item in value.items()}
    return dataclasses.replace(config, **changes)


def _in_our_words(reason: str) -> str:
    """Rewrite jsonargparse's errors in the form "field: got X, expected Y"."""
    reason = re.sub(r"Group '(\S+)' does not accept option '(\S+)'", r"\1.\2: unknown key", reason)
    # Of a union: 'Parser key "a.b": ... Subtypes: [<types>] Errors: ... Given value: x';
    # of one type: 'Parser key "a.b": Expected a <type>. Got value: x'.
    match = re.fullmatch(
        r'Parser key "(\S+)": (?:.* Subtypes: \[(.*?)\] Errors: .* Given value|'
        r"Expected an? (.*)\. Got value): (.*)",
        reason,
    )
    if not match:
        return reason
    key, types, kind, value = match.groups()
    expected = re.sub(r"<class '(\w+)'>", r"\1", types or kind).replace("typing.Literal", "one of ")
    expected = expected.replace("int, tuple[int, int]", "int or [int, int]")
    return f"{key}: got {value}, expected {expected.replace(', NoneType', ' or null')}"


def _dotted(reason: str, config_class: type[Any]) -> str:
    """Put its section before a field whose own dataclass does not know where it stands."""
    name = re.split(r"\W", reason, maxsplit=1)[0]
    sections = [each for each in dataclasses.fields(config_class) if _is_section(each.type)]
    # Nearest first: a field of the sections themselves, then one further down.
    for section in sections:
        if name in {field.name for field in dataclasses.fields(section.type)}:  # type: ignore[arg-type]
            return f"{section.name}.{reason}"
    for section in sections:
        inner = _dotted(reason, section.type)  # type: ignore[arg-type]
        if inner != reason:
            return f"{section.name}.{inner}"
    return reason


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _file_of(reason: str, arguments: Sequence[str]) -> str:
    """Name the preset if the field at fault stands in it and not on the command line."""
    field = re.split(r"[:\s]", reason, maxsplit=1)[0]
    # ``--config=x`` and ``--config x`` alike.
    given = [part for argument in arguments for part in argument.split("=", 1)]
    if "--config" not in given[:-1] or f"--{field}" in given:
        return ""
    path = Path(given[given.index("--config") + 1])
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    is_there = f"{field.rpartition('.')[2]}:" in text
    return f"{path}: " if is_there or reason.startswith("Problems parsing") else ""
