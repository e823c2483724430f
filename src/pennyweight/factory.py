"""What a user names as `module:function`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ArtifactError, PennyweightError

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def call_factory(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """What `module:function` returns for keyword arguments; modules of the current directory are found, too.

    Raises ArtifactError if there is no such function or it raises.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        try:
            function = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise ArtifactError(f"cannot find {name}: {error}") from error
        try:
            return function(**(options or {}))
        except PennyweightError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise ArtifactError(f"{name} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
