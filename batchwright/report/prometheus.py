"""Prometheus: the newest line of metrics.jsonl in the text form that Prometheus scrapes.

Nothing here touches an engine: a running job hands over a `Sample` a second, and scrapes read the
last one. Needs prometheus-client (extra `metrics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from batchwright.errors import ConfigError
from batchwright.job.events import JobEvent, Measured
from batchwright.job.metrics import Sample

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

LOOPBACK = "127.0.0.1"

_TOKENS = {
    "computed": "Tokens that passed through the model",
    "computed_prompt": "The part of the computed tokens that stand in prompts",
    "generated": "Tokens drawn",
    "cached": "Prompt tokens taken from blocks that another row had computed",
    "recomputed": "Tokens computed again after preemption or a failed step",
}
_GAUGES = {
    "running_sequences": ("num_running_seqs", "Sequences that run"),
    "waiting_sequences": ("num_waiting_seqs", "Sequences that have not started"),
    "kv_used_ratio": ("kv_used_fraction", "Share of the blocks for keys and values in use"),
    "peak_memory_bytes": ("peak_memory_bytes", "Most memory the process has had"),
    "last_sample_timestamp_seconds": ("time", "When these numbers were taken"),
    "expected_rows": ("rows_estimated", "Rows of the input, an estimate until it is read"),
    "eta_seconds": ("eta_s", "Expected seconds until the job ends"),
}


def prometheus_text(samples: Mapping[str, Sample]) -> tuple[bytes, str]:
    """(text, content type) of some jobs' numbers, for whoever serves /metrics.

    Args:
        samples: the newest of each job, by its name, which becomes the label `batch`.
    Raises:
        ConfigError: prometheus-client is not installed.
    """
    client = _client()
    return client.generate_latest(_registry(samples)), client.CONTENT_TYPE_LATEST


class MetricsPort:
    """Serves a job's numbers on a loopback port until `close`, from threads of its own.

    Args:
        name: of the job.
        port: 0 picks a free one.
    Raises:
        ConfigError: the port cannot be had, or prometheus-client is not installed.
    """

    def __init__(self, name: str, port: int) -> None:
        self._name = name
        self._samples = {name: Sample()}
        try:
            self._server, self._thread = _client().start_http_server(
                port, addr=LOOPBACK, registry=_registry(self._samples)
            )
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be used for metrics: {error.strerror or error}; name another "
                "with --metrics-port, 0 picks a free one"
            ) from None

    @property
    def url(self) -> str:
        """Where they are served."""
        return f"http://{LOOPBACK}:{self._server.server_port}/metrics"

    def on_event(self, event: JobEvent) -> None:
        """Take note of an event of the job."""
        if isinstance(event, Measured):
            self._samples[self._name] = event.sample

    def close(self) -> None:
        """End the service."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MetricsPort:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _client() -> Any:
    try:
        import prometheus_client
    except ImportError:
        raise ConfigError(
            "metrics for Prometheus need prometheus-client: pip install 'batchwright[metrics]'"
        ) from None
    return prometheus_client


def _registry(samples: Mapping[str, Sample]) -> CollectorRegistry:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(_Collector(samples))
    return registry


class _Collector:
    """What prometheus-client asks at each scrape."""

    def __init__(self, samples: Mapping[str, Sample]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        samples = dict(self._samples)
        yield from _row_families(samples)
        yield from _work_families(samples)
        yield from _length_families(samples)
        yield from _gauge_families(samples)


def _row_families(samples: Mapping[str, Sample]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    ended = CounterMetricFamily(
        "batchwright_rows", "Rows that ended in this run", labels=["batch", "state"]
    )
    errors = CounterMetricFamily(
        "batchwright_row_errors", "Rows that failed or expired, by code", labels=["batch", "code"]
    )
    now = GaugeMetricFamily(
        "batchwright_rows_in_engine", "Rows in the engine", labels=["batch", "state"]
    )
    for batch, sample in samples.items():
        for state in ("succeeded", "failed", "expired", "cancelled", "skipped"):
            ended.add_metric([batch, state], getattr(sample, f"rows_{state}"))
        for code, count in sample.error_codes.items():
            errors.add_metric([batch, code], count)
        for state in ("running", "waiting"):
            now.add_metric([batch, state], getattr(sample, f"rows_{state}"))
    yield from (ended, errors, now)


def _work_families(samples: Mapping[str, Sample]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    def counter(name: str, text: str, field: str) -> Metric:
        family = CounterMetricFamily(f"batchwright_{name}", text, labels=["batch"])
        for batch, sample in samples.items():
            family.add_metric([batch], getattr(sample, field))
        return family

    for kind, text in _TOKENS.items():
        yield counter(f"{kind}_tokens", text, f"{kind}_tokens")
    yield counter("steps", "Steps of the engine", "steps")
    yield counter("step_rows", "Rows of all steps", "step_rows")
    yield counter("preemptions", "Sequences sent back for want of memory", "preemptions")
    yield counter("folded_rows", "Rows answered by an identical row's computation", "rows_folded")
    times = CounterMetricFamily(
        "batchwright_time_seconds", "Where the time of the run went", labels=["batch", "part"]
    )
    for batch, sample in samples.items():
        for part in ("compile", "prefill", "decode", "idle", "write"):
            times.add_metric([batch, part], getattr(sample, f"{part}_s"))
    yield times


def _length_families(samples: Mapping[str, Sample]) -> Iterator[Metric]:
    from prometheus_client.core import HistogramMetricFamily

    for kind in ("prompt", "output"):
        family = HistogramMetricFamily(
            f"batchwright_{kind}_length_tokens",
            f"Lengths of {kind}s of rows that succeeded",
            labels=["batch"],
        )
        for batch, sample in samples.items():
            buckets = _buckets(getattr(sample, f"{kind}_lengths"))
            family.add_metric([batch], buckets, getattr(sample, f"{kind}_tokens"))
        yield family


def _buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative counts by upper limit: entry i of `counts` has lengths of i bits."""
    buckets: list[tuple[str, float]] = []
    total = 0
    for bits, count in enumerate(counts):
        total += count
        buckets.append((str(float(2**bits - 1)), total))
    return [*buckets, ("+Inf", total)]


def _gauge_families(samples: Mapping[str, Sample]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    for name, (field, text) in _GAUGES.items():
        family = GaugeMetricFamily(f"batchwright_{name}", text, labels=["batch"])
        for batch, sample in samples.items():
            if (value := getattr(sample, field)) is not None:
                family.add_metric([batch], value)
        yield family
