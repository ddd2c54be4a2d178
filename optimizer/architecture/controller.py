"""Controller: a recurrent policy that proposes networks, decision by decision.

Its weights follow the policy's gradient, so that what was worth more becomes more likely: by
REINFORCE (Williams 1992) with a moving average as the baseline and a bonus for entropy, as Zoph and
Le 2017, "Neural Architecture Search with Reinforcement Learning", section 3.2, and Pham et al.
2018, "ENAS", appendix, have it; or by PPO's clipped objective (Schulman et al. 2017, equation 7),
as Zoph et al. 2018 did. It knows nothing of what a network is worth, or why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from optimizer.architecture.space import ArchitectureSpace, Choices

_INIT = 0.1
"""Weights begin evenly within this of 0 (ENAS), so that the first networks are nearly random."""


class Policy(nn.Module):
    """An LSTM cell that reads which option each decision took, and gives logits for the next."""

    def __init__(self, space: ArchitectureSpace, width: int) -> None:
        super().__init__()
        self.space = space
        sizes = [len(decision.options) for decision in space.decisions]
        self.start = nn.Parameter(torch.zeros(width))
        self.options = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.cell = nn.LSTMCell(width, width)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -_INIT, _INIT)

    def draw(self, generator: torch.Generator) -> Choices:
        """A network by the policy's probabilities."""
        x, state = self.start[None], None

        def choose(index: int, _earlier: Sequence[int]) -> int:
            nonlocal x, state
            state = self.cell(x, state)
            likely = functional.softmax(self.heads[index](state[0])[0], dim=0)
            option = int(torch.multinomial(likely, 1, generator=generator))
            x = self._of_option(index, torch.tensor([option]))
            return option

        with torch.no_grad():
            return self.space.completed(choose)

    def judge(self, networks: Sequence[Choices]) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] log-probabilities of the networks, and [n] entropies of their decisions summed.
        Decisions that aren't open are passed over: they cost neither."""
        is_open = torch.tensor([self.space.is_open(choices) for choices in networks])
        options = torch.tensor([list(choices) for choices in networks])
        x = self.start.expand(len(networks), -1)
        state = (torch.zeros_like(x), torch.zeros_like(x))
        total = x.new_zeros(len(networks))
        entropy = torch.zeros_like(total)
        for index in range(len(self.space.decisions)):
            asked = is_open[:, index]
            if not bool(asked.any()):
                continue
            made = self.cell(x, state)
            logits = functional.log_softmax(self.heads[index](made[0]), dim=1)
            chosen = logits.gather(1, options[:, index, None])[:, 0]
            total = total + torch.where(asked, chosen, 0)
            entropy = entropy - torch.where(asked, (logits.exp() * logits).sum(1), 0)
            of_these = asked[:, None]
            state = (
                torch.where(of_these, made[0], state[0]),
                torch.where(of_these, made[1], state[1]),
            )
            x = torch.where(of_these, self._of_option(index, options[:, index]), x)
        return total, entropy

    def _of_option(self, index: int, options: torch.Tensor) -> torch.Tensor:
        """[n, width]: what the cell reads when these were chosen."""
        embedded: torch.Tensor = self.options[index](options)
        return embedded


@dataclass
class _Told:
    choices: Choices
    advantage: float
    log_probability: float


class Controller:
    """A proposer; `batch` networks make one step (`reinforce`) or `passes` steps (`ppo`)."""

    def __init__(
        self,
        space: ArchitectureSpace,
        seed: int,
        method: Literal["reinforce", "ppo"] = "reinforce",
        *,
        width: int = 64,
        learning_rate: float = 0.01,
        batch: int = 5,
        entropy_bonus: float = 0.005,
        baseline_decay: float = 0.9,
        clip: float = 0.2,
        passes: int = 4,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = Policy(space, width)
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=learning_rate)
        self._method = method
        self._batch = batch
        self._entropy_bonus = entropy_bonus
        self._decay = baseline_decay
        self._clip = clip
        self._passes = passes
        self._baseline: float | None = None
        self._told: list[_Told] = []

    def ask(self) -> Choices:
        return self.policy.draw(self._generator)

    def tell(self, choices: Choices, reward: float) -> None:
        """The first reward is its own baseline: it teaches nothing but that."""
        baseline = reward if self._baseline is None else self._baseline
        self._baseline = self._decay * baseline + (1 - self._decay) * reward
        with torch.no_grad():
            log_probability = float(self.policy.judge([choices])[0])
        self._told.append(_Told(choices, reward - baseline, log_probability))
        if len(self._told) == self._batch:
            self._learn(self._told)
            self._told = []

    def _learn(self, told: Sequence[_Told]) -> None:
        for _ in range(self._passes if self._method == "ppo" else 1):
            self._optimizer.zero_grad()
            self._loss(told).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    def _loss(self, told: Sequence[_Told]) -> torch.Tensor:
        log_probability, entropy = self.policy.judge([one.choices for one in told])
        advantage = torch.tensor([one.advantage for one in told])
        if self._method == "ppo":
            ratio = (log_probability - torch.tensor([one.log_probability for one in told])).exp()
            clipped = ratio.clamp(1 - self._clip, 1 + self._clip)
            gain = torch.minimum(ratio * advantage, clipped * advantage)
        else:
            gain = log_probability * advantage
        return -(gain + self._entropy_bonus * entropy).mean()
