"""Reward: one number for accuracy and latency, to be made large."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Reward:
    """accuracy × (latency / target)^w (Tan et al. 2019, "MnasNet", equation 2), where w is `within`
    for latencies up to the target and `beyond` above it. The paper's soft constraint is −0.07 in
    both, by which twice the latency is worth 5 % of accuracy; its hard one 0 and −1."""

    target_s: float
    within: float = -0.07
    beyond: float = -0.07

    def __post_init__(self) -> None:
        if not self.target_s > 0:
            raise ValueError(f"target_s: got {self.target_s}, want above 0")
        for name in ("within", "beyond"):
            exponent = getattr(self, name)
            if not -10 <= exponent <= 0:
                raise ValueError(f"{name}: got {exponent}, want -10 to 0")

    def __call__(self, accuracy: float, latency_s: float) -> float:
        """Raises ValueError for a latency that isn't above 0, or no number as accuracy."""
        if not latency_s > 0 or not math.isfinite(accuracy):
            raise ValueError(f"got accuracy {accuracy} at {latency_s} s, want numbers")
        exponent = self.within if latency_s <= self.target_s else self.beyond
        return float(accuracy * (latency_s / self.target_s) ** exponent)
