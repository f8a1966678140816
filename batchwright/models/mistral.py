"""Mistral (arXiv:2310.06825): Llama with the same sliding window in every layer."""

from __future__ import annotations

from batchwright.models.llama import Llama


class Mistral(Llama):
    """Later versions set `sliding_window` to null: full attention."""

    def window(self, layer: int) -> int | None:
        return self.config.get("sliding_window")


Model = Mistral
