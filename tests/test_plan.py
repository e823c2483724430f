"""Budgets, plans, their YAML, and the allocation of candidates to layers."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.compress.allocate import SOLVERS, allocate
from pennyweight.compress.budget import Budget
from pennyweight.compress.contract import Candidate
from pennyweight.compress.plan import Choice, LayerInfo, Plan, SplitChoice
from pennyweight.errors import BudgetError, PennyweightError, PlanError, UnknownNameError

METHODS = {"gptq": ["bits", "group"], "svd": ["rank"], "dense": []}


def parse(**given):
    return Budget.parse(**given, n_parameters=1000, original_bytes=4000)


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (7_000_000, 7_000_000),
        (7e6, 7_000_000),
        ("7MB", 7_000_000),
        ("7 mb", 7_000_000),
        ("108kB", 108_000),
        ("1.5GB", 1_500_000_000),
        ("6.5MiB", 6_815_744),
        ("2KiB", 2048),
        ("900_000", 900_000),
        ("900000 B", 900_000),
        ("0.1MB", 100_000),
        ("8M", 8_000_000),
    ],
)
def test_sizes_are_read(size, nbytes):
    assert parse(size=size) == nbytes


def test_bits_and_ratio_count_the_whole_file():
    assert parse(bits=2.5) == 312
    assert parse(ratio=8) == 500


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "none of them"),
        ({"size": 1, "bits": 2}, "both size and bits"),
        ({"size": "7XB"}, r"'7XB' is not understood; give an integer \(bytes\), .*'6.5MiB'"),
        ({"size": "7.5"}, "not understood"),
        ({"size": "-7MB"}, "not understood"),
        ({"size": True}, "not understood"),
        ({"size": 7.5}, "not understood"),
        ({"size": math.nan}, "not understood"),
        ({"size": 0}, "0 bytes"),
        ({"size": -3}, "-3 bytes"),
        ({"bits": 0}, "above 0"),
        ({"bits": math.nan}, "above 0"),
        ({"ratio": 1}, "above 1"),
        ({"ratio": math.inf}, "above 1"),
        ({"ratio": 5000}, "0 bytes"),
    ],
)
def test_senseless_budgets_are_refused(given, message):
    with pytest.raises(BudgetError, match=message):
        parse(**given)


def candidates(layers: int = 3, rows: int = 64, cols: int = 64) -> dict[str, list[Candidate]]:
    """1 to 8 bits for every layer; each bit divides the distortion by four; layers differ in weight."""
    return {
        f"layer.{at}.weight": [
            Candidate("gptq", {"bits": b, "group": 64}, rows * cols * b // 8 + 100, (at + 1) * 4.0**-b)
            for b in range(1, 9)
        ]
        for at in range(layers)
    }


def example_plan() -> Plan:
    plan = allocate(candidates(), 6000, 500, rows={f"layer.{at}.weight": 64 for at in range(3)})
    info = {name: LayerInfo((64, 64), "linear", 16384, 0.25) for name in plan.choices}
    return replace(plan, layers=info, original_bytes=50_000, seed=3)


def exact_optimum(offers, available: int) -> float:
    return min(
        sum(c.distortion for c in chosen)
        for chosen in itertools.product(*offers.values())
        if sum(c.nbytes for c in chosen) <= available
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("budget", range(2500, 13_000, 700))
def test_divided_plan_uses_the_budget_and_beats_every_undivided_one(solver, budget):
    offers = candidates(rows=256, cols=16)
    plan = allocate(offers, budget, 500, solver, rows=dict.fromkeys(offers, 256))
    assert plan.total is not None and plan.distortion is not None
    own_bytes, row_bytes = 256 // 8 + 64, 2  # a division's bitmap and header; a bit more for one row
    assert budget - own_bytes - row_bytes < plan.total <= budget
    assert plan.total == 500 + sum(c.nbytes or 0 for c in plan.choices.values())
    assert sum(c.split is not None for c in plan.choices.values()) <= 1
    undivided = allocate(offers, budget, 500, solver).distortion
    assert undivided is not None and plan.distortion <= undivided
    assert plan.distortion <= exact_optimum(offers, budget - 500 - own_bytes)


def test_large_model_is_filled_to_a_thousandth():
    offers = candidates(layers=30, rows=384, cols=384)
    rows = dict.fromkeys(offers, 384)
    for budget in range(700_000, 4_000_000, 330_001):
        total = allocate(offers, budget, 20_000, rows=rows).total
        assert total is not None and 0.999 * budget <= total <= budget


def test_division_keeps_to_whole_rows_and_interpolates():
    offers = candidates(layers=1, rows=10, cols=800)
    plan = allocate(offers, 3000, 0, rows={"layer.0.weight": 10})
    (choice,) = plan.choices.values()
    low, high = offers["layer.0.weight"][1:3]  # 2100 and 3100 bytes
    assert choice.split == SplitChoice("gptq", {"bits": 3, "group": 64}, 0.8)  # 66 of the 900 spare bytes are its own
    assert choice.nbytes == 2100 + 800 + 2 + 64
    assert choice.distortion == pytest.approx(0.2 * low.distortion + 0.8 * high.distortion)


def test_layers_without_rows_and_candidates_with_shared_parts_stay_whole():
    shared = "svd"
    offers = candidates()
    offers["layer.2.weight"] = [
        replace(c, method=shared, shared_nbytes=9) if c.options["bits"] in (1, 2, 4, 8) else c
        for c in offers["layer.2.weight"]
    ]
    rows = {"layer.0.weight": 64, "layer.2.weight": 64}
    for budget in range(2400, 12_000, 100):
        plan = allocate(offers, budget, 500, rows=rows)
        assert plan.choices["layer.1.weight"].split is None
        assert all(shared not in (c.method, c.split.method) for c in plan.choices.values() if c.split)


def test_an_upgrade_that_fits_is_made_whole():
    """The relaxation stops before layer a, which cannot be divided; layer b's upgrade fits many times over."""
    offers = {
        "a": [Candidate("svd", {}, 0, 100.0), Candidate("svd", {}, 1000, 0.0, shared_nbytes=10)],
        "b": [Candidate("gptq", {"bits": 1}, 0, 1.0), Candidate("gptq", {"bits": 2}, 100, 0.0)],
    }
    plan = allocate(offers, 500, 0, rows={"a": 64, "b": 64})
    assert (plan.total, plan.distortion) == (100, 100.0)
    assert plan.choices["b"] == Choice("gptq", {"bits": 2}, 100, 0.0)


