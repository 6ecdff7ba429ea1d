"""What one batched MoE layer is, as a frozen value that checks itself."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, explain


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchedMoEConfig:
    """Static description of the batched experts of one layer.

    Attributes:
        num_experts: physical experts over all ranks (routed, redundant and fused shared ones).
        num_ranks: ranks of the all-to-all group.
        top_k: experts per token.
        hidden_size: model hidden size.
        intermediate_size: one expert's intermediate size.
        max_num_tokens: most tokens that one rank dispatches at once, T; from the plan, > 0.
        batch_invariant: one launch of the experts for every batch, so that a token gets the same
            bits in any (the host's deterministic inference); costs speed in small ones.
        other_ranks: ranks of other DP groups that may prefill while this one replays a decode
            graph; 0 where none does.
    """

    num_experts: int
    num_ranks: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    max_num_tokens: int
    batch_invariant: bool = False
    other_ranks: int = 0

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_ranks", "top_k", "hidden_size", "intermediate_size"):
            _positive(name, getattr(self, name), "check the model's config.json")
        _positive(
            "max_num_tokens",
            self.max_num_tokens,
            "--batched-dp-moe-max-tokens 256 (it sizes the all-to-all buffer)",
        )
        if self.num_experts % self.num_ranks:
            raise ConfigError(
                explain(
                    "experts per rank",
                    got=f"{self.num_experts} experts over {self.num_ranks} ranks",
                    allowed="a number of experts that the ranks divide",
                    fix="change --tp-size, or add redundant experts "
                    "(--ep-num-redundant-experts) until they divide",
                )
            )

    @property
    def num_local_experts(self) -> int:
        """Experts of this rank, L."""
        return self.num_experts // self.num_ranks

    @property
    def capacity(self) -> int:
        """Rows of the batched layout per local expert: ranks * T."""
        return self.num_ranks * self.max_num_tokens


def _positive(name: str, value: int, fix: str) -> None:
    if value <= 0:
        raise ConfigError(explain(name, got=value, allowed=">= 1", fix=fix))
