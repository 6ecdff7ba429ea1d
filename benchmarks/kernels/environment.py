"""What the figures of a kernel benchmark depend on."""

import datetime

import torch
import triton


def environment() -> dict[str, str]:
    """What a number depends on."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }
