"""Test another build of the compiled kernels, emulated or sanitized.

    python tests/other_build.py FILE [arguments for pytest]

A script and not a conftest, as it must come before anything of pennyweight, which pytest imports to filter warnings.
"""

import importlib.util
import sys

import pytest

if __name__ == "__main__":
    name = "pennyweight.kernels._cpu"
    spec = importlib.util.spec_from_file_location(name, sys.argv[1])
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # what `from . import _cpu` finds
    spec.loader.exec_module(module)
    print(f"Testing {module.__file__}: {', '.join(module.instruction_sets())}")
    sys.exit(pytest.main(sys.argv[2:]))
