"""Write the tables of docs/nodes.md: how many bytes are sent over the network in one iteration of PPO with vLLM.

python docs/traffic.py [--check]
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from generated import write_or_check

PAGE = Path(__file__).resolve().parent / "nodes.md"
FENCE = re.compile(r"(<!-- traffic -->\n\n)(.*?)(\n<!-- end -->)", re.DOTALL)
ADAPTER_BYTES = 4  # adapters are sent in fp32
WEIGHT_BYTES = 2  # full weights are sent in the step's precision; here bf16
ANSWER_BYTES = 75  # of a sampled token in an answer: its id, text, offset, and its log-probability twice, as JSON
RANKS = (8, 64)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model that decide how large it is."""

    name: str
    width: int
    inner: int  # of the feed-forward layers
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    is_tied: bool  # the output matrix is the embedding

    def linear_layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block."""
        attention, keys = self.heads * self.head_size, self.key_value_heads * self.head_size
        return [
            (self.width, attention),
            (self.width, keys),
            (self.width, keys),
            (attention, self.width),
            (self.width, self.inner),
            (self.width, self.inner),
            (self.inner, self.width),
        ]

    def parameters(self) -> int:
        """The number of weights."""
        block = sum(inputs * outputs for inputs, outputs in self.linear_layers()) + 2 * self.width
        return self.layers * block + self.width + self.vocabulary * self.width * (1 if self.is_tied else 2)

    def adapter_parameters(self, rank: int) -> int:
        """The number of weights of an adapter on all linear layers of the blocks."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linear_layers())


SHAPES = (
    Shape("Llama 3.2 1B", 2048, 8192, 16, 32, 8, 64, 128256, True),
    Shape("Llama 3.1 8B", 4096, 14336, 32, 32, 8, 128, 128256, False),
    Shape("Llama 3.1 70B", 8192, 28672, 80, 64, 8, 128, 128256, False),
)


def adapter_bytes(shape: Shape, rank: int) -> int:
    """Bytes of an adapter's weights, as each server reads them once in an iteration."""
    return ADAPTER_BYTES * shape.adapter_parameters(rank)


def weight_bytes(shape: Shape) -> int:
    """Bytes of the full weights, as each server reads them once in an iteration without ``lora``."""
    return WEIGHT_BYTES * shape.parameters()


def answer_bytes(episodes: int, tokens: int) -> int:
    """Bytes of all answers of an iteration with ``tokens`` sampled tokens per episode."""
    return ANSWER_BYTES * episodes * tokens


def shown(number: int) -> str:
    """Bytes as text: MB or GB."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def tables() -> str:
    """The two tables as Markdown."""
    lines = ["| to each server, per iteration | " + " | ".join(f"adapter of rank {rank}" for rank in RANKS) + " | full weights (bf16) |"]
    lines.append("|---|" + "---:|" * (len(RANKS) + 1))
    for shape in SHAPES:
        sizes = [*(adapter_bytes(shape, rank) for rank in RANKS), weight_bytes(shape)]
        lines.append(f"| {shape.name} | " + " | ".join(map(shown, sizes)) + " |")
    lines += ["", "| from all servers together, per iteration | 64 episodes | 256 | 1,024 |", "|---|---:|---:|---:|"]
    for tokens in (512, 4096):
        lines.append(f"| {tokens:,} tokens per completion | " + " | ".join(shown(answer_bytes(n, tokens)) for n in (64, 256, 1024)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, FENCE, tables()))
