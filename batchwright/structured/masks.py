"""Masks of a Step: which tokens its constrained draws may give, as plain data for an executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from batchwright.step import Step

if TYPE_CHECKING:
    from batchwright.structured.matcher import Matcher


def with_masks(step: Step, draws: Sequence[tuple[int, Matcher]]) -> Step:
    """The Step with masks for some of its draws.

    Args:
        draws: (index of the draw, what it may give); at least one.
    """
    masks = np.empty((len(draws), draws[0][1].num_words), np.uint32)
    mask_of_sample = np.full(len(step.sample_slots), -1, np.int32)
    for line, (index, matcher) in enumerate(draws):
        mask_of_sample[index] = line
        matcher.fill(masks[line])
    return dataclasses.replace(step, masks=masks, mask_of_sample=mask_of_sample)
