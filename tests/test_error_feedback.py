"""Error feedback: the accounting identity, the kernel and its reference, dead and singular inputs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight import kernels
from pennyweight.compress.contract import LayerView, compressor
from pennyweight.compress.error_feedback import factorise, feedback, feedback_uniform


def _metric(cols, seed=0, rank=None):
    """Second moment of correlated inputs: a random mixture of `rank` sources whose strengths fall off."""
    generator = torch.Generator().manual_seed(seed)
    sources = rank or cols
    strength = (
        torch.linspace(1, 0.05, sources, dtype=torch.float64) if sources > 1 else torch.ones(1, dtype=torch.float64)
    )
    x = torch.randn(4 * cols, sources, generator=generator, dtype=torch.float64) * strength
    x = x @ torch.randn(sources, cols, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x)


def _view(rows, cols, metric, seed=0):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return LayerView("layer", weight, metric[None], torch.ones(rows, dtype=torch.float64))


@pytest.mark.parametrize("order", [False, True])
def test_squared_errors_add_up_to_the_error_in_the_metric(order):
    torch.manual_seed(0)
    weight, metric = torch.randn(5, 150), _metric(150)
    factor = factorise(metric, damping=0.0, order=order)
    rounded, errors, step = torch.empty_like(weight), torch.zeros(5, dtype=torch.float64), 0.3
    position = {int(c): i for i, c in enumerate(factor.order)}

    def quantise(column, values):
        q = (values / step).round() * step
        rounded[:, column] = q
        errors.add_(((values - q) / factor.upper[position[column], position[column]]).double() ** 2)
        return q

    feedback(weight, factor, quantise)
    e = (weight - rounded).double()
    torch.testing.assert_close(((e @ metric) * e).sum(1), errors, rtol=1e-3, atol=1e-5)


def test_identity_metric_is_round_to_nearest():
    weight = torch.randn(7, 20)
    factor = factorise(torch.eye(20, dtype=torch.float64), damping=0.0)
    codes = feedback_uniform(weight, factor, torch.full((7,), 0.25), torch.ones(20))
    assert torch.equal(codes.float(), (weight / 0.25).round())


def test_conditional_variance_of_two_inputs():
    metric = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    factor = factorise(metric, damping=0.0, order=False)
    # the first column is explained by the second: 2 - 1/1 = 1; the last keeps its own variance
    torch.testing.assert_close(factor.conditional_variance, torch.tensor([1.0, 1.0]))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 9), st.integers(1, 300), st.integers(0, 3), st.floats(0.01, 4))
def test_uniform_kernel_equals_the_general_loop(rows, cols, seed, step):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    row, column = torch.rand(rows, generator=generator) + 0.1, torch.rand(cols, generator=generator) + 0.5
    row *= step
    factor = factorise(_metric(cols, seed))
    codes = torch.zeros(rows, cols, dtype=torch.int16)

    def quantise(j, values):
        code = torch.round(values / (row * column[j])).clamp(-32767, 32767)
        codes[:, j] = code.to(torch.int16)
        return code * (row * column[j])

    feedback(weight, factor, quantise)
    made = feedback_uniform(weight, factor, row, column)
    # sums run in another order: an entry half way between two codes may fall to either side, and later ones follow
    metric = _metric(cols, seed).float()
    lost = [((e @ metric) * e).sum(1) for e in (weight - c * row[:, None] * column for c in (made, codes))]
    assert made.shape == codes.shape
    torch.testing.assert_close(lost[0].sum(), lost[1].sum(), rtol=0.02, atol=1e-5)


@pytest.mark.skipif(not kernels.is_compiled(), reason="the compiled kernels are not built")
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 200), st.integers(1, 128), st.integers(0, 5))
def test_compiled_block_equals_its_reference_bit_for_bit(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    work = torch.randn(rows, width + 3, generator=generator)[:, 1 : width + 1]  # strided
    upper = torch.triu(torch.randn(width, width, generator=generator)) * 0.1 + torch.eye(width)
    row, column = torch.rand(rows, generator=generator), torch.rand(width, generator=generator)
    row[::5] = 0.0
    for made, expected in zip(
        kernels.feedback_block(work, upper, row, column), kernels.feedback_block_reference(work, upper, row, column)
    ):
        assert torch.equal(made, expected)


@pytest.mark.parametrize("method, options", [("gptq", {"bits": 3, "group": 16}), ("entropy-gptq", {"step": 0.7})])
@pytest.mark.parametrize("rank", [None, 5])
def test_beats_rounding_in_a_correlated_metric_even_a_singular_one(method, options, rank):
    layer = _view(32, 64, _metric(64, rank=rank))
    isotropic = _view(32, 64, torch.eye(64, dtype=torch.float64))
    made = compressor(method).compress(layer, **options)
    plain = compressor(method).compress(isotropic, **options)
    assert layer.distortion(made.decode()) < 0.8 * layer.distortion(plain.decode())


def test_dead_inputs_are_free_and_become_zero():
    metric = _metric(40)
    metric[7] = metric[:, 7] = 0
    layer = _view(8, 40, metric)
    for method, options in (("gptq", {"bits": 8, "group": 0}), ("entropy-gptq", {"step": 0.01})):
        decoded = compressor(method).compress(layer, **options).decode()
        assert decoded[:, 7].abs().max() < 0.02
        assert torch.isfinite(decoded).all()


def test_zero_metric_and_zero_weight_do_not_fail():
    layer = LayerView(
        "l", torch.zeros(4, 6), torch.zeros(1, 6, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    )
    for method in ("gptq", "entropy-gptq"):
        for candidate in compressor(method).candidates(layer):
            assert candidate.distortion == 0


def test_finer_steps_cost_more_and_lose_less():
    layer = _view(64, 96, _metric(96))
    offers = [c for c in compressor("entropy-gptq").candidates(layer) if c.options["columns"]]
    assert all(a.nbytes <= b.nbytes and a.distortion >= b.distortion for a, b in itertools.pairwise(offers))


@settings(deadline=None, max_examples=10)
@given(st.integers(900, 6000))
def test_fit_never_exceeds_the_size_asked_for(nbytes):
    layer = _view(96, 96, _metric(96))
    packed, options, _ = compressor("entropy-gptq").fit(layer, {"step": 1.0, "columns": True}, nbytes)
    assert 0.97 * nbytes <= packed.nbytes <= nbytes
    assert compressor("entropy-gptq").compress(layer, **options).to_bytes() == packed.to_bytes()


def test_important_rows_get_the_finer_grid():
    layer = _view(20, 64, _metric(64))
    layer.row_weight[:10] = 16.0
    decoded = compressor("entropy-gptq").compress(layer, step=1.0).decode()
    error = (decoded - layer.weight).pow(2).mean(1)
    assert 8 < float(error[10:].mean() / error[:10].mean()) < 32  # 16 in theory


def test_a_candidate_can_be_made_again_from_its_options():
    layer = _view(24, 48, _metric(48))
    for method in ("gptq", "entropy-gptq"):
        for candidate in compressor(method).candidates(layer):
            packed = compressor(method).compress(layer, **candidate.options)
            assert packed.nbytes == candidate.nbytes
            assert layer.distortion(packed.decode()) == pytest.approx(candidate.distortion, rel=1e-6)
