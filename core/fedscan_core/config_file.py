"""RUN.toml as people meet it: reading it with errors that help, explaining every key, and a file to start from.

Unknown keys are refused with the nearest right name. What `explain` prints is read off the types in
`fedscan_core.config`, so that the text cannot drift from the code.
"""

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ValidationError

from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a RUN.toml.

    Args:
        path: the file.
        overrides: `section.key=value` texts; the value is TOML, or a bare word taken as a string.

    Raises:
        ConfigError: unreadable, not TOML, an unknown key or a wrong value; the text names the key and the way out.
    """
    try:
        with path.open("rb") as file:
            tree = tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(
            f"There is no file {path}.", remedy="`fedscan config --sample` prints one to start from."
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a RUN.toml.", remedy="To go on with a run, use --resume.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text.", remedy="Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}.", remedy="Check the path and its permissions.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}.", remedy="Mend that line; text values need quotes."
        ) from None
    for override in overrides:
        _override(tree, override)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> RunConfig:
    """Checks a tree of values; see `load` for the errors."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        first: dict[str, str] = {}  # one problem for each key: a union reports one for each of its kinds
        for item in error.errors():
            first.setdefault(_key(item), _problem(item))
        text = "; ".join(first.values())
        raise ConfigError(
            f"RUN.toml: {text}{'' if text.endswith('?') else '.'}", remedy="`fedscan config --explain` lists every key."
        ) from None


def explain() -> Iterator[tuple[str, str, str, str]]:
    """Yields (key, type, default, description) for every key, in file order; a section has type ''."""
    yield from _explain(RunConfig, "")


SAMPLE = """\
# A whole experiment. `fedscan config --explain` lists every key.
name = "my-run"

[task]
labels = ["normal", "pneumonia"]
image_size = 64

[privacy]
target_epsilon = 8.0        # each site's total, training and evaluation together

[train]
rounds = 100

[data]
dir = "my-images"           # holds metadata.csv with the columns file, patient_id, label, site, split
"""


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: not of the form key=value.", remedy="For example --set train.rounds=10.")
    *sections, last = (part.strip() for part in key.split("."))
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"--set {text}: '{section}' is not a section.", remedy="`fedscan config --explain` lists every key."
            )
    try:
        tree[last] = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        tree[last] = value.strip()


def _key(item: Any) -> str:
    kinds = ("int", "float")
    return ".".join(str(part) for part in item["loc"] if part not in kinds and not str(part).startswith("literal["))


def _problem(item: Any) -> str:
    key = _key(item)
    loc = key.split(".") if key else []
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"'{key}' is a section: write [{key}] and its keys below"
    if item["type"] == "too_short":
        return f"'{key}' needs at least {item['ctx']['min_length']} values"
    if item["type"] == "extra_forbidden":
        section = _section(loc[:-1])
        names = list(section.model_fields) if section else []
        elsewhere = [k for k, kind, _, _ in explain() if kind and k.split(".")[-1] == loc[-1]]
        near = difflib.get_close_matches(loc[-1], names, n=1, cutoff=0.5)
        if near:
            return f"unknown key '{key}', did you mean '{'.'.join([*loc[:-1], near[0]])}'?"
        if elsewhere:
            return f"unknown key '{key}', did you mean '{elsewhere[0]}'?"
        return f"unknown key '{key}' (here are: {', '.join(names)})"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    return f"'{key}': {message[0].lower()}{message[1:]}"


def _section(loc: Sequence[str]) -> type[BaseModel] | None:
    here: type[BaseModel] = RunConfig
    for part in loc:
        if part.isdigit():
            continue
        field = here.model_fields.get(part)
        inner = _inner_section(field.annotation) if field else None
        if inner is None:
            return None
        here = inner
    return here


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds (also inside a tuple or a union), or None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in typing.get_args(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _explain(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        inner = _inner_section(field.annotation)
        if inner is not None:
            repeated = typing.get_origin(field.annotation) is tuple
            key = f"{prefix}{name}"
            yield f"[[{key}]]" if repeated else f"[{key}]", "", "", (inner.__doc__ or "").strip().splitlines()[0]
            yield from _explain(inner, f"{key}.")
        else:
            default = "required" if field.is_required() else _toml_value(field.default)
            yield f"{prefix}{name}", _type_text(field.annotation), default, field.description or ""


def _toml_value(value: Any) -> str:
    if value is None:
        return "unset"
    return (
        tomli_w.dumps({"v": list(value) if isinstance(value, tuple) else value}, multiline_strings=False)
        .removeprefix("v = ")
        .strip()
        .replace("\n", "")
        .replace("    ", " ")
    )


def _type_text(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " | ".join(json.dumps(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(_type_text(part) for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is tuple:
        return f"list of {_type_text(typing.get_args(annotation)[0])}"
    return {int: "integer", float: "number", str: "text", bool: "true | false"}.get(annotation, str(annotation))
