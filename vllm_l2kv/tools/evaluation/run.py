"""Runs cases under every variant in a real engine."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import vllm_l2kv
from vllm_l2kv.messages.usage import take_usage
from vllm_l2kv.params import EVALUATION_SCORERS, OFFERED_SCORERS, CompressionParams
from vllm_l2kv.policy import CompactionPoints, Intervals, num_keep
from vllm_l2kv.settings import FullHeads, Settings
from vllm_l2kv.tools.evaluation.cases import Answer, Case
from vllm_l2kv.tools.evaluation.rows import about_heads
from vllm_l2kv.tools.evaluation.variants import HIDDEN, SEEN
from vllm_l2kv.tools.progress import Progress

CPU_CACHE_BYTES = 2 * 2**30
INTERVALS = Intervals()


class Engine:
    """vLLM with compression.

    Prefix caching is on: a prompt is computed once, and every variant compacts its own copy.

    Args:
        model: Folder or name of a model.
        full_layers: Layers that never compact.
        full_heads: KV heads of other layers that never compact.
        intervals: Rows beyond a budget that a request may hold.
        profile: Profile with the weights of scorers that need them; nothing else is read from it.
        scorers: Scorers to compare, in addition to those that servers offer.
        arguments: More of vLLM's engine arguments.
    """

    def __init__(
        self,
        model: str,
        full_layers: Sequence[int],
        intervals: Intervals = INTERVALS,
        profile: Path | None = None,
        full_heads: FullHeads | None = None,
        scorers: Iterable[str] = EVALUATION_SCORERS,
        **arguments: Any,
    ) -> None:
        import torch
        import vllm
        from vllm.platforms import current_platform

        device: dict[str, Any] = {}
        if current_platform.is_cpu():
            device = {"dtype": "float32", "enforce_eager": True}
            # In its own process, the engine would wait for its worker in a busy loop that takes a CPU core.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                device["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        processor = "ForcedTokens" if current_platform.is_cpu() else "ForcedTokensV2"
        self._intervals = intervals
        compression_args = vllm_l2kv.engine_args(
            full_layers,
            full_heads,
            prompt_interval=intervals.prompt,
            answer_interval=intervals.answer,
            evaluation_scorers=[name for name in scorers if name not in OFFERED_SCORERS],
            profile=profile,
            default_keep_ratio=1.0,
        )
        self._llm = vllm.LLM(
            model,
            logits_processors=[f"vllm_l2kv.tools.evaluation.teacher_forcing:{processor}"],
            **{"disable_log_stats": True, **device, **compression_args, **arguments},
        )
        self.tokenizer = self._llm.get_tokenizer()
        config = self._llm.llm_engine.vllm_config
        self.about = {
            "model": Path(model).name,
            "full_layers": sorted(full_layers),
            **about_heads(Settings.from_config(compression_args["additional_config"]).full_heads),
            "device": "CPU" if current_platform.is_cpu() else torch.cuda.get_device_name(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "vllm": vllm.__version__,
        }
        self.max_tokens = config.model_config.max_model_len
        # A tenth is reserved for partly filled blocks.
        self._room = 0.9 * config.cache_config.num_gpu_blocks * config.cache_config.block_size

    def rows(
        self,
        task: str,
        cases: Sequence[Case],
        variants: Sequence[CompressionParams],
        progress: Progress | None = None,
        questions: Sequence[str] = (SEEN,),
    ) -> Iterator[dict[str, Any]]:
        """One row for each case, variant and kind of question; the rows of a case are consecutive.

        Args:
            task: Name of the task, for the rows.
            cases: The prompts.
            variants: How each prompt is compressed.
            progress: Counts prompts that are read and tokens that are generated.
            questions: Some of `QUESTIONS`. Without compression they do not differ, so the whole cache is measured once.
        """
        asked = [(v, question) for v in variants for question in (questions if v.compresses else (SEEN,))]
        progress = progress or Progress()
        progress.begin(task)
        num_before = 0
        for group in self._groups(cases, asked):
            which = f"{task}: prompts {num_before + 1} to {num_before + len(group)} of {len(cases)}"
            progress.part(which, len(group), "read")
            # Fill the prefix cache first: variants that start together could not share their prompts.
            self._generate([(case, None) for case in group], progress)
            pairs = [(case, _params(case, variant, question)) for case in group for variant, question in asked]
            num_tokens = sum(case.num_tokens for case, _ in pairs)
            progress.part(f"{which}, {len(pairs)} answers", num_tokens, "tokens")
            for (case, params), answer in zip(pairs, self._generate(pairs, progress), strict=True):
                yield {
                    "task": task,
                    **self.about,
                    **{name.removeprefix("kv_"): value for name, value in params.as_fields().items()},
                    "question": SEEN if params.prefix_tokens is None else HIDDEN,
                    **self._about_budget(params),
                    "num_prompt_tokens": len(case.prompt),
                    "memory": answer.memory,
                    **case.about,
                    **case.score(answer),
                }
            num_before += len(group)
            progress.reached(num_before / len(cases))

    def _groups(self, cases: Iterable[Case], asked: Sequence[tuple[CompressionParams, str]]) -> Iterator[list[Case]]:
        """Groups of cases that fit in the cache, with a compacted copy for each variant, so that none is preempted."""
        group: list[Case] = []
        room = self._room
        for case in cases:
            size = len(case.prompt)
            size += sum(self._num_rows(case, _params(case, variant, question)) for variant, question in asked)
            if group and size > room:
                yield group
                group, room = [], self._room
            group.append(case)
            room -= size
        if group:
            yield group

    def _num_rows(self, case: Case, params: CompressionParams) -> int:
        """Most rows that an answer holds, without the prompt that all variants share until they are compacted."""
        num_prompt_tokens = len(case.prompt)
        if params.max_tokens is None:
            compressed = params.prefix_tokens or num_prompt_tokens
            return num_keep(compressed, params) + num_prompt_tokens - compressed + case.num_tokens
        points = CompactionPoints(num_prompt_tokens, params, self._intervals)
        return points.max_rows(num_prompt_tokens + case.num_tokens)

    def _about_budget(self, variant: CompressionParams) -> dict[str, int]:
        """Fields of rows with a budget: the intervals."""
        if variant.max_tokens is None:
            return {}
        return {f"{name}_interval": interval for name, interval in self._intervals._asdict().items()}

    def _generate(self, pairs: Sequence[tuple[Case, Any]], progress: Progress) -> list[Answer]:
        """Answers in the order of `pairs`; a case without a variant is only read.

        Runs the engine step by step to show progress: `LLM.generate` reports only finished answers, and answers that
        start together finish together.
        """
        from vllm.inputs import tokens_input

        engine = self._llm.llm_engine
        for index, (case, variant) in enumerate(pairs):
            engine.add_request(str(index), tokens_input(case.prompt), _sampling_params(case, variant))
        parts: list[list[Any]] = [[] for _ in pairs]
        memory = [1.0] * len(pairs)
        left = [_num_tokens(case, variant) for case, variant in pairs]
        while engine.has_unfinished_requests():
            for output in engine.step():
                index, part = int(output.request_id), output.outputs[0]
                parts[index].append(part)
                if usage := take_usage(output):
                    memory[index] = usage["memory_ratio"]
                # An answer may end early.
                done = left[index] if output.finished else len(part.token_ids)
                left[index] -= done
                progress.advance(done)
        return [_answer(*answer) for answer in zip(parts, memory, strict=True)]


def _params(case: Case, variant: CompressionParams, question: str) -> CompressionParams:
    """The params of a variant for one case."""
    return replace(variant, prefix_tokens=case.num_document_tokens) if question == HIDDEN else variant


def _num_tokens(case: Case, variant: CompressionParams | None) -> int:
    return 1 if variant is None else case.num_tokens


def _sampling_params(case: Case, variant: CompressionParams | None) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from vllm_l2kv.tools.evaluation.teacher_forcing import FORCED

    fields = {} if variant is None else variant.as_fields()
    forced = {FORCED: list(case.forced)} if case.forced else {}
    return SamplingParams(
        max_tokens=_num_tokens(case, variant),
        temperature=0,
        logprobs=0,
        # A forced text may contain the end-of-sequence token.
        ignore_eos=bool(forced),
        extra_args=fields | forced,
        output_kind=RequestOutputKind.DELTA,
    )


def _answer(parts: Sequence[Any], memory: float) -> Answer:
    chosen = [
        step[token_id] for part in parts for step, token_id in zip(part.logprobs or [], part.token_ids, strict=True)
    ]
    text = "".join(part.text for part in parts)
    losses, hits = tuple(-token.logprob for token in chosen), tuple(token.rank == 1 for token in chosen)
    return Answer(text, losses, hits, memory)
