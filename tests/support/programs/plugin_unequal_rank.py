"""A plugin beside ours that makes the last rank differ, as ``UNEQUAL`` says.

``tokens``: it would size the buffer for one token more. ``memory``: nearly all of its device is
taken when the buffer is created.
"""

import os

_held = []


def _last():
    import torch.distributed as dist

    return dist.get_rank() == dist.get_world_size() - 1


def _one_token_more(original):
    def sizes(*args):
        found = original(*args)
        return found | {"tokens per rank": found["tokens per rank"] + 1} if _last() else found

    return sizes


def _nothing_free(original):
    def free_bytes():
        import torch

        if _last() and not _held:
            _held.append(torch.empty(original() - (200 << 20), dtype=torch.uint8, device="cuda"))
        return original()

    return free_bytes


def register():
    """In every process; only schedulers create a buffer."""
    from moe_plugin.integration.serve import buffer

    if os.environ["UNEQUAL"] == "tokens":
        buffer._sizes = _one_token_more(buffer._sizes)
    else:
        buffer._free_bytes = _nothing_free(buffer._free_bytes)
