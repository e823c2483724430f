"""Measured times of layers, kept in the user's cache directory: a JSON file for each machine and set of versions.

The directory: PENNYWEIGHT_CACHE, else pennyweight/ below XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import warn
from .kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without stubs)
from .layers.forms import Form


def cache_directory() -> Path:
    """Where measured times are kept."""
    named = os.environ.get("PENNYWEIGHT_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pennyweight"


def machine() -> dict[str, Any]:
    """What times depend on besides the layer: processor, instruction set in use, versions, threads."""
    from . import __version__  # the package is still being imported when this module is

    kernels = Path(_cpu.__file__).read_bytes() if _cpu is not None else b""
    return {
        "processor": _processor(),
        "instruction_set": instruction_set(),
        "torch": torch.__version__,
        "pennyweight": __version__,
        "kernels": f"{zlib.crc32(kernels):08x}",  # a new build may run otherwise under the same version
        "threads": torch.get_num_threads(),
    }


def instruction_set() -> str:
    """The one the kernels use; "none" where they are not compiled."""
    if _cpu is None:
        return "none"
    return os.environ.get("PENNYWEIGHT_ISA") or _cpu.instruction_sets()[-1]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class TimingCache:
    """The times known for this machine: `times[layer][form]`, in microseconds; what is timed `layer_times.py` names.

    A damaged file counts as none, with a warning. fresh: do not read what is there, but write.
    """

    def __init__(self, fresh: bool = False) -> None:
        self.machine = machine()
        name = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_directory() / f"timings-{name}.json"
        self.times: dict[str, dict[Form, float]] = {} if fresh else self._read()
        self._new: dict[str, dict[Form, float]] = {}

    def add(self, layer: str, times: Mapping[Form, float]) -> None:
        self.times[layer] = self._new[layer] = dict(times)

    def save(self) -> None:
        """Write what was added to the file, in one step, beside what others have written meanwhile."""
        if not self._new:
            return
        merged = self._read() | self._new
        layers = {layer: {str(form): t for form, t in times.items()} for layer, times in sorted(merged.items())}
        text = json.dumps({"machine": self.machine, "microseconds": layers}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as unfinished:
                (Path(unfinished) / self.path.name).write_text(text, encoding="utf-8")
                (Path(unfinished) / self.path.name).replace(self.path)
        except OSError as error:
            warn(f"measured times cannot be kept in {self.path.parent}: {error.strerror or error}")
        self._new.clear()

    def _read(self) -> dict[str, dict[Form, float]]:
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            if values["machine"] != self.machine:
                raise ValueError("it is another machine's")
            return {layer: _times(times) for layer, times in values["microseconds"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f"the measured times in {self.path} cannot be read and are measured anew ({error or type(error)})")
            return {}


def _times(values: Mapping[str, Any]) -> dict[Form, float]:
    times = {Form.of_text(text): float(value) for text, value in values.items()}
    if not times or not all(math.isfinite(t) and t >= 0 for t in times.values()):
        raise ValueError("a time is missing or makes no sense")
    return times
