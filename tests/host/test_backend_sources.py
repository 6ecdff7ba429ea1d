"""Our records of the host's backends, held against the host's source text."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from moe_plugin.backends import BUILT_IN
from moe_plugin.backends.not_batched import NOT_BATCHED
from moe_plugin.integration.resolve.exported_variables import HOST_TOKENS_PER_RANK
from moe_plugin.integration.resolve.launch_facts import KEY_VALUE_STORES


def source(path: str) -> str:
    """A file of the host, unimported."""
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "srt" / path).read_text()


def dispatcher(backend: str) -> str:
    return source(f"layers/moe/token_dispatcher/{backend}.py")


def test_every_backend_that_the_host_offers_is_batched_or_says_why_not() -> None:
    """The choices of ``--moe-a2a-backend``; a new one must be looked at."""
    tree = ast.parse(source("arg_groups/fields/exec_.py"))
    choices = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "moe_a2a_backend"
        for name in re.findall(r"'(\w+)'", ast.unparse(node.annotation).split("Arg(")[0])
    }
    assert choices == {*BUILT_IN, *NOT_BATCHED}


@pytest.mark.parametrize("backend", BUILT_IN)
def test_tokens_variables_and_their_default_are_the_hosts(backend: str) -> None:
    variable = BUILT_IN[backend].limits.tokens_variable
    assert variable
    declared = f"{variable} = EnvInt({HOST_TOKENS_PER_RANK})"
    text = dispatcher(backend)
    read = rf'get_int_env_var\(\s*"{variable}", {HOST_TOKENS_PER_RANK}\s*\)'
    assert declared in source("environ.py") or re.search(read, text)
    assert variable in text


@pytest.mark.parametrize("backend", BUILT_IN)
def test_the_largest_t_is_what_the_dispatcher_asserts(backend: str) -> None:
    found = re.findall(
        r"assert self.num_max_dispatch_tokens_per_rank <= (\d+)", dispatcher(backend)
    )
    most = BUILT_IN[backend].limits.max_tokens
    assert [int(number) for number in found] == ([] if most is None else [most])


@pytest.mark.parametrize("backend", BUILT_IN)
def test_modes_in_which_the_host_builds_them(backend: str) -> None:
    """A dispatcher that may be normal raises, or its mode does not matter."""
    refuses = r"if self\.deepep_mode\.enable_normal\(\):\s*raise NotImplementedError"
    only = BUILT_IN[backend].low_latency_only
    assert bool(re.search(refuses, dispatcher(backend))) == only


def test_where_the_dtype_of_rows_comes_from() -> None:
    """DeepEP and pplx ask each layer, NIXL a variable, Mooncake nobody."""
    nixl, mooncake = BUILT_IN["nixl"], BUILT_IN["mooncake"]
    assert f"use_fp8 = not envs.{nixl.bf16_variable}.get()" in dispatcher("nixl")
    assert mooncake.bf16_variable is None
    assert "use_fp8=True" in dispatcher("mooncake")
    for backend in ("deepep", "pplx"):
        assert BUILT_IN[backend].bf16_variable == ""
        assert "get_deepep_output_dtype(self)" in dispatcher(backend)


def test_checks_of_the_host_that_leave_attention_tp_out() -> None:
    """pplx: the chunk of a DP group and the decode graph as they are; DeepEP v2: the graph."""
    hook = source("arg_groups/moe_hook.py")
    pplx = hook[hook.index("def required_pplx_dispatch_tokens_per_rank") :]
    assert "required = cfg.chunked_prefill_size" in pplx
    assert "required = max(required, cfg.cuda_graph_max_bs_decode)" in pplx
    assert "graph_tokens = graph_bs * tokens_per_req" in hook
    assert "scatter_ranks = max(1, view.tp_size // view.attn_dp_size)" in hook
    assert (BUILT_IN["pplx"].whole_rows, BUILT_IN["deepep_v2"].whole_graphs) == (True, True)
    assert not any(BUILT_IN[name].whole_rows for name in ("deepep", "nixl", "mooncake"))


def test_key_value_stores_are_those_whose_weights_the_host_copies() -> None:
    """By the scheme that leads to a ``BaseKVConnector``; file stores hold plain checkpoints."""
    folder = source("connector/__init__.py")
    created = dict(re.findall(r'connector_type == "(\w+)":\n\s+return (\w+)\(', folder))
    modules = re.findall(r"from sglang\.srt\.connector\.(\w+) import (\w+)", folder)
    copied = {
        name for path, name in modules if "(BaseKVConnector)" in source(f"connector/{path}.py")
    }
    schemes = {f"{scheme}://" for scheme, name in created.items() if name in copied}
    assert schemes == set(KEY_VALUE_STORES)
