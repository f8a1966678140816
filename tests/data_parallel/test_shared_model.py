"""A model written to memory that others map: the same model, its numbers there once."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from batchwright.data_parallel.shared_model import ALIGNMENT, map_model, write_model
from batchwright.models.layers import Embedding, Linear
from batchwright.models.loader import load_model
from batchwright.weights.checkpoint import open_checkpoint
from tests.models.reference import TINY, make_checkpoint

pytestmark = pytest.mark.cpu


@pytest.fixture
def memory():
    file_descriptor = os.memfd_create("test")
    yield file_descriptor
    os.close(file_descriptor)


def loaded(path, name="llama_biased", **options):
    make_checkpoint(name, path)
    return load_model(open_checkpoint(path), dtype=torch.float32, max_positions=256, **options)


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_mapped_model_is_the_model(name, tmp_path, memory):
    model = loaded(tmp_path, name)
    mapped = map_model(write_model(model, memory), memory)
    assert type(mapped) is type(model)
    assert list(map(repr, mapped.attention_specs)) == list(map(repr, model.attention_specs))
    theirs = dict(mapped.named_modules())
    for module_name, module in model.named_modules():
        other = theirs[module_name]
        for key, value in module.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), (module_name, key)
        if isinstance(module, Linear | Embedding):
            assert torch.equal(module.scales, other.scales)
            assert module.weight.data_ptr() != other.weight.data_ptr()
        if isinstance(module, Linear) and module._held is not None:
            for array, its in zip(module._held, other._held, strict=True):
                assert np.array_equal(array, its) and array.flags == its.flags


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_numbers_are_written_once(tmp_path, memory, quantize):
    model = loaded(tmp_path, quantize=quantize)
    mapped = map_model(write_model(model, memory), memory)
    unique = {p.data_ptr(): p.nbytes + ALIGNMENT for p in model.parameters()}
    rest = {b.data_ptr(): b.nbytes + ALIGNMENT for b in model.buffers()}
    for module in model.modules():
        if isinstance(module, Linear | Embedding):
            rest[module.scales.data_ptr()] = module.scales.nbytes
        if isinstance(module, Linear):
            rest[module._channels.data_ptr()] = module._channels.nbytes + ALIGNMENT
    for table in {spec.rotary for spec in model.attention_specs}:
        rest |= {t.data_ptr(): t.nbytes + ALIGNMENT for t in (table.cos, table.sin)}
    assert os.fstat(memory).st_size <= sum(unique.values()) + sum(rest.values())
    # tied weights are one parameter here too, and what the kernel reads is the parameter
    assert mapped.lm_head.weight is mapped.model.embed_tokens.weight or quantize
    if not quantize:
        held = mapped.lm_head._held[0]
        assert held.__array_interface__["data"][0] == mapped.lm_head.weight.data_ptr()
    assert all(p.data_ptr() % ALIGNMENT == 0 for p in mapped.parameters())


def test_what_one_writes_the_others_do_not_see(tmp_path, memory):
    rest = write_model(loaded(tmp_path), memory)
    one, other = map_model(rest, memory), map_model(rest, memory)
    before = other.lm_head.weight.clone()
    one.lm_head.weight.zero_()
    assert not one.lm_head.weight.any() and torch.equal(other.lm_head.weight, before)


def test_a_model_is_written_where_it_is_told_and_the_thread_comes_back(
    tmp_path, memory, monkeypatch
):
    pinned = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(set(cores)))
    before = os.sched_getaffinity(0)
    write_model(loaded(tmp_path), memory, cores=[min(before)])
    assert pinned == [{min(before)}, before]
