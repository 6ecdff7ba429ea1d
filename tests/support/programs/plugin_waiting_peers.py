"""A plugin beside ours: whatever error a rank meets, it waits for ever.

gloo sees a broken connection at once and its rank reports an error. DeepEP's ranks wait in a GPU
kernel for a peer that is gone, for 100 s.
"""

import time


def wait_for_ever(original, *args, **kwargs):
    """Around the scheduler's loop."""
    try:
        return original(*args, **kwargs)
    except Exception as error:
        print(f"this rank waits for ever after: {error}", flush=True)
        time.sleep(3600)


def register():
    """Hook the loop."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.managers.scheduler.Scheduler.run_event_loop"
    HookRegistry.register(target, wait_for_ever, HookType.AROUND)
