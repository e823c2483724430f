"""Converted models compute what the prepared ones do, bit for bit on signs, and come back from their files."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pennyweight as pw
from pennyweight.errors import ArtifactError, DataError, PlanError, WeightError
from pennyweight.kernels.binary import find_thresholds
from pennyweight.layers.packed import packed_weights, set_memory
from pennyweight.layers.quantised import QuantisedLayer
from pennyweight.training.presets import PRESETS
from pennyweight.training.recipe import preset
from pennyweight.training.schedule import set_progress

HERE = Path(__file__).parent
ENDS = (nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6, 3))
SIGNS = {"weight": "binary", "input": "rsign"}


class Mean(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2)


def between(*middle: nn.Module) -> nn.Sequential:
    """Convolution -> the modules given, from 6 channels to 6 -> pooling -> linear."""
    return nn.Sequential(copy.deepcopy(ENDS[0]), *middle, Mean(), copy.deepcopy(ENDS[1]))


def lived_in(model: nn.Module) -> nn.Module:
    """As if it had been trained: every parameter and statistic a number of its own, in eval mode."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "original" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(3 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(9 * torch.rand(module.running_var.shape, generator=generator) + 0.1)
    set_progress(model, 1)
    return model.eval()


def both(model: nn.Module, recipe, x: torch.Tensor, prepared: bool = False):
    """(output when prepared, output when converted, the converted model)."""
    lived_in(model if prepared else pw.prepare(model, recipe))
    with torch.no_grad():
        before = model(x)
        return before, pw.convert(model)(x), model


def folded(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, QuantisedLayer) and m.output_flip is not None]


class Net(nn.Module):
    """Kinds of layers and paths between them: what folds, what must not."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1, self.act1 = nn.Conv2d(8, 70, 3, padding=1), nn.BatchNorm2d(70), nn.Hardtanh()
        self.conv2, self.norm2 = nn.Conv2d(70, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.short = nn.Conv2d(8, 8, 1, stride=2, bias=False)
        self.grouped, self.norm3 = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2), nn.BatchNorm2d(12)
        self.conv1d, self.norm4 = nn.Conv1d(12, 16, 3, padding=1, padding_mode="circular"), nn.BatchNorm1d(16)
        self.conv1d2 = nn.Conv1d(16, 8, 2, padding=1)
        self.linear1, self.norm5 = nn.Linear(8, 65), nn.BatchNorm1d(65)
        self.linear2 = nn.Linear(65, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = self.short(x) + self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        x = self.norm3(self.grouped(x)).flatten(2)
        x = self.conv1d2(self.norm4(self.conv1d(x)))
        x = self.linear2(self.norm5(self.linear1(x.mean(2))))
        return self.head(x)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


IMAGES = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))

# --- outputs ---


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_computes_the_same(name):
    before, after, model = both(make_net(), preset(name), IMAGES)
    assert torch.equal(before, after)
    assert folded(model) == ([] if name in ("xnor-net", "xnor++", "dorefa-2") else ["conv1", "conv1d", "linear1"])
    left = [
        name for name, _ in model.named_parameters() if "original" in name or "noise" in name or "estimator" in name
    ]
    assert not left and not model.training
    assert torch.equal(copy.deepcopy(model)(IMAGES), after)
    packed = packed_weights(model)
    assert len(packed) == 8 and all(weight.nbytes == len(weight.to_bytes()) for weight in packed.values())


@given(
    st.integers(0, 1000),
    st.sampled_from(["bnn", "reactnet", "recu", "reste"]),
    st.booleans(),
    st.sampled_from([nn.Identity(), nn.Hardtanh(), nn.ReLU(), nn.Dropout(), nn.Hardtanh(-0.3, 0.2)]),
    st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_thresholds_are_exact(seed, name, bias, activation, affine):
    """Batch norm's own rounding, a bias, shifts of the next sign, order-keeping activations: the same bits."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(5, affine=affine)
    model = between(nn.Conv2d(6, 5, 3, bias=bias), norm, copy.deepcopy(activation), nn.Conv2d(5, 6, 1))
    pw.prepare(model, preset(name))
    lived_in(model)
    with torch.no_grad():
        scale = model[1].weight_factors()[1]
        norm.running_mean.copy_(torch.randint(-9, 9, (5,)) * (1 if scale is None else scale))  # met exactly
        x = torch.randn(4, 2, 9, 9)
        before = model(x)
        assert torch.equal(pw.convert(model)(x), before) and folded(model) == ["1"]


