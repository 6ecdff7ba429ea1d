"""Packed experts have the parameters that we read, in the host's own methods."""

from ..support.hosts import host_result, program


def test_what_the_hosts_methods_create_is_repacked() -> None:
    """Names, orders and groups; what they stand for is in tests/unit/test_packed_weights."""
    found = host_result(program("packed_layers"))
    assert {name: each["format"] for name, each in found.items()} == {
        "compressed-tensors": "int4_g32",
        "AWQ": "int4_g128_zero",
        "GPTQ": "int4_g128",
        "moe_wna16": "int4_g128_zero",
        "FP4": "mxfp4",
    }
    assert all(each["shapes"] == [[256, 256], [256, 128]] for each in found.values())
    left = {name: each["not restored"] for name, each in found.items() if each["not restored"]}
    assert left == {}, "parameters that the host could not load into again"
    for name, each in found.items():
        assert each["finite"], f"{name}: --load-format dummy"
        assert each["same"], f"{name}: a reload that sends nothing"
