"""Fixtures of several files."""

from __future__ import annotations

import sys

import pytest

from training_runs import ZOO


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with training_zoo.py in it."""
    (tmp_path / "training_zoo.py").write_text(ZOO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("training_zoo", None)
