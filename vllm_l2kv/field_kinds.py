"""Kinds of values of request fields: each has its check, its bounds in words and its JSON schema.

Standard library only. A name is passed to every check, so that the error can show it as the user wrote it.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

MAX_TOKENS = 2**31 - 1
"""Largest count that a request may name; vLLM keeps lengths in 32-bit integers."""


class ParamError(ValueError):
    """A field with a value out of bounds, or an unknown `kv_` field.

    Attributes:
        param: Name of the offending field, as the client wrote it.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Ratio:
    """A number in (0, 1]."""

    type: ClassVar[str] = "number"

    def bounds(self, name: str) -> str:
        """The bounds, in words."""
        return f"0 < {name} <= 1"

    def schema(self) -> dict[str, Any]:
        """The bounds, for OpenAPI."""
        return {"type": self.type, "exclusiveMinimum": 0, "maximum": 1}

    def check(self, name: str, value: Any) -> float:
        """Returns the ratio as a float.

        Raises:
            ParamError: Not a number, or out of bounds.
        """
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ParamError(name, f"{name} must be a number with {self.bounds(name)}, got {_show(value)}.")
        # Compare before converting: float() of a huge integer overflows. NaN fails the comparison.
        if not 0 < value <= 1 or math.isnan(value):
            raise ParamError(name, f"{name} must satisfy {self.bounds(name)}, got {_show(value)}.")
        return float(value)


@dataclass(frozen=True)
class Count:
    """A number of tokens."""

    minimum: int = 0
    type: ClassVar[str] = "integer"

    def bounds(self, name: str) -> str:
        """The bounds, in words."""
        return f"{self.minimum} <= {name} <= {MAX_TOKENS}"

    def schema(self) -> dict[str, Any]:
        """The bounds, for OpenAPI."""
        return {"type": self.type, "minimum": self.minimum, "maximum": MAX_TOKENS}

    def check(self, name: str, value: Any) -> int:
        """Returns the count.

        Raises:
            ParamError: Not an integer, or out of bounds.
        """
        if isinstance(value, bool) or not isinstance(value, int):
            raise ParamError(name, f"{name} must be an integer >= {self.minimum}, got {_show(value)}.")
        if not self.minimum <= value <= MAX_TOKENS:
            raise ParamError(name, f"{name} must satisfy {self.bounds(name)}, got {_show(value)}.")
        return value


@dataclass(frozen=True)
class Choice:
    """One of a few names.

    Attributes:
        names: Those that are offered.
        unlisted: Matches the whole of others, which only some engines take; each says why where it does not.
    """

    names: tuple[str, ...]
    unlisted: re.Pattern[str] | None = None
    type: ClassVar[str] = "string"

    def bounds(self, name: str) -> str:
        """The bounds, in words."""
        return f"one of {', '.join(self.names)}"

    def schema(self) -> dict[str, Any]:
        """The bounds, for OpenAPI."""
        return {"type": self.type, "enum": list(self.names)}

    def check(self, name: str, value: Any) -> str:
        """Returns the name.

        Raises:
            ParamError: Not one of the names.
        """
        if isinstance(value, str) and (value in self.names or (self.unlisted and self.unlisted.fullmatch(value))):
            return value
        raise ParamError(name, f"{name} must be {self.bounds(name)}, got {_show(value)}.")


Kind = Ratio | Count | Choice


def _show(value: Any) -> str:
    # A huge integer cannot even be printed (Python limits int to str), a long string should not be.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**18:
        return "an integer of more than 18 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
