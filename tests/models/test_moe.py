"""Sparse mixture of experts: routing, bits, router margins and the forms checkpoints come in."""

import pytest
import torch

from batchwright.models.loader import load_model
from batchwright.models.moe import SparseMoE, route
from tests.models.ragged import ragged_logits
from tests.models.reference import (
    CONTROL,
    TINY,
    TOLERANCE,
    random_sequences,
    reference_logits,
)

pytestmark = pytest.mark.cpu

MOE = ("mixtral", "qwen3_moe", "qwen3_moe_raw")


def sparse_blocks(model):
    return [module for module in model.modules() if isinstance(module, SparseMoE)]


def test_route_worked_example():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 3.5]])
    weights, experts = route(logits, 2, renormalise=True)
    assert experts.tolist() == [[0, 2], [2, 1]]
    # two logits that differ by d share as 1 : exp(-d)
    first = torch.tensor([1 / (1 + torch.tensor(-d).exp()) for d in (1.0, 0.5)])
    torch.testing.assert_close(weights, torch.stack((first, 1 - first), dim=1))
    raw, _ = route(logits, 2, renormalise=False)
    torch.testing.assert_close(raw, logits.softmax(-1).topk(2).values)


def test_equals_the_dense_sum(checkpoint, load):
    """Against every expert computed for every token, unchosen ones weighted zero."""
    block = sparse_blocks(load(checkpoint("mixtral")[0]))[0]
    x = torch.randn(33, 48)
    weights, experts = route(block.gate(x), block.top_k, renormalise=True)
    share = torch.zeros(33, len(block.experts)).scatter(1, experts, weights)
    dense = sum(share[:, i, None] * expert(x) for i, expert in enumerate(block.experts))
    torch.testing.assert_close(block(x), dense)


@pytest.mark.parametrize("num_rows", [1, 2, 12, 13, 57])
def test_rows_have_the_same_bits_in_any_company(num_rows, checkpoint, load):
    block = sparse_blocks(load(checkpoint("qwen3_moe")[0]))[0]
    x = torch.randn(200, 48)
    together = block(x)
    chosen = torch.randperm(200)[:num_rows]
    assert torch.equal(block(x[chosen]), together[chosen])


def test_no_tokens(checkpoint, load):
    block = sparse_blocks(load(checkpoint("mixtral")[0]))[0]
    assert block(torch.empty(0, 48)).shape == (0, 48)


class FusedSource:
    """A checkpoint whose experts are stacked, as transformers 5 holds them in memory."""

    def __init__(self, model):
        self.config = model.config.to_dict()
        self._tensors = model.state_dict()

    def names(self):
        return list(self._tensors)

    def tensor(self, name):
        return self._tensors[name]

    stored = tensor


@pytest.mark.parametrize("name", MOE)
def test_stacked_experts_load_the_same(name, checkpoint, load):
    path, theirs = checkpoint(name)
    source = FusedSource(theirs)
    assert any(name.endswith("experts.gate_up_proj") for name in source.names())
    stacked = load_model(source, dtype=torch.float32, max_positions=64)
    for (key, one), (_, other) in zip(
        stacked.named_parameters(), load(path).named_parameters(), strict=True
    ):
        assert torch.equal(one, other), key


def test_num_experts_under_both_names(checkpoint, load):
    path, _ = checkpoint("qwen3_moe")
    source_name = TINY["qwen3_moe"][1]["num_experts"]
    assert len(sparse_blocks(load(path))[0].experts) == source_name
    assert len(sparse_blocks(load(path, num_experts=source_name))[0].experts) == source_name


@pytest.mark.parametrize("name", MOE)
def test_wrong_renormalisation_is_seen(name, checkpoint, load, error_of):
    model = load(checkpoint(name)[0])
    for module in model.modules():
        if isinstance(module, SparseMoE):
            module.renormalise = not module.renormalise
    assert error_of(name, model) > CONTROL


@pytest.mark.parametrize("name", MOE)
def test_router_margins(name, checkpoint, load, error_of, capsys):
    """The k-th expert is ahead of the next by more than rounding can close, for every token.

    Only then may parity hold: where two experts tie, either choice is right. `margin` is the gap of
    router logits over their largest, `rounding` how far ours differ from transformers'.
    """
    path, theirs = checkpoint(name)
    model = load(path)
    ours_seen, theirs_seen = [], []
    hooks = [
        module.gate.register_forward_hook(lambda _, __, out: ours_seen.append(out))
        for module in model.modules()
        if isinstance(module, SparseMoE)
    ]
    hooks += [
        module.gate.register_forward_hook(lambda _, __, out: theirs_seen.append(out[0]))
        for module in theirs.modules()
        if type(module).__name__.endswith("SparseMoeBlock")
    ]
    sequence = random_sequences((130,))
    ragged_logits(model, sequence)
    reference_logits(theirs, sequence)
    for hook in hooks:
        hook.remove()
    assert len(ours_seen) == len(theirs_seen) > 0
    top_k = theirs.config.num_experts_per_tok
    scale = max(logits.abs().max() for logits in theirs_seen)
    ranked = [logits.sort(descending=True).values for logits in theirs_seen]
    margin = min((r[:, top_k - 1] - r[:, top_k]).min() for r in ranked) / scale
    pairs = zip(ours_seen, theirs_seen)
    rounding = max((mine - yours).abs().max() for mine, yours in pairs) / scale
    with capsys.disabled():
        print(f"\n{name}: router margin {margin:.1e}, rounding {rounding:.1e}")
    assert rounding < TOLERANCE
    assert margin > 2 * rounding
