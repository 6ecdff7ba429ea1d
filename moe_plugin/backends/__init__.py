"""The built-in batched backends, one file each: what they carry, and in which modes."""

from .deepep import DEEPEP
from .deepep_v2 import DEEPEP_V2
from .mooncake import MOONCAKE
from .nixl import NIXL
from .pplx import PPLX

BUILT_IN = {backend.name: backend for backend in (DEEPEP, NIXL, MOONCAKE, PPLX, DEEPEP_V2)}
"""By the host's name. A name in here is not for others to register."""
