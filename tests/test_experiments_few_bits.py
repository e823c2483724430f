"""The experiments of OFQ and denoise-affine: arms are what their pages call them, conclusions follow the numbers."""

from __future__ import annotations

import math

import pytest
import torch

import pennyweight as pw
from pennyweight.bench.experiments import denoise_affine, ofq
from pennyweight.weights.denoise_affine import Denoiser, kept


@pytest.mark.parametrize("sparsity", denoise_affine.SETTINGS.values())
def test_the_baseline_is_straight_through_binarisation(sparsity):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    stays = kept(x, sparsity)
    mean = (x.abs() * stays).sum(1, keepdim=True) / stays.sum(1, keepdim=True)
    y = Denoiser(1, block=64, sparsity=sparsity, **denoise_affine.ARMS[denoise_affine.STE])(x)
    torch.testing.assert_close(y, torch.where(x >= 0, mean, -mean) * stays)
    (gradient,) = torch.autograd.grad(y, x, incoming := torch.randn(5, 64))
    assert torch.equal(gradient, incoming)


def run(loss: float, diverged: bool = False) -> denoise_affine.Run:
    return denoise_affine.Run(loss, 0.1, loss, loss, diverged)


def test_conclusions_of_denoising_follow_the_numbers():
    def found(ste: float, denoised: float) -> dict:
        losses = {denoise_affine.STE: ste, denoise_affine.DENOISED: denoised}
        return {
            (arm, setting): {1e-3: [run(3.0, diverged=arm == denoise_affine.STE)], 1e-2: [run(losses.get(arm, 2.5))]}
            for arm, setting in denoise_affine.ROWS
        }

    lines = denoise_affine.conclusions(found(2.8, 2.4))
    assert lines[0].startswith("1 bit: denoised beats STE, by +0.40") and "1 of 1 seeds" in lines[0]
    assert "1 of 2 runs of STE diverged over the ladder, and 0 of 2 denoised" in lines[1]
    assert "does not beat" in denoise_affine.conclusions(found(2.4, 2.8))[0]
    assert denoise_affine.best_rate({1e-3: [run(3.0), run(math.inf)], 1e-2: [run(2.9), run(2.8)]}) == 1e-2


def test_no_statistic_of_the_quantisers_looks_ahead():
    torch.manual_seed(0)
    model = denoise_affine.CharacterModel(9)
    pw.prepare(model, denoise_affine.recipe(denoise_affine.DENOISED, "2:4"))
    ids = torch.randint(9, (2, 12))
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 9
    before, after = model(ids), model(changed)
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-5) and not torch.allclose(before[:, 8:], after[:, 8:])


def test_conclusions_of_ofq_follow_the_numbers():
    worse, better = ofq.Run(80.0, 80.0, 1e-3, 1e-3, 0.1), ofq.Run(81.0, 81.0, 1e-4, 1e-4, 0.1)
    shows = {arm: [worse if arm == ofq.BASELINE else better] * 2 for arm in ofq.ARMS}
    assert ofq.conclusions(shows)[-1].endswith("LSQ, shows.")
    assert "StatsQ: +1.0 points against LSQ (higher in 2 of 2 seeds), 0.10 times" in ofq.conclusions(shows)[0]
    fails = {arm: [better if arm == ofq.BASELINE else worse] * 2 for arm in ofq.ARMS}
    assert ofq.conclusions(fails)[-1].endswith("does not show.")
    assert "does not reduce" in ofq.conclusions(fails)[-2]


def test_arms_prepare_what_they_name():
    data = torch.randn(4, 1, 28, 28)
    counts = {}
    for arm in ofq.ARMS:
        model = pw.prepare(
            ofq.transformer(), {"rules": [{"match": "blocks.*", "input": ofq._INPUT, **ofq.ARMS[arm]}]}, data=data
        )
        names = {name.split(".")[-1] for name, _ in model.named_modules()}
        assert ("product" in names) == ("QKR" in arm) and ("query" in names) == ("QKR" not in arm)
        assert any(name.endswith("step_hook") for name, _ in model.named_modules()) == ("CGA" in arm)
        counts[arm] = sum(p.numel() for name, p in model.named_parameters() if "original" in name)
        assert 0 < ofq.share_near_boundaries(model) < 0.5
    assert len(set(counts.values())) == 1  # two heads: as many weights as one matrix
