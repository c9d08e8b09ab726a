import itertools
import math
from fractions import Fraction
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import Compaction, CompactionPoints, Intervals, Kind, image_around, num_keep

BARE = {"protect_first": 0, "protect_last": 0}
ratios = st.one_of(st.just(1.0), st.floats(0, 1, exclude_min=True))


@given(n=st.integers(1, 200_000), hundredths=st.integers(1, 100))
def test_ceiling_of_the_ratio_as_it_is_written(n, hundredths):
    """Floats such as 0.07 * 100 == 7.000000000000001 must not keep one token too many."""
    assert num_keep(n, CompressionParams(hundredths / 100, **BARE)) == math.ceil(Fraction(hundredths, 100) * n)


@given(
    n=st.integers(1, 10_000),
    ratio=st.floats(0, 1, exclude_min=True),
    first=st.integers(0, 20_000),
    last=st.integers(0, 20_000),
)
def test_bounds(n, ratio, first, last):
    keep = num_keep(n, CompressionParams(ratio, protect_first=first, protect_last=last))
    assert 1 <= keep <= n
    assert keep >= min(n, first + last)
    assert keep >= math.floor(ratio * n)
    assert keep <= max(math.ceil(ratio * n), first + last, 1)


@pytest.mark.parametrize(
    ("n", "ratio", "protect", "expected"),
    [
        (13, 0.6, 0, 8),  # the notebook of the authors' code: 13 tokens, keep 0.6
        (100, 1 - 0.9, 0, 10),  # int(100 * (1 - 0.9)) == 9
        (1, 1e-9, 0, 1),
        (10, 0.1, 3, 6),
        (10, 0.9, 3, 9),
        (5, 0.1, 3, 5),
    ],
)
def test_examples_of_a_ratio(n, ratio, protect, expected):
    assert num_keep(n, CompressionParams(ratio, protect_first=protect, protect_last=protect)) == expected


class Life(NamedTuple):
    """The inputs that decide a request's compactions, and its number of computed tokens."""

    num_prompt_tokens: int
    params: CompressionParams
    intervals: Intervals
    num_tokens: int
    images: tuple[tuple[int, int], ...] = ()

    @property
    def points(self) -> CompactionPoints:
        return CompactionPoints(self.num_prompt_tokens, self.params, self.intervals, self.images)

    def walk(self, last: Compaction | None = None) -> tuple[list[tuple[int, int, int]], int]:
        """Adds row after row and checks at each position whether a compaction is due, there or inside an image.

        Args:
        last: A compaction with whose rows the walk begins.

        Returns:
        Position, rows before and rows after each compaction, and the maximum number of rows held.
        """
        begin, rows = (last.position, last.num_keep) if last else (0, 0)
        found, most = [], rows
        document, budget = self.params.prefix_tokens, self.params.max_tokens
        num_coming = {first: last - first for first, last in self.images}
        for position in range(begin + 1, self.num_tokens + 1):
            rows += 1
            most = max(most, rows)
            due = [rows]
            if position == (self.num_prompt_tokens if document is None else document):
                due.append(num_keep(position, self.params))
            is_in_prompt = position < self.num_prompt_tokens
            interval = self.intervals.prompt if is_in_prompt else self.intervals.answer
            held = rows + num_coming.get(position, 0)  # at the end of an image that begins here
            if budget is not None and (held >= budget + interval or position == document):
                due.append(budget)
            if min(due) < rows:
                found.append((position, rows, min(due)))
                rows = min(due)
        return found, most


@st.composite
def images(draw, begin: int, end: int) -> tuple[tuple[int, int], ...]:
    """Draws images between two positions, some of them without text between them."""
    found: list[tuple[int, int]] = []
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), max_size=4)):
        first = (found[-1][1] + 1 if found else begin) + gap
        found.append((first, first + length - 1))
    return tuple(image for image in found if image[1] < end)


