"""Kinds of values of request fields: each has a check, its bounds as text and a JSON schema.

Standard library only. Every check takes the name of the field or option, which its error shows as the user wrote it.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

MAX_TOKENS = 2**31 - 1
"""Largest count that a request may give; vLLM keeps lengths in 32-bit integers."""


class ParamError(ValueError):
    """A field's value is out of bounds, or a `kv_` field is unknown.

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
            ParamError: The value is not a number, or is out of bounds.
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
            ParamError: The value is not an integer, or is out of bounds.
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
        names: Values that every engine takes.
        unlisted: Full match of values that only some engines take; `Settings` refuses them in the others.
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
            ParamError: The value is not one of the names.
        """
        if isinstance(value, str) and (value in self.names or (self.unlisted and self.unlisted.fullmatch(value))):
            return value
        raise ParamError(name, f"{name} must be {self.bounds(name)}, got {_show(value)}.")


Kind = Ratio | Count | Choice


def _show(value: Any) -> str:
    # Python refuses to print a huge integer, and a long string would make the error unreadable.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**18:
        return "an integer of more than 18 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
