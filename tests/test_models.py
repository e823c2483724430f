"""The reference networks: published sizes, shapes, gradients, batch of one, and their parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.cost import cost_table
from pennyweight.errors import DataError, UnknownNameError
from pennyweight.layers.dprelu import DPReLU
from pennyweight.layers.rprelu import RPReLU
from pennyweight.models.attention import SelfAttention
from pennyweight.models.bert_tiny import bert_tiny
from pennyweight.models.keyword_conv import keyword_conv
from pennyweight.models.pointnet import Transform, pointnet
from pennyweight.models.pokebnn import VARIANTS, Gate, PokeBNN, PokeConv, pokebnn, precision, reshape_shortcut
from pennyweight.models.reactnet import reactnet
from pennyweight.models.resnet_cifar import SubsamplePad, resnet18_cifar, resnet20
from pennyweight.models.vgg_small import vgg_small
from pennyweight.models.vision_transformer import deit_small, deit_tiny, vit_tiny


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small_pokebnn() -> PokeBNN:
    return PokeBNN(num_classes=5, in_channels=1, stages=((16, 1), (32, 2)), patch=2)


def images(batch: int, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


#: name -> (how to make a small one with 5 classes, a batch of n for it)
SMALL = {
    "resnet18": (lambda: resnet18_cifar(5, 8), images),
    "resnet18-bireal": (lambda: resnet18_cifar(5, 8, activation="prelu", shortcut_around="convolution"), images),
    "resnet20": (lambda: resnet20(5, 8, activation="hardtanh"), images),
    "reactnet": (lambda: reactnet(5, 4, stem_stride=1), images),
    "vgg": (lambda: vgg_small(5, 8, image_size=16), images),
    "pokebnn": (small_pokebnn, lambda n: images(n, 1)),
    "vit": (lambda: vit_tiny(5, image_size=16), images),
    "bert": (lambda: bert_tiny(5, vocabulary=40), lambda n: torch.arange(7 * n).view(n, 7)),
    "keywords": (lambda: keyword_conv(5, 16), lambda n: images(n, 1, 10)),
    "pointnet": (lambda: pointnet(5), lambda n: torch.randn(n, 3, 20, generator=torch.Generator().manual_seed(0))),
}


@pytest.fixture(params=SMALL)
def case(request):
    torch.manual_seed(0)
    make, batch = SMALL[request.param]
    return make(), batch


def test_shape_and_gradients_reach_every_parameter(case):
    model, batch = case
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # at the start PokeBNN's last norms let nothing through
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, Transform):  # starts as the identity, whatever the points
            nn.init.normal_(module.matrix.weight, std=0.1)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    out = model(batch(4))
    assert out.shape == (4, 5)
    F.cross_entropy(out, torch.tensor([0, 1, 2, 3])).backward()
    for name, p in model.named_parameters():
        if name.endswith("key.bias"):  # adds one number to all scores of a query: softmax does not see it
            assert p.grad.abs().max() < 1e-6
            continue
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


def test_eval_output_does_not_depend_on_batch_mates(case):
    model, batch = case
    model.eval()
    x = batch(4)
    together = model(x)
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)


def test_same_seed_same_network(case, request):
    model, _ = case
    torch.manual_seed(0)
    again = SMALL[request.node.callspec.params["case"]][0]()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


# ------------------------------------------------------------------------------------------------------ published sizes


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (resnet18_cifar, 11_173_962),
        (resnet20, 269_722),
        (reactnet, 29_333_672),
        (vgg_small, 4_660_106),
        (deit_tiny, 5_717_416),
        (deit_small, 22_050_664),
        (lambda: deit_tiny(distilled=True), 5_910_800),
        (lambda: bert_tiny(2), 4_385_920 + 2 * 128 + 2),
    ],
)
def test_parameters(make, expected):
    with torch.device("meta"):
        assert parameters(make()) == expected


def test_multiplications_by_hand():
    def macs(model, *shape):
        return cost_table(model, torch.empty(1, *shape, device="meta")).macs

    with torch.device("meta"):
        stage = 32 * 32 * 9 * 64 * 64  # the same for every stage: half the sides, twice the channels
        shortcuts = sum((32 >> i) ** 2 * (64 << i) * (64 << i - 1) for i in (1, 2, 3))
        by_hand = 1024 * 27 * 64 + 4 * 4 * stage - 3 * stage // 2 + shortcuts + 512 * 10
        assert macs(resnet18_cifar(), 3, 32, 32) == by_hand == 555_422_720
        stage = 32 * 32 * 9 * 16 * 16
        assert macs(resnet20(), 3, 32, 32) == 1024 * 27 * 16 + 3 * 6 * stage - 2 * stage // 2 + 640
        assert macs(vgg_small(), 3, 32, 32) == 1024 * 9 * (3 * 128 + 128**2) + 256 * 9 * 128 * 256 * 3 + (
            64 * 9 * 256 * 512 * 3 + 81_920
        )
        assert macs(keyword_conv(), 1, 49, 10) == 25 * 5 * (40 * 64 + 4 * (9 * 64 + 64 * 64)) + 64 * 12
        vanilla = macs(pointnet(transforms=False), 3, 1000)
        assert round(vanilla / 1e6) == 148  # the paper's table 6
        full = macs(pointnet(), 3, 1000)
        assert full / 1e6 == pytest.approx(440, rel=0.01)  # it gives two digits, and leaves open whether products count


def test_pointnet_parameters_are_the_papers():
    with torch.device("meta"):
        assert round(parameters(pointnet()) / 1e6, 1) == 3.5
        assert round(parameters(pointnet(transforms=False)) / 1e6, 1) == 0.8


# -------------------------------------------------------------------------------------------------------------- pokebnn


def test_pokebnn_elementwise_operations_are_those_of_the_authors_test():
    """Positions times channels at 224 pixels and width 1, as the released regression test counts them."""
    counts = {"norm": 0, "activation": 0, "local": 0, "block": 0}

    def add(kind):
        def hook(module, args, result):
            counts[kind] += result.numel()

        return hook

    with torch.device("meta"):
        model, x = pokebnn(), torch.empty(1, 3, 224, 224)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(add("norm"))
        elif isinstance(module, DPReLU):
            module.register_forward_hook(add("activation"))
        elif isinstance(module, PokeConv):
            module.register_forward_hook(add("local"))
    for block in model.blocks:
        block.expand.register_forward_hook(add("block"))
    model(x)
    assert counts == {"norm": 17_912_832, "activation": 9_106_944, "local": 8_805_888, "block": 5_519_360}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pokebnn_parameters_are_what_the_formula_says(variant):
    width = VARIANTS[variant]
    with torch.device("meta"):
        model = pokebnn(variant)
    expected = 32 * 3 * 16 + 64 * 9 + (2 + 4) * (32 + 64)
    channels = 64
    for base, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        f = int(base * width)
        for _ in range(blocks):
            for c, out, taps in ((channels, f, 1), (f, f, 9), (f, 4 * f, 1)):
                gate = (c + 1) * (c // 8) + (c // 8 + 1) * out
                expected += taps * c * out + gate + (2 + 2 + 4) * out
            channels = 4 * f
    expected += (channels + 1) * 1000
    assert parameters(model) == expected
    assert set(precision(model)) == {
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }


def test_pokebnn_starts_with_shortcuts_alone_at_the_end_of_a_block():
    torch.manual_seed(0)
    model = small_pokebnn()
    zero = [name for name, p in model.named_parameters() if name.endswith("norm.weight") and not p.any()]
    assert zero == [f"blocks.{i}.expand.norm.weight" for i in range(3)]
    seen = []
    last = model.blocks[1].expand
    last.activation.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, block_input = torch.randn(2, 32, 4, 4), torch.randn(2, 64, 8, 8)
    last(x, block_input)
    size = torch.Size((4, 4))
    torch.testing.assert_close(
        seen[0], reshape_shortcut(x, 128, size, "pad") + reshape_shortcut(block_input, 128, size, "tile")
    )


def channels_of(source: list[float], channels: int, more) -> list[float]:
    x = torch.tensor(source).view(1, -1, 1, 1)
    return reshape_shortcut(x, channels, x.shape[2:], more).flatten().tolist()


def test_reshaped_shortcuts():
    assert channels_of([0.0, 1, 2, 3, 4, 5, 6, 7], 3, "pad") == [0.5, 2.5, 4.5]  # channels 6 and 7 are dropped
    assert channels_of([1.0, 2], 6, "tile") == [1, 2, 1, 2, 1, 2]
    assert channels_of([1.0, 2], 6, "pad") == [1, 2, 0, 0, 0, 0]
    assert channels_of([1.0, 2], 5, "tile") == [1, 2, 1, 2, 1]  # where the released code stops
    assert channels_of([1.0, 2], 2, "tile") == [1, 2]


@pytest.mark.parametrize("size", [6, 7])
def test_stride_two_is_the_published_padding_in_a_mirror(size):
    """Against windows of 3 that start at 0, 2, ... in images of even size, at -1, 1, ... in those of odd size."""
    torch.manual_seed(0)
    layer = PokeConv(8, 8, 3, 2).eval()
    x, start = torch.randn(1, 8, size, size), 0 if size % 2 == 0 else -1
    padded = F.pad(x, (1, 2, 1, 2)).double()
    rows = range(start + 1, start + 1 + 2 * ((size + 1) // 2), 2)
    windows = torch.stack([torch.stack([padded[0, :, i : i + 3, j : j + 3] for j in rows]) for i in rows])
    convolved = torch.einsum("ijcab,ocab->oij", windows, layer.convolution.weight.flip(2, 3).double())
    mirrored = x.flip(2, 3)
    ours = layer.convolution(mirrored).flip(2, 3)[0].double()
    torch.testing.assert_close(ours, convolved, rtol=1e-5, atol=1e-6)
    pooled = reshape_shortcut(mirrored, 8, ours.shape[1:], "pad").flip(2, 3)[0].double()
    torch.testing.assert_close(pooled, windows.mean((3, 4)).permute(2, 0, 1), rtol=1e-5, atol=1e-6)


def test_gate_is_a_hard_sigmoid():
    gate = Gate(8, 3)
    nn.init.zeros_(gate.excite.weight)
    with torch.no_grad():
        gate.excite.bias.copy_(torch.tensor([-9.0, 0, 9]))
    assert gate(torch.randn(2, 8, 4, 4)).flatten().tolist() == [0, 0.5, 1] * 2
    with pytest.raises(ValueError, match="at least 8 channels, not 4"):
        Gate(4, 8)


def test_unknown_variant_is_named():
    with pytest.raises(UnknownNameError, match=r"2\.0x"):
        pokebnn("2x")


# ---------------------------------------------------------------------------------------------------------------- parts


def test_shifted_rectifiers():
    x = torch.linspace(-3, 3, 24, dtype=torch.float64).view(2, 3, 4)
    for layer in (RPReLU(3), DPReLU(3)):
        torch.testing.assert_close(layer.double()(x), F.leaky_relu(x, 0.25))
    first, second = RPReLU(3).double(), DPReLU(3).double()
    with torch.no_grad():
        for p in first.parameters():
            p.copy_(torch.randn(3, dtype=torch.float64))
        second.shift_in.copy_(-first.shift_in)
        second.shift_out.copy_(-first.shift_out)
        second.slope.copy_(first.slope)
    torch.testing.assert_close(first(x), second(x))
    for layer in (first, second):
        torch.autograd.gradcheck(lambda x, layer=layer: layer(x), x.clone().requires_grad_())
        for p in layer.parameters():

            def of_parameter(value, layer=layer, p=p):
                name = next(n for n, q in layer.named_parameters() if q is p)
                return torch.func.functional_call(layer, {name: value}, (x,))

            torch.autograd.gradcheck(of_parameter, p.detach().clone().requires_grad_())


def test_shortcut_without_parameters():
    x = torch.arange(2 * 16.0).view(1, 2, 4, 4)
    out = SubsamplePad(2, 5, 2)(x)
    assert out.shape == (1, 5, 2, 2)
    assert not out[:, [0, 3, 4]].any()
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])


def test_bireal_block_leads_every_sign_around():
    """With all weights zero a plain block forgets its input between the convolutions; this one passes it on."""
    for around in ("block", "convolution"):
        model = resnet18_cifar(5, 4, activation="hardtanh", shortcut_around=around).eval()
        block = model.layer1[0]
        seen = []
        block.conv2.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        nn.init.zeros_(block.conv1.weight)
        x = torch.rand(1, 4, 8, 8) - 0.5
        block(x)
        assert torch.equal(seen[0], x) == (around == "convolution")


def test_options_are_checked():
    with pytest.raises(ValueError, match="activation must be"):
        resnet20(activation="gelu")
    with pytest.raises(ValueError, match="shortcut_around must be"):
        resnet20(shortcut_around="stage")
    with pytest.raises(ValueError, match="do not tile"):
        vit_tiny(image_size=30)
    with pytest.raises(ValueError, match="divided among"):
        SelfAttention(10, 3)
    with pytest.raises(ValueError, match="multiple of 64"):
        bert_tiny(features=100)
    with pytest.raises(ValueError, match="at least 8 pixels"):
        vgg_small(image_size=4)
    with pytest.raises(DataError, match="9 tokens"):
        bert_tiny(positions=8)(torch.zeros(1, 9, dtype=torch.long))


def test_attention_is_torchs():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(8, 2).eval(), nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.no_grad():
        nn.init.normal_(theirs.in_proj_bias)
        parts = zip((ours.query, ours.key, ours.value), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3))
        for layer, weight, bias in parts:
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        ours.output.load_state_dict(theirs.out_proj.state_dict())
    x, mask = torch.randn(3, 5, 8), torch.arange(5) < torch.tensor([[5], [3], [1]])
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(x, mask), theirs(x, x, x, key_padding_mask=~mask)[0], rtol=1e-5, atol=1e-6)


def test_bert_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, num_labels=3
    )
    theirs, ours = transformers.BertForSequenceClassification(config).eval(), bert_tiny(3, vocabulary=50).eval()
    renames = {
        "bert.embeddings.word_embeddings": "words",
        "bert.embeddings.position_embeddings": "positions",
        "bert.embeddings.token_type_embeddings": "segments",
        "bert.embeddings.LayerNorm": "norm",
        "bert.encoder.layer.": "blocks.",
        "attention.self.": "attention.",
        "attention.output.dense": "attention.output",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp.hidden",
        "output.dense": "mlp.output",
        "output.LayerNorm": "mlp_norm",
        "bert.pooler.dense": "pooler",
        "classifier": "head",
    }
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in renames.items():
            if old in name and not (old.startswith("output.") and "attention." in name):
                name = name.replace(old, new)
        state[name] = value
    ours.load_state_dict(state)
    ids = torch.randint(50, (3, 6))
    mask, segments = torch.arange(6) < torch.tensor([[6], [4], [1]]), torch.randint(2, (3, 6))
    expected = theirs(input_ids=ids, attention_mask=mask.long(), token_type_ids=segments).logits
    torch.testing.assert_close(ours(ids, mask, segments), expected, rtol=1e-5, atol=1e-6)


def test_pointnet_does_not_see_the_order_of_points():
    torch.manual_seed(0)
    model, x = pointnet(4).eval(), torch.randn(2, 3, 30)
    torch.testing.assert_close(model(x), model(x[:, :, torch.randperm(30)]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.input_transform(x), torch.eye(3).expand(2, 3, 3), rtol=0, atol=0.05)


def test_distilled_transformer_trains_two_heads_and_evaluates_their_mean():
    with torch.device("meta"):
        model = deit_tiny(7, image_size=32, distilled=True)
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    x = images(2, size=32)
    first, second = model(x)
    torch.testing.assert_close(model.eval()(x), (first + second) / 2)