offer_lists = st.lists(
    st.builds(Candidate, st.just("gptq"), st.just({}), st.integers(0, 3000), st.integers(0, 99).map(float)),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=100)
@given(
    offers=st.dictionaries(st.sampled_from("abc"), offer_lists, min_size=1), rows=st.integers(1, 300), data=st.data()
)
def test_any_plan_holds_its_budget_and_divides_at_whole_rows(
    offers: dict[str, list[Candidate]], rows: int, data: st.DataObject
):
    smallest = sum(min(c.nbytes for c in choices) for choices in offers.values())
    budget = data.draw(st.integers(smallest, smallest + 6000)) + 50
    plan = allocate(offers, budget, 50, rows=dict.fromkeys(offers, rows))
    undivided = allocate(offers, budget, 50)
    assert plan.total is not None and plan.total <= budget
    assert plan.distortion is not None and undivided.distortion is not None
    assert plan.distortion <= undivided.distortion
    for choice in plan.choices.values():
        if choice.split is not None:
            assert 0 < choice.split.fraction < 1
            assert choice.split.fraction * rows == pytest.approx(round(choice.split.fraction * rows))


def test_without_limit_every_layer_gets_its_best():
    plan = allocate(candidates(), None, 500, rows={"layer.0.weight": 64})
    assert all(c.options["bits"] == 8 and c.split is None for c in plan.choices.values())
    assert plan.budget is None


