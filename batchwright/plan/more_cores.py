"""What a processor with more cores would do, by a law from measurements with one and two threads.

Work that threads divide takes  serial + parallel / threads  (Amdahl), fitted to both measurements;
scheduling and what else a step costs once are not divided. Products cannot be faster than reading
their weights from memory, nor attention of single tokens than reading its keys; how fast the whole
memory is must be told. Replicas divide the memory's speed, and each has its own steps, so what a
step costs once is paid by all at the same time.

Left out: clock rates that fall when more cores work, caches that more cores have together, memory
of other nodes, the parent's time for each row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from batchwright.plan.cost import Hardware, RateCurve

BANDWIDTH = 200e9
"""Bytes/s of the memory of a large machine, if nothing is said: eight channels of DDR4-3200 have
205e9 by their data sheet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreLaw:
    """See the module docstring.

    Attributes:
        one, two: the machine measured with one and with two threads.
        weight_bytes: of one element of the weights.
        memory_bytes_per_s: of the pretended machine, all cores reading.
    """

    one: Hardware
    two: Hardware
    weight_bytes: float
    memory_bytes_per_s: float = BANDWIDTH

    def hardware(self, num_threads: int, num_replicas: int = 1) -> Hardware:
        """The rates of one of some replicas with so many threads each, when all work."""
        one, two = self.one, self.two
        bandwidth = self.memory_bytes_per_s / num_replicas

        def rate(name: str) -> float:
            return 1 / amdahl(1 / getattr(one, name), 1 / getattr(two, name), num_threads)

        def seconds(name: str) -> float:
            return amdahl(getattr(one, name), getattr(two, name), num_threads)

        return replace(
            one,
            name=f"{one.name} with {num_threads * num_replicas} cores",
            num_threads=num_threads,
            layers=self._curve(one.layers, two.layers, num_threads, bandwidth),
            head=self._curve(one.head, two.head, num_threads, bandwidth),
            ceiling_flops_per_s=rate("ceiling_flops_per_s"),
            attention_flops_per_s=rate("attention_flops_per_s"),
            kv_bytes_per_s=min(rate("kv_bytes_per_s"), bandwidth),
            memory_bytes_per_s=bandwidth,
            token_s=seconds("token_s"),
            draw_s=seconds("draw_s"),
            busy=1.0,
        )

    def _curve(
        self, one: RateCurve, two: RateCurve, num_threads: int, bandwidth: float
    ) -> RateCurve:
        all_rows = max(one.rows, two.rows, key=len)  # what takes long is not measured
        rates = []
        for rows in all_rows:
            seconds = amdahl(one.seconds(rows, 1.0), two.seconds(rows, 1.0), num_threads)
            # two FLOPs for each row and element of the weights
            rates.append(min(rows / seconds, 2 * rows * bandwidth / self.weight_bytes))
        return RateCurve(all_rows, tuple(rates))


def amdahl(one_s: float, two_s: float, num_threads: int) -> float:
    """Seconds with so many threads of what takes one_s with one and two_s with two.

    A second thread that does not help means that none does; one that more than halves the time
    means that nothing is serial.
    """
    serial = min(max(2 * two_s - one_s, 0.0), one_s)
    return serial + (one_s - serial) / num_threads