@st.composite
def lives(draw) -> Life:
    """Draws small numbers, so that all kinds of points coincide: any order of intervals, budgets of protected rows."""
    first, last = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    least = max(first + last, 1)
    params = CompressionParams(
        draw(ratios),
        max_tokens=draw(st.none() | st.just(least) | st.integers(least, 30)),
        protect_first=first,
        protect_last=last,
        prefix_tokens=draw(st.none() | st.integers(1, 79)),
    )
    intervals = Intervals(draw(st.integers(1, 25)), draw(st.integers(1, 25)))
    n = draw(st.integers((params.prefix_tokens or 0) + 1, 80))
    return Life(n, params, intervals, draw(st.integers(1, 120)), draw(images(0, n)))


@settings(max_examples=2000, deadline=None)
@given(life=lives())
def test_compactions_are_those_of_a_walk_along_the_positions(life):
    found, _ = life.walk()
    assert [(c.position, c.num_rows, c.num_keep) for c in life.points.until(life.num_tokens)] == found


@given(life=lives())
def test_each_compaction_follows_the_one_before(life):
    """`after` a compaction returns the next one of the list; positions increase, and each compaction evicts rows."""
    seen = list(itertools.islice(life.points.until(10_000), 20))
    for last, following in zip([None, *seen], seen, strict=False):
        assert life.points.after(last) == following
    for last, following in itertools.pairwise(seen):
        assert last.position < following.position
        assert last.num_evicted < following.num_evicted
        assert following.num_rows == following.position - last.num_evicted
    assert all(1 <= compaction.num_keep < compaction.num_rows for compaction in seen)


@given(life=lives())
def test_every_compaction_has_the_protected_rows(life):
    params = life.params
    for compaction in life.points.until(life.num_tokens):
        assert compaction.num_keep >= params.protect_first + params.protect_last


@given(life=lives())
def test_the_kind_has_place_and_cause(life):
    for compaction in life.points.until(life.num_tokens):
        if compaction.kind is Kind.PROMPT_BUDGET:
            assert compaction.position < life.num_prompt_tokens
        if compaction.kind is Kind.ANSWER_BUDGET:
            assert compaction.position >= life.num_prompt_tokens
        if compaction.kind is Kind.RATIO:
            assert compaction.position == life.num_prompt_tokens
            assert life.params.prefix_tokens is None
            assert compaction.num_keep == num_keep(life.num_prompt_tokens, life.params)
        elif compaction.kind is Kind.DOCUMENT:
            assert compaction.position < life.num_prompt_tokens
            assert compaction.num_keep <= num_keep(compaction.position, life.params)
        else:
            assert compaction.num_keep == life.params.max_tokens
        assert (compaction.kind is Kind.DOCUMENT) == (compaction.position == life.params.prefix_tokens)


@given(life=lives())
def test_a_document_ends_with_no_more_rows_than_its_ratio_and_its_budget_leave(life):
    """This holds whatever happens inside the document, so the rows after it begin at a known slot."""
    end, params = life.params.prefix_tokens, life.params
    if end is None or not params.compresses:
        return
    last = max(life.points.until(end), default=None)
    rows = last.num_keep + end - last.position if last else end
    assert rows == min(end, num_keep(end, params), params.max_tokens or end)


@given(life=lives())
def test_those_in_the_prompt_come_before_its_end(life):
    long = life._replace(num_tokens=life.num_prompt_tokens - 1)
    assert [(c.position, c.num_rows, c.num_keep) for c in life.points.in_prompt()] == long.walk()[0]


@given(life=lives(), data=st.data())
def test_those_in_the_prompt_are_the_same_in_every_longer_one(life, data):
    """Otherwise their rows could not serve other questions and the next turn of a conversation."""
    n = life.num_prompt_tokens
    end = data.draw(st.integers(n, n + 60))
    more = data.draw(images(n, end))
    longer = life._replace(num_prompt_tokens=end, images=life.images + more).points.in_prompt()
    assert [c for c in longer if c.position < n] == life.points.in_prompt()


