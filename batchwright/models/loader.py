"""Model weights from a Checkpoint into a CausalLM."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

import batchwright.models
from batchwright.errors import ModelFormatError, UnsupportedModelError
from batchwright.kernels.linear.packing import PackedWeight, pack
from batchwright.models.causal_lm import CausalLM
from batchwright.models.layers import Embedding, Linear
from batchwright.models.narrow_weights import join_rows, pack_stored
from batchwright.tensor_parallel.ranks import Ranks
from batchwright.tensor_parallel.sharding import divide
from batchwright.weights.block_tensor import BlockTensor

logger = logging.getLogger(__name__)

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


class WeightSource(Protocol):
    """What the loader needs of `weights.checkpoint.Checkpoint`."""

    @property
    def config(self) -> dict[str, Any]: ...

    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def stored(self, name: str) -> torch.Tensor | BlockTensor: ...


def model_class(config: Mapping[str, Any]) -> type[CausalLM]:
    """The architecture file for a config.json.

    Raises:
        UnsupportedModelError: there is none for its model_type; the message lists those there are.
    """
    model_type = str(config.get("model_type", "")).replace("-", "_")
    if model_type.isidentifier():
        module_name = f"{batchwright.models.__name__}.{model_type}"
        if importlib.util.find_spec(module_name) is not None:
            found = getattr(importlib.import_module(module_name), "Model", None)
            if found is not None:
                return found
    raise UnsupportedModelError(
        f"unsupported: model_type {config.get('model_type')!r}; "
        f"supported: {', '.join(supported_model_types())}"
    )


def supported_model_types() -> list[str]:
    """model_type of every architecture file."""
    names = [module.name for module in pkgutil.iter_modules(batchwright.models.__path__)]
    modules = {name: importlib.import_module(f"batchwright.models.{name}") for name in names}
    return sorted(name for name, module in modules.items() if hasattr(module, "Model"))


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in the names common to all architectures; see `CausalLM.read_config`.

    Raises:
        UnsupportedModelError: unknown architecture.
        ModelFormatError: an entry is missing, or a size is not a positive integer.
    """
    build = model_class(config)
    try:
        common = build.read_config(config)
        sizes = {name: common[name] for name in _SIZES}
    except KeyError as error:
        raise ModelFormatError(f"config.json lacks {error.args[0]!r}") from error
    sizes["num_key_value_heads"] = common.get("num_key_value_heads") or common[_SIZES[3]]
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ModelFormatError(f"config.json: {name} is {size!r}, expected a positive integer")
    if common["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise ModelFormatError(
            f"config.json: {common['num_attention_heads']} query heads cannot share "
            f"{sizes['num_key_value_heads']} key-value heads evenly"
        )
    return common


def build_empty(config: Mapping[str, Any], max_positions: int) -> CausalLM:
    """The model of a config.json on the meta device: its parameters have shapes and no values.

    Raises: as `load_model`, as far as the config is concerned.
    """
    common = read_config(config)
    try:
        with torch.device("meta"):
            return model_class(config)(common, max_positions)
    except KeyError as error:
        raise ModelFormatError(f"config.json lacks {error.args[0]!r}") from error


def load_model(
    source: WeightSource,
    *,
    dtype: torch.dtype,
    max_positions: int,
    device: str = "cpu",
    quantize: str | None = None,
    ranks: Ranks | None = None,
) -> CausalLM:
    """Build the model and fill it with weights.

    Args:
        source: config and tensors by their Hugging Face names.
        dtype: type of all parameters, except that in fp32 on the CPU weights of products and
            embeddings stay as narrow as they are stored.
        max_positions: longest context; rotary tables cover it.
        device: where the parameters shall be; each is copied there as it is read.
        quantize: "int8" or "fp8": products have such weights (lossy), except a router's, and with
            fp8 the output head's; embeddings keep their values.
        ranks: those that have the model together; only this one's part is read.
    Raises:
        UnsupportedModelError: unknown architecture or setting.
        ModelFormatError: a tensor or config entry is missing or has the wrong shape.
        ConfigError: the model has fewer learned positions than max_positions; or int8 is asked
            for together with another dtype than fp32.
    """
    model = whole = build_empty(source.config, max_positions)
    if ranks is not None:
        model = build_empty(source.config, max_positions)
        divide(model, ranks)
    model.dtype, config = dtype, model.config
    used: set[str] = set()
    tensors = _Tensors(source, source.tensor, used)
    stored = _Tensors(source, source.stored, used)
    head = model.get_submodule("lm_head")
    assert isinstance(head, Linear)
    packs = dtype == torch.float32 and torch.device(device).type == "cpu"
    is_tied = config["tie_word_embeddings"] and "lm_head.weight" not in tensors
    for module_name, module in model.named_modules():
        if is_tied and module is head:
            continue
        holds = packs and quantize is None and isinstance(module, Linear | Embedding)
        for name, parameter in sorted(module.named_parameters(recurse=False)):  # biases first
            is_held = holds and name == "weight"
            narrow = is_held and ranks is None  # blocks of integers are not divided
            parts = _parts(whole, stored if narrow else tensors, module_name, name)
            if ranks is not None and isinstance(module, Linear | Embedding):
                parts = map(module.share, parts)
            if is_held:  # one by one, so that only one weight is in memory twice
                _hold(module, join_rows(list(parts)))
            else:
                value = _join(parts, parameter.shape, dtype, device)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        if quantize and isinstance(module, Linear) and module is not head:
            _QUANTIZE[quantize](module)
    if config["tie_word_embeddings"]:
        _tie(model, head)
    if quantize == "int8":
        _quantize_head(model, head)
    if ranks is None or ranks.rank == 0:
        _warn_of_unused(sorted(set(source.names()) - used), model)
    return model.eval()


