"""nn.MultiheadAttention in parts: PyTorch's results, packed and not."""

import copy
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import pennyweight as pw
from pennyweight.compress.capture import input_rows
from pennyweight.errors import PennyweightWarning
from pennyweight.formats.integer import Integer
from pennyweight.layers.packed import install, set_memory
from pennyweight.layers.packed_attention import in_parts
from pennyweight.layers.packed_module import PackedModule
from pennyweight.layers.sites import weight_sites

SIDE, HEADS = 8, 2


def made(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(SIDE, HEADS, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)  # biases too
    return module.eval()


def packed(module: nn.Module, bits: int = 4) -> nn.Module:
    """A copy with all weights packed, memory "low"."""
    twin = copy.deepcopy(module)
    weights = {
        site.name: Integer.encode(site.view.to_matrix(site.parameter.detach()), bits, 8) for site in weight_sites(twin)
    }
    return install(twin, weights, "low")


@st.composite
def calls(draw):
    """(options of the module, arguments of its forward)"""
    options = {name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    if draw(st.booleans()):
        options |= {"kdim": 5, "vdim": 3}
    batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    own = draw(st.booleans()) and "kdim" not in options
    keys = queries if own else draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def values(length: int, size: int) -> torch.Tensor:
        return torch.randn(*((batch, length) if options["batch_first"] else (length, batch)), size, generator=generator)

    query = values(queries, SIDE)
    inputs = (
        [query] * 3
        if own
        else [query, values(keys, options.get("kdim", SIDE)), values(keys, options.get("vdim", SIDE))]
    )
    arguments = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    unbatched = draw(st.booleans())
    if unbatched:
        inputs = [x[0] if options["batch_first"] else x[:, 0] for x in inputs]
        inputs = [inputs[0]] * 3 if own else inputs
        batch = 1

    def mask(*shape: int) -> torch.Tensor:
        left_out = torch.rand(*shape, generator=generator) < 0.4
        left_out[..., 0] = False  # rows without any key are not a number
        return left_out if draw(st.booleans()) else torch.randn(*shape, generator=generator)

    if draw(st.booleans()):
        many = draw(st.booleans())
        arguments["attn_mask"] = mask(*([batch * HEADS] if many else []), queries, keys)
        arguments["is_causal"] = False
    if draw(st.booleans()):
        arguments["key_padding_mask"] = mask(*([] if unbatched else [batch]), keys)
    return options, inputs, arguments


def close(found, wanted, tolerance=1e-5):
    assert (found[1] is None) == (wanted[1] is None)
    for ours, theirs in zip(found, wanted):
        if theirs is not None:
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=120, deadline=None)
@given(calls())
def test_parts_are_pytorchs_attention(call):
    options, inputs, arguments = call
    module = made(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # masks of two types
        wanted = module(*inputs, **arguments)
        with in_parts(module):
            found = module(*inputs, **arguments)
    close(found, wanted)


@settings(max_examples=40, deadline=None)
@given(calls(), st.sampled_from([16, 32]))
def test_packed_parts_are_the_decoded_attention(call, activation_bits):
    options, inputs, arguments = call
    assume("attn_mask" not in arguments or arguments["attn_mask"].ndim == 2)
    twin = packed(made(**options))
    decoded = copy.deepcopy(twin)
    set_memory(decoded, "fast")
    set_memory(twin, "low", activation_bits)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        close(twin(*inputs, **arguments), decoded(*inputs, **arguments), 5e-4 if activation_bits == 16 else 0.0)


def test_a_causal_hint_without_a_mask_is_refused_as_pytorch_does():
    x = torch.randn(2, 3, SIDE)
    module = made(batch_first=True)
    for attention in (module, packed(module)):
        with pytest.raises(RuntimeError, match="attn_mask"):
            attention(x, x, x, is_causal=True, need_weights=False)


def test_dropout_of_weights_in_training():
    module, x = made(batch_first=True, dropout=0.5).train(), torch.randn(2, 3, SIDE)
    with in_parts(module):
        torch.manual_seed(1)
        found = module(x, x, x)
    torch.manual_seed(1)
    close(found, module(x, x, x))
    assert (found[1] == 0).any()


def test_gradients_of_a_packed_attention_reach_its_input():
    twin = packed(made(batch_first=True))
    decoded = copy.deepcopy(twin)
    set_memory(decoded, "fast")
    gradients = []
    for module in (twin, decoded):
        x, towards = torch.randn(2, 2, 3, SIDE, generator=torch.Generator().manual_seed(0))
        (module(x.requires_grad_(), x, x, need_weights=False)[0] * towards).sum().backward()
        gradients.append(x.grad)
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


def test_hooks_see_what_the_output_projection_reads_only_while_it_lasts():
    module, x = made(batch_first=True), torch.randn(2, 3, SIDE)
    seen = []
    module.out_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with in_parts(module):
        y, _ = module(x, x, x)
    assert len(seen) == 1
    torch.testing.assert_close(y, module.out_proj(seen.pop()))
    seen.clear()
    module(x, x, x)
    assert not seen and "forward" not in vars(module)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def test_a_transformer_runs_on_codes_without_decoding(monkeypatch):
    model, x = encoder(), torch.randn(3, 5, 16)
    twin = packed(model, 8)
    with torch.no_grad():
        wanted = model(x)
        set_memory(twin, "fast")
        torch.testing.assert_close(twin(x), wanted, rtol=0.05, atol=0.05)
        set_memory(twin, "low")

        def refuse(*_):
            raise AssertionError("a weight was decoded")

        monkeypatch.setattr(PackedModule, "decoded_weight", refuse)
        torch.testing.assert_close(twin(x), wanted, rtol=0.05, atol=0.05)


def test_a_transformer_is_compressed_whole(tmp_path):
    """Output projections and cross-attention are seen by calibration: nothing is left in half precision."""
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
    data = [(torch.randn(4, 5, 16), torch.randn(4, 3, 16)) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", PennyweightWarning)
        plan = pw.plan(model, bits=4.0, data=data)
        small = pw.shrink(model, plan=plan, data=data)
    assert all(plan.choices[site.name].method != "dense" for site in weight_sites(model))
    pw.save(small, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(pw.load(tmp_path / "out", model=model)(*data[0]), small(*data[0]))


def test_cross_attention_is_calibrated_on_all_it_reads():
    model = made(batch_first=True, kdim=5, vdim=3)
    query, key, value = torch.randn(4, 2, SIDE), torch.randn(4, 3, 5), torch.randn(4, 3, 3)
    sites = {site.attribute: site for site in weight_sites(model)}
    for name, x in (("q_proj_weight", query), ("k_proj_weight", key), ("v_proj_weight", value)):
        ((rows, _),) = input_rows(sites[name], (query, key, value))
        assert torch.equal(rows[0], x.flatten(0, 1))
    whole = next(s for s in weight_sites(made(batch_first=True)) if s.attribute == "in_proj_weight")
    shared = [rows for rows, _ in input_rows(whole, (query, query, query))]
    assert len(shared) == 1 and torch.equal(shared[0][0], query.flatten(0, 1))
    memory = torch.randn(4, 3, SIDE)
    assert [rows.shape[1] for rows, _ in input_rows(whole, (query, memory, memory))] == [8, 12]
