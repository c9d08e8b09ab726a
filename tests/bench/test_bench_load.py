"""Lengths and arrivals against their distributions; prompts against each other."""

from argparse import ArgumentTypeError
from itertools import combinations, islice
from random import Random
from statistics import mean, median

import pytest

from vllm_l2kv.tools.bench.load import Lengths, Load, lengths, planned
from vllm_l2kv.tools.bench.prompts import MIN_TOKENS, Prompts

FIXED = Lengths(64, 64)
ENDLESS = Load(Lengths(10, 1000), Lengths(1, 50), rate=4.0)


def some(load: Load, number: int = 4000):
    return list(islice(planned(load), number))


class TestLengths:
    @pytest.mark.parametrize("text", ["512", "200:2000", "lognormal:500:0.6:4000"])
    def test_forms_are_parsed_and_printed(self, text):
        assert str(lengths(8)(text)) == text

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("7", "8 <= LOW <= HIGH, got '7'"),
            ("0", "1 <= N <= 2147483647, got 0"),
            ("20:10", "8 <= LOW <= HIGH, got '20:10'"),
            ("4:10", "8 <= LOW <= HIGH, got '4:10'"),
            ("many", "N must be an integer >= 1, got 'many'"),
            ("10:", "N must be an integer >= 1, got ''"),
            ("1:2:3", "N, LOW:HIGH (uniform) or lognormal:MEDIAN:SIGMA:HIGH (cut at HIGH), got '1:2:3'"),
            ("lognormal:500:0.6", "lognormal:MEDIAN:SIGMA:HIGH"),
            ("lognormal:500:0:4000", "0 < X, got '0'"),
            ("lognormal:500:nan:4000", "0 < X, got 'nan'"),
            ("lognormal:500:1:7", "8 <= LOW <= HIGH"),
        ],
    )
    def test_others_are_refused(self, text, said):
        with pytest.raises(ArgumentTypeError) as caught:
            lengths(8)(text)
        assert said in str(caught.value)

    def test_uniform(self):
        random = Random(0)
        drawn = [Lengths(10, 20).draw(random) for _ in range(2000)]
        assert set(drawn) == set(range(10, 21))
        assert mean(drawn) == pytest.approx(15, abs=0.3)

    def test_log_normal_is_cut_at_both_ends(self):
        random = Random(0)
        drawn = [Lengths(100, 2000, 500, 1.0).draw(random) for _ in range(4000)]
        assert median(drawn) == pytest.approx(500, rel=0.05)
        assert min(drawn) == 100
        assert max(drawn) == 2000
        # A normal distribution has 8.3 % of its values above ln(2000 / 500) = 1.386 deviations.
        assert drawn.count(2000) / 4000 == pytest.approx(0.083, abs=0.015)


class TestPlanned:
    def test_a_seed_makes_one_load(self):
        assert some(ENDLESS) == some(ENDLESS)
        other = some(Load(ENDLESS.prompt_tokens, ENDLESS.output_tokens, rate=4.0, seed=1))
        for name in ("due_s", "num_prompt_tokens", "num_output_tokens"):
            differing = [
                getattr(a, name) != getattr(b, name) for a, b in zip(some(ENDLESS, 100), other[:100], strict=True)
            ]
            assert sum(differing) > 90, name

    def test_poisson_arrivals(self):
        due = [request.due_s for request in some(ENDLESS)]
        gaps = [later - earlier for earlier, later in zip([0.0, *due], due, strict=False)]
        assert mean(gaps) == pytest.approx(1 / 4, rel=0.05)
        # Exponential: the standard deviation equals the mean, and gaps are independent.
        assert mean(gap**2 for gap in gaps) == pytest.approx(2 / 16, rel=0.1)
        assert min(gaps) > 0

    def test_the_rate_changes_no_length(self):
        fast = Load(ENDLESS.prompt_tokens, ENDLESS.output_tokens, rate=40.0)
        waiting = Load(ENDLESS.prompt_tokens, ENDLESS.output_tokens, concurrency=3)
        sizes = [[request[2:] for request in some(load, 50)] for load in (ENDLESS, fast, waiting)]
        assert sizes[0] == sizes[1] == sizes[2]

    def test_the_end(self):
        assert [request.number for request in planned(Load(FIXED, FIXED, num_requests=3))] == [0, 1, 2]
        in_time = list(planned(Load(FIXED, FIXED, rate=4.0, duration_s=10.0)))
        after = some(Load(FIXED, FIXED, rate=4.0))[len(in_time)]
        assert in_time[-1].due_s <= 10 < after.due_s
        # Clients that wait for answers stop by the clock.
        assert len(some(Load(FIXED, FIXED, duration_s=0.1), 50)) == 50


def first_difference(a: list[int], b: list[int]) -> int:
    return next(i for i, (left, right) in enumerate(zip(a, b, strict=False)) if left != right)


class TestPrompts:
    TEXT = tuple(Random(7).choices(range(100, 400), k=500))

    @pytest.mark.parametrize("shared", [0, 0.5, 0.99])
    @pytest.mark.parametrize("bos", [(), (1,)])
    def test_lengths_are_exact(self, shared, bos):
        prompts = Prompts(self.TEXT, bos, shared, seed=0)
        for length in (MIN_TOKENS, 33, 499, 500, 2100):
            prompt = prompts.prompt(1, 2, length)
            assert len(prompt) == length
            assert prompt[: len(bos)] == list(bos)
            assert set(prompt[len(bos) :]) <= set(self.TEXT)

    def test_the_same_again(self):
        for _ in range(2):
            assert Prompts(self.TEXT, (), 0.5, 3).prompt(4, 5, 90) == Prompts(self.TEXT, (), 0.5, 3).prompt(4, 5, 90)
        assert Prompts(self.TEXT, (), 0.5, 3).prompt(4, 5, 90) != Prompts(self.TEXT, (), 0.5, 4).prompt(4, 5, 90)

    def test_rounds_share_nothing_but_the_bos(self):
        prompts = Prompts(self.TEXT, (1,), 0.9, seed=0)
        for a, b in combinations([prompts.prompt(number, 0, 200) for number in range(20)], 2):
            assert first_difference(a, b) == 1

    def test_requests_of_a_round_differ_at_once(self):
        prompts = Prompts(self.TEXT, (1,), 0, seed=0)
        several = [prompts.prompt(0, number, 50) for number in (0, 1, 2, 299, 300, 301, 5000)]
        for a, b in combinations(several, 2):
            assert first_difference(a, b) in (2, 3)

    def test_the_shared_share_is_shared(self):
        prompts = Prompts(self.TEXT, (1,), 0.5, seed=0)
        for a, b in combinations([prompts.prompt(0, number, 80 + 20 * number) for number in range(5)], 2):
            assert first_difference(a, b) >= min(len(a), len(b)) // 2
        a, b = (prompts.prompt(0, number, 100) for number in range(2))
        assert first_difference(a, b) in (50, 51)

    def test_text_continues_in_order(self):
        prompt = Prompts(self.TEXT, (), 0, seed=0).prompt(0, 0, 100)
        twice = ",".join(map(str, self.TEXT * 2))
        assert ",".join(map(str, prompt[3:])) in twice
