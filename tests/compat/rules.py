"""Rules of compression for the tests of this folder, as arguments of `engine.keep` and of the reference."""

from typing import Any

import pytest

INTERVALS = (100, 3)
"""Intervals of all engines here, in the prompt and in the answer, so short that an answer is compacted repeatedly."""

RULES: list[Any] = [
    pytest.param({"ratio": "0.25"}, id="ratio"),
    pytest.param({"ratio": "1", "budget": 60}, id="budget"),
    pytest.param({"ratio": "0.25", "budget": 80, "first": 4, "last": 16}, id="both"),
    pytest.param({"ratio": "0.25", "document": 100}, id="document"),
]
"""In prompts of 300 tokens each budget causes two compactions inside the prompt and one at its end. A second request
continues from the last one inside the prompt, or after the document.
"""
