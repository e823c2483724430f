"""What a user asks for: a size in bytes, `Budget.parse(size="7MB", n_parameters=n, original_bytes=m)` -> 7000000, or a
time in seconds, `parse_latency("3ms")` -> 0.003."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from ..errors import BudgetError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SECONDS = {"us": "1e-6", "µs": "1e-6", "μs": "1e-6", "ms": "1e-3", "s": "1"}
_SIZE_FORMS = "an integer (bytes), '900_000', '108kB', '7MB', '1.5GB' (powers of 1000) or '6.5MiB' (powers of 1024)"


class Budget:
    """A size in one of the three forms a user may give: size, bits or ratio."""

    @staticmethod
    def parse(
        size: int | str | None = None,
        bits: float | None = None,
        ratio: float | None = None,
        *,
        n_parameters: int,
        original_bytes: int,
    ) -> int:
        """The budget in bytes of all files needed to load the model.

        Exactly one of: size, in bytes or as text ("7MB" = 7,000,000; "6.5MiB" = 6,815,744); bits, average per parameter
        with everything in the files counted; ratio, how many times smaller than `original_bytes` (above 1). Fractions
        of a byte are dropped. Raises BudgetError naming the accepted forms.
        """
        given = [name for name, value in (("size", size), ("bits", bits), ("ratio", ratio)) if value is not None]
        if len(given) != 1:
            got = f"both {' and '.join(given)}" if given else "none of them"
            raise BudgetError(f"give exactly one of size, bits and ratio; got {got}")
        if size is not None:
            budget = parse_size(size)
        elif bits is not None:
            if not (math.isfinite(bits) and bits > 0):
                raise BudgetError(f"bits={bits} is no number of bits per parameter; give one above 0, such as 2.5")
            budget = int(bits * n_parameters / 8)
        else:
            assert ratio is not None
            if not (math.isfinite(ratio) and ratio > 1):
                raise BudgetError(
                    f"ratio={ratio} does not shrink; give a number above 1, such as 12 (twelve times smaller)"
                )
            budget = int(original_bytes / ratio)
        if budget < 1:
            raise BudgetError(f"{given[0]} comes to {budget} bytes; a model needs more")
        return budget


def parse_size(size: int | str) -> int:
    """Bytes of a size given as a number or as text; raises BudgetError naming the accepted forms."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    if isinstance(size, float) and size.is_integer():  # 7e6
        return int(size)
    parts = (
        re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*(|[kmg]i?)(b?)\s*", size.lower()) if isinstance(size, str) else None
    )
    if parts is None or ("." in parts[1] and not parts[2]):
        raise BudgetError(f"size {size!r} is not understood; give {_SIZE_FORMS}")
    return int(Decimal(parts[1].replace("_", "")) * _UNITS[parts[2]])


def parse_latency(latency: float | str) -> float:
    """Seconds of a time given as a number of them or as text: "800us", "3ms", "0.5s"; raises BudgetError."""
    seconds = math.nan
    if isinstance(latency, str):
        parts = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?|\.\d+)\s*(us|µs|μs|ms|s)\s*", latency.lower())
        if parts is not None:
            seconds = float(Decimal(parts[1].replace("_", "")) * Decimal(_SECONDS[parts[2]]))
    elif isinstance(latency, int | float) and not isinstance(latency, bool):
        seconds = float(latency)
    if not (math.isfinite(seconds) and seconds > 0):
        raise BudgetError(f"latency {latency!r} is not understood; give '800us', '3ms', '0.5s' or a number of seconds")
    return seconds


def time_text(seconds: float) -> str:
    """ "3.1 ms", "812 µs", "1.2 s"."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs"
