"""The warning about a search that could not measure much."""

from types import SimpleNamespace

import pytest

from vllm_l2kv.tools.profile.doubts import MIN_QUESTIONS, uncertainty, warning
from vllm_l2kv.tools.profile.make import Made
from vllm_l2kv.tools.profile.recommend import NOTHING_FULL, WHOLE, Outcome, Recommendation
from vllm_l2kv.tools.profile.report import how_to_use

MANY = 2 * MIN_QUESTIONS


def outcome(name: str, memory: float, exact: tuple[float, float]) -> Outcome:
    return Outcome(name, memory, (), memory, "l2", {}, "token", (0.0, 0.0), exact, {})


def found(
    num_questions: int = MANY,
    whole: tuple[float, float] = (1.0, 1.0),
    nothing_full: tuple[float, float] = (0.25, 0.25),
    layers: tuple[float, float] = (0.5, 0.5),
    heads: tuple[float, float] = (0.5, 0.5),
) -> Recommendation:
    """The result of a search; at memory 0.75 everything is answered."""
    outcomes = [outcome(WHOLE, 1.0, whole)]
    for memory, lost in ((0.75, False), (0.5, True)):
        named = {NOTHING_FULL: nothing_full, "recommended": layers, "recommended heads": heads}
        outcomes += [outcome(name, memory, exact if lost else whole) for name, exact in named.items()]
    judged = -(-num_questions // 2)
    return Recommendation((0,), (), (), (), tuple(outcomes), 1, (), {"facts": num_questions}, {"facts": judged})


def profile(*memories: float) -> SimpleNamespace:
    """A profile of these memories, of which a server takes heads."""
    return SimpleNamespace(
        path="p",
        about={"tensor_parallel_size": 1},
        recommended=[SimpleNamespace(memory=memory) for memory in memories],
        default_classes=lambda memory, num_ranks: "heads",
    )


def test_nothing_to_say():
    assert warning(found()) is None


@pytest.mark.parametrize(
    ("num_questions", "said"),
    [
        (
            1,
            "Warning: 1 question for the search and 1 to judge are few: a share may be wrong by 0.45;",
        ),
        (
            4,
            "Warning: 4 questions for the search and 2 to judge are few: a share may be wrong by 0.41;",
        ),
        (
            MIN_QUESTIONS - 1,
            "Warning: 31 questions for the search and 16 to judge are few: a share may be wrong by 0.22;",
        ),
    ],
)
def test_few_questions(num_questions, said):
    line = warning(found(num_questions))
    assert line.startswith(said)
    assert "\n" not in line
    assert "use --questions 32 or more." in line
    assert "at memory" not in line
    assert warning(found(MIN_QUESTIONS)) is None


def test_uncertainty_is_half_of_wilsons_interval():
    """Half width for 8 of 16: (0.7200 - 0.2800) / 2."""
    assert uncertainty(16) == pytest.approx(0.2200, abs=1e-4)


def test_a_model_that_answers_nothing():
    line = warning(found(whole=(0.05, 0.125), layers=(0.0, 0.0)))
    assert line.startswith("Warning: The model answers only 0.09 of the questions with its whole cache, so")
    assert "at memory" not in line
    assert warning(found(whole=(0.6, 0.6), nothing_full=(0.1, 0.1))) is None


@pytest.mark.parametrize("of", ["layers", "heads"])
def test_settings_that_are_no_better_than_nothing_full(of):
    line = warning(found(**{of: (0.25, 0.25)}))
    assert line.startswith(f"Warning: Full {of} at memory 0.5 answer fewer questions than the whole cache, and no more")
    # Seen and hidden count together.
    assert warning(found(**{of: (0.5, 0.25)})) is None


@pytest.mark.parametrize(
    ("lost", "memory"),
    [({}, 0.5), ({"heads": (0.0, 0.0)}, 0.75), ({"layers": (0.0, 0.0)}, 0.5)],
    ids=["nothing", "what is served", "what is not served"],
)
def test_the_advised_command_has_a_memory_that_is_of_use(lost, memory):
    *_, command = how_to_use(Made(profile(0.75, 0.5, 0.25), None, found(**lost)), "MODEL")
    assert command.split()[-5:] == ["MODEL", "--kv-profile", "p", "--kv-memory", f"{memory:g}"]


def test_no_command_is_advised_where_no_memory_is_of_use():
    lines = list(how_to_use(Made(profile(0.5), None, found(heads=(0.0, 0.0))), "MODEL"))
    assert lines == ["No memory from 0.5 up is good enough to serve with."]


def test_a_setting_that_loses_next_to_nothing_is_not_doubted():
    assert warning(found(nothing_full=(0.95, 0.95), layers=(0.95, 0.95), heads=(1.0, 1.0))) is None


def test_both_in_one_line():
    line = warning(found(1, layers=(0.0, 0.0)))
    assert "--questions 32 or more. Full layers at memory 0.5 answer" in line