@settings(max_examples=500, deadline=None)
@given(life=lives())
def test_a_budget_divides_no_image_as_long_as_the_prompts_interval(life):
    """Only a longer one, and only if no earlier compaction is possible; the end of the prompt is after all images."""
    document = life.params.prefix_tokens
    for last, coming in itertools.pairwise([None, *life.points.until(life.num_tokens)]):
        divided = image_around(life.points.images, coming.position)
        if divided is None:
            continue
        assert coming.position < life.num_prompt_tokens
        if coming.position != document:
            first, end = divided
            assert end + 1 - first > life.intervals.prompt
            assert first - (last.num_evicted if last else 0) <= life.params.max_tokens


@given(life=lives())
def test_images_change_nothing_if_no_compaction_would_be_inside_one(life):
    expected = life._replace(images=()).points.in_prompt()
    away = [(first, last) for first, last in life.images if not any(first < c.position <= last for c in expected)]
    assert life._replace(images=tuple(away)).points.in_prompt() == expected


@given(life=lives())
def test_the_last_of_the_document_and_the_last_of_the_prompt_are_published(life):
    expected = set()
    for bound in (life.params.prefix_tokens or 0, life.num_prompt_tokens - 1):
        expected.update([c for c in life.points.in_prompt() if c.position <= bound][-1:])
    assert life.points.to_publish() == sorted(expected)


@given(life=lives(), more=st.integers(0, 50))
def test_the_list_up_to_a_position_begins_every_longer_one(life, more):
    shorter = list(life.points.until(life.num_tokens))
    longer = list(life.points.until(life.num_tokens + more))
    assert longer[: len(shorter)] == shorter
    assert all(compaction.position > life.num_tokens for compaction in longer[len(shorter) :])


@settings(max_examples=500, deadline=None)
@given(life=lives())
def test_max_rows_is_a_bound(life):
    """It holds at every length, and is exact without a budget or, without images, with a long enough answer."""
    _, most = life.walk()
    bound = life.points.max_rows(life.num_tokens)
    assert most <= bound <= life.num_tokens
    assert bound == life._replace(images=()).points.max_rows(life.num_tokens)
    if life.params.max_tokens is None:
        assert bound == most
    elif life.params.prefix_tokens is None and not life.images:
        long = life._replace(num_tokens=life.num_prompt_tokens + life.params.max_tokens + life.intervals.answer)
        assert long.points.max_rows(long.num_tokens) == long.walk()[1] <= life.params.max_tokens + max(life.intervals)


@settings(max_examples=500, deadline=None)
@given(life=lives(), data=st.data())
def test_max_rows_is_a_bound_for_a_life_that_begins_with_found_rows(life, data):
    """It is exact without a budget, and never above the bound without found rows."""
    for last in life.points.in_prompt():
        end = data.draw(st.integers(last.position + 1, last.position + 60))
        bound = life.points.max_rows(end, last)
        _, most = life._replace(num_tokens=end).walk(last)
        assert most <= bound <= life.points.max_rows(end)
        if life.params.max_tokens is None:
            assert bound == most


def test_found_rows_are_not_counted_twice():
    """A short question after 3,048 tokens, of which 1,000 rows were found."""
    points = CompactionPoints(3100, CompressionParams(max_tokens=1000, **BARE), Intervals())
    assert points.max_rows(3110, points.after(None)) == 1062


@given(life=lives(), more=st.integers(0, 50))
def test_more_tokens_never_need_fewer_rows(life, more):
    """The largest request that fits is found by bisection, which needs this."""
    for last in [None, *life.points.in_prompt()]:
        shorter = max(life.num_tokens, last.position if last else 0)
        assert life.points.max_rows(shorter, last) <= life.points.max_rows(shorter + more, last)


