"""For comparison: the host's humming kernels, as it runs them behind DeepEP low latency.

The host's own runner on bf16 rows [E, capacity, H] with counts [E]: one GEMM, an activation and
another GEMM. Weights are laid out by the calls that the host makes after loading, and launches are
those of its table. The table has a kernel for every range of rows; only those that the benchmark
asks for are compiled, with NVRTC, into $HUMMING_CACHE_DIR (~/.humming/cache by default).
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from moe_plugin.kernels.formats import Format
from moe_plugin.kernels.launch import Shape
from moe_plugin.kernels.packing import E2M1, MIDDLE
from moe_plugin.kernels.tuning.tune import copies_past_l2, graph_seconds

# Else importing it starts compilers that run beside what is measured.
os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")

MASKED = "grouped_masked"
EXPONENTS = (-7, -4)
"""Scales are powers of two, the last excluded: bf16 and MXFP4 both hold them."""
ERROR_FACTOR = 2.0
"""Times the error of the same steps in plain torch; a split sum is rounded once more."""


@dataclass(frozen=True)
class HummingLayers:
    """Several copies of one layer, so that no launch finds its weights in L2.

    Attributes:
        core: the host's runner.
        layers: weights in humming's layout.
        x: bf16 [E, capacity, H] of each copy, finite, live or not.
        w13, w2: float32, the first expert of the first copy, dequantised.
    """

    shape: Shape
    core: Any
    layers: tuple[torch.nn.Module, ...]
    x: tuple[torch.Tensor, ...]
    w13: torch.Tensor
    w2: torch.Tensor

    def call(self, copy: int, rows: int) -> Callable[[], torch.Tensor]:
        """One layer with `rows` rows of every expert; out [E, capacity, H], bf16."""
        from humming.config import GemmType
        from sglang.srt.layers.moe.moe_runner.humming import (
            HummingMoeQuantInfo,
            HummingRunnerInput,
        )

        x = self.x[copy % len(self.x)]
        info = HummingMoeQuantInfo(layer=self.layers[copy % len(self.layers)])
        counts = torch.full((self.shape.experts,), rows, dtype=torch.int32, device=x.device)
        given = HummingRunnerInput(
            hidden_states=x,
            topk_weights=torch.ones((1, 1), device=x.device),
            topk_ids=torch.zeros((1, 1), dtype=torch.int32, device=x.device),
            gemm_type=GemmType(MASKED),
            expert_num_tokens=counts,
            expected_m=rows,
        )
        return lambda: self.core.run(given, info, {}).hidden_states


def import_host() -> None:
    """Raise ImportError where humming or the host's runner for it is missing. An import may take a
    minute and must not be cut short, so that no time limit applies to it."""
    import humming.layer  # noqa: F401
    import sglang.srt.layers.moe.moe_runner.humming  # noqa: F401


def weight_schema(fmt: Format) -> Any:
    """Humming's name for one of our formats."""
    from humming.schema import HummingWeightSchema

    if not fmt.packed or fmt.zero_points:
        raise ValueError(f"{fmt.name}: compared are 4-bit formats without zero points")
    names = ("float4e2m1", "float8e8m0") if fmt.code == "e2m1" else ("uint4", "bfloat16")
    return HummingWeightSchema(
        b_dtype=names[0], bs_dtype=names[1], weight_scale_group_size=fmt.group_size
    )


def describe_layer(shape: Shape) -> torch.nn.Module:
    """What the host's runner reads of a layer, still without weights."""
    from humming.layer import HummingMethod
    from humming.schema import HummingInputSchema

    layer = torch.nn.Module()
    layer.hidden_size, layer.intermediate_size_per_partition = shape.hidden, shape.inter
    layer.params_dtype = torch.bfloat16
    for name, (n, k) in matrices(shape).items():
        HummingMethod.prepare_layer_meta(
            layer, n, k, weight_schema(shape.format), HummingInputSchema(), shape.experts,
            pad_n_to_multiple=256, pad_k_to_multiple=128, torch_dtype=torch.bfloat16,
            sublayer_name=name,
        )  # fmt: skip
    return layer


def matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """Output and input channels; gates stand before ups."""
    return {"w13": (2 * shape.inter, shape.hidden), "w2": (shape.hidden, shape.inter)}


def random_tensors(
    shape: Shape, n: int, k: int, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """A matrix of every expert as humming takes it before its own repacking: eight codes in an
    int32, the first lowest; any code is a weight."""
    wanted = weight_schema(shape.format).get_tensors_attrs(
        shape_n=n, shape_k=k, param_dtype=torch.bfloat16, num_experts=shape.experts
    )
    size = wanted["weight"]["shape"]
    words = torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device=device)
    exponents = torch.randint(*EXPONENTS, wanted["weight_scale"]["shape"], device=device)
    if shape.format.code == "e2m1":
        scales = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scales = torch.exp2(exponents.float()).bfloat16()
    return {"weight": words, "weight_scale": scales}


def dequantise_humming(tensors: dict[str, torch.Tensor], fmt: Format) -> torch.Tensor:
    """float32 [N, K] of one expert's `random_tensors`, exact."""
    words = tensors["weight"]
    codes = (words.unsqueeze(-1) >> torch.arange(0, 32, 4, device=words.device)) & 15
    codes = codes.flatten(-2)
    if fmt.code == "e2m1":
        values = torch.tensor(E2M1, device=words.device)[codes & 7]
        values = torch.where(codes > 7, -values, values)
    else:
        values = codes.float() - MIDDLE
    return values * tensors["weight_scale"].float().repeat_interleave(fmt.group_size, -1)


