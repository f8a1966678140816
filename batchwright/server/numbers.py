"""What the server tells about itself in numbers, for the page."""

from __future__ import annotations

from typing import Any

from batchwright.server.batch_record import Batch
from batchwright.server.parts import Parts

MAX_SHOWN = 100


def engine_numbers(parts: Parts) -> dict[str, float]:
    """Counts since the server's start (`num_`), and how busy it is now."""
    engine = parts.shared_engine
    stats, load = engine.stats, engine.load_seen
    batches = parts.batches.records.all()
    return {
        "num_steps": stats.num_steps,
        "num_computed_tokens": stats.num_computed_tokens,
        "num_cached_tokens": stats.num_cached_tokens,
        "num_generated_tokens": stats.num_generated_tokens,
        "num_recomputed_tokens": stats.num_recomputed_tokens,
        "num_preemptions": stats.num_preemptions,
        "num_folded": stats.num_folded,
        "num_running_seqs": load.num_running_seqs,
        "kv_used_fraction": load.kv_used_fraction,
        "num_open_calls": engine.num_open_calls,
        "num_unfinished_batches": sum(not batch.has_ended for batch in batches),
        "silent_s": engine.silent_s,
    }


def dashboard_numbers(parts: Parts) -> dict[str, Any]:
    """What the page shows: no text of rows, no names of files, no error messages."""
    newest = parts.batches.records.all()[::-1][:MAX_SHOWN]
    return {
        "model": parts.settings.model_name,
        "health": parts.health,
        "engine": engine_numbers(parts),
        "batches": [_batch(parts, batch) for batch in newest],
    }


def _batch(parts: Parts, batch: Batch) -> dict[str, Any]:
    live = parts.batches.live.get(batch.id)
    counts = live.counts if live else batch.counts
    codes = dict(live.error_codes if live else batch.error_codes)
    for error in batch.errors:
        codes[error.code] = codes.get(error.code, 0) + 1
    return {
        "id": batch.id,
        "endpoint": batch.endpoint,
        "status": batch.status.value,
        "created_at": batch.at["validating"],
        "total": counts.total,
        "completed": counts.completed,
        "failed": counts.failed,
        "eta_s": live.eta_s if live else None,
        "is_running": parts.batches.running_id == batch.id,
        "is_held": batch.id in parts.batches.held,
        "error_codes": codes,
        "has_report": parts.batches.has_report(batch.id),
    }
