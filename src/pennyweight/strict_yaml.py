"""YAML that people write by hand (plans, recipes), read so that a slip is told: a key given twice is an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from .errors import PlanError


def parse(text: str, what: str) -> Any:
    """The plain values in `text`. Raises PlanError, with the line, if it is not valid; `what` names it there."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as the date 2000-99-99
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise PlanError(f"{what} is not valid YAML{where}: {problem or error}") from None


def read(path: str | os.PathLike[str]) -> Any:
    """The same of a UTF-8 file; PlanError, too, if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from None
    return parse(text, str(path))


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)
