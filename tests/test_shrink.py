"""plan and shrink on small models of every kind: the promise, the plan's round trip, honest failure."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.compress.contract import LayerView, compressor, sample_rows
from pennyweight.compress.data import calls
from pennyweight.compress.observe import observe, weight_only_view
from pennyweight.errors import BudgetError, DataError, PennyweightWarning, PlanError, UnknownNameError, WeightError
from pennyweight.layers.packed import packed_weights
from pennyweight.layers.sites import weight_sites


class Words(nn.Module):
    """Embedding, LSTM, LayerNorm and a head."""

    def __init__(self, tied=False):
        super().__init__()
        self.table = nn.Embedding(200, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 200, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.norm(self.lstm(self.table(ids))[0]))


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def _mlp():
    return nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 10))


def _case(kind):
    torch.manual_seed(0)
    if kind == "words":
        return Words(), [torch.randint(0, 200, (8, 12)) for _ in range(3)]
    if kind == "tied":
        return Words(tied=True), [torch.randint(0, 200, (8, 12)) for _ in range(3)]
    if kind == "pictures":
        return Pictures().eval(), [torch.randn(8, 3, 8, 8) for _ in range(3)]
    return _mlp(), [torch.randn(16, 24) for _ in range(3)]


KINDS = ["mlp", "words", "tied", "pictures"]


def _fp16_size(model):
    return 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.2, 0.35, 0.6])
def test_files_fit_and_use_the_budget(tmp_path, kind, share):
    model, data = _case(kind)
    size = int(share * _fp16_size(model)) + 1500
    small = pw.shrink(model, size=size, data=data)
    written = pw.save(small, tmp_path / "out")
    assert 0.99 * size <= written <= size
    assert written == sum((tmp_path / "out" / f).stat().st_size for f in ("model.safetensors", "config.json"))
    loaded = pw.load(tmp_path / "out", model=_case(kind)[0])
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), small(data[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_generous_budget_is_lossless_and_the_smallest_is_named(kind):
    model, data = _case(kind)
    rich = pw.shrink(model, size="10MB", data=data)
    with torch.no_grad():
        torch.testing.assert_close(rich(data[0]), model.eval()(data[0]), rtol=2e-2, atol=2e-2)
    with pytest.raises(BudgetError, match=r"smallest reachable is [\d,]+") as error:
        pw.shrink(model, size=300, data=data)
    smallest = int(
        str(error.value).split("smallest reachable is ")[1].split(",  ")[0].split(", of")[0].replace(",", "")
    )
    assert pw.shrink(model, size=smallest + 200, data=data)._pennyweight.size <= smallest + 200


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_model_is_left_alone_and_the_result_is_the_same_every_time(kind):
    model, data = _case(kind)
    before = copy.deepcopy(model.state_dict())
    size = int(0.3 * _fp16_size(model)) + 1500
    first, second = (pw.shrink(model, size=size, data=data) for _ in range(2))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {n: p.to_bytes() for n, p in packed_weights(first).items()} == {
        n: p.to_bytes() for n, p in packed_weights(second).items()
    }


def test_state_dict_keeps_the_names_of_the_original():
    model, data = _case("words")
    small = pw.shrink(model, size="12kB", data=data)
    assert small.state_dict().keys() == model.state_dict().keys()


def test_tied_weights_are_packed_once():
    model, data = _case("tied")
    small = pw.shrink(model, size="10kB", data=data)
    assert len(packed_weights(small)) == len(weight_sites(model))
    assert torch.equal(small.table(torch.arange(200)), small.head.decoded_weight("weight"))


def test_a_plan_is_a_dry_run_and_can_be_edited(tmp_path):
    model, data = _case("mlp")
    plan = pw.plan(model, size="5kB", data=data)
    assert plan.total <= 5000 and plan.total > 4900
    assert plan.frontier[0][0] > plan.frontier[-1][0]
    plan.save(tmp_path / "plan.yaml")
    again = pw.Plan.load(tmp_path / "plan.yaml")
    assert again.to_yaml() == plan.to_yaml()
    small = pw.shrink(model, plan=again, data=data)
    assert small._pennyweight.size <= 5000
    again.choices["0.weight"] = type(again.choices["0.weight"])("rtn", {"bits": 4, "group": 0})
    edited = pw.shrink(model, plan=again, data=data, size="6kB")
    assert packed_weights(edited)["0.weight"].format == "int"
    assert edited._pennyweight.plan.choices["0.weight"].method == "rtn"


def test_a_plan_that_does_not_fit_the_model_is_refused():
    model, data = _case("mlp")
    plan = pw.plan(model, size="5kB", data=data)
    with pytest.raises(UnknownNameError, match="layer"):
        pw.shrink(Words(), plan=plan, data=[torch.zeros(1, 3, dtype=torch.long)])
    for change, message in (("rtnn", "method"), ("rtn", "option")):
        plan.choices["0.weight"] = type(plan.choices["0.weight"])(change, {"bitz": 4})
        with pytest.raises(UnknownNameError, match=message):
            pw.shrink(model, plan=plan, data=data)
    del plan.choices["0.weight"]
    with pytest.raises(PlanError, match="no line for layer"):
        pw.shrink(model, plan=plan, data=data)


def test_budgets_as_bits_and_ratio():
    model, data = _case("mlp")
    parameters = sum(p.numel() for p in model.parameters())
    assert pw.shrink(model, bits=6, data=data)._pennyweight.size <= parameters * 6 / 8
    assert pw.shrink(model, ratio=5, data=data)._pennyweight.size <= parameters * 4 / 5


@pytest.mark.parametrize("kind", KINDS)
def test_without_data(kind):
    model, _ = _case(kind)
    size = int(0.4 * _fp16_size(model)) + 1500
    assert 0.98 * size <= pw.shrink(model, size=size)._pennyweight.size <= size


@pytest.mark.parametrize("distortion", ["output", "loss", "layer"])
@pytest.mark.parametrize("solver", ["hull", "dynamic", "integer"])
def test_every_distortion_and_solver(distortion, solver):
    model, data = _case("mlp")
    small = pw.shrink(model, size="5kB", data=data, distortion=distortion, solver=solver)
    assert small._pennyweight.size <= 5000


def test_a_layer_never_reached_stays_dense_with_a_warning():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    with pytest.warns(PennyweightWarning, match=r"idle\.weight is never reached"):
        small = pw.shrink(Half(), size="2kB", data=[torch.randn(8, 20)])
    assert packed_weights(small)["idle.weight"].format == "dense16"


def test_zero_variance_inputs():
    model = _mlp()
    small = pw.shrink(model, size="5kB", data=[torch.ones(16, 24)])
    assert torch.isfinite(small(torch.ones(1, 24))).all()


def test_bad_input_is_refused_by_name():
    model, data = _case("mlp")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(WeightError, match=r"2\.weight"):
        pw.shrink(broken, size="5kB", data=data)
    with pytest.raises(DataError, match="batch 1 holds NaN"):
        pw.shrink(model, size="5kB", data=[data[0], data[1] * float("inf")])
    with pytest.raises(DataError, match="empty"):
        pw.shrink(model, size="5kB", data=[])
    with pytest.raises(DataError, match="loss is not finite on calibration batch 0"):
        pw.shrink(model, size="5kB", data=data, distortion="loss", loss=lambda out, call: out.sum() * float("nan"))
    with pytest.raises(UnknownNameError, match="gptq"):
        pw.shrink(model, size="5kB", data=data, methods=["gptqq"])
    with pytest.raises(UnknownNameError, match="preset"):
        pw.shrink(model, size="5kB", data=data, preset="smalest")
    with pytest.raises(BudgetError, match="exactly one"):
        pw.shrink(model, data=data)
    with pytest.raises(WeightError, match="no weight"):
        pw.shrink(nn.ReLU(), size="5kB")
    small = pw.shrink(model, size="5kB", data=data)
    with pytest.raises(WeightError, match="packed already"):
        pw.shrink(small, size="4kB", data=data)


@pytest.mark.parametrize(
    "data",
    [
        torch.randn(8, 24),
        [torch.randn(8, 24)],
        [(torch.randn(8, 24), torch.zeros(8))],  # with labels
        [{"input": torch.randn(8, 24)}],
        ({"input": torch.randn(8, 24)} for _ in range(2)),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 24), torch.zeros(8)), batch_size=4),
    ],
    ids=["tensor", "list", "tuple", "dict", "generator", "loader"],
)
def test_data_of_every_form(data):
    assert pw.shrink(_mlp(), size="5kB", data=data)._pennyweight.size <= 5000


def test_observed_distortion_predicts_the_change_of_the_output():
    """The metric's promise: for small independent errors in every layer, the predicted sum is what is measured."""
    torch.manual_seed(0)
    model = _mlp().eval()
    batches = calls(model, [torch.randn(64, 24) for _ in range(32)])
    sites = weight_sites(model)
    seen = observe(model, batches, sites)
    reference = torch.cat([c(model) for c in batches])
    ratios = []
    for _trial in range(6):
        noisy = copy.deepcopy(model)
        predicted = 0.0
        for site in weight_sites(noisy):
            decoded = seen.views[site.name].weight + 0.003 * torch.randn(site.view.matrix_shape)
            predicted += seen.views[site.name].distortion(decoded)
            with torch.no_grad():
                site.parameter.copy_(site.to_parameter(decoded))
        change = (torch.cat([c(noisy) for c in batches]) - reference).detach()
        measured = float(change.pow(2).sum(1).mean() / reference.detach().var(0, correction=0).sum())
        ratios.append(measured / predicted)
    assert 0.8 < sum(ratios) / len(ratios) < 1.25