def test_find_thresholds_by_brute_force():
    limits = torch.tensor([-3.0, 0.5, 7.0, -1e12, 1e12])
    rising = find_thresholds(lambda y: y >= limits, 5, limits.device)
    falling = find_thresholds(lambda y: y < limits, 5, limits.device)
    for y in (-(2**31), -4, -3, 0, 1, 6, 7, 2**31 - 1):
        assert torch.equal((y >= rising.threshold) != rising.flip, y >= limits)
        assert torch.equal((y >= falling.threshold) != falling.flip, y < limits)


class Residual(nn.Module):
    """The norm's output is used twice, an activation is shared, one path goes through a function."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.act = nn.Hardtanh()

    def forward(self, x):
        x = self.norms[0](self.convs[0](self.stem(x)))
        x = x + self.act(self.norms[1](self.convs[1](x)))
        x = self.act(self.norms[2](self.convs[2](x)))
        x = F.gelu(self.norms[3](self.convs[3](x)))
        return self.head(x)


def test_norms_that_somebody_else_reads_stay():
    before, after, model = both(Residual(), {"rules": [{"match": "convs.*", **SIGNS}]}, IMAGES)
    assert torch.equal(before, after) and not folded(model)


def test_a_model_that_cannot_be_traced_keeps_its_norms():
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model = Branching(*between(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)))
    before, after, model = both(model, preset("bnn"), IMAGES)
    assert torch.equal(before, after) and not folded(model)


def test_what_does_not_fold():
    conv = nn.Conv2d(6, 6, 3, padding=1)
    cases = {
        "groups": [conv, nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=2)],
        "reflected": [conv, nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")],
        "no statistics": [conv, nn.BatchNorm2d(6, track_running_stats=False), nn.Conv2d(6, 6, 3)],
        "not monotone": [conv, nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 6, 3)],
        "pooled": [conv, nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3)],
    }
    for middle in cases.values():
        model = between(*copy.deepcopy(middle))
        pw.prepare(model, {"rules": [{"match": "Conv2d", **SIGNS}]})
        norm = model[2]
        if norm.running_mean is None:  # batch statistics: no eval mode to compare
            norm.running_mean, norm.running_var = None, None
        lived = model.eval() if norm.running_mean is None else lived_in(model)
        with torch.no_grad():
            before = lived(IMAGES)
            assert torch.equal(pw.convert(lived)(IMAGES), before) and not folded(lived)


@pytest.mark.parametrize(
    ("weight", "given"),
    [
        ("binary", None),
        ("fda", None),
        ("dorefa", None),
        ("binary", {"method": "dorefa", "bits": 4}),
        ("dorefa", "rsign"),
    ],
)
@pytest.mark.parametrize("layer", [nn.Conv3d(3, 4, 2), nn.Linear(3, 4), nn.Conv2d(3, 4, 2, padding="same")])
def test_other_bits_than_one_and_one(weight, given, layer):
    x = torch.randn(2, 3, *[5] * len(getattr(layer, "kernel_size", ())))
    rule = {"match": "0", "weight": weight} | ({"input": given} if given else {})
    before, after, model = both(nn.Sequential(copy.deepcopy(layer)), {"rules": [rule]}, x)
    assert torch.equal(before, after) and list(packed_weights(model)) == ["0.weight"]
    for memory in ("low", "fast"):
        set_memory(model, memory, 32)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("layer", [nn.Conv3d(3, 4, 2, padding=1), nn.Conv2d(3, 4, 2, padding="same")])
def test_signs_that_the_kernels_do_not_take_are_multiplied_otherwise(layer):
    x = torch.randn(2, 3, *[5] * len(layer.kernel_size))
    before, after, model = both(nn.Sequential(layer), {"rules": [{"match": "0", **SIGNS}]}, x)
    assert torch.equal(before, after) and not model[0].takes_signs


def test_linear_layers_over_tokens_and_half_precision():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 70), nn.Linear(70, 6), nn.Linear(6, 2))
    x = torch.randn(2, 5, 6)
    before, after, model = both(model, preset("reactnet"), x)
    assert torch.equal(before, after)
    for dtype in (torch.bfloat16, torch.float64):
        cast = copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert cast.dtype == dtype and torch.allclose(
            cast.float(), before, atol=0.3 if dtype == torch.bfloat16 else 1e-4
        )


def test_folded_linear_layers_take_rows_only():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Linear(6, 2))
    before, after, model = both(model, preset("bnn"), torch.randn(5, 6))
    assert torch.equal(before, after) and folded(model) == ["1"]
    with pytest.raises(DataError, match="takes"):
        model(torch.randn(2, 4, 6))


# --- what is refused ---


def test_what_is_not_yet_discrete_is_refused_and_left():
    with pytest.raises(PlanError, match="no prepared layer"):
        pw.convert(make_net())
    with pytest.raises(PlanError, match="already"):
        pw.convert(pw.convert(pw.prepare(make_net(), preset("dorefa-2"))))
    for name in ("biper", "fda", "two-stage"):
        model = pw.prepare(make_net(), preset(name))
        set_progress(model, 0.4)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(WeightError, match=r"conv1: .*set_progress\(model, 1\)"):
            pw.convert(model)
        assert model.training and before.keys() == model.state_dict().keys()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model = pw.prepare(make_net(), preset("bnn"))
    with torch.no_grad():
        model.linear2.parametrizations.weight.original[0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"linear2: .*NaN"):
        pw.convert(model)


def test_saving_before_converting_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"conv1 is prepared .*convert"):
        pw.save(pw.prepare(make_net(), preset("bnn")), tmp_path / "out")


# --- files ---

FRESH = """
import sys, torch
sys.path.insert(0, {tests!r})
import pennyweight as pw
for name in {names!r}:
    model = pw.load(name, "test_convert:make_net", memory="low" if name == "reste" else "fast")
    torch.save(model(torch.load("images", weights_only=True)), name + ".out")
    pw.save(model, name + ".again")
