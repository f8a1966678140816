"""The link between ranks on a CPU is one that a sum could have, and is charged."""

from __future__ import annotations

import pytest
import torch

from batchwright.exec import machine_cost as machine_cost_module
from batchwright.job.plan_job import cost_model
from batchwright.opened_model import open_model
from batchwright.plan.exchange import Link
from batchwright.tensor_parallel.measure_link import measure_link
from tests.running_job import make_model

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_link_as_it_may_be(num_ranks):
    link = measure_link(num_ranks, 1024, torch.float32)
    assert 1e7 < link.bytes_per_s < 1e12
    assert 1e-6 < link.latency_s < 0.1


def test_what_ranks_send_is_charged_in_this_machines_cost(tmp_path, monkeypatch):
    asked = []

    def measure(*arguments):
        asked.append(arguments)
        return Link(1e6, 0.5)

    monkeypatch.setattr(machine_cost_module, "measure_link", measure)
    model = make_model(tmp_path / "model")
    costs = [
        cost_model(open_model(str(model), {"device": "cpu", "tensor_parallel_size": size}))
        for size in (1, 2)
    ]
    shape = costs[1].shape
    assert asked == [(2, shape.hidden_size, torch.float32)]
    one, two = (cost.hardware for cost in costs)
    num_sums = 2 * shape.num_layers + 1
    assert one.logits_s == 0 and one.step_s < 0.5
    assert two.logits_s == pytest.approx(0.5 * shape.vocab_size * 4 / 1e6)
    assert two.step_s - (num_sums + 2) * 0.5 < 0.5
    assert two.token_s >= num_sums * shape.hidden_size * 4 / 1e6
