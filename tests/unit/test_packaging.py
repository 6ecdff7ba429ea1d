"""The distribution: what is in it, its name and version, and that it works without the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import moe_plugin

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from ..support.hosts import host_result, program

ROOT = Path(__file__).parents[2]
SHIPPED = {"moe_plugin": "moe_plugin", "kernels": "moe_plugin.kernels"}
SHIPPED["integration"] = "moe_plugin.integration"


def _settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_declared_packages_equal_the_tree() -> None:
    """An undeclared package vanishes from the wheel without a warning."""
    found = set()
    for folder, name in SHIPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            rest = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join([name, *rest]))
    assert set(_settings()["tool"]["setuptools"]["packages"]) == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a clean copy of the tracked files."""
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in files.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_name_and_version(wheel: Path) -> None:
    """One source of the version; found under a name of its own, used under the short ones."""
    assert wheel.name == f"sglang_moe_plugin-{moe_plugin.__version__}-py3-none-any.whl"
    info = f"sglang_moe_plugin-{moe_plugin.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        headers = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        points = archive.read(f"{info}/entry_points.txt").decode().splitlines()
    assert (headers["Name"], headers["Version"]) == ("sglang-moe-plugin", moe_plugin.__version__)
    assert headers["Description-Content-Type"] == "text/markdown"
    assert "moe-plugin = moe_plugin.cli.main:main" in points
    assert "moe_plugin = moe_plugin.integration.plugin:register" in points


def test_the_changelog_has_this_version() -> None:
    """`make release` takes its notes from there; what is not released yet stands above."""
    heads = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Unreleased"
    assert ".dev" in moe_plugin.__version__ or moe_plugin.__version__ in heads


def test_wheel_has_no_foreign_top_level(wheel: Path) -> None:
    """Never a top-level `kernels`: SGLang imports Hugging Face's package of that name."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"moe_plugin"}
    assert "moe_plugin/kernels/experts_torch.py" in names
    assert "moe_plugin/integration/plugin.py" in names
    assert "moe_plugin/py.typed" in names
    assert not any("cpu_platform" in name or name.startswith("tests") for name in names)


def test_wheel_loads_in_the_host_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed from the wheel, the host finds the plugin and its parser knows our flag."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True, capture_output=True)
    env = {"PYTHONPATH": str(target), "SGLANG_PLUGINS": "moe_plugin", "SGLANG_PLATFORM": ""}
    package, kernels, state, switch = host_result(program("wheel_in_host"), cwd=tmp_path, env=env)
    assert Path(package).is_relative_to(target)
    assert Path(kernels).is_relative_to(target)
    assert (state, switch) == ("active", "off")
