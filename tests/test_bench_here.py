"""bench here and the times of layers: made-up clocks, so that nothing hangs on the machine's speed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import pennyweight as pw
import test_cli
from pennyweight.bench.here import time_here
from pennyweight.compress import layer_times
from pennyweight.compress.data import Call, resized
from pennyweight.compress.layer_times import find_layers, original_twin, time_layer
from pennyweight.errors import DataError, PennyweightWarning, WeightError
from pennyweight.formats import Binary, Codebook, Integer, LowRank, Partial, SignedLowRank, Sparse, Split, Stacked
from pennyweight.layers.forms import ORIGINAL, SPLIT, Form, division, form_of, interpolate, samples
from pennyweight.layers.packed import install
from pennyweight.timing_cache import TimingCache, cache_directory, machine
from test_cli import CNN, fails, run
from zoo import INDEX, make_zoo, packed_zoo

here = test_cli.here  # a working directory with cli_models.py in it


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made_up_times(layer, call):
    """A microsecond for each weight of the original; every packed form one more than the last."""
    shapes = [shape for _, shape in layer.weights.values()]
    base = float(sum(rows * cols for rows, cols in shapes))
    forms = samples(*shapes[0])
    return {ORIGINAL: base, **{form: base - 2 + at for at, form in enumerate(forms)}}


@pytest.fixture
def clock(monkeypatch):
    """Made-up times; the layers that were timed."""
    timed = []

    def time(layer, call):
        timed.append(layer.name)
        return made_up_times(layer, call)

    monkeypatch.setattr(layer_times, "time_layer", time)
    return timed


class Twins(nn.Module):
    """Equal layers, one of them called twice, and one that is never reached."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 16)
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 4)
        self.unused = nn.Linear(16, 16)

    def forward(self, index):
        x = self.third(self.second(self.first(self.table(index))))
        return self.head(self.third(x))


WORDS = torch.arange(40).view(8, 5)


def test_every_sample_runs_as_its_form_says_and_all_families_are_there():
    made = samples(24, 192)
    assert all(packed.shape == (24, 192) for packed in made.values())
    assert all(form_of(packed) == form for form, packed in made.items() if form != SPLIT)
    assert isinstance(made[SPLIT], Split)
    families = {form.family for form in made}
    assert families == {
        *("dense16", "decoded", "binary", "codebook", "lowrank", "sparse", "partial", "stacked", "split"),
        *(f"int{bits}" for bits in (1, 2, 3, 4, 8)),
    }
    assert {form.at for form in made if form.family == "int3"} == {1, 3}  # a scale a row, and one for 64 columns
    assert [form for form in samples(1, 5) if form.family == "split"] == []


def test_forms_follow_what_the_kernels_take():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    assert form_of(Integer.encode(weight, 3, 32)) == Form("int3", 4)
    assert form_of(Integer.encode(weight, 6, 0)) == Form("int8", 1)
    assert form_of(Integer.encode(weight, 4, 12)) == Form("decoded")  # groups that are no multiple of 8
    assert form_of(Integer.encode(weight, 12, 0)) == Form("decoded")
    codes = torch.zeros(16, 128, dtype=torch.int64)
    codes[0, 0] = 1000  # one code beyond a byte
    assert form_of(Integer.from_codes(codes, torch.ones(16, 1), bits=11, group=0)) == Form("int8", 1)
    assert form_of(Binary.encode(weight, 64)) == Form("binary", 2)
    table = Codebook.from_codes(torch.zeros(16, 32, dtype=torch.int64), torch.zeros(2, 4), cols=128)
    assert form_of(table) == Form("codebook", 0.25)
    assert form_of(Sparse.encode(weight, weight > 1e9)) == Form("sparse", 0)
    assert form_of(Partial.encode(weight, weight.abs() > 1e9)) == Form("partial", 0)
    assert form_of(Stacked.encode(weight, 3)) == Form("stacked", 3)
    signed = SignedLowRank.encode(weight, 4)
    assert form_of(signed) == Form("stacked", 4)
    assert form_of(Stacked.from_parts([signed, Binary.encode(weight)])) == Form("stacked", 5)
    assert form_of(Stacked.from_parts([signed, Integer.encode(weight, 4)])) == Form("decoded")
    low = LowRank.from_factors(Integer.encode(weight[:, :3], 4), Integer.encode(weight[:3], 4))
    assert form_of(low) == Form("lowrank", 3)


