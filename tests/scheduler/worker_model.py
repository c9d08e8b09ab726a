"""A worker without a model: its memory holds names of rows in place of numbers.

It carries out a step's output as both runners do: forget requests, compact, copy blocks, write the rows of scheduled
tokens, and read everything that attention would read. The name of a row has everything that its numbers depend on. So a
row of another request is correct exactly if it may be shared: the same tokens and salt, and either a whole context or
the same compactions by the same rule. Every row that is read is compared with the request's expected row.
"""

import itertools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from vllm_l2kv.block_math import num_blocks_for
from vllm_l2kv.messages.orders import CompactionOrder, GroupMove, compacted_hits_of, orders_of

STOP = 999


class History(NamedTuple):
    """The compactions of a request so far.

    Attributes:
        first: Protected rows at the start.
        last: Protected rows at the end.
        kept: Positions of compactions, and rows kept there.
    """

    first: int
    last: int
    kept: tuple[tuple[int, int], ...]


class Row(NamedTuple):
    """The content of a slot.

    Attributes:
        group: KV-cache group, since a block's bytes mean something else in another one.
        prefix: The salt, and the tokens up to this one.
        position: Position of this token.
        history: The compactions before it was computed; `None` if it saw its whole context.
        copy: The compaction that moved it here; `None` if it was written here. Two compactions of one name may keep
        different rows if rounding decides, so rows of both must not be mixed.
    """

    group: int
    prefix: int
    position: int
    history: History | None
    copy: int | None = None


class Tokens:
    """A request's tokens, including future ones: its first token repeatedly, then perhaps a stop token.

    So a request's answer equals the prompt of another one that begins with the same token, where wrong sharing is most
    likely.
    """

    def __init__(self, prompt: list[int], stop_after: int | None, salt: str | None = None) -> None:
        self.prompt = prompt
        self._stop = None if stop_after is None else len(prompt) + stop_after
        self._nothing = zlib.crc32((salt or "").encode())
        self._prefixes: list[int] = []

    def __getitem__(self, position: int) -> int:
        if position < len(self.prompt):
            return self.prompt[position]
        return STOP if position == self._stop else self.prompt[0]

    def answer(self, max_tokens: int) -> list[int]:
        tokens = [self[position] for position in range(len(self.prompt), len(self.prompt) + max_tokens)]
        return tokens[: tokens.index(STOP) + 1] if STOP in tokens else tokens

    def row(self, group: int, position: int, history: History | None) -> Row:
        while position >= len(self._prefixes):
            before = self._prefixes[-1] if self._prefixes else self._nothing
            self._prefixes.append(zlib.crc32(b"%d" % self[len(self._prefixes)], before))
        return Row(group, self._prefixes[position], position, history)


class Due(NamedTuple):
    """A compaction that must happen at exactly this position."""

    position: int
    num_rows: int
    num_keep: int