def test_frontier_counts_overhead_and_falls():
    plan = example_plan()
    sizes, distortions = zip(*plan.frontier)
    assert sizes[0] == 500 + 3 * (4096 + 100) and sizes[-1] == 500 + 3 * (512 + 100)
    assert list(sizes) == sorted(sizes, reverse=True) and list(distortions) == sorted(distortions)
    assert len(allocate(candidates(200), 10**6, 0).frontier) <= 100


def test_budget_below_reach_names_the_smallest():
    with pytest.raises(BudgetError, match=r"2,000 bytes .* smallest reachable is 2,336, of which 500"):
        allocate(candidates(), 2000, 500)
    assert allocate(candidates(), 2336, 500).total == 2336


@pytest.mark.parametrize(
    ("offers", "message"),
    [
        ({"a": []}, "layer 'a' has no candidate"),
        ({"a": [Candidate("gptq", {"bits": 2}, 5, math.nan)]}, "layer 'a': candidate gptq bits=2 .* nan"),
        ({"a": [Candidate("gptq", {"bits": 2}, -5, 0.0)]}, "layer 'a': candidate gptq bits=2 .* -5 bytes"),
        ({}, "no layer"),
    ],
)
def test_senseless_candidates_are_refused(offers, message):
    with pytest.raises(PlanError, match=message):
        allocate(offers, 1000, 0)


names = st.text(min_size=1, max_size=12)
numbers = st.floats(allow_nan=False) | st.integers(-(10**12), 10**12)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=12), lambda v: st.lists(v, max_size=3), max_leaves=4
)
options = st.dictionaries(names, values, max_size=3)
splits = st.none() | st.builds(SplitChoice, names, options, st.floats(0, 1, exclude_min=True, exclude_max=True))
counts = st.integers(0, 10**12)
finite = st.floats(allow_nan=False, allow_infinity=False)
choices = st.builds(Choice, names, options, st.none() | counts, st.none() | finite, splits)
infos = st.builds(LayerInfo, st.lists(counts, max_size=4).map(tuple), names, counts, st.none() | finite)
plans = st.builds(
    Plan,
    choices=st.dictionaries(names, choices, min_size=1, max_size=4),
    budget=st.none() | counts,
    overhead=counts,
    solver=names,
    frontier=st.lists(st.tuples(counts, finite), max_size=3),
    original_bytes=st.none() | counts,
    layers=st.dictionaries(names, infos, max_size=3),
    seed=counts,
)


@settings(deadline=None, max_examples=80)
@given(plan=plans)
def test_yaml_gives_the_same_plan_back(plan):
    text = plan.to_yaml()
    assert Plan.from_yaml(text) == plan
    below = text.split("\nlayers:\n")[1].split("\n")
    assert next(at for at, line in enumerate(below) if not line.startswith("  ")) == len(plan.choices)


@pytest.mark.parametrize(
    "text", ["a\nb", " a", "yes", "3", "2020-01-01", "a: b", "# a", "{a}", "\x85\u2028", "\ufeff", "é😀", "a" * 200]
)
def test_any_name_stays_on_its_line(text):
    plan = Plan({text: Choice(text, {text: text}), "b": Choice(text)}, solver=text)
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert plan.to_yaml().count("\n") == Plan({"a": Choice("a"), "b": Choice("a")}).to_yaml().count("\n")


def test_json_able_and_printable():
    plan = example_plan()
    assert json.loads(json.dumps(plan.to_dict()))["total"] == plan.total
    assert "layer.2.weight" in str(plan) and f"{plan.total:,}" in str(plan)
    odd = replace(plan, choices={"a[/b]": Choice("gptq", {"bits": [1]})}, layers={})
    assert "a[/b]" in str(odd) and "bits=[1]" in str(odd)


def test_save_and_load(tmp_path):
    plan = example_plan()
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "missing.yaml")
    (tmp_path / "plan.yaml").write_text("layers: 3")
    with pytest.raises(PlanError, match=r"plan\.yaml: `layers` .* a mapping"):
        Plan.load(tmp_path / "plan.yaml")


