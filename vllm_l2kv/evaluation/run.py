"""Answers to cases under every variant, by the real engine."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import vllm_l2kv
from vllm_l2kv.evaluation.cases import Answer, Case
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import num_keep

CPU_CACHE_BYTES = 2 * 2**30


class Engine:
    """vLLM with compression.

    Prefix caching stays on: a prompt is computed once, and every variant compacts a copy of its own.

    Args:
        model: Folder or name of a model.
        full_layers: Layers that never compact.
        arguments: More of vLLM's engine arguments.
    """

    def __init__(self, model: str, full_layers: Sequence[int], **arguments: Any) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        device: dict[str, Any] = {}
        if current_platform.is_cpu():
            device = {"dtype": "float32", "enforce_eager": True}
            # In a process of its own the engine waits for its worker by spinning, on a core that work could use.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                device["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        processor = "ForcedTokens" if current_platform.is_cpu() else "ForcedTokensV2"
        ours = vllm_l2kv.engine_args(full_layers=full_layers)
        self._llm = LLM(
            model,
            logits_processors=[f"vllm_l2kv.evaluation.forcing:{processor}"],
            **{"disable_log_stats": True, **device, **ours, **arguments},
        )
        self.tokenizer = self._llm.get_tokenizer()
        config = self._llm.llm_engine.vllm_config
        self.about = {"model": Path(model).name, "full_layers": sorted(full_layers)}
        self.max_tokens = config.model_config.max_model_len
        # A tenth is left for blocks that are filled in part.
        self._room = 0.9 * config.cache_config.num_gpu_blocks * config.cache_config.block_size

    def rows(self, task: str, cases: Iterable[Case], variants: Sequence[CompressionParams]) -> Iterator[dict[str, Any]]:
        """One row for each case and variant, those of a case one after the other."""
        for group in self._groups(cases, variants):
            # Fills the prefix cache, which variants that start together could not share.
            self._generate([(case, None) for case in group])
            pairs = [(case, variant) for case in group for variant in variants]
            for (case, variant), answer in zip(pairs, self._generate(pairs), strict=True):
                yield {
                    "task": task,
                    **self.about,
                    **{name.removeprefix("kv_"): value for name, value in variant.as_fields().items()},
                    "num_prompt_tokens": len(case.prompt),
                    **case.about,
                    **case.score(answer),
                }

    def _groups(self, cases: Iterable[Case], variants: Sequence[CompressionParams]) -> Iterator[list[Case]]:
        """Cases that fit into the cache together, with a compacted copy for each variant; so none is preempted."""
        group: list[Case] = []
        room = self._room
        for case in cases:
            n = len(case.prompt)
            size = n + sum(num_keep(n, variant) + case.num_tokens for variant in variants)
            if group and size > room:
                yield group
                group, room = [], self._room
            group.append(case)
            room -= size
        if group:
            yield group

    def _generate(self, pairs: Sequence[tuple[Case, Any]]) -> list[Answer]:
        from vllm import SamplingParams

        from vllm_l2kv.evaluation.forcing import FORCED

        params = []
        for case, variant in pairs:
            fields = {} if variant is None else variant.as_fields()
            forced = {FORCED: list(case.forced)} if case.forced else {}
            num_tokens = 1 if variant is None else case.num_tokens
            # A forced text may well hold the token that ends one.
            params.append(
                SamplingParams(
                    max_tokens=num_tokens,
                    temperature=0,
                    logprobs=0,
                    ignore_eos=bool(forced),
                    extra_args=fields | forced,
                )
            )
        prompts = [{"prompt_token_ids": case.prompt} for case, _ in pairs]
        outputs = [output.outputs[0] for output in self._llm.generate(prompts, params, use_tqdm=False)]
        return [_answer(output) for output in outputs]


def _answer(output: Any) -> Answer:
    chosen = [step[token_id] for step, token_id in zip(output.logprobs, output.token_ids, strict=True)]
    return Answer(output.text, tuple(-token.logprob for token in chosen), tuple(token.rank == 1 for token in chosen))
