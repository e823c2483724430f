"""One file per outside world. Importing this package imports none of them.

`import pennyweight` must stay cheap, yet `AutoModel.from_pretrained` must know our artifacts without a further call. So
`register_when_imported` waits for transformers to import its own registry of quantisers and enters ours right then.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Enter pennyweight in transformers' registry: now if that is loaded, else when it is. Harmless to repeat."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    # The module registers itself at its end. Should it not import, with a transformers that lacks what it needs, that
    # is no reason to break transformers for everybody: `pennyweight.load` will say so.
    with contextlib.suppress(ImportError):
        importlib.import_module("pennyweight.integrations.transformers")


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds one module, the registry, by asking the other finders, and has it followed by our registration."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()
