"""Kernels of signs: sizes and numbers they refuse, compiled or not, and that they do without the compiled ones."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight import kernels
from pennyweight.errors import PennyweightWarning
from pennyweight.kernels import binary
from pennyweight.kernels.binary import Scaled, Thresholds

cpu = kernels._cpu
compiled = pytest.mark.skipif(cpu is None, reason="the kernels are not compiled")


def _signs(generator, *shape):
    return 2.0 * torch.randint(2, shape, generator=generator) - 1


W, SQUARE = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 4).numpy()
X5, W4 = torch.zeros(1, 5, 5, 2, 1, dtype=torch.int64), torch.zeros(4, 3, 3, 1, dtype=torch.int64)
GOOD = Thresholds(torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize(
    "call",
    [
        lambda: binary.pack_signs(torch.zeros(3, 4), torch.zeros(5)),
        lambda: binary.pack_signs(torch.tensor(1.0)),
        lambda: binary.unpack_signs(W, 129),
        lambda: binary.binary_linear(W, W, 64),
        lambda: binary.binary_linear(W, W, 129),
        lambda: binary.binary_linear(W, W, -1),
        lambda: binary.binary_linear(W, W[:, :1], 128),
        lambda: binary.binary_linear(W.int(), W, 128),
        lambda: binary.binary_linear(W - 1, W, 127),
        lambda: binary.binary_linear(W, W - 1, 127),
        lambda: binary.binary_linear(W, W, 128, Scaled(torch.zeros(5))),
        lambda: binary.binary_linear(W, W, 128, Thresholds(GOOD.threshold, GOOD.flip[:3])),
        lambda: binary.binary_linear(W, W, 128, Thresholds(GOOD.threshold.float(), GOOD.flip)),
        lambda: binary.binary_conv2d(X5, W4, 65),
        lambda: binary.binary_conv2d(X5[..., 0], W4, 64),
        lambda: binary.binary_conv2d(X5, W4[:3], 64),
        lambda: binary.binary_conv2d(X5, W4, 64, stride=0),
        lambda: binary.binary_conv2d(X5, W4, 64, padding=-1),
        lambda: binary.binary_conv2d(X5, W4, 64, dilation=3),
        lambda: binary.binary_conv2d(X5, W4, 64, padding=(1, 1, 1)),
        lambda: binary.binary_conv2d(X5, W4, 64, padding_value=1),
        lambda: binary.binary_conv2d(X5, W4[:, :0], 64),
        lambda: binary.binary_conv2d(X5, W4 - 1, 63),
        lambda: binary.pack_images(torch.zeros(1, 4, 2, 2), 3),
        lambda: binary.pack_images(torch.zeros(1, 4, 2, 2), 2, torch.zeros(3)),
        lambda: binary.pack_filters(torch.zeros(4, 2, 2)),
        lambda: binary.hamming_distances(W, W[:, :1]),
        lambda: binary.plane_distances(W.view(1, 4, 2), W.view(1, 8, 1)),
        lambda: binary.plane_distances(W.view(1, 8, 1).repeat(1, 2, 1), W.view(1, 8, 1).repeat(1, 2, 1)),
        lambda: binary.fold_batch_norm(None, torch.zeros(3), torch.ones(2), None, None),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(call):
    with pytest.raises(ValueError):
        call()


@compiled
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_the_compiled_module_refuses_what_does_not_fit(data):
    """Sizes from nowhere end in an error or in an answer, never in foreign memory: Python's checks are left out."""
    size = st.integers(0, 3)

    def array(dims, dtype=torch.int64):
        return torch.zeros([data.draw(size) for _ in range(dims)], dtype=dtype).numpy()

    def maybe(dtype):
        return array(1, dtype) if data.draw(st.booleans()) else None

    out = array(2, data.draw(st.sampled_from([torch.int32, torch.float32, torch.int64])))
    epilogue = (maybe(torch.float32), maybe(torch.float32), maybe(torch.int32), maybe(torch.uint8))
    number = st.sampled_from([0, 1, 2, 3, 64, 65, 128, 2**31 - 1, 2**31, 2**63, 2**64 - 1])
    pair = st.tuples(number, number)
    calls = {
        "linear": lambda: cpu.binary_linear(array(2), array(2), data.draw(number), out, *epilogue, 1),
        "convolution": lambda: cpu.binary_convolution(
            array(5), array(4), data.draw(number), *(data.draw(pair) for _ in range(3)), True, out, *epilogue, 1
        ),
        "distances": lambda: cpu.binary_distances(array(3), array(3), array(2, torch.int32), 1),
        "pack": lambda: cpu.binary_pack(array(2, torch.float32), maybe(torch.float32), array(2), 1),
    }  # fmt: skip
    with contextlib.suppress(ValueError):
        calls[data.draw(st.sampled_from(sorted(calls)))]()


@compiled
@pytest.mark.parametrize(
    "call",
    [
        lambda out: cpu.binary_linear(W.numpy(), W.numpy(), 128, out, None, None, None, None, 1),
        lambda out: cpu.binary_linear(W.numpy(), W.numpy(), 64, SQUARE, None, None, None, None, 1),
        lambda out: cpu.binary_linear((W - 1).numpy(), W.numpy(), 127, SQUARE, None, None, None, None, 1),
        lambda out: cpu.binary_distances(X5[0].view(5, 5, 2).numpy(), X5[0].view(5, 10, 1).numpy(), out, 1),
        lambda out: cpu.binary_pack(torch.zeros(2, 65).numpy(), None, torch.zeros(2, 1, dtype=torch.int64).numpy(), 1),
    ],
)  # fmt: skip
def test_the_compiled_module_checks_sizes_itself(call):
    with pytest.raises(ValueError):
        call(torch.zeros(4, 3, dtype=torch.int32).numpy())


def test_without_compiled_kernels(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight = binary.pack_signs(_signs(generator, 9, 70)), binary.pack_signs(_signs(generator, 5, 70))
    images, filters = (
        binary.pack_images(_signs(generator, 1, 3, 5, 5)),
        binary.pack_filters(_signs(generator, 4, 3, 3, 3)),
    )

    def everything():
        return [
            binary.pack_signs(torch.linspace(-1, 1, 70)), binary.binary_linear(x, weight, 70),
            binary.hamming_distances(x, weight), binary.binary_conv2d(images, filters, 3, epilogue=GOOD),
        ]  # fmt: skip

    expected = everything()
    monkeypatch.setattr(kernels, "_cpu", None)
    monkeypatch.setattr(kernels, "_told", False)
    with pytest.warns(PennyweightWarning) as told:
        values = everything()
    assert len(told) == 1
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
