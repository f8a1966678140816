"""check_formats: number formats that not every card, and not every model, can have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from batchwright.config import ResolvedConfig
from batchwright.errors import ConfigError
from batchwright.kernels.fp8_linear.naive import SIZE_MULTIPLE
from batchwright.models.causal_lm import CausalLM
from batchwright.models.layers import Linear, Parallel
from batchwright.models.loader import build_empty


def check_formats(model_config: Mapping[str, Any], config: ResolvedConfig) -> None:
    """Refuse fp8 where the card or the model's sizes do not allow it, before anything is loaded.

    Args:
        model_config: config.json.
    Raises:
        ConfigError: the card's compute capability is below 8.9, or a product has a size that is no
            multiple of SIZE_MULTIPLE.
    """
    if config.device != "cuda":
        return
    _check_card(config)
    if config.quantize == "fp8":
        check_fp8_sizes(build_empty(model_config, 1), config.tensor_parallel_size)


def _check_card(config: ResolvedConfig) -> None:
    formats = {"quantize": config.quantize, "kv_cache_dtype": config.kv_cache_dtype}
    wanted = [name for name, value in formats.items() if value == "fp8"]
    if wanted and torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError(
            f"{' and '.join(wanted)} {'is' if len(wanted) == 1 else 'are'} fp8, which "
            f"{torch.cuda.get_device_name()} cannot compute with (that takes compute capability "
            "8.9); leave it out, or keep keys and values in int8 (--kv-cache-dtype int8)"
        )


def check_fp8_sizes(model: CausalLM, num_ranks: int) -> None:
    """Refuse products that tensor cores do not take; of each rank's part, if there are several.

    Args:
        model: not divided, without weights.
    Raises:
        ConfigError: naming the product.
    """
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or module.exact or name == "lm_head":
            continue
        divides_inputs = module.parallel in (Parallel.ROW, Parallel.SUMMAND)
        inputs = module.in_features // (num_ranks if divides_inputs else 1)
        is_column = module.parallel is Parallel.COLUMN
        outputs = module.out_features // (num_ranks if is_column else 1)
        if inputs % SIZE_MULTIPLE or outputs % SIZE_MULTIPLE:
            of_rank = f" on each of {num_ranks} ranks" if num_ranks > 1 else ""
            fewer = ", or use fewer ranks (--tensor-parallel-size)" if num_ranks > 1 else ""
            raise ConfigError(
                f"quantize is fp8, which needs sizes that are multiples of {SIZE_MULTIPLE}, and "
                f"{name} has {inputs} inputs and {outputs} outputs{of_rank}; leave quantize out"
                f"{fewer}"
            )
