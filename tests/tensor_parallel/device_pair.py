"""A pair of processes whose executors are the GPU's, on the CPU: twins for kernels, reruns for
graphs."""

from __future__ import annotations

from batchwright.exec.device.build import bytes_of_blocks
from batchwright.exec.device.executor import DeviceExecutor
from batchwright.exec.device.graphs import Rerun
from batchwright.kv.groups import windows_of_layers
from batchwright.tensor_parallel import follower_process

PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from tests.tensor_parallel.device_pair import main; main(int(sys.argv[1]))"
)
MADE: list[DeviceExecutor] = []


def build_executor(model, config, *, vocab_size, ranks):
    """As exec.build's, with a DeviceExecutor."""
    specs = model.attention_specs
    windows, group_of_layer = windows_of_layers([spec.window for spec in specs])
    groups = config.kv_groups(
        windows, bytes_of_blocks(specs, group_of_layer, config, lambda head_dim: 4)
    )
    executor = DeviceExecutor(
        model,
        groups,
        group_of_layer,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        vocab_size=vocab_size,
        graphs=Rerun(),
        max_graph_tokens=40,
        num_programs=(8, 4),
        ranks=ranks,
    )
    executor.run_largest(config.max_num_batched_tokens, config.max_num_seqs, config.max_model_len)
    executor.capture_decoding()
    MADE.append(executor)
    return executor, groups, config


def main(file_descriptor: int) -> None:
    """What the other process runs."""
    follower_process.build_executor = build_executor
    follower_process.main(file_descriptor)
