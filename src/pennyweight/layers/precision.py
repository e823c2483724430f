"""How many bits a layer's weight and input have: said once, read by cost tables and training recipes alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Bits of a layer's weight and of its input, 1 to 32; 32 (and 16) are floating point.

    signed_input: whether the input takes negative values, too (false behind a ReLU or a softmax).
    """

    weight: int = 32
    input: int = 32
    signed_input: bool = True

    def __post_init__(self) -> None:
        for what, bits in (("weight", self.weight), ("input", self.input)):
            if not 1 <= bits <= 32:
                raise ValueError(f"{what} bits must be 1..32, not {bits}")

    @property
    def adders(self) -> int:
        """One-bit adders of a multiplier of these two numbers: what one multiply-accumulate counts in ACE."""
        return self.weight * self.input

    def __str__(self) -> str:
        return f"{self.weight}-bit x {self.input}-bit"