@pytest.mark.parametrize("distortion", ["output", "loss"])
def test_kinds_of_candidates_are_priced_alike(distortion):
    """Whatever the method, what a candidate is said to cost is what the model's output (or divergence) then shows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 16)).eval()
    x = torch.randn(512, 12) @ torch.randn(12, 48) + 0.3 * torch.randn(512, 48)
    sites = weight_sites(model)
    views = observe(model, calls(model, [x]), sites, distortion=distortion).views

    @torch.no_grad()
    def measured(name, weight):
        before, changed = model(x), copy.deepcopy(model)
        changed.get_parameter(name).copy_(weight)
        after = changed(x)
        if distortion == "output":
            return float((after - before).pow(2).sum(1).mean() / before.var(0, correction=0).sum())
        return float(F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean"))

    checked = 0
    for method in ("rtn", "gptq", "entropy-gptq", "binary", "codebook", "svd", "rd-prune"):
        ratios = []
        for site in sites:
            for priced in compressor(method).candidates(views[site.name]):
                change = measured(site.name, compressor(method).compress(views[site.name], **priced.options).decode())
                if 1e-5 < change < 0.1:  # small enough for a second-order measure, large enough for float32
                    ratios.append(change / priced.distortion)
        if ratios:
            assert 0.8 < torch.tensor(ratios).log().mean().exp() < 1.25, method
            checked += len(ratios)
    assert checked > 50


def test_positions_that_cannot_matter_have_no_weight():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, mask):
            return (self.layer(x) * mask[..., None]).sum(1)

    torch.manual_seed(0)
    model, x, mask = Masked(), torch.randn(8, 5, 4), torch.ones(8, 5)
    mask[:, 3:] = 0
    polluted = x.clone()
    polluted[:, 3:] = 100.0
    views = [
        observe(model, calls(model, [(v, mask)]), weight_sites(model)).views["layer.weight"] for v in (x, polluted)
    ]
    torch.testing.assert_close(views[0].hessian, views[1].hessian)


@pytest.mark.parametrize("method", ["svd", "codebook"])
def test_shared_bytes_are_counted_once_when_rows_are_sampled(method):
    """A factor or a table does not grow with the rows; scaling all bytes would overprice the whole layer."""
    torch.manual_seed(0)
    weight = torch.randn(4096, 48) @ torch.randn(48, 48)
    layer = LayerView("table", weight, torch.eye(48)[None], torch.ones(4096, dtype=torch.float64), "embedding")
    part, factor = sample_rows(layer, 1 << 14)
    assert factor > 8
    for priced in compressor(method).candidates(part):
        whole = compressor(method).compress(layer, **priced.options).nbytes
        assert 0 < priced.shared_nbytes <= priced.nbytes
        assert abs(priced.for_more_rows(factor).nbytes - whole) < abs(priced.nbytes * factor - whole)


def test_data_free_view_is_the_identity_metric():
    model = _mlp()
    view = weight_only_view(weight_sites(model)[0])
    assert view.distortion(torch.zeros_like(view.weight)) == pytest.approx(1.0)


def test_sequential_recalibration_beats_layer_by_layer():
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(48, 48), nn.Tanh())])
    data = [torch.randn(64, 48) @ torch.randn(48, 48) for _ in range(4)]
    held_out = torch.randn(256, 48) @ torch.randn(48, 48)
    with torch.no_grad():
        target = model(held_out)
        losses = {
            sequential: float(
                (pw.shrink(model, size="4kB", data=data, sequential=sequential)(held_out) - target).pow(2).mean()
            )
            for sequential in (True, False)
        }
    assert losses[True] < losses[False]


@pytest.mark.parametrize("kind", ["mlp", "pictures"])
def test_quantised_activations_are_saved_and_cost_little_at_8_bits(tmp_path, kind):
    model, data = _case(kind)
    small, plain = (pw.shrink(model, size="9kB", data=data, activations=bits) for bits in (8, None))
    with torch.no_grad():
        target = model.eval()(data[0])
        errors = [float((m(data[0]) - target).pow(2).mean() / target.var()) for m in (small, plain)]
    assert errors[0] != errors[1]
    assert errors[0] < errors[1] + 5e-3
    assert pw.save(small, tmp_path / "out") <= 9000
    loaded = pw.load(tmp_path / "out", model=_case(kind)[0])
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), small(data[0]))
    with pytest.raises(DataError, match="activations"):
        pw.shrink(model, size="9kB", activations=8)


def test_recovery_improves_and_keeps_the_promise():
    torch.manual_seed(0)
    model, data = _mlp().eval(), [torch.randn(64, 24) for _ in range(20)]
    held_out = torch.randn(512, 24)
    with torch.no_grad():
        plain, recovered = (pw.shrink(model, size="2200B", data=data, recover=steps) for steps in (0, 200))
        errors = [float((m(held_out) - model(held_out)).pow(2).mean()) for m in (plain, recovered)]
    assert recovered._pennyweight.size <= 2200
    before, after = recovered._pennyweight.recovered
    assert after < before
    assert errors[1] < errors[0]


def test_recovery_that_does_not_help_is_undone():
    model, data = _case("mlp")
    plain, recovered = (pw.shrink(model, size="9kB", data=data, recover=steps) for steps in (0, 2))
    before, after = recovered._pennyweight.recovered
    assert after <= before
    if after == before:
        assert {n: p.to_bytes() for n, p in packed_weights(plain).items()} == {
            n: p.to_bytes() for n, p in packed_weights(recovered).items()
        }


def test_recovery_without_data_is_refused():
    with warnings.catch_warnings(), pytest.raises(DataError, match="recover needs calibration data"):
        pw.shrink(_mlp(), size="5kB", recover=5)
