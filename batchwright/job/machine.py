"""The machine a job runs on, as far as it explains the job's speed."""

from __future__ import annotations

import os
import platform

import msgspec

from batchwright.processor import processor


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Equal machines have equal speed, load aside. No name that would identify one.

    Attributes:
        processor: the model of the processor.
        num_cpus: processors that this process may use.
        memory_bytes: memory of the machine.
        system: operating system.
    """

    processor: str = ""
    num_cpus: int = 0
    memory_bytes: int = 0
    system: str = ""


def this_machine() -> Machine:
    """The machine this process runs on."""
    return Machine(
        processor=processor(),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.machine()}",
    )
