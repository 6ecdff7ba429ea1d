"""Real DeepEP low latency on real GPUs: every case of :mod:`tests.gpu.cases`, told one by one.

One rank, two ranks (which share the GPU where there is only one: correct, slow), and as many ranks
as the machine has GPUs where there are three or more. Rank r uses GPU r modulo their number.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from ..support import gpu_environment
from .case_runner import NAMES, run_cases
from .deepep_world import deepep_world

GPUS = torch.cuda.device_count()
# DeepEP's own limit is 200e9 cycles, 100 s and more; its trap would hide who waited where.
CASE_LIMIT_S = 90.0
RUN_LIMIT_S = 400.0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(RUN_LIMIT_S + 100),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="requires an NVIDIA GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec("deep_ep") is None, reason="requires the deep_ep package"
    ),
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="1 rank"),
        pytest.param(2, id="2 ranks"),
        pytest.param(
            GPUS,
            id="a rank per GPU",
            marks=pytest.mark.skipif(GPUS < 3, reason=f"requires 3 or more GPUs, got {GPUS}"),
        ),
    ],
)
def outcome(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """One run of all cases per number of ranks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in gpu_environment.DEEPEP.items():
            patch.setenv(name, value)
        yield run_cases(request.param, deepep_world, limit_s=CASE_LIMIT_S, timeout_s=RUN_LIMIT_S)


@pytest.mark.parametrize("case", NAMES)
def test_deepep_low_latency(outcome: dict[str, str], case: str) -> None:
    """What :mod:`tests.gpu.cases` says of the case holds on every rank."""
    assert not outcome[case], outcome[case]
