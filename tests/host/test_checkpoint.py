"""The random checkpoint notices its experts: without this, equal tokens would prove nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..support.serving.checkpoint import Shape, write_checkpoint
from ..support.serving.prompts import NEW_TOKENS, SHORT_PROMPTS

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

_SPACE = "\u0120"  # how a byte-level vocabulary spells a blank


def _greedy(path: Path) -> list[list[int]]:
    """Tokens by transformers: a second, independent implementation of the model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    vocab = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    answers = []
    for prompt in SHORT_PROMPTS:
        ids = torch.tensor([[vocab[char.replace(" ", _SPACE)] for char in prompt]])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def test_zeroing_the_experts_changes_every_prompt_dropping_one_changes_most(
    model: Path, stock: list[dict], tmp_path: Path
) -> None:
    """And the unchanged model says the same in transformers and in the stock server."""
    whole = _greedy(model)
    assert whole == [answer["tokens"] for answer in stock[: len(SHORT_PROMPTS)]]
    every = tuple(range(Shape().num_experts))
    zeroed = _greedy(write_checkpoint(tmp_path / "zeroed", drop_experts=every))
    assert all(a != b for a, b in zip(whole, zeroed, strict=True))
    dropped = _greedy(write_checkpoint(tmp_path / "dropped", drop_experts=(3,)))
    changed = sum(a != b for a, b in zip(whole, dropped, strict=True))
    assert changed > len(SHORT_PROMPTS) // 2