def test_times_between_forms_lie_on_a_line_and_never_fall_to_nothing():
    times = {Form("int3", 1): 10.0, Form("int3", 6): 20.0, Form("decoded"): 90.0, Form("lowrank", 0): 8.0}
    assert interpolate(times, Form("int3", 1)) == 10
    assert interpolate(times, Form("int3", 3)) == pytest.approx(14)
    assert interpolate(times, Form("int3", 11)) == pytest.approx(30)  # beyond, too
    assert interpolate(times, Form("int3", -100)) == 5
    assert interpolate(times, Form("lowrank", 7)) == 8
    assert interpolate(times, Form("codebook", 0.5)) == 90  # was not timed: counts as decoded
    with pytest.raises(KeyError):
        interpolate({}, Form("decoded"))
    parts = {Form("int3", 1): 10.0, Form("int4", 1): 20.0}
    assert division(parts | {SPLIT: 40.0}) == 25
    assert division(parts | {SPLIT: 4.0}) == 0 == division(parts)
    assert Form.of_text(str(Form("codebook", 0.125))) == Form("codebook", 0.125)


@pytest.mark.parametrize("make", [make_zoo, packed_zoo])
def test_all_kinds_of_layers_are_found_with_what_they_are_given(make):
    model = make()
    layers = {layer.name: layer for layer in find_layers(model, Call((INDEX,)))}
    assert len(layers) == 16  # the attention with its output projection is one
    assert layers["attention"].weights.keys() == {"in_proj_weight", "out_proj.weight"}
    assert layers["head"].weights == {"weight": ("embedding.weight", (23, 10))}  # tied
    assert sum(layers["lstm"].shares.values()) == pytest.approx(1)
    kinds = {name: layer.kind for name, layer in layers.items()}
    assert (kinds["bag"], kinds["up2d"], kinds["cell"], kinds["attention"]) == (
        *("embedding", "conv", "recurrent", "linear"),
    )
    # A packed model's layers go by the names of the plain one's, so that both share what was measured.
    plain = {layer.name: layer.text for layer in find_layers(make_zoo(), Call((INDEX,)))}
    assert {name: layer.text for name, layer in layers.items()} == plain


def test_unpacked_copies_compute_what_the_packed_model_does():
    model = packed_zoo()
    twin = original_twin(model)
    assert not any("Packed" in type(m).__name__ for m in twin.modules())
    assert any("Packed" in type(m).__name__ for m in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(twin(INDEX), model(INDEX))


def test_layers_really_run_in_every_form(monkeypatch):
    """One round of the real clock a kind of layer: what counts is that it runs at all."""
    monkeypatch.setattr(layer_times, "_ROUNDS", 1)
    wanted = ("embedding", "bag", "conv1d", "up2d", "lstm", "cell", "attention", "head")
    for layer in find_layers(packed_zoo(), Call((INDEX,))):
        if layer.name in wanted:
            ((call, count),) = layer.calls.values()
            taken = time_layer(layer, call)
            assert count == 1 and ORIGINAL in taken and Form("int3", 1) in taken and all(t > 0 for t in taken.values())


def test_equal_layers_are_timed_once_and_the_unreached_are_named(clock):
    found = time_here(Twins(), WORDS, [1, 32])
    assert len(clock) == 2 * 3  # table, 16x16, head
    assert [(row.layers, row.batch) for row in found.rows] == [
        (["table"], 1),
        (["first", "second", "third"], 1),
        (["head"], 1),
        (["table"], 32),
        (["first", "second", "third"], 32),
        (["head"], 32),
    ]
    assert found.left_out == ["unused"]
    assert found.rows[1].ratio(ORIGINAL) == 1
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_layers_get_so_many_rows(monkeypatch, rows):
    given = {}

    def time(layer, call):
        given[layer.name] = call
        with torch.no_grad():
            layer.module(*call.args, **call.kwargs)
        return {ORIGINAL: 1.0}

    monkeypatch.setattr(layer_times, "time_layer", time)
    time_here(make_zoo(), INDEX, [rows])
    shapes = {name: tuple(call.args[0].shape) for name, call in given.items()}
    assert shapes["head"] == (rows, 10) and shapes["embedding"] == (rows,) and shapes["conv2d"] == (rows, 1, 5, 10)
    assert shapes["lstm"] == (rows, 5, 10) == shapes["attention"] and shapes["cell"] == (rows, 10)


def test_resized_repeats_or_cuts_the_samples_only():
    call = Call((torch.arange(6).view(3, 2), "text"), {"scale": torch.ones(5)})
    assert resized(call, 2).args[0].tolist() == [[0, 1], [2, 3]]
    assert resized(call, 4).args[0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert resized(call, 4).args[1] == "text" and resized(call, 4).kwargs["scale"].shape == (5,)


def test_what_makes_no_sense_is_refused(clock):
    with pytest.raises(DataError, match="batch sizes"):
        time_here(Twins(), WORDS, [0])
    with pytest.raises(DataError, match="empty"):
        time_here(Twins(), [], [1])
    with pytest.raises(WeightError, match="no layer"):
        time_here(nn.ReLU(), torch.ones(2), [1])


def test_measured_times_are_kept_and_fresh_ones_replace_them(cache, clock):
    time_here(Twins(), WORDS, [4])
    assert [path.suffix for path in cache.iterdir()] == [".json"]
    time_here(Twins(), WORDS, [4])
    assert len(clock) == 3
    time_here(Twins(), WORDS, [4], fresh=True)
    assert len(clock) == 6
    values = json.loads(next(cache.iterdir()).read_text())
    assert values["machine"] == machine() and len(values["microseconds"]) == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"machine": {}, "microseconds": {}}', "times", "empty"],
)
def test_a_damaged_cache_is_told_of_and_made_anew(clock, text):
    time_here(Twins(), WORDS, [4])
    path = TimingCache().path
    good = path.read_text()
    if text in ("times", "empty"):
        values = json.loads(good)
        values["microseconds"] = {"Linear": {"int3@1": "soon"} if text == "times" else {}}
        text = json.dumps(values)
    path.write_text(text)
    with pytest.warns(PennyweightWarning, match="measured anew"):
        time_here(Twins(), WORDS, [4])
    assert path.read_text() == good and len(clock) == 6


def test_other_threads_versions_and_builds_have_caches_of_their_own(monkeypatch):
    first = TimingCache().path
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert TimingCache().path != first
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(pw, "__version__", "99")
    assert TimingCache().path != first


def test_the_directory_of_the_cache(monkeypatch, tmp_path):
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("PENNYWEIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg/pennyweight"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache/pennyweight"


def test_a_cache_that_cannot_be_written_is_told_of_and_the_times_are_there(monkeypatch, tmp_path, clock):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "file/below"))
    with pytest.warns(PennyweightWarning, match="cannot be"):
        assert time_here(Twins(), WORDS, [4]).rows


def test_two_that_write_keep_each_others_times():
    one, other = TimingCache(), TimingCache()
    one.add("a", {ORIGINAL: 1.0})
    other.add("b", {ORIGINAL: 2.0})
    one.save()
    other.save()
    assert TimingCache().times == {"a": {ORIGINAL: 1.0}, "b": {ORIGINAL: 2.0}}


def test_the_command_prints_a_table_or_json(here, clock):
    shown = run("bench", "here", *CNN, "--batch", "2", "--quiet").stdout
    assert "2 rows" in shown and "int, 3 bit" in shown and "16x3x3x3" not in shown and "16x27" in shown
    found = json.loads(run("bench", "here", *CNN, "--json").stdout)
    assert {layer["batch"] for layer in found["layers"]} == {1, 32}
    assert found["machine"]["threads"] == torch.get_num_threads()
    formats = found["layers"][0]["formats"]
    assert formats["original@0"] == {"microseconds": 16.0 * 27, "ratio": 1.0}
    assert formats["dense16@0"]["ratio"] < 1 < formats["split@0"]["ratio"]
    assert "give --data" in fails("bench", "here", CNN[0])
    assert "no directory" in fails("bench", "here", "nowhere/at/all")
    assert "here" in run("bench", "--help").stdout


def test_a_shrunk_model_is_timed_as_well_and_by_layer_on_request(here, clock, monkeypatch):
    run("shrink", *CNN, "--methods", "entropy-gptq", "--size", "4kB", "-o", "out")
    found = json.loads(run("bench", "here", "out", "--reference", *CNN, "--batch", "2", "--json").stdout)
    assert [layer["layers"] for layer in found["layers"]] == [["0"], ["3"], ["7"]]
    assert "give its module:factory" in fails("bench", "here", "out", *CNN[1:])
    monkeypatch.setattr(layer_times, "time_calls", lambda models, call: [30.0, 20.0][: len(models)])
    timed = json.loads(run("inspect", "out", "--time", "--reference", *CNN, "--json").stdout)
    assert [(row["microseconds"], row["original_microseconds"]) for row in timed["layers"]] == [(30, 20)] * 3
    assert "3 slower" in run("inspect", "out", "--time", "--reference", *CNN).stdout
    assert "µs" not in run("inspect", "out").stdout


def test_the_report_times_layers_only_when_asked(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    made = {f"{at}.weight": Integer.encode(model[at].weight.detach(), 4, 8) for at in (0, 2)}
    small = install(model, made)

    def time(models, call):
        packed, plain = (type(m).__name__ for m in models)
        assert (packed, plain) == ("PackedLinear", "Linear")
        return [9.0, 10.0] if models[0].in_features == 12 else [3.0, 2.0]

    monkeypatch.setattr(layer_times, "time_calls", time)
    untimed = pw.report(small, inputs=torch.zeros(2, 12))
    assert not untimed.timed and "microseconds" not in untimed.to_dict()["layers"][0]
    assert "µs" not in str(untimed) + untimed.to_html()
    found = pw.report(small, inputs=torch.zeros(2, 12), time=True)
    assert [(row.microseconds, row.slower) for row in found.layers] == [(9, False), (3, True)]
    assert "1 slower" in str(found) and str(found).count("▲") == 1
    assert found.to_html().count("▲ slower") == 1 and "<strong>1</strong> of 2 layers got slower" in found.to_html()
    with pytest.raises(DataError, match="give inputs"):
        pw.report(small, time=True)
