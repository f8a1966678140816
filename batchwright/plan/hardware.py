"""Hardware of GPUs from data sheets, for simulation, with the shares of them that kernels reach.

A product takes as long as its FLOPs or as reading its weights, whichever is longer, so its curve of
rates has one point: the rows at which both take the same time. Peaks are the makers'. The shares of
the H200 were measured by this project, from its kernels alone (docs/gpu.md).
Those of the others are assumed: they follow from BlendServe's Table 1 (arXiv:2411.16102:
Llama-3-8B on an A100, products in 205 to 223 TFLOP/s, 1.73 TB/s in attention of single tokens).
Several devices share a model by dividing every product and head (tensor parallel), and are charged
for what they send to each other (`exchange.py`), nothing of which was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchwright.errors import ConfigError
from batchwright.plan.cost import Hardware, RateCurve
from batchwright.plan.exchange import Link, with_exchange
from batchwright.plan.shape import ModelShape

PRODUCT_SHARE = 218 / 312
"""Of the peak FLOP/s, that products and attention of prompts reach, where it is not measured."""

MEMORY_SHARE = 1.73 / 2.039
"""Of the memory bandwidth, that reading weights, keys and values reaches, likewise."""

STEP_S = 1e-3
"""Launches, scheduling and drawing that a step does not hide. Assumed: only launches were measured,
0.35 ms for 300 small kernels in one graph on an H200."""

BUS_SHARE = 0.8
"""Of the bus's bandwidth, that copies from and to pinned memory reach, and of the links' that large
tensors do. Assumed."""

EXCHANGE_S = 10e-6
"""Latency of one collective between devices. Assumed."""

TILE_ROWS = 128
"""Rows of one tile of a product."""

USABLE_SHARE = 0.9
"""Of the memory, that weights, keys and values may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A device by its data sheet; FLOP/s are dense.

    Attributes:
        bf16_flops_per_s: of 2-byte numbers; smaller weights are multiplied as these.
        fp32_flops_per_s: of 4-byte numbers.
        fp8_flops_per_s: of e4m3 numbers on both sides; None: it has no such products.
        memory_bytes_per_s, memory_bytes: of the device's own memory.
        bus_bytes_per_s: of the bus to the host, in one direction: PCIe 4.0 or 5.0 with 16 lanes.
        nvlink_bytes_per_s: to the other devices of the machine, in one direction: half of what the
            data sheet gives, which is both. 0: there is none, they meet over the bus.
        product_share, attention_share: of the peak FLOP/s, in products and in attention of prompts.
        memory_share, kv_share: of the bandwidth, in products of few rows and in attention of single
            tokens.
    """

    name: str
    bf16_flops_per_s: float
    fp32_flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: float
    fp8_flops_per_s: float | None = None
    bus_bytes_per_s: float = 64e9
    nvlink_bytes_per_s: float = 0.0
    product_share: float = PRODUCT_SHARE
    attention_share: float = PRODUCT_SHARE
    memory_share: float = MEMORY_SHARE
    kv_share: float = MEMORY_SHARE
    step_s: float = STEP_S
    tile_rows: int = TILE_ROWS

    @property
    def link(self) -> Link:
        """Between devices that share a model."""
        bytes_per_s = self.nvlink_bytes_per_s or self.bus_bytes_per_s
        return Link(bytes_per_s * BUS_SHARE, EXCHANGE_S)


DEVICES = {
    profile.name: profile
    for profile in (
        DeviceProfile(
            name="A100-80G",
            bf16_flops_per_s=312e12,
            fp32_flops_per_s=19.5e12,
            memory_bytes_per_s=2.039e12,
            memory_bytes=80e9,
            bus_bytes_per_s=32e9,
            nvlink_bytes_per_s=300e9,
        ),
        DeviceProfile(
            name="H100",
            bf16_flops_per_s=989e12,
            fp32_flops_per_s=67e12,
            memory_bytes_per_s=3.35e12,
            memory_bytes=80e9,
            fp8_flops_per_s=1979e12,
            nvlink_bytes_per_s=450e9,
        ),
        DeviceProfile(
            name="H200",
            bf16_flops_per_s=989e12,
            fp32_flops_per_s=67e12,
            memory_bytes_per_s=4.8e12,
            memory_bytes=141e9,
            fp8_flops_per_s=1979e12,
            nvlink_bytes_per_s=450e9,
            # Shapes of Llama-3-8B in bf16, benchmarks/results/2026-11-26-gpu-h200-*.json. Layers:
            # 681 to 751 TFLOP/s from 1,024 rows on, 3.6 TB/s of weights up to 16 rows (the head
            # alone 4.2). In fp8 1,267 to 1,313 TFLOP/s from 1,024 rows on, 0.64 to 0.66 of the
            # peak (2026-11-27-gpu-h200-fp8.json). Attention: 426 to 473 TFLOP/s of a prompt of
            # 8,192 tokens and of chunks after 16,384 (315 to 368 of chunks after 1,024 to 4,096:
            # there it is too fast), 4.5 TB/s of 256 rows with 4,096 keys or more.
            product_share=0.71,
            attention_share=0.455,
            memory_share=0.75,
            kv_share=0.94,
        ),
        DeviceProfile(
            name="L40S",
            bf16_flops_per_s=362e12,
            fp32_flops_per_s=91.6e12,
            memory_bytes_per_s=0.864e12,
            memory_bytes=48e9,
            fp8_flops_per_s=733e12,
            bus_bytes_per_s=32e9,
        ),
    )
}
"""H100 and A100 are the SXM modules, which have NVLink; an L40S has PCIe 4.0 only."""


def find_device(name: str) -> DeviceProfile:
    """A profile by name, in upper or lower case.

    Raises:
        ConfigError: there is none.
    """
    for profile in DEVICES.values():
        if profile.name.lower() == name.lower():
            return profile
    raise ConfigError(f"device is {name!r:.60}, must be one of {', '.join(DEVICES)}")


def device_hardware(
    profile: DeviceProfile,
    shape: ModelShape,
    weight_bytes: float,
    *,
    num_devices: int = 1,
    overlap: float = 0.0,
    fp8: bool = False,
) -> Hardware:
    """The rates of a device, or of several that share a model, for that model.

    Args:
        weight_bytes: of one element of the weights, but for those in fp8.
        num_devices: every rate is multiplied by it; what they send is charged.
        overlap: see `Hardware`.
        fp8: weights of the layers are e4m3, and multiplied as such where the device can.
    Raises:
        ConfigError: the weights do not fit, or an argument is out of range.
    """
    if not 0 <= overlap <= 1:
        raise ConfigError(f"overlap is {overlap}, must be between 0 and 1")
    kv_memory_bytes(profile, shape, 1.0 if fp8 else weight_bytes, num_devices=num_devices)
    peak = profile.bf16_flops_per_s if weight_bytes <= 2 else profile.fp32_flops_per_s
    flops_per_s = num_devices * peak * profile.product_share
    bytes_per_s = num_devices * profile.memory_bytes_per_s * profile.memory_share
    # n rows with w-byte weights: 2 n FLOPs an element, against w bytes.
    balance_rows = flops_per_s * weight_bytes / (2 * bytes_per_s)
    curve = layers = RateCurve((balance_rows,), (flops_per_s,))
    if fp8:
        fp8_peak = profile.fp8_flops_per_s or profile.bf16_flops_per_s
        fp8_flops_per_s = num_devices * fp8_peak * profile.product_share
        layers = RateCurve((fp8_flops_per_s / (2 * bytes_per_s),), (fp8_flops_per_s,))
    together = Hardware(
        name=profile.name if num_devices == 1 else f"{num_devices} x {profile.name}",
        num_threads=num_devices,
        layers=layers,
        head=curve,
        ceiling_flops_per_s=num_devices * peak,
        attention_flops_per_s=num_devices * peak * profile.attention_share,
        kv_bytes_per_s=num_devices * profile.memory_bytes_per_s * profile.kv_share,
        memory_bytes_per_s=num_devices * profile.memory_bytes_per_s,
        host_bytes_per_s=num_devices * profile.bus_bytes_per_s * BUS_SHARE,
        step_s=profile.step_s,
        tile_rows=profile.tile_rows,
        overlap=overlap,
    )
    return with_exchange(together, shape, profile.link, num_devices, 2 if weight_bytes <= 2 else 4)


def kv_memory_bytes(
    profile: DeviceProfile, shape: ModelShape, weight_bytes: float, *, num_devices: int = 1
) -> float:
    """Memory left for keys and values.

    Raises:
        ConfigError: the weights do not fit, or there is no device.
    """
    if num_devices < 1:
        raise ConfigError(f"num_devices is {num_devices}, must be at least 1")
    weights = shape.num_params * weight_bytes
    free = num_devices * profile.memory_bytes * USABLE_SHARE - weights
    if free <= 0:
        raise ConfigError(
            f"the weights take {weights / 1e9:.1f} GB, {num_devices} x {profile.name} has "
            f"{num_devices * profile.memory_bytes * USABLE_SHARE / 1e9:.1f} GB for them and for "
            "keys and values; use more devices or a smaller model"
        )
    return free
