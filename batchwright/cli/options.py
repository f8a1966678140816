"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from batchwright.cli.numbers import parse_count


class DtypeName(StrEnum):
    """Number format of weights and activations."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class DeviceName(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class QuantizeName(StrEnum):
    """Number format of products."""

    int8 = "int8"
    fp8 = "fp8"


class KVCacheDtypeName(StrEnum):
    """Number format of keys and values."""

    auto = "auto"
    bfloat16 = "bfloat16"
    int8 = "int8"
    fp8 = "fp8"


InputPath = Annotated[
    str | None,
    typer.Argument(metavar="IN", help="File of requests; - is stdin (JSONL).", show_default=False),
]
InputOption = Annotated[
    str | None, typer.Option("-i", "--input", metavar="IN", help="The same as IN.")
]
Model = Annotated[str, typer.Option(help="smollm2, a Hugging Face directory, or a GGUF file.")]

Column = Annotated[
    list[str] | None,
    typer.Option(metavar="PARAMETER=NAME", help="Which column is which parameter."),
]
Template = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Prompt with columns in it: 'Sum up: {text}'")
]
Endpoint = Annotated[
    str | None, typer.Option(metavar="URL", help="Where rows go: /v1/chat/completions, ...")
]
PromptSchema = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Schema of modules that rows import; docs/prompt_cache.md."),
]
Limit = Annotated[
    int | None, typer.Option(parser=parse_count, metavar="N", help="Only the first N rows.")
]
Sample = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="N", help="Only N rows, chosen by their ids."),
]
Shard = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Only part I of N; rows are divided by their ids."),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="N", help="Most tokens of a row, prompt and output."),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="N", help="Most sequences running at once."),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="N", help="Most tokens computed in one step."),
]
KVCacheMemory = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="BYTES", help="Memory for keys and values: 4G."),
]
KVTokens = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="N", help="Most tokens of keys and values kept."),
]
SwapSpace = Annotated[
    int | None,
    typer.Option(
        parser=parse_count,
        metavar="BYTES",
        help="The host's memory for keys and values that a GPU has no room for: 64G; docs/gpu.md.",
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        parser=parse_count,
        metavar="N",
        help="Tokens of a block of keys and values (32), a multiple of 32.",
    ),
]
Order = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="In which order rows start (auto); docs/orders.md."),
]
Lengths = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="How output lengths are guessed (subtree); docs/lengths.md."),
]
Dtype = Annotated[DtypeName, typer.Option(help="Number format to compute in.")]
Device = Annotated[
    DeviceName, typer.Option(help="cuda is an NVIDIA GPU; auto takes one if there is any.")
]
Quantize = Annotated[
    QuantizeName | None,
    typer.Option(
        help="Products in int8 on the CPU or fp8 on GPUs: faster, less memory, lossy; docs/int8.md."
    ),
]
KVCacheDtype = Annotated[
    KVCacheDtypeName,
    typer.Option(
        help="Keys and values in fewer bits, lossy; bfloat16 on the CPU, fp8 on GPUs; docs/int8.md."
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, help="Randomness of rows that give no seed of their own.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default one per core.")]
TensorParallelSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Divide the model over N GPUs, or N processes on the CPU; docs/tensor_parallel.md.",
    ),
]
DataParallelSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Run N replicas on the CPU, each on its part of the cores; docs/scaling.md.",
    ),
]
NoPrefixSharing = Annotated[
    bool, typer.Option("--no-prefix-sharing", help="Compute shared prefixes for each row.")
]
Prices = Annotated[
    str | None, typer.Option(metavar="FILE", help="Price list (TOML); docs/plan.md.")
]


def one_source(input_path: str | None, input_option: str | None) -> str:
    """The input, which is given as an argument or with -i.

    Raises:
        typer.BadParameter: it is given twice or not at all.
    """
    source = input_path if input_option is None else input_option
    if source is None or (input_path is not None and input_option is not None):
        raise typer.BadParameter("give the input file once, as IN or with -i")
    return source


def given(**settings: Any) -> dict[str, Any]:
    """The engine's settings that the user has given."""
    return {name: value for name, value in settings.items() if value is not None}
