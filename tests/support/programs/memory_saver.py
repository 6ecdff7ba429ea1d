"""In which order the host's memory saver and our buffer act."""

from contextlib import contextmanager
from types import SimpleNamespace

from program_io import emit
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from moe_plugin.batched_backend import Capability
from moe_plugin.integration.serve import buffer, process
from moe_plugin.planning.plan import Plan

log = []


class Adapter:
    """Stands for the saver, whose region every allocation would be in."""

    @contextmanager
    def disable(self):
        log.append("off")
        yield
        log.append("on")


def create(enable):
    """Stands for the host's choice of an adapter."""
    log.append(enable)
    return Adapter()


def mode(normal):
    """DeepEP's, as the host passes it."""
    return SimpleNamespace(enable_normal=lambda: normal)


TorchMemorySaverAdapter.create = staticmethod(create)
process.host_config = lambda: SimpleNamespace(enable_memory_saver=True)
buffer.check_ranks_agree = lambda group, sizes: None
buffer._create_low_latency = lambda *args: log.append("made")
plan = Plan(capability=Capability(True, ""))
for normal in (False, True):
    asked = (None, 2048, 2, mode(normal))
    buffer._create(lambda *args: log.append("made"), None, plan, asked, 8)
emit(log)