"""


def test_a_fresh_process_computes_the_same(tmp_path):
    expected = {}
    torch.save(IMAGES, tmp_path / "images")
    for name in PRESETS:
        _, expected[name], model = both(make_net(), preset(name), IMAGES)
        pw.save(model, tmp_path / name)
    code = FRESH.format(tests=str(HERE), names=list(PRESETS))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for name, output in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.out", weights_only=True), output), name
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / f"{name}.again" / file).read_bytes()


def test_files_that_do_not_fit(tmp_path):
    _, _, model = both(make_net(), preset("reactnet"), IMAGES)
    pw.save(model, tmp_path / "out")
    for other in (between(), Residual(), nn.Linear(2, 2)):
        with pytest.raises(ArtifactError, match="does not fit"):
            pw.load(tmp_path / "out", other)
    with pytest.raises(ArtifactError, match="shape"):
        wider = make_net()
        wider.head = nn.Linear(9, 5)
        pw.load(tmp_path / "out", wider)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride = stride

    def forward(self, x):
        y = self.norm2(self.conv2(F.hardtanh(self.norm1(self.conv1(x)))))
        x = F.avg_pool2d(x, self.stride)
        return y + F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))


def make_resnet18() -> nn.Module:
    torch.manual_seed(0)
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), *blocks, Mean(), nn.Linear(512, 10)
    )


def test_a_resnet18_converts_fast_and_becomes_small(tmp_path):
    model = pw.prepare(make_resnet18(), preset("reste"))
    parameters = sum(p.numel() for p in model.parameters())
    lived_in(model)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        start = time.perf_counter()
        pw.convert(model)
        assert time.perf_counter() - start < 5
        assert torch.equal(model(x), before)
        size = pw.save(model, tmp_path / "out")
        assert parameters > 10_000_000 and size < parameters / 8 * 1.06  # a bit a weight, 6 % for everything else
        assert torch.equal(pw.load(tmp_path / "out", make_resnet18)(x), before)
