"""Where a configuration comes from: the JSON file, and over it the environment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, SecretStr

from ztun.config.problems import Location, Problem, choices, known_keys, step_into, unknown_key_in
from ztun.errors import ConfigError

PREFIX = "ZTUN_"
DELIMITER = "__"


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys were there more than once (RFC 8259 section 4)."""

    repeated: tuple[str, ...] = ()


def _make_object(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _value in pairs]
        made.repeated = tuple(dict.fromkeys(key for key in keys if keys.count(key) > 1))
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_file(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The object in the file, and the keys that it repeats. Raises ConfigError where there is no such object."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; --config takes the path of a JSON file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8, which JSON must be") from None
    try:
        document = json.loads(text, object_pairs_hook=_make_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = error.msg[:1].lower() + error.msg[1:]
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {message}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must hold a JSON object, {{...}}")
    return document, list(_find_repeated(document, ()))


def _find_repeated(value: Any, location: Location) -> Iterator[Problem]:
    if isinstance(value, _Object):
        for key in value.repeated:
            yield Problem((*location, key), "is there more than once; keep one")
        for key, part in value.items():
            yield from _find_repeated(part, (*location, key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _find_repeated(part, (*location, index))


class Overlay:
    """Values laid over a document, and where each came from, so that an error names the right place."""

    def __init__(self, root: type[BaseModel], document: dict[str, Any]) -> None:
        self.document = document
        self.origins: dict[Location, str] = {}
        self.problems: list[str] = []
        self._root = root

    def read_environment(self, environ: Mapping[str, str]) -> None:
        """ZTUN_SECTION__KEY=value for every key, however deep; a number is the place in a list (from 0)."""
        for variable in sorted(environ):  # ZTUN_TUN={...} first, so that it does not undo ZTUN_TUN__MTU
            if variable.startswith(PREFIX):
                self._read_variable(variable, environ[variable])

    def _read_variable(self, variable: str, text: str) -> None:
        parts = [int(part) if part.isdecimal() else part.lower() for part in variable[len(PREFIX) :].split(DELIMITER)]
        if len(parts) == 1 and parts[0] not in self._root.model_fields:
            return  # for some other purpose: every key of ours is in a section
        annotation: Any = self._root
        for part in parts:
            inner = step_into(annotation, part)
            if inner is None:
                self.problems.append(f"environment: {variable}: '{part}': {_no_step(annotation, part)}")
                return
            annotation = inner
        try:
            self.lay(tuple(parts), parse_text(annotation, text), f"environment: {variable}")
        except ValueError as error:
            self.problems.append(f"environment: {variable}: {error}")

    def lay(self, location: Location, value: Any, origin: str) -> None:
        """Put a value into the document, which is not changed itself. Raises ValueError where a list is too short."""
        self.document = _replaced(self.document, location, value)
        self.origins[location] = origin


def _no_step(annotation: Any, part: str | int) -> str:
    if any(get_origin(choice) is tuple for choice in choices(annotation)):
        return "must be the place in the list, from 0"
    known = known_keys(annotation)
    return unknown_key_in(annotation, str(part)) if known else "is below a single value; leave it out"


def _replaced(holder: Any, location: Location, value: Any) -> Any:
    if not location:
        return value
    part, *rest = location
    if isinstance(part, int):
        if not isinstance(holder, list) or part >= len(holder):
            raise ValueError(f"there is no element {part} to set")
        return [*holder[:part], _replaced(holder[part], tuple(rest), value), *holder[part + 1 :]]
    held = holder if isinstance(holder, dict) else {}
    return {**held, part: _replaced(held.get(part), tuple(rest), value)}


def parse_text(annotation: Any, text: str) -> Any:
    """The text of a variable as what JSON would have given: a list may also be written with commas.

    What does not parse is returned as it is; the models then say what they wanted. Raises ValueError for bad JSON.
    """
    wanted = choices(annotation)
    if type(None) in wanted and (text == "" or (text == "null" and SecretStr not in wanted)):
        return None
    if any(get_origin(choice) is tuple for choice in wanted) and not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    if any(get_origin(choice) is tuple or _is_model(choice) for choice in wanted):
        return _parse_json(text)
    if {bool, int, float}.intersection(wanted):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _is_model(choice: Any) -> bool:
    return isinstance(choice, type) and issubclass(choice, BaseModel)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"column {error.colno}: not JSON: {error.msg[:1].lower()}{error.msg[1:]}") from None
