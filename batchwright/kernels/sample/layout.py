"""What a sampling kernel needs to know about a slot: one record per slot, no objects.

Arrays beside the record (one line per slot, first `num_*` entries valid): bias ids and values,
suppressed ids, token history.
"""

from __future__ import annotations

import numpy as np

SLOT = np.dtype(
    [
        ("noise_key", np.uint64),
        ("temperature", np.float64),  # 0: greedy
        ("top_p", np.float64),  # >= 1: off
        ("min_p", np.float64),  # 0: off
        ("top_k", np.int32),  # 0: off
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("sample_index", np.int32),
        ("min_tokens", np.int32),
        ("num_biased", np.int32),
        ("num_suppressed", np.int32),  # ids that may not be drawn before min_tokens
        ("num_prompt_tokens", np.int32),
        ("num_tokens", np.int32),  # length of the history, prompt included; 0 if not kept
    ],
    align=True,
)
