"""Plain data of avmm's own classes as JSON and back: dataclasses, enumerations, tuples, bytes, paths.

What JSON does not have is an object with one key that says what it is. Only dataclasses and enumerations of avmm are
ever made from a file, and nothing in it is run. Paths become absolute.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any


class NotPlain(ValueError):
    """What was found is not what :func:`dumps` writes, or is of a class this avmm does not have."""


def dumps(value: Any) -> bytes:
    """``value`` as JSON. Lists come back as tuples. Raises TypeError for what is not plain."""
    return json.dumps(_encode(value), separators=(",", ":")).encode()


def loads(data: bytes) -> Any:
    """What :func:`dumps` was given. Raises NotPlain."""
    try:
        return _decode(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RecursionError) as error:
        raise NotPlain(str(error)) from error


def _encode(value: Any) -> Any:
    if isinstance(value, Enum):
        return {"enum": [_name(type(value)), value.value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes | bytearray):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        return [_encode(each) for each in value]
    if isinstance(value, dict):
        return {"dict": [[_encode(key), _encode(each)] for key, each in value.items()]}
    if isinstance(value, Path):
        return {"path": os.path.abspath(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {_name(type(value)): {each.name: _encode(getattr(value, each.name)) for each in fields(value)}}
    raise TypeError(f"{type(value).__name__} is not plain data")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(each) for each in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "enum":
        return _class(content[0], Enum)(content[1])
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind == "dict":
        return {_decode(key): _decode(each) for key, each in content}
    if kind == "path":
        return Path(content)
    made: Any = _class(kind, object)
    if not hasattr(made, "__dataclass_fields__"):
        raise NotPlain(f"{kind} is not plain data")
    return made(**{name: _decode(each) for name, each in content.items()})


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str, base: type) -> Any:
    module, _, qualname = name.partition(":")
    if not module.startswith("avmm."):
        raise NotPlain(f"{name} is not a class of avmm's")
    found = getattr(import_module(module), qualname)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise NotPlain(f"{name} is not a class of avmm's")
    return found
