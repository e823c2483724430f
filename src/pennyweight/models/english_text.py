"""English prose that every Python carries, for text models when the user gives no data.

Source: `pydoc_data.topics`, the language reference as plain text. A fifth of its sentences is held out, so that what
fidelity is measured on was never calibrated on.
"""

from __future__ import annotations

import random
import re

#: One sentence in so many is held out.
HOLD_OUT = 5
_SEED = 0


def calibration_text(limit: int | None = None) -> list[str]:
    """Sentences to calibrate on, shuffled once and for all; the first `limit` of them."""
    return [s for i, s in enumerate(_sentences()) if i % HOLD_OUT][:limit]


def held_out_text(limit: int | None = None) -> list[str]:
    """Sentences to measure on, none of them in `calibration_text`; the first `limit` of them."""
    return _sentences()[::HOLD_OUT][:limit]


def _sentences() -> list[str]:
    from pydoc_data.topics import topics

    paragraphs = [p for name in sorted(topics) for p in topics[name].split("\n\n") if not p.startswith("    ")]
    found = [s for p in paragraphs for s in _split(p.replace("*", "").replace("`", ""))]
    found = list(dict.fromkeys(found))
    random.Random(_SEED).shuffle(found)
    return found


def _split(text: str) -> list[str]:
    """Sentences of 5 to 60 words that read as prose, not as code or grammar."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", re.sub(r"\s+", " ", text).strip())
    return [
        s for s in sentences if 5 <= len(s.split()) <= 60 and sum(c.isalpha() or c == " " for c in s) > 0.8 * len(s)
    ]
