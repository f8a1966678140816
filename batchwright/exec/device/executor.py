"""DeviceExecutor: one model on one GPU, or one rank's part of it.

Block tables, keys and values, and the last drawn tokens live on the device. A step is planned on
the host in numpy, sent in one transfer, computed as a captured graph if it is small, and its tokens
come back while the next step is being made: `execute` does not wait for the device, so with one
step of look-ahead the device never waits for the host.

On a CPU it does the same with stand-ins for kernels and graphs, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from batchwright.attention.device import (
    LISTS,
    DeviceAttention,
    RowBatch,
    WorkSizes,
    describe,
)
from batchwright.attention.spec import AttentionSpec
from batchwright.exec.device.graphs import Compute, Graphs
from batchwright.exec.device.kv_memory import EIGHT_BIT_DTYPES, DeviceKV
from batchwright.exec.device.layout import Array, Layout
from batchwright.exec.device.sampler import DeviceSampler, HostSampler, Sampler, greedy
from batchwright.exec.device.shapes import (
    MAX_GRAPH_TOKENS,
    filled,
    graph_tokens,
    padded_rows,
    token_arrays,
)
from batchwright.exec.device.transfer import Arriving, Download, Upload, fetch
from batchwright.exec.local import LOGITS_CHUNK
from batchwright.exec.pooling import Pooler
from batchwright.exec.slot_state import SlotState
from batchwright.kernels.paged_attention.device_work import DeviceWork
from batchwright.kernels.paged_attention.work_list import WorkList
from batchwright.kv.groups import KVGroup
from batchwright.models.causal_lm import CausalLM
from batchwright.request import Float32Array, Int32Array
from batchwright.step import NewSequence, Step, StepResult, TableUpdate, TokenLogprobs
from batchwright.tensor_parallel.ranks import Ranks

UPLOAD_BYTES = 4 << 20
"""Of a step's inputs; 2,048 tokens of prompts take about 300 KiB. Larger ones get memory then."""


NO_BLOCKS = torch.empty(0, dtype=torch.int64)


