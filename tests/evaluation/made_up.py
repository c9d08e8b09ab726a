"""Made-up rows of answers."""

from itertools import product
from typing import Any

from vllm_l2kv.tools.evaluation.variants import variants


def made_up(
    task: str,
    scorers=("l2",),
    ratios=(0.5, 0.25),
    lengths=(100, 200),
    depths=(0, 0.5),
    num_samples: int = 4,
    score: float | None = None,
    budgets=(),
    **about: Any,
) -> list[dict[str, Any]]:
    """Returns rows like `Engine.rows`; the excess loss is `1 - ratio`, and by default every other sample is right."""
    rows = []
    places = {"perplexity": [{}], "copy": [{}], "ruler": [{"subtask": "vt"}, {"subtask": "cwe"}]}
    places["chat"] = [{"turn": 0}, {"turn": 1}]
    for length, place, sample, variant in product(
        lengths,
        places.get(task, [{"depth": depth} for depth in depths]),
        range(num_samples),
        variants(scorers, ratios, [(0, 0), (4, 64)], budgets=budgets),
    ):
        loss, right = 2 + 0.1 * sample + (1 - variant.keep_ratio), sample % 2 if score is None else score
        perplexity = {"loss": loss, "accuracy": 0.5, "losses": [loss] * 19, "hits": [0] * 19}
        scores = {"score": right, "exact": right, "answer": "<i>42</i>"}
        rows.append(
            {
                "task": task,
                "model": "tiny",
                "full_layers": [0, 1],
                **{name.removeprefix("kv_"): value for name, value in variant.as_fields().items()},
                **({} if variant.max_tokens is None else {"prompt_interval": 2048, "answer_interval": 16}),
                "length": length,
                **place,
                "sample": sample,
                **(perplexity if task == "perplexity" else scores),
                **about,
            }
        )
    return rows
