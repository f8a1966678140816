"""An executor without a model that checks every Step's memory.

Instead of keys it stores, per KV slot and group, a fingerprint of the whole prefix up to that
token. Each query then demands that its row's block table leads to exactly the prefix it should
see, so a lost copy, a block freed too early or a wrong table entry fails at once. What is drawn,
scored or pooled is a function of the prefix alone: the right answer of a sequence is known without
any scheduler.
"""

from __future__ import annotations

import hashlib

import numpy as np

from batchwright.request import Float32Array
from batchwright.sequence import Sequence
from batchwright.step import LAST_SAMPLED, NO_WRITE, Step, StepResult, TokenLogprobs

UNWRITTEN = 0


def fingerprint(previous: int, token_id: int) -> int:
    """Fingerprint of a prefix extended by one token; never UNWRITTEN."""
    digest = hashlib.blake2b(b"%d,%d" % (previous, token_id), digest_size=7).digest()
    return int.from_bytes(digest, "little") + 1


def fingerprints(token_ids: list[int]) -> list[int]:
    """Fingerprint of the prefix that ends with each token."""
    prefix, prefixes = UNWRITTEN, []
    for token_id in token_ids:
        prefix = fingerprint(prefix, token_id)
        prefixes.append(prefix)
    return prefixes


def draw(prefix: int, sample_index: int, vocab_size: int) -> int:
    """The token that follows a prefix in this pretended model."""
    return fingerprint(prefix, -5 - sample_index) % vocab_size


def score_line(prefix: int, target: int) -> int:
    """What this pretended model says about `target` after a prefix, in the place of its rank."""
    return fingerprint(prefix, target) % 2**31


def hidden(prefix: int) -> int:
    """The pretended hidden state after a prefix; sums of a few are exact in fp32."""
    return prefix % 2**16


def expected_output(sequence: Sequence, vocab_size: int) -> list[int]:
    """Output tokens of a sequence, from its prompt alone."""
    prefix = fingerprints(sequence.request.prompt_token_ids.tolist())[-1]
    output: list[int] = []
    while sequence.num_prompt_tokens + len(output) < sequence.max_len:
        token_id = draw(prefix, sequence.sample_index, vocab_size)
        output.append(token_id)
        if token_id in sequence.end_token_ids:
            break
        prefix = fingerprint(prefix, token_id)
    return output


def expected_scores(sequence: Sequence) -> dict[int, int]:
    """Score line of every scored position of a sequence."""
    if sequence.score_start is None:
        return {}
    prompt = sequence.request.prompt_token_ids.tolist()
    prefixes = fingerprints(prompt)
    return {
        position: score_line(prefixes[position - 1], prompt[position])
        for position in range(sequence.score_start, len(prompt))
    }


