"""Compile kernels without a GPU: for other architectures, and in several processes at once.

Results land in Triton's cache, where the launch in the server finds them.
"""

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from ..launch import Device, Launch, Shape


class OfflineDriver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = self.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        del device
        return 0


def compile_offline(shape: Shape, launch: Launch, device: Device) -> list[Any]:
    """The compiled kernels of one launch. Replaces the process's Triton driver: call it in a
    process of its own."""
    import triton

    from ..experts import compile_layer
    from ..portable.masked_gemm_kernel import masked_gemm_kernel

    triton.runtime.driver.set_active(OfflineDriver(device.capability))
    masked_gemm_kernel.device_caches.clear()  # they remember the previous target
    return compile_layer(shape, launch, device)


def _compile_quietly(job: tuple[Shape, Launch, Device]) -> str | None:
    try:
        compile_offline(*job)
    except Exception as error:  # a candidate that does not compile is no candidate
        return f"{type(error).__name__}: {error}"
    return None


def precompile(
    jobs: Iterable[tuple[Shape, Launch]], device: Device, workers: int = 4
) -> dict[tuple[Shape, Launch], str]:
    """Fill Triton's cache for these launches; returns those that failed, with the reason."""
    jobs = list(dict.fromkeys(jobs))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        outcomes = pool.map(_compile_quietly, [(*job, device) for job in jobs], chunksize=2)
        return {job: why for job, why in zip(jobs, outcomes, strict=True) if why}
