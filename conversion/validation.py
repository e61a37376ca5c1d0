"""From a plain dict to a frozen section of the configuration, with errors that name key, expectation and value."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from hf_linattn.config import LinearAttentionConfig
from hf_linattn.errors import UserError


class Section(BaseModel):
    """Base of every part of the tree: immutable, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def build_config(cls: type[Section], raw: dict[str, Any], overrides: Iterable[str], source: str):
    """`cls` from a plain dict with `section.key=value` overrides laid over it; `source` is named in errors.

    Raises:
        UserError: see `load_recipe`.
    """
    for override in overrides:
        _apply_override(raw, override)
    _check_keys(raw, cls, "", source)
    try:
        return cls(**raw)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from None
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise UserError(f"--set: expected section.key=value, got {override!r}")
    *parents, key = path.strip().split(".")
    for parent in parents:
        child = raw.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {parent!r} is a value, not a section")
        raw = child
    try:
        raw[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {text!r} is not a YAML value; quote it") from None


def _check_keys(raw: Mapping[str, Any], cls: type, prefix: str, source: str) -> None:
    fields = _field_types(cls)
    for key, value in raw.items():
        if key not in fields:
            raise UserError(f"{source}: unknown key {prefix + str(key)!r}{nearest(str(key), fields, prefix)}")
        section = _section_type(fields[key])
        if section is None:
            continue
        if not isinstance(value, Mapping):
            raise UserError(
                f"{source}: {prefix}{key}: expected a mapping of {', '.join(_field_types(section))}, got {value!r}"
            )
        _check_keys(value, section, f"{prefix}{key}.", source)


def _field_types(cls: type) -> dict[str, Any]:
    if dataclasses.is_dataclass(cls):
        return typing.get_type_hints(cls)
    return {name: field.annotation for name, field in cls.model_fields.items()}


def _section_type(annotation: Any) -> type | None:
    """The nested section an annotation stands for, or None for a plain value."""
    candidates = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and (issubclass(candidate, (Section, LinearAttentionConfig))):
            return candidate
    return None


def nearest(key: str, known: Iterable[str], prefix: str = "") -> str:
    """The part of an error text that helps with a misspelt `key`: the nearest of `known`, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix + near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error":
            lines.append(f"{name}: {message}" if name else message)
        else:
            lines.append(f"{name}: {message[0].lower() + message[1:]}, got {item['input']!r}")
    return "; ".join(lines)
