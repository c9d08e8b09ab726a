"""What the tests of this folder ask of a request's cache, in the words of `engine.keep` and of the reference."""

from typing import Any

import pytest

INTERVALS = (100, 3)
"""Of all engines here, in the prompt and in the answer: so few rows that a short answer is compacted several times."""

RULES: list[Any] = [
    pytest.param({"ratio": "0.25"}, id="ratio"),
    pytest.param({"ratio": "1", "budget": 60}, id="budget"),
    pytest.param({"ratio": "0.25", "budget": 80, "first": 4, "last": 16}, id="both"),
    pytest.param({"ratio": "0.25", "document": 100}, id="document"),
]
"""With prompts of 300 tokens, each budget means two compactions inside the prompt and one at its end. Who asks again
begins at the last one inside the prompt, or after the document.
"""
