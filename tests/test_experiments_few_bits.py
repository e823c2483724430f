"""The experiments of OFQ and denoise-affine: arms are what their pages call them, conclusions follow the numbers."""

from __future__ import annotations

import copy
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
    arms = [*ofq.TRAININGS, *ofq.ANNEALED.values()]
    shows = {arm: [worse if arm == ofq.BASELINE else better] * 2 for arm in arms}
    assert ofq.conclusions(shows)[-1].count("shows") == 2
    assert "StatsQ: +1.0 points against LSQ (higher in 2 of 2 seeds), 0.10 times" in ofq.conclusions(shows)[0]
    fails = {arm: [better if arm == ofq.BASELINE else worse] * 2 for arm in arms}
    assert ofq.conclusions(fails)[-1].count("does not show") == 2
    assert "does not reduce" in ofq.conclusions(fails)[-2]
    grid = {
        ofq.BASELINE: {1e-3: {ofq.BASELINE: worse}, 1e-2: {ofq.BASELINE: better}, 1e-1: {ofq.BASELINE: worse}},
        "StatsQ + QKR": {rate: {"StatsQ + QKR": worse, ofq.FULL: better} for rate in (1e-3, 1e-2)},
    }
    assert "at 1 of 2" in ofq.at_equal_rates(grid)[0]


def test_trainings_prepare_what_they_name():
    data = torch.randn(4, 1, 28, 28)
    counts = {}
    for name, rule in ofq.TRAININGS.items():
        if rule is None:
            continue
        model = pw.prepare(
            ofq.transformer(), {"rules": [{"match": "blocks.*", "input": ofq._INPUT, **rule}]}, data=data
        )
        names = {part.split(".")[-1] for part, _ in model.named_modules()}
        assert ("product" in names) == ("QKR" in name) and ("query" in names) == ("QKR" not in name)
        assert any(part.endswith("step_hook") for part, _ in model.named_modules()) == (name in ofq.ANNEALED)
        counts[name] = sum(p.numel() for part, p in model.named_parameters() if "original" in part)
        assert 0 < ofq.share_near_boundaries(model) < 0.5
    assert len(set(counts.values())) == 1  # two heads: as many weights as one matrix


def test_annealing_is_all_that_parts_an_arm_from_its_twin(monkeypatch):
    """A training and its deepcopy end bit for bit alike, unless one of them is annealed; what is frozen stays."""
    monkeypatch.setattr(ofq, "TRAIN", 64)
    torch.manual_seed(0)
    images, labels = torch.randn(64, 1, 28, 28), torch.arange(64) % 10
    data = ofq.Data((images, labels), (images, labels), (images, labels))
    model = ofq.transformer()
    rule = ofq.TRAININGS["StatsQ"]
    assert rule is not None
    pw.prepare(model, {"rules": [{"match": "blocks.*", "input": ofq._INPUT, **rule}]}, data=images)
    training = ofq.Training(model, 1e-3, 22, seed=0)
    training.go(images, labels, until=training.last_phase)
    assert training.taken == 20
    twin, annealed = copy.deepcopy(training), copy.deepcopy(training)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters() if name.endswith("original")}
    first, second = training.finish(data, annealed=False), twin.finish(data, annealed=False)
    assert first == second
    annealed.finish(data, annealed=True)
    for name, latent in annealed.model.named_parameters():
        if name in before:
            assert 0 < (latent != before[name]).double().mean() < 0.05  # those within the band alone
            assert (training.model.get_parameter(name) != before[name]).double().mean() > 0.9