def launch_configs(core: Any, rows: int) -> dict[str, Any]:
    """The host's configuration for `rows` rows per expert, its table cut down to their entry."""
    from humming.config import GemmType

    core.humming_gemm_configs.pop(MASKED, None)
    configs = dict(core.get_humming_gemm_configs(GemmType(MASKED)))
    for name in ("w13", "w2"):
        entry = entry_of(configs[f"{name}_tuning_config"], rows * core.num_experts)
        configs[f"{name}_tuning_config"] = [[0, 1 << 30, entry]]
        configs[f"{name}_tuning_config_str"] = json.dumps([[0, 1 << 30, entry]])
    core.humming_gemm_configs[MASKED] = configs
    return configs


def entry_of(table: Sequence[Sequence[Any]], rows: int) -> dict[str, Any]:
    """The entry for `rows` rows of all experts, of a table of (above, up to, entry)."""
    return next(entry for above, up_to, entry in table if above < rows <= up_to)


def kernel_configs(core: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The kernels of both GEMMs that these rows launch, each once."""
    found = {}
    for m in rows:
        configs = launch_configs(core, m)
        for name, meta in core.layer.humming_metas.items():
            entry = configs[f"{name}_tuning_config"][0][2]
            config = json.loads(meta.to_str()) | configs["compute_config"] | entry
            config = {k: v for k, v in config.items() if k not in ("sublayer_name", "num_sms")}
            found[json.dumps(config, sort_keys=True)] = config
    return list(found.values())


def compile_kernels(configs: Sequence[dict[str, Any]], seconds: float) -> None:
    """Fill humming's cache with many compilers at once, for as long as `seconds` last. What fails
    fails again, and is told, where it is launched."""
    from humming.kernel import HummingKernel

    device = torch.cuda.current_device()
    pool = ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,))
    wait([pool.submit(HummingKernel, **config) for config in configs], seconds)
    pool.shutdown(wait=False, cancel_futures=True)


def make_core(shape: Shape, top_k: int) -> Any:
    """The host's runner of one rank's experts, told of the layer that it will get."""
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.humming import HummingRunnerCore

    core = HummingRunnerCore(
        MoeRunnerConfig(
            num_experts=shape.experts,
            num_local_experts=shape.experts,
            hidden_size=shape.hidden,
            intermediate_size_per_partition=shape.inter,
            top_k=top_k,
            params_dtype=torch.bfloat16,
        )
    )
    core.layer = describe_layer(shape)
    return core


def create_humming(shape: Shape, top_k: int, rows: Sequence[int], seconds: float) -> HummingLayers:
    """Compile, for `seconds` at most, what `rows` need, and fill the copies of a layer."""
    from humming.layer import HummingMethod

    core = make_core(shape, top_k)
    compile_kernels(kernel_configs(core, rows), seconds)
    layers, dense = [], {}
    for copy in range(copies_past_l2(shape)):
        layer = describe_layer(shape)
        for name, (n, k) in matrices(shape).items():
            tensors = random_tensors(shape, n, k, "cuda")
            if not copy:
                first = {key: value[0] for key, value in tensors.items()}
                dense[name] = dequantise_humming(first, shape.format)
            for key, value in tensors.items():
                setattr(layer, f"{name}_{key}", torch.nn.Parameter(value, requires_grad=False))
            HummingMethod.transform_humming_layer(layer, sublayer_name=name)
        layer.register_buffer("locks", torch.zeros(1024, dtype=torch.int32, device="cuda"))
        layers.append(layer)
    size = (shape.experts, shape.capacity, shape.hidden)
    x = tuple(torch.randn(size, dtype=torch.bfloat16, device="cuda") for _ in layers)
    return HummingLayers(shape, core, tuple(layers), x, dense["w13"], dense["w2"])


def check_humming(humming: HummingLayers, rows: int) -> str:
    """Its first expert against float64: "" or what was wrong."""
    launch_configs(humming.core, rows)
    got = humming.call(0, rows)()[0, :rows].double()
    x, w13, w2 = humming.x[0][0, :rows].double(), humming.w13.double(), humming.w2.double()

    def layer(rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        gate, up = rounded(x @ w13.T).chunk(2, -1)
        return rounded(rounded(torch.nn.functional.silu(gate) * up) @ w2.T)

    want = layer(lambda values: values)
    allowed = ERROR_FACTOR * (layer(lambda values: values.bfloat16().double()) - want).norm()
    error = (got - want).norm()
    relative = f"{error / want.norm():.2e}, allowed {allowed / want.norm():.2e}"
    return "" if error <= allowed else f"relative error of {rows} rows: {relative}"


def time_humming(humming: HummingLayers, rows: int) -> dict[str, float]:
    """Microseconds of the layer, and of one whose activation leaves unused rows alone.

    On bf16 rows the host's activation goes over the whole capacity; the kernels do not."""
    launch_configs(humming.core, rows)
    calls = [humming.call(copy, rows) for copy in range(4)]
    found = {"humming_us": 1e6 * graph_seconds(calls)}
    whole, live = humming.core.apply_activation, rows * humming.shape.experts

    def activate(inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        whole(inputs=inputs[:live], outputs=outputs[:live])

    with patch.object(humming.core, "apply_activation", activate):
        return found | {"humming_live_us": 1e6 * graph_seconds(calls)}
