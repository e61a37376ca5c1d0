"""The `*_kwargs` of an attention form: options that only one feature map or one decay has."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any


def known_options(cls: type, *given: str) -> list[str]:
    """The arguments of `cls` but those called `given`, which its builder passes itself."""
    return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", *given)]


def check_options(argument: str, name: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """Check that `name` has every option.

    Raises:
        ValueError: naming `argument`, the option and those that are known.
    """
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{argument}: {name!r} has no option {unknown[0]!r}; its options: {', '.join(known) or 'none'}"
        )
