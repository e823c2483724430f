"""The report: figures that can be counted by hand, and a page that stands alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.compress.plan import Choice, LayerInfo, Plan
from pennyweight.compress.shrink import Record
from pennyweight.errors import ArtifactError, WeightError
from pennyweight.formats import (
    Binary,
    Codebook,
    Dense16,
    Integer,
    LowRank,
    Partial,
    SignedLowRank,
    Sparse,
    Split,
    Stacked,
)
from pennyweight.layers.packed import install
from pennyweight.layers.sites import weight_sites
from pennyweight.report import Histogram, LayerRow, Report, report, report_artifact
from pennyweight.report_page import page, size_text
from pennyweight.report_storage import storage


def weight(rows=8, cols=12):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def packed_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    made = {
        "0.weight": Integer.encode(model[0].weight.detach(), 4, 4),
        "2.weight": Binary.encode(model[2].weight.detach(), 8),
    }
    return install(model.eval(), made)


def with_plan(model):
    choices = {
        "0.weight": Choice("rtn", {"bits": 4, "step": 0.123456789}, 80, 0.25),
        "2.weight": Choice("binary", {}, 20, 0.5),
    }
    layers = {"0.weight": LayerInfo((8, 12), "linear", 384, 2.0), "2.weight": LayerInfo((4, 8), "linear", 128, 1.0)}
    plan = Plan(choices, 2000, 100, layers=layers, original_bytes=560)
    plan.frontier = [(100_000, 0.001), (1000, 0.5), (100, 3.0)]
    model._pennyweight = Record(plan, 0)
    return model


def test_size_is_that_of_the_saved_files(tmp_path):
    model = packed_model()
    assert report(model).size == pw.save(model, tmp_path / "out")
    assert report(model).size == sum(
        (tmp_path / "out" / f).stat().st_size for f in ("config.json", "model.safetensors")
    )


def test_figures_by_hand():
    made = report(with_plan(packed_model()))
    assert made.parameters == 8 * 12 + 8 + 4 * 8 + 4
    assert made.effective_bits == pytest.approx(8 * made.size / 140)
    assert made.ratio == pytest.approx(560 / made.size)
    assert made.distortion == pytest.approx(0.75)
    assert made.other_bytes == made.size - sum(row.nbytes for row in made.layers)
    assert [row.name for row in made.heaviest(1)] == ["0.weight"]
    assert made.layers[0].method == "rtn bits=4 step=0.1235"
    assert made.smallest == 100


def test_frontier_is_read_between_its_points():
    made = report(with_plan(packed_model()))
    assert made.predicted_distortion(550) == pytest.approx((0.5 + 3.0) / 2)
    assert made.predicted_distortion(99) is None
    made.size = 100
    assert made.gain_of_more(450) == pytest.approx(1 - 1.75 / 3)
    assert made.gain_of_more(10**6) is None


@pytest.mark.parametrize(("size", "step"), [(7_000_000, 100_000), (141_000, 10_000), (5, 1)])
def test_step_is_a_round_share_of_the_size(size, step):
    assert Report([], size, 1).step == step


def test_multiplications_of_linear_layers_a_sample():
    made = report(packed_model(), inputs=torch.zeros(5, 12))
    assert made.macs == {"4-bit x 32-bit": 96, "1-bit x 32-bit": 32}
    made = report(packed_model(), inputs=[torch.zeros(5, 3, 12)])
    assert made.macs == {"4-bit x 32-bit": 3 * 96, "1-bit x 32-bit": 3 * 32}


def count(module, inputs):
    """Multiplications of a module stored in 16 bits."""
    install(module.eval(), {s.name: Dense16.encode(s.matrix()) for s in weight_sites(module)})
    return report(module, inputs=inputs).macs


def test_multiplications_of_other_layers():
    assert count(nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.zeros(2, 4, 5, 7)) == {
        "16-bit x 32-bit": 35 * 6 * 2 * 9
    }
    transposed = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    assert count(transposed, torch.zeros(2, 4, 5, 7)) == {"16-bit x 32-bit": 35 * 4 * 3 * 9}
    lstm = nn.LSTM(3, 5, batch_first=True)
    assert count(lstm, torch.zeros(2, 7, 3)) == {"16-bit x 32-bit": 7 * (20 * 3 + 20 * 5)}
    assert count(nn.Embedding(9, 4), torch.zeros(2, 3, dtype=torch.int64)) == {}


def test_multiplications_follow_the_format():
    mask = weight().abs() > 1
    low_rank = LowRank.from_factors(Dense16.encode(weight(8, 2)), Dense16.encode(weight(2, 12)))
    for packed, expected in (
        (low_rank, {"16-bit x 32-bit": 2 * (8 + 12)}),
        (Sparse.encode(weight(), mask), {"sparse x 32-bit": int(mask.sum())}),
        (Partial.encode(weight(), mask), {"1-bit x 32-bit": 8 * 12, "sparse x 32-bit": int(mask.sum())}),
        (Stacked.encode(weight(), 3), {"1-bit x 32-bit": 3 * 8 * 12}),
        (SignedLowRank.encode(weight(), 2), {"1-bit x 32-bit": 2 * 8 * 12, "16-bit x 32-bit": 2 * (8 + 12)}),
    ):
        model = install(nn.Linear(12, 8), {"weight": packed})
        assert report(model, inputs=torch.zeros(1, 12)).macs == expected


def test_storage_in_words():
    second = torch.arange(8) % 4 == 0
    split = Split.from_parts(second, Binary.encode(weight(6), 12), Dense16.encode(weight(2)))
    codes = torch.zeros(8, 4, dtype=torch.int64)
    assert storage(Dense16.encode(weight())) == "dense float16"
    assert storage(Integer.encode(weight(64, 64), 4, 4)) == "4-bit codes, groups of 4"
    assert storage(Binary.encode(weight(), 12)) == "signs"
    assert storage(split) == "signs; 25 % of rows dense float16"
    assert storage(Codebook.from_codes(codes, torch.zeros(5, 3), cols=12)) == "codebook of 5 blocks of 3"
    assert storage(Sparse.encode(weight(), torch.arange(96).view(8, 12) < 24)) == "sparse, 25 % kept"
    signed = SignedLowRank.encode(weight(), 2)
    assert storage(signed) == "signs, magnitudes of rank 2"
    assert storage(Stacked.from_parts([signed, signed])) == "2 stages (signs, magnitudes of rank 2)"
    assert storage(Partial.encode(weight(), torch.arange(96).view(8, 12) < 24, 0)) == "signs; 25 % of weights salient"
    coded = Integer.from_codes(torch.zeros(64, 64, dtype=torch.int64), torch.ones(64, 1), bits=8, group=0)
    assert storage(coded) == "8-bit codes, range-coded"


def test_parts_of_a_divided_layer_add_up():
    second = torch.arange(8) % 4 == 0
    split = Split.from_parts(second, Binary.encode(weight(6), 12), Dense16.encode(weight(2)))
    (row,) = report(install(nn.Linear(12, 8), {"weight": split})).layers
    assert [kind for kind, _ in row.parts] == ["binary", "dense16"]
    assert sum(size for _, size in row.parts) == row.nbytes


def test_histograms_count_every_weight_before_and_after():
    model, original = packed_model(), nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    for row in report(model, original=original).layers:
        assert row.histogram is not None and row.histogram.before is not None
        assert sum(row.histogram.before) == sum(row.histogram.after) == row.weights
    assert all(row.histogram and row.histogram.before is None for row in report(model).layers)


def test_histogram_of_the_original_is_drawn_with_the_norm_folded_in():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    original[1].running_var.fill_(1e-4)  # folding multiplies the weights by about a hundred
    small = pw.shrink(original, bits=40, data=torch.randn(4, 3, 6, 6), methods=["dense"])
    histogram = report(small, original=original).layers[0].histogram
    assert histogram is not None and histogram.before is not None
    assert sum(abs(a - b) for a, b in zip(histogram.before, histogram.after)) <= 4


def test_a_dense_model_is_refused():
    with pytest.raises(WeightError, match="no packed weight"):
        report(nn.Linear(2, 2))


def test_report_of_files_equals_report_of_the_model(tmp_path):
    model = with_plan(packed_model())
    made = report(model)
    pw.save(model, tmp_path / "out", plan=made.plan.to_yaml())
    read = report_artifact(tmp_path / "out").to_dict()
    expected = made.to_dict()
    assert read.pop("name") == "out" and expected.pop("name") == "Sequential"
    assert json.dumps(read) == json.dumps(expected)


def test_report_without_a_plan(tmp_path):
    made = report(packed_model())
    assert made.distortion is None and made.ratio is None and made.smallest is None
    assert "0.weight" in str(made)
    made.save(tmp_path / "report.html")


def test_save_tells_by_the_suffix(tmp_path):
    made = report(with_plan(packed_model()))
    assert json.loads(made.save(tmp_path / "a" / "report.json").read_text())["size"] == made.size
    assert made.save(tmp_path / "report.html").read_text().startswith("<!doctype html>")
    with pytest.raises(ArtifactError, match=r"html or \.json"):
        made.save(tmp_path / "report.pdf")


class Tags(HTMLParser):
    """Checks that every tag is closed in order."""

    VOID = ("meta", "line", "circle", "path", "polyline")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_page(text):
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert not re.search(r"(?:https?:)?//\w|url\(|@import", text)
    assert "nan" not in re.sub(r"<style>.*</style>", "", text, flags=re.S).lower().replace("dominant", "")
    return tags.seen


def test_the_page_stands_alone_and_is_well_formed():
    seen = check_page(
        page(report(with_plan(packed_model()), inputs=torch.zeros(1, 12), original=packed_model().eval()))
    )
    assert seen.count("section") == 6
    assert {"svg", "figure", "table"} <= set(seen)


def test_names_cannot_break_the_page():
    row = LayerRow("<script>x</script>&", None, (2, 2), "<b>", "<i>", [("int", 5)], 5, 16, 4, 0.1, 1.0, {"a": 3})
    text = page(Report([row], 20, 4, 100, 30, "<s>", [(30, 0.1), (10, 2.0)], None, "<em>"))
    check_page(text)
    assert "<script>" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize(
    "frontier", [[], [(50, 0.0)], [(50, 0.5)], [(50, 0.5), (50, 0.5)], [(90, 0.0), (80, 0.1), (9, 0.1)]]
)
def test_pages_of_odd_frontiers(frontier):
    row = LayerRow(
        "w", "linear", (2, 2), "rtn", "x", [("int", 5)], 5, None, 4, 0.0, None, None, Histogram(-1, 1, None, [0, 0])
    )
    check_page(page(Report([row], 20, 4, None, None, None, frontier)))


def test_many_layers_are_drawn_by_the_heaviest():
    rows = [LayerRow(f"w{i}.weight", "linear", (2, 2), None, "x", [("int", i + 1)], i + 1, 16, 4) for i in range(100)]
    text = page(Report(rows, 9999, 400))
    check_page(text)
    assert "52 smaller layers" in text and text.count('name-cell">') == 49


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (312, "312 B"),
        (1000, "1.00 kB"),
        (94_080, "94.1 kB"),
        (141_000, "141 kB"),
        (6_993_548, "6.99 MB"),
        (2.5e9, "2.50 GB"),
    ],
)
def test_sizes_in_words(nbytes, text):
    assert size_text(nbytes) == text