def published(n: int, intervals: tuple[int, int] = (2048, 256), **params) -> list[int]:
    points = CompactionPoints(n, CompressionParams(**{**BARE, **params}), Intervals(*intervals))
    return [compaction.position for compaction in points.to_publish()]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (published(3000, keep_ratio=0.5), []),  # its only compaction is at the end of the prompt, and private
        (published(3000, prefix_tokens=2000), []),  # nothing is evicted
        (published(3000, keep_ratio=0.5, prefix_tokens=2000), [2000]),
        (published(6000, max_tokens=1000), [5096]),  # 3,048 was the last compaction of an earlier turn
        (published(3048, max_tokens=1000), []),
        # 3,048 in the document, its end, and 2,048 + 1,000 rows after it
        (published(9000, max_tokens=1000, prefix_tokens=4000), [4000, 8096]),
        (published(6000, max_tokens=1000, prefix_tokens=4000), [4000]),
        # the budget is due at the end of the document in any case
        (published(6000, (20, 20), max_tokens=10, prefix_tokens=30), [30, 5990]),
    ],
)
def test_examples_of_what_is_published(found, expected):
    assert found == expected


@pytest.mark.parametrize(("n", "document"), [(10, 10), (10, 11), (1, 1)])
@pytest.mark.parametrize("keep_ratio", [1, 0.5])
def test_a_document_is_shorter_than_its_prompt(n, document, keep_ratio):
    params = CompressionParams(keep_ratio, prefix_tokens=document)
    words = (
        f"kv_prefix_tokens must be less than the prompt's {n} tokens, got {document}; at least one token must follow"
    )
    with pytest.raises(ParamError, match=words) as error:
        CompactionPoints.of(n, params, Intervals())
    assert error.value.param == "kv_prefix_tokens"
    assert (CompactionPoints.of(document + 1, params, Intervals()) is None) == (keep_ratio == 1)


