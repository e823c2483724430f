"""The operators of signs: what torch.library checks, and the same results under torch.compile."""

import pytest
import torch

from pennyweight.kernels import binary, operators

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def epilogues(outputs):
    thresholds = binary.Thresholds(torch.arange(outputs, dtype=torch.int32) - 3, torch.arange(outputs) % 2 == 0)
    scaled = binary.Scaled(torch.rand(outputs), torch.randn(outputs))
    return [
        (None, (None, None, None, None)),
        (scaled, (scaled.scale, scaled.bias, None, None)),
        (thresholds, (None, None, thresholds.threshold, thresholds.flip)),
    ]


@pytest.mark.parametrize("kind", range(3))
def test_linear(kind):
    x, weight = binary.pack_signs(torch.randn(5, 70)), binary.pack_signs(torch.randn(9, 70))
    epilogue, given = epilogues(9)[kind]
    torch.library.opcheck(operators.binary_linear, (x, weight, 70, *given), test_utils=CHECKS)
    expected = binary.binary_linear(x, weight, 70, epilogue)
    assert torch.equal(torch.ops.pennyweight.binary_linear(x, weight, 70, *given), expected)


@pytest.mark.parametrize("kind", range(3))
def test_convolution(kind):
    x, weight = binary.pack_images(torch.randn(2, 6, 7, 5)), binary.pack_filters(torch.randn(4, 6, 3, 2))
    epilogue, given = epilogues(4)[kind]
    options = ([2, 1], [1, 2], [1, 2], 0)
    torch.library.opcheck(operators.binary_conv2d, (x, weight, 6, *options, *given), test_utils=CHECKS)
    expected = binary.binary_conv2d(x, weight, 6, *options, epilogue=epilogue)
    assert torch.equal(torch.ops.pennyweight.binary_conv2d(x, weight, 6, *options, *given), expected)


def test_two_layers_compiled():
    """Float inputs to bits, a hidden layer that stays packed, float outputs."""
    first, second = binary.pack_signs(torch.randn(100, 30)), binary.pack_signs(torch.randn(7, 100))
    threshold, flip = torch.zeros(100, dtype=torch.int32), torch.zeros(100, dtype=torch.bool)
    scale = torch.rand(7)

    def net(x):
        ops = torch.ops.pennyweight
        hidden = ops.binary_linear(ops.pack_signs(x, None), first, 30, None, None, threshold, flip)
        return ops.binary_linear(hidden, second, 100, scale, None, None, None) + 1.0

    x = torch.randn(6, 30)
    signs = torch.where(x >= 0, 1.0, -1.0) @ binary.unpack_signs(first, 30).T
    expected = (torch.where(signs >= 0, 1.0, -1.0) @ binary.unpack_signs(second, 100).T) * scale + 1.0
    torch.testing.assert_close(net(x), expected)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))