def expected_embedding(sequence: Sequence) -> list[int]:
    """Pooled hidden states of an embedding sequence: (their number, their sum)."""
    states = [hidden(prefix) for prefix in fingerprints(sequence.request.prompt_token_ids.tolist())]
    return [len(states), sum(states)] if sequence.request.pooling == "mean" else [1, states[-1]]


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
        num_host_blocks: int = 0,
    ) -> None:
        self.host = np.zeros((num_host_blocks, block_size), np.int64)
        self.windows, self.block_size, self.vocab_size = windows, block_size, vocab_size
        max_blocks = -(-max_model_len // block_size)
        self.kv = [np.zeros(n * block_size, np.int64) for n in num_blocks]
        self.tables = [np.full((max_num_seqs, max_blocks), -1) for _ in windows]
        self.last_token: dict[int, int] = {}
        self.sample_index: dict[int, int] = {}
        self.occupied: set[int] = set()
        self.prefixes: dict[int, list[int]] = {}  # slot -> fingerprint after each position
        self.pooled: dict[int, list[int]] = {}  # slot -> [number, sum] of pooled states so far
        self.pooling: dict[int, str | None] = {}

    def execute(self, step: Step) -> StepResult:
        self._apply_changes(step)
        self._check_rows(step)
        self._write(step)
        self._check_visible(step)
        return StepResult(
            step_id=step.step_id,
            token_ids=self._sample(step),
            score_logprobs=self._score(step),
            embeddings=self._pool(step),
        )

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
            self.prefixes[new.slot] = fingerprints(new.token_ids.tolist())
            self.pooling[new.slot], self.pooled[new.slot] = new.pooling, [0, 0]
        if step.saved_blocks is not None:
            blocks, host_blocks = step.saved_blocks.T
            assert len(set(host_blocks.tolist())) == len(host_blocks), "two saves to one block"
            self.host[host_blocks] = self.kv[0].reshape(-1, self.block_size)[blocks]
        for table, update in zip(self.tables, step.table_updates, strict=True):
            table[update.slots, update.indices] = update.block_ids
        for kv, copies in zip(self.kv, step.block_copies, strict=True):
            assert len(set(copies[:, 1].tolist())) == len(copies), "two copies to one block"
            blocks = kv.reshape(-1, self.block_size)
            blocks[copies[:, 1]] = blocks[copies[:, 0]]
        if step.loaded_blocks is not None:
            host_blocks, blocks = step.loaded_blocks.T
            assert len(set(blocks.tolist())) == len(blocks), "two loads to one block"
            assert self.host[host_blocks, 0].all(), "loaded what was never saved"
            self.kv[0].reshape(-1, self.block_size)[blocks] = self.host[host_blocks]

    def _check_rows(self, step: Step) -> None:
        """One run of consecutive positions per occupied slot, and no KV slot written twice."""
        assert step.num_rows and len(set(step.slots.tolist())) == step.num_rows
        assert set(step.slots.tolist()) | set(step.sample_slots.tolist()) <= self.occupied
        lengths = np.diff(step.cu_seqlens_q)
        assert (lengths > 0).all() and step.cu_seqlens_q[-1] == step.num_tokens
        firsts = np.repeat(step.positions[step.cu_seqlens_q[:-1]], lengths)
        offsets = np.arange(step.num_tokens) - np.repeat(step.cu_seqlens_q[:-1], lengths)
        assert (step.positions == firsts + offsets).all()
        slots = np.repeat(step.slots, lengths)
        for table, kv_slots in zip(self.tables, step.kv_slots, strict=True):
            blocks = table[slots, step.positions // self.block_size]
            places = blocks * self.block_size + step.positions % self.block_size
            written = kv_slots != NO_WRITE
            assert (places[written] == kv_slots[written]).all(), "written beside the block table"
            assert len(np.unique(kv_slots[written])) == written.sum(), "KV slot written twice"

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
                start = (
                    0 if window is None else max(0, int(step.positions[first[row]]) - window + 1)
                )
                positions = np.arange(start, end)
                blocks = table[slot, positions // self.block_size]
                found = kv[blocks * self.block_size + positions % self.block_size]
                assert (found == np.array(self.prefixes[slot][start:end])).all(), "wrong KV is seen"

    def _row_of(self, step: Step, token: int) -> int:
        return int(np.searchsorted(step.cu_seqlens_q, token, side="right")) - 1

    def _sample(self, step: Step) -> np.ndarray:
        assert len(set(step.sample_slots.tolist())) == len(step.sample_slots)
        ids = []
        draws = zip(step.sample_tokens.tolist(), step.sample_slots.tolist(), strict=True)
        for token, slot in draws:
            source = int(step.slots[self._row_of(step, token)])
            assert step.positions[token] == len(self.prefixes[source]) - 1, "drawn inside a prefix"
            prefix = self.prefixes[source][-1]
            if slot != source:  # a fork: it continues its parent's prefix
                self.prefixes[slot] = list(self.prefixes[source])
            self.last_token[slot] = draw(prefix, self.sample_index[slot], self.vocab_size)
            ids.append(self.last_token[slot])
        return np.array(ids, np.int32)

    def _score(self, step: Step) -> TokenLogprobs | None:
        """Lines whose ranks are `score_line`s."""
        lines = []
        scored = zip(step.score_tokens.tolist(), step.score_targets.tolist(), strict=True)
        for token, target in scored:
            prefixes = self.prefixes[int(step.slots[self._row_of(step, token)])]
            lines.append(score_line(prefixes[step.positions[token]], target))
        if not lines:
            return None
        zeros, none = np.zeros(len(lines), np.float32), np.empty((len(lines), 0))
        return TokenLogprobs(
            zeros, np.array(lines, np.int32), none.astype(np.int32), none.astype(np.float32)
        )

    def _pool(self, step: Step) -> dict[int, Float32Array]:
        embeddings = {}
        for row, done in zip(step.pool_rows.tolist(), step.pool_done.tolist(), strict=True):
            slot = int(step.slots[row])
            start, end = step.cu_seqlens_q[row : row + 2]
            states = [hidden(self.prefixes[slot][p]) for p in step.positions[start:end].tolist()]
            if self.pooling[slot] == "last":
                self.pooled[slot], states = [0, 0], states[-1:]
            self.pooled[slot][0] += len(states)
            self.pooled[slot][1] += sum(states)
            if done:
                embeddings[slot] = np.array(self.pooled[slot], np.float32)
        return embeddings