class GraphKey(NamedTuple):
    """What tells captured graphs apart."""

    num_tokens: int
    wide: bool
    merged: bool


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """A step's inputs on the device, int32; those of a graph keep their places."""

    token_ids: torch.Tensor  # [num_tokens] or LAST_SAMPLED
    token_slots: torch.Tensor  # [num_tokens]
    position_ids: torch.Tensor  # [num_tokens]
    kv_slots: list[torch.Tensor]  # per KV group, [num_tokens]
    work: list[DeviceWork]


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step's inputs on the host.

    Attributes:
        key: the graph that they fit, or None.
        counts: of each work list; see DeviceAttention.bind.
    """

    arrays: dict[str, Array]
    counts: list[tuple[int, int]]
    key: GraphKey | None


@dataclass(slots=True, eq=False)
class Pending:
    """A StepResult that is on its way.

    Attributes:
        drawn: token ids; None: nothing is drawn.
        sample_logprobs, score_logprobs: the fields of TokenLogprobs.
        embeddings: one, [number of slots, hidden_size], of `pooled_slots`.
    """

    step_id: int
    drawn: Arriving | None
    sample_logprobs: Arriving | None
    score_logprobs: Arriving | None
    embeddings: Arriving | None
    pooled_slots: list[int]

    def wait(self) -> StepResult:
        """Waits for the device."""
        token_ids = np.empty(0, np.int32)
        if self.drawn is not None:
            token_ids = self.drawn.wait()[0].copy()  # its memory serves again
        embeddings: dict[int, Float32Array] | None = None
        if self.embeddings is not None:
            embeddings = dict(zip(self.pooled_slots, self.embeddings.wait()[0].copy(), strict=True))
        return StepResult(
            step_id=self.step_id,
            token_ids=token_ids,
            sample_logprobs=_logprobs(self.sample_logprobs),
            score_logprobs=_logprobs(self.score_logprobs),
            embeddings=embeddings,
        )


def _logprobs(arriving: Arriving | None) -> TokenLogprobs | None:
    return None if arriving is None else TokenLogprobs(*arriving.wait())


class DeviceExecutor:
    """See the module docstring.

    Args:
        model: from `models.loader`, on the device.
        groups: KV groups with their pool sizes; see also `allocate`.
        group_of_layer: KV group of every layer.
        block_size: tokens per block.
        max_num_seqs: slots.
        max_model_len: most tokens of a sequence.
        vocab_size: columns of the logits.
        graphs: records small steps; None: every step is launched kernel by kernel.
        max_graph_tokens: of the largest step that is recorded.
        num_programs, share_prefixes: see DeviceAttention.
        kv_cache_dtype: "int8" or "fp8": keys and values in 8 bits; else in the model's dtype.
        ranks: see LocalExecutor. Collectives are queued like kernels, so graphs have them too.
    """

    def __init__(
        self,
        model: CausalLM,
        groups: Sequence[KVGroup],
        group_of_layer: Sequence[int],
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int,
        graphs: Graphs | None,
        max_graph_tokens: int = MAX_GRAPH_TOKENS,
        num_programs: tuple[int, int] | None = None,
        share_prefixes: bool = True,
        kv_cache_dtype: str = "auto",
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks
        self._draws = ranks is None or ranks.rank == 0
        device = next(model.parameters()).device
        self._model, self._device, self._dtype = model, device, model.dtype
        self._group_of_layer = list(group_of_layer)
        self._block_size = block_size
        self._kv = DeviceKV(
            model.attention_specs,
            group_of_layer,
            block_size=block_size,
            dtype=EIGHT_BIT_DTYPES.get(kv_cache_dtype, self._dtype),
            device=device,
        )
        self._attention = DeviceAttention(
            model.attention_specs,
            group_of_layer,
            block_size=block_size,
            dtype=self._dtype,
            device=self._device,
            kv_cache_dtype=kv_cache_dtype,
            num_programs=num_programs,
            share_prefixes=share_prefixes,
        )
        max_blocks = -(-max_model_len // block_size)
        self._slots = SlotState(len(groups), max_num_seqs, max_blocks)  # block tables on the host
        self._no_slot = max_num_seqs  # one line more, for tokens that fill up
        lines = max_num_seqs + 1
        self._tables = [self._zeros(lines, max_blocks) for _ in groups]
        self._last_token = self._zeros(lines)
        sizes = max_num_seqs, max_model_len, vocab_size
        self._sampler: Sampler = (
            DeviceSampler(*sizes, self._device)
            if self._attention.has_kernels
            else HostSampler(*sizes)
        )
        self._pooler = Pooler()
        self._num_prompt: Int32Array = np.zeros(max_num_seqs, np.int32)
        self._upload = Upload(UPLOAD_BYTES, self._device)
        self._download = Download(max_num_seqs, self._device)
        self._graphs = graphs
        self._sizes = graph_tokens(max_graph_tokens) if graphs is not None else []
        self._captured: dict[GraphKey, Compute | None] = {}
        self._layouts: dict[GraphKey, tuple[Layout, list[WorkSizes]]] = {}
        self.num_replayed = 0
        """Steps that were computed as a graph."""
        self.allocate(groups)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self._device)

    def allocate(self, groups: Sequence[KVGroup]) -> None:
        """Take memory for keys and values, in place of what there was."""
        self._captured.clear()  # they hold the addresses of the old
        self._kv.allocate(groups)

    @torch.inference_mode()
    def execute(self, step: Step) -> Pending:
        """See `Executor`. Returns before the device is done. Level rounding."""
        try:
            return self._execute(step)
        except torch.OutOfMemoryError:
            self._captured.clear()
            self._sizes = []  # what is left is better spent on rows
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            raise

    def close(self) -> None:
        self._kv.clear()
        self._captured.clear()

    def _execute(self, step: Step) -> Pending:
        for new in step.new_sequences:
            self._install(new)
        self._slots.apply(step)
        planned = self._plan(step)
        slots = step.sample_slots
        output_positions = step.positions[step.sample_tokens] + 1 - self._num_prompt[slots]
        changes = _changes(step, self._slots.block_tables)
        if self._draws:
            changes |= self._sampler.inputs(step, output_positions)
        layout, views = self._send(planned, changes)
        self._apply(step, views)
        hidden = self._compute(planned, layout)
        drawn, told = None, None
        if len(slots):
            drawn, told = self._draw(step, hidden, output_positions, views)
        score = self._score(step, hidden, views) if len(step.score_tokens) else None
        pooled = self._pooler.pool(step, hidden) if len(step.pool_rows) else {}
        return Pending(
            step_id=step.step_id,
            drawn=drawn,
            sample_logprobs=told,
            score_logprobs=score,
            embeddings=fetch([torch.stack(list(pooled.values()))]) if pooled else None,
            pooled_slots=list(pooled),
        )

    def _install(self, new: NewSequence) -> None:
        self._num_prompt[new.slot] = new.num_prompt_tokens
        if new.pooling is not None:
            self._pooler.start(new.slot, new.pooling)
        else:
            self._sampler.add(new)

    # Planning on the host --------------------------------------------------------------------

    def _plan(self, step: Step) -> PlannedStep:
        """The step's inputs, filled up to the size of a graph if it is small."""
        num_tokens = step.num_tokens
        size = next((size for size in self._sizes if size >= num_tokens), None)
        rows = padded_rows(step, num_tokens if size is None else size, self._no_slot)
        tables = self._slots.block_tables
        work = self._attention.work(rows, step.num_rows, tables)
        key = None if size is None else self._key(size, work)
        if size is not None and key is None:  # too many levels of shared keys: none, then
            work = self._attention.work(rows, step.num_rows, tables, share=False)
            key = self._key(size, work)
        return self._planned(step, rows, work, key)

    def _planned(
        self, step: Step, rows: RowBatch, work: Sequence[WorkList], key: GraphKey | None
    ) -> PlannedStep:
        """The arrays of a step, of the lengths that its graph has."""
        arrays: dict[str, Array] = dict(token_arrays(step, rows, self._no_slot))
        counts = [describe(one) for one in work]
        if key is not None:
            sizes = self._layout_of(key)[1]
            counts = [(size.total_partials, size.max_partials) for size in sizes]
            work = [
                one._replace(merged_tokens=filled(one.merged_tokens, size.merged, -1))
                for one, size in zip(work, sizes, strict=True)
            ]
        for index, one in enumerate(work):
            arrays |= {f"{name}.{index}": getattr(one, name) for name in LISTS}
        return PlannedStep(arrays, counts, key)

    def _key(self, num_tokens: int, work: Sequence[WorkList]) -> GraphKey | None:
        """The graph that work fits, if any."""
        key = GraphKey(
            num_tokens,
            any(len(one.wide) for one in work),
            any(len(one.merged_tokens) for one in work),
        )
        sizes = self._layout_of(key)[1]
        return key if all(size.hold(one) for size, one in zip(sizes, work, strict=True)) else None

    def _layout_of(self, key: GraphKey) -> tuple[Layout, list[WorkSizes]]:
        """Where a graph's inputs lie, and how long its work lists are."""
        if key not in self._layouts:
            sizes = self._attention.graph_sizes(key.num_tokens, wide=key.wide, merged=key.merged)
            num_tokens = (key.num_tokens,)
            names = "token_ids", "token_slots", "position_ids"
            shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, num_tokens)
            shapes |= {f"kv_slots.{group}": num_tokens for group in range(len(self._tables))}
            for index, size in enumerate(sizes):
                shapes[f"narrow.{index}"] = size.narrow, 8
                shapes[f"wide.{index}"] = size.wide, 8
                shapes[f"entry_tokens.{index}"] = (size.num_entries,)
                for name in ("key_start", "key_end", "partial_start", "num_partials"):
                    shapes[f"{name}.{index}"] = num_tokens
                shapes[f"merged_tokens.{index}"] = (size.merged,)
            sections = {name: (np.int32, shape) for name, shape in shapes.items()}
            self._layouts[key] = Layout(sections), sizes
        return self._layouts[key]

    # The transfer ----------------------------------------------------------------------------

    def _send(
        self, planned: PlannedStep, changes: dict[str, Array]
    ) -> tuple[Layout, dict[str, torch.Tensor]]:
        """Send everything at once: (where the inputs lie, the changes and samples)."""
        if planned.key is None:
            layout = Layout.of(planned.arrays)
        else:
            layout = self._layout_of(planned.key)[0]
        rest = Layout.of(changes, layout.end)
        host = self._upload.begin(rest.end)
        layout.write(planned.arrays, host)
        rest.write(changes, host)
        self._sent = self._upload.send(rest.end)
        return layout, rest.views(self._sent)

    def _apply(self, step: Step, views: dict[str, torch.Tensor]) -> None:
        """Block tables, copies of keys and values, and what new sequences want drawn."""
        if self._draws:
            self._sampler.apply(views)
        if step.num_swapped:
            self._save(step, views)
        for group, table in enumerate(self._tables):
            if f"table_ids.{group}" in views:
                ids, places = views[f"table_ids.{group}"], views[f"table_places.{group}"]
                table.view(-1).index_copy_(0, places, ids)
            if f"copied_blocks.{group}" in views:
                self._kv.copy_blocks(group, *views[f"copied_blocks.{group}"])
            if "loaded_blocks" in views:
                self._load(step, views)
        if "copied_tokens" in views:
            self._kv.copy_tokens(*views["copied_tokens"])

    def _save(self, step: Step, views: dict[str, torch.Tensor]) -> None:
        """Copy blocks to the host, perhaps none."""
        assert step.saved_blocks is not None
        self._kv.save(views.get("saved_blocks", NO_BLOCKS), step.saved_blocks[:, 1].tolist())

    def _load(self, step: Step, views: dict[str, torch.Tensor]) -> None:
        """Copy blocks back from the host."""
        assert step.loaded_blocks is not None
        self._kv.load(step.loaded_blocks[:, 0].tolist(), views["loaded_blocks"])

    # Computing -------------------------------------------------------------------------------

    def _compute(self, planned: PlannedStep, layout: Layout) -> torch.Tensor:
        """[num_tokens, hidden_size] after the final norm; of a graph, valid until the next step."""
        inputs = self._inputs(planned, layout)
        key = planned.key
        if key is None or self._graphs is None or self._sent is not self._upload.there:
            return self._forward(inputs, planned.counts)
        if key not in self._captured:  # compiles kernels; most sizes come again
            self._captured[key] = None
            return self._forward(inputs, planned.counts)
        replay = self._captured[key]
        if replay is None:
            counts = planned.counts
            replay = self._graphs.capture(lambda: self._forward(inputs, counts))
            self._captured[key] = replay
        self.num_replayed += 1
        return replay()

    def _inputs(self, planned: PlannedStep, layout: Layout) -> Inputs:
        views = layout.views(self._sent)
        lists = [
            [views[f"{name}.{index}"] for name in LISTS] for index in range(len(planned.counts))
        ]
        return Inputs(
            token_ids=views["token_ids"],
            token_slots=views["token_slots"],
            position_ids=views["position_ids"],
            kv_slots=[views[f"kv_slots.{group}"] for group in range(len(self._tables))],
            work=self._attention.bind(lists, planned.counts),
        )

    def _forward(self, inputs: Inputs, counts: Sequence[tuple[int, int]]) -> torch.Tensor:
        partials = self._attention.partials(counts)

        def attend(
            spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> torch.Tensor:
            return self._attention.run(
                spec,
                q,
                k,
                v,
                self._kv.layers[spec.layer],
                work=inputs.work,
                block_tables=self._tables,
                kv_slots=inputs.kv_slots,
                position_ids=inputs.position_ids,
                partials=partials,
            )

        last = self._last_token.index_select(0, inputs.token_slots)
        token_ids = torch.where(inputs.token_ids < 0, last, inputs.token_ids)
        hidden: torch.Tensor = self._model(token_ids, inputs.position_ids, attend)
        return hidden

    # Drawing ---------------------------------------------------------------------------------

    def _draw(
        self,
        step: Step,
        hidden: torch.Tensor,
        output_positions: Int32Array,
        views: dict[str, torch.Tensor],
    ) -> tuple[Arriving | None, Arriving | None]:
        """Token ids and log-probabilities, if any."""
        logits = self._model.logits(hidden.index_select(0, views["sample_tokens"]))
        drawn = None
        token_ids = self._zeros(len(step.sample_slots))
        if self._draws:
            drawn = self._sampler.draw(logits, step, output_positions, views)
            token_ids = drawn.token_ids
        if self._ranks is not None:
            self._ranks.share(token_ids)
        # -1, of a row that has failed, is never looked up: see SlotState.note_sampled
        self._last_token.index_copy_(0, views["sample_slots"], token_ids.clamp(min=0))
        if drawn is None:
            return None, None
        told = None if drawn.logprobs is None else fetch(drawn.logprobs)
        return self._download.start(token_ids), told

    def _score(
        self, step: Step, hidden: torch.Tensor, views: dict[str, torch.Tensor]
    ) -> Arriving | None:
        """Score given tokens a chunk of rows at a time: never a [num_tokens, vocab] tensor."""
        chunks = []
        for start in range(0, len(step.score_tokens), LOGITS_CHUNK):
            rows = slice(start, start + LOGITS_CHUNK)
            tokens = views["score_tokens"][rows]
            logits = self._model.logits(hidden.index_select(0, tokens))
            if self._draws:
                chunks.append(self._sampler.score(logits, step, rows, views))
        if not self._draws:
            return None
        return fetch([torch.cat(column) for column in zip(*chunks, strict=True)])

    # Before the first step -------------------------------------------------------------------

    @torch.inference_mode()
    def capture_decoding(self) -> None:
        """Record the graphs of steps that only decode, of every size; others wait for such a step.

        While one is recorded the device has nothing to do: in the middle of a job that costs.
        """
        largest = next((s for s in self._sizes if s >= self._no_slot), None)  # a token a slot
        sizes = self._sizes if largest is None else [s for s in self._sizes if s <= largest]
        for size in reversed(sizes):  # what the largest took serves the others
            step = self._empty_step(0, 1)
            rows = padded_rows(step, size, self._no_slot)
            work = self._attention.work(rows, 0, self._slots.block_tables, share=False)
            for merged in (False, True):
                planned = self._planned(step, rows, work, GraphKey(size, False, merged))
                for _ in range(2):  # the first run compiles kernels
                    layout, _ = self._send(planned, {})
                    self._compute(planned, layout)
        self.num_replayed = 0

    @torch.inference_mode()
    def run_largest(self, num_tokens: int, num_samples: int, max_model_len: int) -> None:
        """Compute a step of so many tokens for nothing, which neither writes nor is remembered.

        Compiles kernels and takes as much memory as a step may. Block 0 must exist.
        """
        step = self._empty_step(num_tokens, min(num_tokens, max_model_len))
        rows = padded_rows(step, num_tokens, self._no_slot)
        work = self._attention.work(rows, 0, self._slots.block_tables, share=False)
        planned = self._planned(step, rows, work, None)
        layout, _ = self._send(planned, {})
        hidden = self._compute(planned, layout)
        greedy(self._model.logits(hidden[:1].expand(num_samples, -1).contiguous()))
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _empty_step(self, num_tokens: int, length: int) -> Step:
        """Tokens of rows of `length` that have no slot; nothing is written or drawn."""
        num_rows = -(-num_tokens // length)
        starts = np.minimum(np.arange(num_rows + 1) * length, num_tokens).astype(np.int32)
        positions = (np.arange(num_tokens) % length).astype(np.int32)
        none, pairs = np.empty(0, np.int32), np.empty((0, 2), np.int32)
        num_groups = len(self._tables)
        return Step(
            step_id=-1,
            finished_slots=none,
            new_sequences=(),
            table_updates=(TableUpdate(none, none, none),) * num_groups,
            block_copies=(pairs,) * num_groups,
            slots=np.full(num_rows, self._no_slot, np.int32),
            cu_seqlens_q=starts,
            token_ids=np.zeros(num_tokens, np.int32),
            positions=positions,
            kv_slots=(np.full(num_tokens, -1, np.int32),) * num_groups,
            sample_tokens=none,
            sample_slots=none,
            score_tokens=none,
            score_targets=none,
        )


def _changes(step: Step, block_tables: Sequence[Int32Array]) -> dict[str, Array]:
    """What a step changes, and the tokens it draws and scores; int64 where torch writes by index.

    Args:
        block_tables: on the host, changed already. An entry may be set twice in a step, and the
            device writes in no order, so both times it is given what holds in the end.
    """
    changes: dict[str, Array] = {}
    for group, (update, copies, table) in enumerate(
        zip(step.table_updates, step.block_copies, block_tables, strict=True)
    ):
        if len(update.slots):
            places = update.slots.astype(np.int64) * table.shape[1] + update.indices
            changes[f"table_places.{group}"] = places
            changes[f"table_ids.{group}"] = table[update.slots, update.indices]
        if len(copies):
            changes[f"copied_blocks.{group}"] = copies.T.astype(np.int64)
    if step.saved_blocks is not None and len(step.saved_blocks):
        changes["saved_blocks"] = step.saved_blocks[:, 0].astype(np.int64)
    if step.loaded_blocks is not None and len(step.loaded_blocks):
        changes["loaded_blocks"] = step.loaded_blocks[:, 1].astype(np.int64)
    if step.kv_copies is not None:
        changes["copied_tokens"] = step.kv_copies.T.astype(np.int64)
    if len(step.sample_slots):
        changes["sample_tokens"] = step.sample_tokens
        changes["sample_slots"] = step.sample_slots.astype(np.int64)
    if len(step.score_tokens):
        changes["score_tokens"] = step.score_tokens
    return changes