def test_edited_line_loses_its_prediction_and_no_other():
    plan = example_plan()
    name = next(n for n, c in plan.choices.items() if c.split is None)
    old = f"  {name}: {{method: gptq, options: {{bits: {plan.choices[name].options['bits']}, group: 64}}}}"
    text = plan.to_yaml()
    assert text.count(old + "\n") == 1
    edited = Plan.from_yaml(text.replace(old + "\n", f"  {name}: {{method: svd, options: {{rank: 3}}}}\n"))
    assert edited.choices[name] == Choice("svd", {"rank": 3})
    assert edited.total is None and edited.distortion is None
    assert {n: c for n, c in edited.choices.items() if n != name} == {
        n: c for n, c in plan.choices.items() if n != name
    }
    assert edited.layers == plan.layers
    assert "?" in str(edited)


def test_plan_may_be_written_by_hand():
    plan = Plan.from_yaml("budget: 7MB\nlayers:\n  a: {method: dense}\n  b: {method: gptq, options: {bits: 3}}\n")
    assert plan == Plan({"a": Choice("dense"), "b": Choice("gptq", {"bits": 3})}, budget=7_000_000)
    plan.validate(["a", "b"], METHODS)
    plan.validate(["a", "b"], list(METHODS))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: {a: {method: gptq", "not valid YAML at line 1"),
        ("layers:\n  a: {method: gptq}\n  a: {method: svd}", "line 3: 'a' is given twice"),
        ("a: !!python/object/apply:os.getcwd []\nlayers: {}", "not valid YAML"),
        ("layers: {a: {method: gptq, options: {x: 2000-99-99}}}", "not valid YAML"),
        ("- 1", "no `layers`"),
        ("pennyweight_plan: 2\nlayers: {}", "version 2"),
        ("laiers: {}\nlayers: {}", "unknown key of the plan 'laiers'; did you mean 'layers'"),
        ("layers: {a: 3}", "layer 'a': expected"),
        ("layers: {a: {options: {}}}", "layer 'a': expected"),
        ("layers: {a: {method: 3}}", "layer 'a': method must be a name"),
        ("layers: {a: {method: gptq, options: [3]}}", "layer 'a': method must be"),
        ("layers: {a: {method: gptq, optoins: {}}}", "layer 'a': 'optoins'; did you mean 'options'"),
        ("layers: {a: {method: gptq, split: {method: svd}}}", "layer 'a', split: fraction is None"),
        ("layers: {a: {method: gptq, split: {method: svd, fraction: 1}}}", "fraction is 1"),
        ("layers: {3: {method: gptq}}", "layer name of the plan must be text, not 3"),
        ("budget: 7XB\nlayers: {}", "'7XB'"),
        ("overhead: many\nlayers: {}", "`overhead` .* whole number"),
        ("layers: {}\nmeasured: {a: 3}", "`measured` of layer 'a' is damaged"),
        ("layers: {}\nfrontier: [3]", "`frontier` is damaged"),
    ],
)
def test_malformed_plans_are_refused(text, message):
    with pytest.raises(PennyweightError, match=message) as error:
        Plan.from_yaml(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"enc.weigth": Choice("gptq")}, UnknownNameError, "unknown layer 'enc.weigth'; did you mean 'enc.weight'"),
        ({"enc.weight": Choice("gtpq")}, UnknownNameError, "layer 'enc.weight': 'gtpq'; did you mean 'gptq'"),
        ({"enc.weight": Choice("gptq", {"bit": 3})}, UnknownNameError, "gptq for layer 'enc.weight': 'bit'; did you"),
        (
            {"enc.weight": Choice("gptq", split=SplitChoice("svd", {"rnk": 1}, 0.5))},
            UnknownNameError,
            "svd for layer 'enc.weight': 'rnk'; did you mean 'rank'",
        ),
        ({"enc.weight": Choice("gptq")}, PlanError, "no line for layer 'head.weight'"),
    ],
)
def test_plan_that_does_not_fit_the_model_is_refused(choices, error, message):
    with pytest.raises(error, match=message):
        Plan(choices).validate(["enc.weight", "head.weight"], METHODS)