def _hold(module: nn.Module, weight: torch.Tensor | BlockTensor) -> None:
    """Give a module a weight for our own kernels, as narrow as it is."""
    if isinstance(module, Embedding):
        module.hold(pack_stored(weight) if isinstance(weight, BlockTensor) else weight)
    else:
        assert isinstance(module, Linear)
        module.hold(pack_stored(weight))


_Read = Callable[[str], torch.Tensor | BlockTensor]


class _Tensors(Mapping[str, Any]):
    """The checkpoint as a mapping that reads on demand and adds what was read to `used`.

    Files saved from a bare decoder lack the leading `model.` or `transformer.` of the names.
    """

    def __init__(self, source: WeightSource, read: _Read, used: set[str]) -> None:
        self._read = read
        self._names = set(source.names())
        self._used = used

    def _stored_name(self, name: str) -> str | None:
        candidates = (name, name.partition(".")[2])
        return next((candidate for candidate in candidates if candidate in self._names), None)

    def __contains__(self, name: object) -> bool:
        return self._stored_name(str(name)) is not None

    def __getitem__(self, name: str) -> Any:
        stored_name = self._stored_name(name)
        if stored_name is None:
            raise ModelFormatError(
                f"the checkpoint has no tensor {name!r}, which its config.json implies; "
                "the download is incomplete or the config belongs to another model"
            )
        self._used.add(stored_name)
        return self._read(stored_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _parts(model: CausalLM, tensors: _Tensors, module_name: str, kind: str) -> Iterator[Any]:
    """A parameter from the checkpoint; of a merged one its parts, which stand beside it.

    Args:
        model: whole, whatever is on this rank.
    """
    module, name = model.get_submodule(module_name), f"{module_name}.{kind}"
    shape = module.get_parameter(kind).shape
    if not (isinstance(module, Linear) and module.parts):
        yield _checked(model.fetch(tensors, name), name, shape)
        return
    parent = module_name.rpartition(".")[0]
    for part, width in module.parts.items():
        part_name = f"{parent}.{part}.{kind}"
        part_shape = torch.Size((width, *shape[1:]))
        yield _checked(model.fetch(tensors, part_name), part_name, part_shape)


def _join(
    parts: Iterator[torch.Tensor], shape: torch.Size, dtype: torch.dtype, device: str
) -> torch.Tensor:
    """One tensor of the parts; on another device it is filled part by part, without a copy here."""
    if torch.device(device).type == "cpu":
        values = list(parts)
        value = values[0] if len(values) == 1 else torch.cat(values)
        return value.to(dtype).contiguous()
    whole, start = torch.empty(shape, dtype=dtype, device=device), 0
    for part in parts:
        whole[start : start + len(part)].copy_(part.to(device))  # converted there
        start += len(part)
    return whole


def _checked(value: Any, name: str, shape: torch.Size) -> Any:
    if value.shape != shape:
        raise ModelFormatError(
            f"tensor {name!r} has shape {list(value.shape)}, config.json implies {list(shape)}; "
            "one of the two belongs to another model"
        )
    return value


def _tie(model: CausalLM, head: Linear) -> None:
    """Share the embedding table with the output head, unless the file has two that differ."""
    table = next(
        module
        for name, module in model.named_modules()
        if name.endswith(("embed_tokens", "wte")) and isinstance(module, Embedding)
    )
    if not head.weight.is_meta and not _same_values(head, table):
        logger.warning(
            "config.json ties the word embeddings, but the checkpoint has an output head of its "
            "own that differs; using that"
        )
    elif table.rows_dtype is None:
        head.weight = table.weight
    else:
        if head.weight.is_meta:
            packed = table.weight.ndim == 3
            weight = PackedWeight(table.weight, table.scales) if packed else pack(table.weight)
            head.hold(weight)
        table.hold(PackedWeight(head.weight, head.scales))
        table.weight = head.weight  # one parameter, not two of the same memory


def _same_values(head: Linear, table: Embedding) -> bool:
    """Whether a head's weight, packed or not, is the table; some rows at a time."""
    parts = torch.arange(table.num_embeddings).split(4096)
    return all(torch.equal(head.rows(ids), table.rows(ids)) for ids in parts)


_QUANTIZE = {"int8": Linear.quantize_int8, "fp8": Linear.quantize_fp8}


def _quantize_head(model: CausalLM, head: Linear) -> None:
    """The output head, whose values the embeddings may share: these keep them as they are."""
    head.quantize_int8()
    for module in model.modules():
        if isinstance(module, Embedding):
            module.narrow()


def _warn_of_unused(names: list[str], model: CausalLM) -> None:
    """Weights that are not used hint at a variant of the architecture that is not the one here."""
    left = [name for name in names if not re.fullmatch(model.not_weights, name)]
    if left:
        logger.warning(
            "%d tensors of the checkpoint are not used by model_type %s, the first is %s",
            len(left),
            model.config.get("model_type"),
            left[0],
        )
