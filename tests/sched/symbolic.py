"""An executor without a model that checks every Step's memory.

Instead of keys it stores, per KV slot and group, a fingerprint of the whole prefix up to that
token. Each query then demands that its row's block table leads to exactly the prefix it should
see, so a lost copy, a block freed too early or a wrong table entry fails at once. The token drawn
is a function of the prefix, sample and position alone: the right output of a sequence is known
without any scheduler.
"""

from __future__ import annotations

import hashlib

import numpy as np

from batchwright.sequence import Sequence
from batchwright.step import LAST_SAMPLED, NO_WRITE, Step, StepResult

UNWRITTEN = 0


def fingerprint(previous: int, token_id: int) -> int:
    """Fingerprint of a prefix extended by one token; never UNWRITTEN."""
    digest = hashlib.blake2b(f"{previous},{token_id}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") + 1


def draw(prefix: int, sample_index: int, vocab_size: int) -> int:
    """The token that follows a prefix in this pretended model."""
    return fingerprint(prefix, -5 - sample_index) % vocab_size


def expected_output(sequence: Sequence, vocab_size: int) -> list[int]:
    """Output tokens of a sequence, from its prompt alone."""
    prefix = UNWRITTEN
    for token_id in sequence.request.prompt_token_ids.tolist():
        prefix = fingerprint(prefix, token_id)
    output: list[int] = []
    while sequence.num_prompt_tokens + len(output) < sequence.max_len:
        token_id = draw(prefix, sequence.sample_index, vocab_size)
        output.append(token_id)
        if token_id in sequence.end_token_ids:
            break
        prefix = fingerprint(prefix, token_id)
    return output


class SymbolicExecutor:
    """See the module docstring. `windows` and `num_blocks` have one entry per KV group."""

    def __init__(
        self,
        windows: list[int | None],
        num_blocks: list[int],
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int,
    ) -> None:
        self.windows, self.block_size, self.vocab_size = windows, block_size, vocab_size
        max_blocks = -(-max_model_len // block_size)
        self.kv = [np.zeros(n * block_size, np.int64) for n in num_blocks]
        self.tables = [np.full((max_num_seqs, max_blocks), -1) for _ in windows]
        self.last_token: dict[int, int] = {}
        self.sample_index: dict[int, int] = {}
        self.occupied: set[int] = set()
        self.prefixes: dict[int, list[int]] = {}  # slot -> fingerprint after each position

    def execute(self, step: Step) -> StepResult:
        self._apply_changes(step)
        self._write(step)
        self._check_visible(step)
        ids = []
        for token, slot in zip(step.sample_tokens.tolist(), step.sample_slots.tolist(), strict=True):
            row = int(np.searchsorted(step.cu_seqlens_q, token, side="right")) - 1
            source = int(step.slots[row])
            prefix = self.prefixes[source][step.positions[token]]
            if slot != source:  # a fork: it continues its parent's prefix
                self.prefixes[slot] = self.prefixes[source][: step.positions[token] + 1]
            self.last_token[slot] = draw(prefix, self.sample_index[slot], self.vocab_size)
            ids.append(self.last_token[slot])
        return StepResult(step_id=step.step_id, token_ids=np.array(ids, np.int32))

    def close(self) -> None:
        pass

    def _apply_changes(self, step: Step) -> None:
        for slot in step.finished_slots.tolist():
            self.occupied.discard(slot)
            for table in self.tables:
                table[slot] = -1
        for new in step.new_sequences:
            assert new.slot not in self.occupied, "a slot was given away twice"
            self.occupied.add(new.slot)
            self.sample_index[new.slot] = new.sample_index
            prefix, prefixes = UNWRITTEN, []
            for token_id in new.token_ids.tolist():
                prefix = fingerprint(prefix, token_id)
                prefixes.append(prefix)
            self.prefixes[new.slot] = prefixes
        for table, update in zip(self.tables, step.table_updates, strict=True):
            table[update.slots, update.indices] = update.block_ids
        for kv, copies in zip(self.kv, step.block_copies, strict=True):
            blocks = kv.reshape(-1, self.block_size)
            blocks[copies[:, 1]] = blocks[copies[:, 0]]

    def _write(self, step: Step) -> None:
        """Write every token's fingerprint, first making known the tokens sampled last."""
        rows = np.repeat(np.arange(step.num_rows), np.diff(step.cu_seqlens_q))
        for index, row in enumerate(rows.tolist()):
            slot, position = int(step.slots[row]), int(step.positions[index])
            prefixes = self.prefixes[slot]
            token_id = int(step.token_ids[index])
            if token_id == LAST_SAMPLED:
                token_id = self.last_token[slot]
                assert position == len(prefixes), "the last sampled token is at the end"
                previous = prefixes[-1]
                prefixes.append(fingerprint(previous, token_id))
            previous = prefixes[position - 1] if position else UNWRITTEN
            assert prefixes[position] == fingerprint(previous, token_id), "wrong token at position"
            for kv, kv_slots in zip(self.kv, step.kv_slots, strict=True):
                if kv_slots[index] != NO_WRITE:
                    kv[kv_slots[index]] = prefixes[position]

    def _check_visible(self, step: Step) -> None:
        last = step.cu_seqlens_q[1:] - 1
        first = step.cu_seqlens_q[:-1]
        for row, slot in enumerate(step.slots.tolist()):
            end = int(step.positions[last[row]]) + 1
            for window, table, kv in zip(self.windows, self.tables, self.kv, strict=True):
                start = 0 if window is None else max(0, int(step.positions[first[row]]) - window + 1)
                positions = np.arange(start, end)
                blocks = table[slot, positions // self.block_size]
                found = kv[blocks * self.block_size + positions % self.block_size]
                assert (found == np.array(self.prefixes[slot][start:end])).all(), "wrong KV is seen"
