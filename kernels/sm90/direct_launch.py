"""A compiled kernel, launched with addresses through Triton's own C function.

Triton's Python looks at every argument of every launch and encodes every tensor map anew. Here the
arguments are laid out once, and tensor maps are kept by the address that they describe.
"""

from copy import copy
from typing import Any

import triton

from .gemm_launch import HopperLaunch

MOST_ADDRESSES = 256  # of rows that are remembered; the allocator repeats a few
USED = ("arg_annotations", "kernel_signature", "launch_cooperative_grid", "launch_pdl")
UNUSED = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
"""Attributes of Triton's launcher that are passed on, and that ask for more than is passed."""


class _At:
    """Stands for a tensor where only its address is asked for."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class DirectLaunch:
    """One compiled GEMM, called with addresses.

    Args:
        gemm: its launch for stand-ins of its tensors.

    Raises:
        NotImplementedError: Triton does not launch this kernel as it is known here.
    """

    def __init__(self, gemm: HopperLaunch) -> None:
        self._kernel = gemm.compile()  # kept: one that is dropped is unloaded
        launcher = self._kernel.run
        try:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            self._launch = triton.runtime.driver.active.utils.launch
        except (ImportError, AttributeError) as error:
            raise NotImplementedError(str(error)) from error
        missing = [name for name in (*USED, *UNUSED) if not hasattr(launcher, name)]
        if missing or any(getattr(launcher, name) for name in UNUSED):
            raise NotImplementedError(f"launcher without {missing}, or with scratch memory")
        self._encode = make_tensordesc_arg
        self._formats = self._kernel.metadata.tensordesc_meta
        self._descriptors = gemm.descriptors
        self._grid, self._constants = gemm.grid, gemm.constants
        # Two hooks and two scratch buffers, all absent, after the launch's metadata.
        self._fixed = (
            self._kernel.function, launcher.launch_cooperative_grid, launcher.launch_pdl,
            self._kernel.packed_metadata, None, None, None, None, None, launcher.arg_annotations,
            launcher.kernel_signature,
        )  # fmt: skip
        self._rows: dict[tuple[int, int], tuple[Any, ...]] = {}

    def weights(self, address: int) -> tuple[Any, ...]:
        """The arguments that describe weights at an address."""
        return self._described(0, address)

    def rows(self, address: int, scales: int) -> tuple[Any, ...]:
        """The arguments that describe rows at an address, and their scales (0: none)."""
        found = self._rows.get((address, scales))
        if found is None:
            if len(self._rows) >= MOST_ADDRESSES:
                self._rows.clear()
            found = self._described(1, address) + self._described(2, address)
            found += self._described(3, scales or address)
            self._rows[address, scales] = found
        return found

    def _described(self, index: int, address: int) -> tuple[Any, ...]:
        described = copy(self._descriptors[index])
        described.base = _At(address)
        return tuple(self._encode(described, self._formats[index], None))

    def __call__(
        self,
        stream: int,
        weights: tuple[Any, ...],
        rows: tuple[Any, ...],
        addresses: tuple[int | None, ...],
    ) -> None:
        """Launch. `addresses`: weight scales, counts, out, its scales, parts, arrivals."""
        self._launch(
            self._grid, 1, 1, stream, *self._fixed,
            (*weights, *rows, *addresses, *self._constants),
        )  # fmt: skip