def points(n: int, intervals: tuple[int, int] = (2048, 256), images=(), **params) -> list[tuple]:
    found = CompactionPoints(n, CompressionParams(**{**BARE, **params}), Intervals(*intervals), images).until(20_000)
    return [tuple(compaction) for compaction in itertools.islice(found, 4)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (points(3000), []),
        (points(3000, keep_ratio=0.5), [(3000, 3000, 1500, "ratio")]),
        (points(10, keep_ratio=0.1, protect_first=5, protect_last=5), []),
        # 1,000 rows, and 2,048 more in the prompt; at its end the answer's interval counts
        (
            points(6000, max_tokens=1000),
            [
                (3048, 3048, 1000, "prompt_budget"),
                (5096, 3048, 1000, "prompt_budget"),
                (6000, 1904, 1000, "answer_budget"),
                (6256, 1256, 1000, "answer_budget"),
            ],
        ),
        # the end of the prompt itself belongs to the answer
        (points(3048, max_tokens=1000)[:1], [(3048, 3048, 1000, "answer_budget")]),
        (points(3049, max_tokens=1000)[:2], [(3048, 3048, 1000, "prompt_budget"), (3304, 1256, 1000, "answer_budget")]),
        # one row less than the budget and an interval: the first token of the answer completes it
        (points(1255, max_tokens=1000)[:1], [(1256, 1256, 1000, "answer_budget")]),
        (points(1256, max_tokens=1000)[:1], [(1256, 1256, 1000, "answer_budget")]),
        # at the end of the prompt, whatever leaves fewer rows
        (points(1300, max_tokens=1000, keep_ratio=0.5)[:1], [(1300, 1300, 650, "ratio")]),
        (points(3000, max_tokens=1000, keep_ratio=0.5)[:1], [(3000, 3000, 1000, "answer_budget")]),
        # a ratio of the whole prompt, after most of it is gone already
        (points(6000, max_tokens=1000, keep_ratio=0.5)[2:3], [(6000, 1904, 1000, "answer_budget")]),
        (points(6000, max_tokens=1000, keep_ratio=0.1)[2:3], [(6000, 1904, 600, "ratio")]),
        (points(5200, max_tokens=1000, keep_ratio=0.25)[2:3], [(5352, 1256, 1000, "answer_budget")]),
        # a shorter interval in the prompt than in the answer
        (
            points(40, (10, 30), max_tokens=10),
            [
                (20, 20, 10, "prompt_budget"),
                (30, 20, 10, "prompt_budget"),
                (60, 40, 10, "answer_budget"),
                (90, 40, 10, "answer_budget"),
            ],
        ),
        # a document: its ratio counts at its end, and all that follows is kept
        (points(3000, keep_ratio=0.5, prefix_tokens=1000), [(1000, 1000, 500, "document")]),
        (points(3000, prefix_tokens=1000), []),
        (
            points(3000, keep_ratio=0.01, prefix_tokens=1000, protect_first=4, protect_last=64)[0],
            (1000, 1000, 68, "document"),
        ),
        (points(3000, keep_ratio=0.5, prefix_tokens=68, protect_first=4, protect_last=64), []),
        # a document and a budget: at its end both count, and then the budget alone
        (
            points(6000, keep_ratio=0.5, prefix_tokens=3000, max_tokens=1000),
            [
                (3000, 3000, 1000, "document"),
                (5048, 3048, 1000, "prompt_budget"),
                (6000, 1952, 1000, "answer_budget"),
                (6256, 1256, 1000, "answer_budget"),
            ],
        ),
        (points(2000, keep_ratio=0.2, prefix_tokens=1500, max_tokens=1000)[0], (1500, 1500, 300, "document")),
        (points(2000, prefix_tokens=1500, max_tokens=1000)[0], (1500, 1500, 1000, "document")),
        # a document longer than the budget and the interval: half of it is more than the rows left
        (
            points(9000, keep_ratio=0.5, prefix_tokens=8000, max_tokens=1000)[:4],
            [
                (3048, 3048, 1000, "prompt_budget"),
                (5096, 3048, 1000, "prompt_budget"),
                (7144, 3048, 1000, "prompt_budget"),
                (8000, 1856, 1000, "document"),
            ],
        ),
        # the budget is due at the end of the document in any case
        (points(4000, prefix_tokens=3048, max_tokens=1000)[0], (3048, 3048, 1000, "document")),
        # 3,048 would be inside an image, so the head holds 3,000 rows there; the next interval begins at 3,000
        (
            points(9000, max_tokens=1000, images=((500, 755), (3000, 3255)))[:2],
            [(3000, 3000, 1000, "prompt_budget"), (5048, 3048, 1000, "prompt_budget")],
        ),
        # before its first token, and after its last one, an image is whole
        (points(9000, max_tokens=1000, images=((3048, 3303),))[0], (3048, 3048, 1000, "prompt_budget")),
        (points(9000, max_tokens=1000, images=((2792, 3047),))[0], (3048, 3048, 1000, "prompt_budget")),
        # an image of 2,049 tokens after 1,000 rows: nothing can be evicted before it
        (points(9000, max_tokens=1000, images=((1000, 3048),))[0], (3048, 3048, 1000, "prompt_budget")),
        (points(9000, max_tokens=1000, images=((1001, 3048),))[0], (1001, 1001, 1000, "prompt_budget")),
        # an image at the end of the prompt, where the answer's interval counts
        (points(3048, max_tokens=1000, images=((2792, 3047),))[0], (3048, 3048, 1000, "answer_budget")),
        # a document that is compacted to 500 rows before the image
        (
            points(9000, keep_ratio=0.5, prefix_tokens=1000, max_tokens=1000, images=((3400, 3655),))[:2],
            [(1000, 1000, 500, "document"), (3400, 2900, 1000, "prompt_budget")],
        ),
        # a budget full of protected rows
        (
            points(12, (3, 2), max_tokens=8, protect_first=4, protect_last=4)[:2],
            [(11, 11, 8, "prompt_budget"), (13, 10, 8, "answer_budget")],
        ),
    ],
)
def test_examples(found, expected):
    assert found == expected


def test_evicted_slots_are_those_of_all_compactions_so_far():
    assert Compaction(position=5096, num_rows=3048, num_keep=1000, kind=Kind.PROMPT_BUDGET).num_evicted == 4096
