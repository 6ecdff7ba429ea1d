"""Which drafts are the target's own checkpoint, by the paths of both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_plugin.integration.resolve.draft_facts import own_draft


def own(target: str, draft: str | None) -> bool:
    """Of a launch with these two paths."""
    return own_draft(SimpleNamespace(model_path=target, speculative_draft_model_path=draft))


@pytest.mark.parametrize("spelling", ["", "/", "/.", "/../model", "link", "relative"])
def test_a_path_is_the_targets_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """A slash at the end, dots, a link, or from the working directory; and either way round."""
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    target = str(tmp_path / "model")
    draft = {"link": str(tmp_path / "link"), "relative": "model"}.get(spelling, target + spelling)
    assert own(target, draft)
    assert own(draft, target)


def test_other_folders_and_names_on_a_hub_are_others(tmp_path: Path) -> None:
    """Two copies are two checkpoints; a name that is no path is compared as it stands."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert not own(str(tmp_path / "a"), str(tmp_path / "b"))
    assert not own("org/model", "org/model-draft")
    assert not own("org/model", "org//model")
    assert own("org/model", "org/model")
    assert own("org/model", None)
