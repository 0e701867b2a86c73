"""What is wrong with a configuration, each in one line that names the place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic_core import ErrorDetails

from ztun.config.values import describe

Location = tuple[str | int, ...]

_PLAIN_KEY = re.compile(r"[\w-]{1,64}")


class Problem(NamedTuple):
    location: Location
    message: str


def write_location(location: Location) -> str:
    """("route", "rules", 2, "ip_cidr", 0) as `route.rules[2].ip_cidr[0]`."""
    text = ""
    for part in location:
        if isinstance(part, int) or not _PLAIN_KEY.fullmatch(part):
            text += f"[{part!r}]"
        else:
            text += f".{part}" if text else part
    return text


def choices(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation comes down to, without Annotated and with unions taken apart."""
    if get_origin(annotation) is Annotated:
        return choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(choice for part in get_args(annotation) for choice in choices(part))
    return (annotation,)


def step_into(annotation: Any, part: str | int) -> Any:
    """The annotation of a key of a section or of an element of a list; None where there is none."""
    for choice in choices(annotation):
        if isinstance(part, int) and get_origin(choice) is tuple:
            return get_args(choice)[0]
        if isinstance(part, str) and isinstance(choice, type) and issubclass(choice, BaseModel):
            field = choice.model_fields.get(part)
            return field.annotation if field is not None else None
    return None


def annotation_at(root: type[BaseModel], location: Location) -> Any:
    annotation: Any = root
    for part in location:
        annotation = step_into(annotation, part)
    return annotation


def known_keys(annotation: Any) -> list[str]:
    for choice in choices(annotation):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return list(choice.model_fields)
    return []


def unknown_key(key: str, known: list[str], *, list_all: bool = False) -> str:
    close = get_close_matches(key, known, n=1)
    guess = f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown key{guess}" + (f"; known here: {', '.join(known)}" if list_all or not close else "")


def unknown_key_in(annotation: Any, key: str) -> str:
    """What to say of a key that a section does not have."""
    list_all = any(getattr(choice, "lists_all_keys", False) for choice in choices(annotation))
    return unknown_key(key, known_keys(annotation), list_all=list_all)


def translate(root: type[BaseModel], error: ErrorDetails) -> Problem:
    """A finding of pydantic in our words. The value is not repeated where it is a secret."""
    location = error["loc"]
    annotation = annotation_at(root, location)
    but = "" if SecretStr in choices(annotation) else f", not {describe(error['input'])}"
    context: Mapping[str, Any] = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            message = unknown_key_in(annotation_at(root, location[:-1]), str(location[-1]))
        case "missing":
            message = "is missing"
        case "value_error":
            message = str(context["error"])
        case "model_type" | "model_attributes_type" | "dict_type":
            message = f"must be an object{but}"
        case "tuple_type" | "list_type":
            message = f"must be a list{but}"
        case "string_type":
            message = f"must be a string{but}"
        case "bool_type" | "bool_parsing":
            message = f"must be true or false{but}"
        case "int_type" | "int_parsing" | "int_from_float":
            message = f"must be a whole number{but}"
        case "float_type" | "float_parsing" | "finite_number":
            message = f"must be a number{but}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            message = f"must be {_bound(context)}{but}"
        case "too_short":
            message = "is an empty list; leave the key out"
        case "literal_error":
            message = f"must be {context['expected']}{but}"
        case _:
            message = error["msg"]
    return Problem(location, message)


def _bound(context: Mapping[str, Any]) -> str:
    for key, words in (("gt", "more than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most")):
        if key in context:
            return f"{words} {context[key]:.15g}"
    return "in range"