class Rule(NamedTuple):
    """A request's parameters and its compactions, implemented independently."""

    ratio: str = "1"
    first: int = 0
    last: int = 0
    budget: int | None = None
    prompt_interval: int = 1
    answer_interval: int = 1
    document: int | None = None

    def compactions(self, num_prompt_tokens: int) -> Iterator[Due]:
        """Adds row after row and decides at each position what to keep; with a budget it never ends."""
        rows, end = 0, self.document or num_prompt_tokens
        for position in itertools.count(1):
            rows += 1
            num_keep = rows
            if position == end:
                num_keep = min(rows, max(math.ceil(Fraction(self.ratio) * end), self.first + self.last, 1))
            if position == self.document and self.budget is not None:
                num_keep = min(num_keep, self.budget)
            interval = self.prompt_interval if position < num_prompt_tokens else self.answer_interval
            if self.budget is not None and rows >= self.budget + interval:
                num_keep = min(num_keep, self.budget)
            if num_keep < rows:
                yield Due(position, rows, num_keep)
                rows = num_keep
            if self.budget is None and position >= num_prompt_tokens:
                return

    def most_rows(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Returns the most rows that a request may hold, if it reaches its budget's interval."""
        rows, num_evicted = [0], 0
        for due in itertools.takewhile(lambda due: due.position <= num_tokens, self.compactions(num_prompt_tokens)):
            rows.append(due.num_rows)
            num_evicted = due.position - due.num_keep
        if self.budget is not None:
            rows.append(min(num_tokens, self.budget + self.answer_interval))
            rows.append(min(num_prompt_tokens, self.budget + self.prompt_interval))
        return max(*rows, num_tokens - num_evicted)


@dataclass
class RequestState:
    """A worker's state of a request, and in `rows` the expected rows, by group and slot.

    `due` is the next compaction; until it happens no token after its position may be computed. Accepted and rejected
    are drafts of the last step.
    """

    tokens: Tokens
    coming: Iterator[Due]
    due: Due | None
    tables: list[list[int]]
    num_computed: int
    num_known: int
    rows: list[list[Row]] = field(default_factory=list)
    num_evicted: int = 0
    history: History | None = None
    num_accepted: int = 0
    num_rejected: int = 0

    def compute(self, position: int) -> None:
        """Adds the rows up to a position."""
        for group, rows in enumerate(self.rows):
            rows += [self.tokens.row(group, i, self.history) for i in range(self.num_computed, position)]
        self.num_computed = position

    def compact(self, rule: Rule) -> list[int]:
        """Records the due compaction, and returns the slots that it keeps."""
        assert self.due is not None
        position, num_rows, num_keep = self.due
        kept = () if self.history is None else self.history.kept
        self.history = History(rule.first, rule.last, (*kept, (position, num_keep)))
        self.num_evicted = position - num_keep
        self.due = next(self.coming, None)
        return kept_slots(num_rows, num_keep, rule.first, rule.last)


class WorkerModel:
    """Executes steps.

    Args:
        block_sizes: Tokens in a block, by group.
        compressed: Groups that are compacted.
        passed: Of groups that hold the end of a context only: how many of its tokens the next one does not see.
        recurrent: Those of them in which a block holds one state, named as the row of its last token.
    """

    def __init__(
        self,
        block_sizes: list[int],
        compressed: set[int],
        passed: Mapping[int, Callable[[int], int]] | None = None,
        recurrent: Collection[int] = (),
    ) -> None:
        self.tokens: dict[str, Tokens] = {}
        self.rules: dict[str, Rule] = {}
        self._block_sizes = block_sizes
        self._compressed = compressed
        self._passed = passed or {}
        self._recurrent = recurrent
        self._memory: dict[tuple[int, int], Row | None] = {}
        self._states: dict[str, RequestState] = {}
        self._compactions = itertools.count()
        self.begun: dict[str, int] = {}  # for requests of the last step, their computed tokens before it
        self.drafts: Counter[str] = Counter()  # accepted and rejected
        self.copied: set[int] = set()  # blocks that may hold rows of whom they were copied from, after those found
        self._hits: Mapping[str, int] = {}  # for requests of the step that begin on compacted rows, their evicted slots

    def execute(self, output) -> list[list[int]]:
        """Runs a step and returns what it sampled, in the order of `num_scheduled_tokens`."""
        for req_id in (*output.finished_req_ids, *(output.preempted_req_ids or ())):
            self._states.pop(req_id, None)
        self.begun = {}
        self._compact(orders_of(output))
        self._zero(output.new_block_ids_to_zero or [])
        self._copy(output.kv_cache_block_copies or [])
        self._hits = compacted_hits_of(output)
        self._update(output)
        self.begun = {req_id: self._states[req_id].num_computed for req_id in output.num_scheduled_tokens}
        written: dict[int, set[int]] = {}
        rejected: list[int] = []
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            num_drafts = len(output.scheduled_spec_decode_tokens.get(req_id, ()))
            for block, offset in self._write(req_id, num_tokens - num_drafts, num_drafts):
                written.setdefault(block, set()).add(offset)
            rejected += self._write_rejected(req_id, num_tokens)
        self._check_written(written)
        self._check_private(rejected)
        return [self._attend(req_id) for req_id in output.num_scheduled_tokens]

    def _check_private(self, blocks: Iterable[int]) -> None:
        """Checks that a block filled with other rows has one holder."""
        tables = ((req_id, group) for req_id, state in self._states.items() for group in range(len(state.tables)))
        holders = Counter(block for table in tables for _, block in self._blocks_read(*table))
        for block in blocks:
            assert holders[block] <= 1, f"block {block} is overwritten and has {holders[block]} holders"

    def _check_written(self, written: dict[int, set[int]]) -> None:
        """Checks that a request writes no block of another one, except rows that the other has found in this same step.

        It must not even write after the other's rows: a hit in a partial block is a copy of it.
        """
        for req_id, state in self._states.items():
            for group in range(len(state.tables)):
                for i, block in self._blocks_read(req_id, group):
                    for offset in written.get(block, ()):
                        slot = (
                            len(state.rows[group]) - 1
                            if group in self._recurrent
                            else i * self._block_sizes[group] + offset
                        )
                        assert slot < len(state.rows[group]), f"block {block} of {req_id} is written by another"
                        assert state.rows[group][slot] == self._memory[block, offset], f"{req_id}: row of another"

    def _compact(self, orders: tuple[CompactionOrder, ...]) -> None:
        check_disjoint(orders)
        for order in orders:
            state, rule = self._states[order.req_id], self.rules[order.req_id]
            assert state.due is not None, f"{order.req_id} has had all its compactions"
            assert (state.num_computed, order.num_rows, order.num_keep) == state.due, f"{order} is not {state.due}"
            # Counts are set, not added: they include all compactions so far.
            assert order.num_evicted == state.num_evicted + order.num_rows - order.num_keep
            assert (order.params.protect_first, order.params.protect_last) == (rule.first, rule.last)
            assert {move.group_id for move in order.moves} == self._compressed
            kept, copy = state.compact(rule), next(self._compactions)
            for move in order.moves:
                self._move(order.req_id, move, kept, copy)
        self._check_private(block for order in orders for move in order.moves for block in move.destination)

    def _move(self, req_id: str, move: GroupMove, kept: list[int], copy: int) -> None:
        state, size = self._states[req_id], self._block_sizes[move.group_id]
        assert list(move.source) == state.tables[move.group_id], f"{req_id}: sources are not its table"
        assert len(move.destination) == num_blocks_for(len(kept), size)
        self._check_rows(req_id, move.group_id)
        assert len(state.rows[move.group_id]) > max(kept)
        rows = [state.rows[move.group_id][slot]._replace(copy=copy) for slot in kept]
        slots = [(block, offset) for block in move.destination for offset in range(size)]
        self._memory.update(itertools.zip_longest(slots, rows))
        self.copied.difference_update(move.destination)
        state.tables[move.group_id] = list(move.destination)
        state.rows[move.group_id] = rows

    def _zero(self, blocks: Iterable[int]) -> None:
        offsets = range(max(self._block_sizes))
        for block in blocks:
            self._memory.update(((block, offset), None) for offset in offsets)
            self.copied.discard(block)

    def _copy(self, copies) -> None:
        offsets = range(max(self._block_sizes))
        rows = [[self._memory.get((copy.src_block_id, offset)) for offset in offsets] for copy in copies]
        for copy, copied in zip(copies, rows, strict=True):
            self._memory.update(((copy.dst_block_id, offset), row) for offset, row in enumerate(copied))
            self.copied.add(copy.dst_block_id)

    def _update(self, output) -> None:
        for new in output.scheduled_new_reqs:
            known = new.prefill_token_ids or new.prompt_token_ids
            self._begin(new.req_id, new.block_ids, new.num_computed_tokens, len(known))
        cached = output.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            num_known = len(self.tokens[req_id].prompt) + cached.num_output_tokens[i]
            if req_id in cached.resumed_req_ids:
                self._begin(req_id, cached.new_block_ids[i], cached.num_computed_tokens[i], num_known)
                continue
            state = self._states[req_id]
            # The scheduler counts drafts as computed and known until the worker reports their rejection.
            num_uncertain = cached.num_computed_tokens[i] - state.num_computed
            assert 0 <= num_uncertain <= state.num_rejected
            state.num_known = num_known - num_uncertain
            for table, blocks in zip(state.tables, cached.new_block_ids[i] or [], strict=False):
                table.extend(blocks)

    def _begin(self, req_id: str, block_ids: tuple[list[int], ...], num_computed: int, num_known: int) -> None:
        """Begins a first or repeated prefill, on rows with a whole context or of one of its own compactions."""
        assert req_id not in self._states
        tokens, rule = self.tokens[req_id], self.rules[req_id]
        coming = rule.compactions(len(tokens.prompt))
        tables = [list(blocks) for blocks in block_ids]
        state = RequestState(tokens, coming, next(coming, None), tables, 0, num_known, [[] for _ in tables])
        self._states[req_id] = state
        while req_id in self._hits and state.num_computed < num_computed:
            assert state.due is not None, f"{req_id} finds rows of no compaction"
            assert state.due.position <= num_computed, f"{req_id} finds rows of no compaction"
            state.compute(state.due.position)
            slots = state.compact(rule)
            for group in self._compressed:
                state.rows[group] = [state.rows[group][slot] for slot in slots]
        assert state.num_evicted == self._hits.get(req_id, 0)
        state.compute(num_computed)
        assert state.due is None or num_computed < state.due.position, f"{req_id} begins after its next compaction"
        if req_id in self._hits:
            self._take_copy(req_id)

    def _take_copy(self, req_id: str) -> None:
        """Checks that found rows exist before the step writes anything, and that all are from one compaction."""
        state = self._states[req_id]
        (copy,) = {getattr(self._memory.get(self._where(req_id, group, 0)), "copy", None) for group in self._compressed}
        for group in range(len(state.tables)):
            if group in self._compressed:
                state.rows[group] = [row._replace(copy=copy) for row in state.rows[group]]
            self._check_rows(req_id, group)

    def _write(self, req_id: str, num_tokens: int, num_drafts: int) -> list[tuple[int, int]]:
        """Computes tokens and a pseudo-random part of the drafts, and returns where it writes them."""
        state = self._states[req_id]
        if state.due is not None:
            assert state.num_computed < state.due.position, f"{req_id} runs without its compaction"
            end = state.num_computed + num_tokens + num_drafts
            assert end <= state.due.position, f"{req_id} runs past its compaction"
        for group in self._recurrent:
            self._check_rows(req_id, group)  # the state that the step begins with, before it is overwritten
        num_rows = [len(rows) for rows in state.rows]
        num_accepted = zlib.crc32(b"%d %d" % (state.num_computed, num_drafts)) % (num_drafts + 1)
        self.drafts.update(accepted=num_accepted, rejected=num_drafts - num_accepted)
        state.num_accepted, state.num_rejected = num_accepted, num_drafts - num_accepted
        state.compute(state.num_computed + num_tokens + num_accepted)
        written = []
        for group, rows in enumerate(state.rows):
            first = len(rows) - 1 if group in self._recurrent else num_rows[group]
            for slot in range(first, len(rows)):
                written.append(self._where(req_id, group, slot))
                self._memory[written[-1]] = rows[slot]
        return written

    def _write_rejected(self, req_id: str, num_tokens: int) -> list[int]:
        """Writes rows of drafts that are rejected later, and returns their blocks."""
        state, blocks = self._states[req_id], []
        num_written = num_tokens - state.num_rejected
        assert state.num_computed == self.begun[req_id] + num_written
        for group, rows in enumerate(state.rows):
            for i in range(state.num_rejected):
                where = self._where(req_id, group, len(rows) + i)
                self._memory[where] = None
                blocks.append(where[0])
        return blocks

    def _attend(self, req_id: str) -> list[int]:
        """Reads all rows of a request; samples when all known tokens are computed, also after each accepted draft."""
        state = self._states[req_id]
        for group in range(len(state.tables)):
            self._check_rows(req_id, group)
            self._check_rest(req_id, group)
        if state.num_computed < state.num_known:
            return []
        end = state.num_computed
        return [state.tokens[position] for position in range(end - state.num_accepted, end + 1)]

    def _first_read(self, req_id: str, group: int) -> int:
        """The first slot that a request reads in this step, or in its next one if it has none."""
        begin = self.begun.get(req_id, self._states[req_id].num_computed)
        return self._passed[group](begin) if group in self._passed else 0

    def _blocks_read(self, req_id: str, group: int) -> Iterator[tuple[int, int]]:
        """Indices and ids of a request's blocks; those that a window has passed may be of others by now."""
        first = self._first_read(req_id, group) // self._block_sizes[group]
        return itertools.islice(enumerate(self._states[req_id].tables[group]), first, None)

    def _check_rows(self, req_id: str, group: int) -> None:
        rows = self._states[req_id].rows[group]
        first = max(0, len(rows) - 1) if group in self._recurrent else self._first_read(req_id, group)
        for slot, row in enumerate(rows[first:], first):
            found = self._memory.get(self._where(req_id, group, slot))
            assert found == row, f"{req_id} reads {found} in slot {slot} instead of {row}"

    def _check_rest(self, req_id: str, group: int) -> None:
        """Checks that slots after the last row are empty, which attention on GPUs may multiply by zero."""
        num_rows, size = len(self._states[req_id].rows[group]), self._block_sizes[group]
        if group in self._recurrent or num_rows % size == 0:
            return
        for slot in range(num_rows, -(-num_rows // size) * size):
            where = self._where(req_id, group, slot)
            found = self._memory.get(where)
            assert found is None or where[0] in self.copied, f"{req_id} has {found} after its last row"

    def _where(self, req_id: str, group: int, slot: int) -> tuple[int, int]:
        table, size = self._states[req_id].tables[group], self._block_sizes[group]
        assert slot < len(table) * size, f"{req_id}: slot {slot} is beyond its table of {len(table)} blocks of {size}"
        return table[slot // size], 0 if group in self._recurrent else slot % size


def kept_slots(num_rows: int, num_keep: int, first: int, last: int) -> list[int]:
    """Returns the protected slots, and a pseudo-random choice of others."""

    def rank(slot: int) -> tuple[bool, int]:
        protected = slot < first or slot >= num_rows - last
        return not protected, zlib.crc32(b"%d %d" % (slot, num_rows))

    return sorted(sorted(range(num_rows), key=rank)[:num_keep])


def check_disjoint(orders: tuple[CompactionOrder, ...]) -> None:
    """Checks that no order writes what another one reads or writes: on a GPU a step's orders run at once."""
    moves = [move for order in orders for move in order.moves]
    assert len({order.req_id for order in orders}) == len(orders)
    for move in moves:
        source, destination = set(move.source), set(move.destination)
        in_place = move.destination == move.source[: len(move.destination)]
        assert in_place or not source & destination
        assert len(destination) == len(move.destination)
        for other in moves:
            assert other is move or not destination & {*other.source, *other.destination}, f"{move} writes {other}"
