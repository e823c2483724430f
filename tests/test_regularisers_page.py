"""docs/regularisers.md: quotes of the measured pages, and an error where a page says something else by now."""

import pytest

from pennyweight.bench.experiments import regularisers
from pennyweight.bench.experiments.regularisers import Entry, page, said
from pennyweight.errors import ArtifactError

PAGE = "# T\n\n- a b: before\n\n## What the numbers say\n\n- a b: 1 point.\n- a c: 2 points.\n- b: none.\n"


def test_lines_are_quoted_word_for_word_from_what_the_numbers_say(tmp_path):
    (tmp_path / "p.md").write_text(PAGE)
    assert said(tmp_path / "p.md", "a ") == ["a b: 1 point.", "a c: 2 points."]
    made = page([Entry("this", "that", "so", "p.md", ("b", "a c"))], tmp_path)
    assert "| this | that | so | b: none. <br> a c: 2 points. [Page](results/p.md) |" in made


def test_a_page_without_the_line_or_no_page_is_an_error(tmp_path):
    (tmp_path / "p.md").write_text(PAGE)
    with pytest.raises(ArtifactError, match="no line begins with 'c'"):
        said(tmp_path / "p.md", "c")
    with pytest.raises(ArtifactError, match="run its experiment"):
        said(tmp_path / "none.md", "a")


def test_the_page_that_is_kept_is_the_one_the_command_writes(tmp_path):
    regularisers.main(["--out", str(tmp_path / "regularisers.md")])
    kept = regularisers.REPOSITORY / "docs" / "regularisers.md"
    assert kept.read_text(encoding="utf-8") == (tmp_path / "regularisers.md").read_text(encoding="utf-8")
