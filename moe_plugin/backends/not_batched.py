"""The host's other all-to-all backends, and why none of them is a batched one."""

from __future__ import annotations

NOT_BATCHED = {
    "none": "there is no all-to-all: every rank sees all tokens",
    "flashinfer": "its rows are in the order of tokens, not masked per expert",
    "flashinfer_megamoe": "one kernel dispatches, computes and combines",
    "megamoe": "one kernel dispatches, computes and combines",
    "mori": "its rows are not masked per expert, and it runs on AMD devices alone",
    "ascend_fuseep": "one Ascend operator dispatches, computes and combines",
    "ascend_tp": "it gathers tokens over tensor parallel, for Ascend",
}
