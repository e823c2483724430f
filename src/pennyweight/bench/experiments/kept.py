"""Measurements kept on disk, so that an interrupted experiment goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def kept(folder: Path, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, from the JSON file of these settings if it has been measured already.

    settings: all that decides the outcome, as plain values; the file's name is their digest, and it holds them, too.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{digest}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["found"]
    found = measure()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"settings": settings, "found": found}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return found
