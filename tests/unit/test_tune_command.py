"""`moe-plugin tune` where there is no GPU, and its usage errors."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.cli.main import main

SHAPE = ["tune", "--experts", "4", "--hidden", "256", "--inter", "128"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what is said without a GPU")
def test_without_a_gpu_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """One clear error, exit code 2."""
    assert main(SHAPE) == 2
    assert "got no GPU, allowed an NVIDIA GPU. Fix:" in capsys.readouterr().err


def test_bad_usage_exits_with_1() -> None:
    """2 means refused, so argparse's own code is remapped."""
    with pytest.raises(SystemExit) as exit_info:
        main([*SHAPE, "--dtype", "int3"])
    assert exit_info.value.code == 1
