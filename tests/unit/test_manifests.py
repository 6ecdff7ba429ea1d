"""Manifests and forge files: that they parse, and that what refers to each other fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "deploy").glob("*.yaml"))
FORGE = sorted((ROOT / ".github").rglob("*.yml"))
KINDS = {
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
    "Deployment": "apps/v1",
    "Service": "v1",
}
POD = {"hostNetwork", "dnsPolicy", "containers", "volumes"}
CONTAINER = {
    *("name", "image", "command", "args", "env", "ports", "resources", "securityContext"),
    *("volumeMounts", "startupProbe", "readinessProbe"),
}
"""Fields that are used, as Kubernetes spells them: it ignores others, and says nothing."""


def _documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def _pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod specs of a workload, with the labels of each."""
    spec = manifest["spec"]
    match manifest["kind"]:
        case "LeaderWorkerSet":
            group = spec["leaderWorkerTemplate"]
            assert set(group) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
            assert group["restartPolicy"] in ("RecreateGroupOnPodRestart", "None")
            return [group["leaderTemplate"], group["workerTemplate"]]
        case "Deployment":
            labels = spec["template"]["metadata"]["labels"]
            assert spec["selector"]["matchLabels"].items() <= labels.items()
            return [spec["template"]]
    return []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_whole(path: Path) -> None:
    """Known kinds and fields, mounts of volumes that are there, variables that are strings."""
    documents = _documents(path)
    for manifest in documents:
        assert manifest["apiVersion"] == KINDS[manifest["kind"]]
        for template in _pods(manifest):
            pod = template["spec"]
            assert set(pod) <= POD
            volumes = {volume["name"] for volume in pod.get("volumes", [])}
            for container in pod["containers"]:
                assert set(container) <= CONTAINER
                assert {m["name"] for m in container.get("volumeMounts", [])} == volumes
                assert all(isinstance(word, str) for word in container.get("command", []))
                assert all(isinstance(word, str) for word in container["args"])
                for variable in container.get("env", []):
                    assert isinstance(variable["value"], str), variable
    names = {m["metadata"]["name"] for m in documents if m["kind"] != "Service"}
    services = {m["metadata"]["name"] for m in documents if m["kind"] == "Service"}
    assert services == names


def test_a_service_leads_to_its_pods() -> None:
    """Selectors against labels; LeaderWorkerSet adds its own to every pod."""
    for path in MANIFESTS:
        labels = []
        for manifest in _documents(path):
            more = {"leaderworkerset.sigs.k8s.io/name": manifest["metadata"]["name"]}
            for template in _pods(manifest):
                labels.append({**template.get("metadata", {}).get("labels", {}), **more})
        for manifest in _documents(path):
            if manifest["kind"] == "Service":
                wanted = manifest["spec"]["selector"].items()
                assert sum(wanted <= found.items() for found in labels) == 1


def test_the_recipe_is_on_the_hosts_image() -> None:
    """And adds the flag; what it leaves out of the build context is not what it copies."""
    recipe = (ROOT / "deploy" / "Dockerfile").read_text()
    assert "FROM lmsysorg/sglang:${SGLANG}" in recipe
    assert '"--use-batched-dp-moe", "on"' in recipe
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert not {"moe_plugin", "kernels", "integration", "pyproject.toml", "README.md"} & {*left_out}


@pytest.mark.parametrize("path", FORGE, ids=lambda path: path.name)
def test_forge_files_parse(path: Path) -> None:
    """The form for bugs asks for the doctor's report, with an id of each field's own."""
    content = yaml.safe_load(path.read_text())
    if "body" in content:
        ids = [field["id"] for field in content["body"]]
        assert len(set(ids)) == len(ids)
        assert "moe-plugin doctor --json" in path.read_text()
    else:
        assert content["jobs"]
        versions = {
            row["python"] for row in content["jobs"]["tests"]["strategy"]["matrix"]["include"]
        }
        assert versions == {"3.10", "3.11", "3.12"}
