"""The command line: what each command prints and writes, and the one line of every mistake."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import pennyweight as pw
from pennyweight import kernels
from pennyweight.bench.demo import demonstrate
from pennyweight.bench.fidelity import embedding_fidelity, output_fidelity
from pennyweight.cli import app
from pennyweight.cli.sources import load_data, load_source
from pennyweight.errors import ArtifactError, DataError, PennyweightWarning
from pennyweight.progress import progress_bars

FACTORY = """
import torch
from torch import nn

def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )

def images():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.randn(8, 3, 8, 8, generator=generator)

def broken():
    raise RuntimeError("no such\\nluck")

def number():
    return 3

def torn():
    yield torch.randn(8, 3, 8, 8)
    raise OSError("disk")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with cli_models.py in it."""
    (tmp_path / "cli_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    yield tmp_path
    sys.modules.pop("cli_models", None)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def fails(*arguments):
    """The one line of a mistake."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


CNN = ("cli_models:small_cnn", "--data", "cli_models:images")
QUICK = ("--methods", "entropy-gptq")


def test_shrink_writes_everything_and_keeps_the_promise(here):
    shown = run("shrink", *CNN, *QUICK, "--size", "4kB", "-o", "out").stdout
    files = {f.name: f.stat().st_size for f in (here / "out").iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "plan.yaml", "report.json", "report.html"}
    size = files["config.json"] + files["model.safetensors"]
    assert 3960 <= size <= 4000
    assert f"{size:,} bytes" in shown
    small = pw.load("out", model=load_source(CNN[0]).model)
    assert small(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    assert pw.Plan.load("out/plan.yaml").budget == 4000


def test_json_is_all_that_standard_output_holds(here):
    shrunk = json.loads(run("shrink", *CNN, *QUICK, "--bits", "8", "-o", "out", "--json").stdout)
    assert shrunk["directory"] == "out" and shrunk["size"] <= shrunk["budget"]
    inspected = json.loads(run("inspect", "out", "--json").stdout)
    assert inspected["checksum"] == "ok" and inspected["size"] == shrunk["size"]
    assert inspected["layers"][0]["nbytes"] == shrunk["layers"][0]["nbytes"]
    planned = json.loads(run("plan", *CNN, *QUICK, "--ratio", "3", "--json").stdout)
    assert planned["total"] <= planned["budget"]
    assert {m["name"] for m in json.loads(run("methods", "--json").stdout)} >= {"dense", "int"}


def test_a_plan_is_written_edited_and_carried_out(here):
    shown = run("plan", *CNN, *QUICK, "--size", "4kB", "-o", "plan.yaml").stdout
    assert "0.weight" in shown and "smallest reachable" in shown
    text = (here / "plan.yaml").read_text()
    start = text.index("  7.weight:")
    (here / "plan.yaml").write_text(
        text[:start] + "  7.weight: {method: dense}\n" + text[text.index("\n", start) + 1 :]
    )
    run("shrink", *CNN, "--plan", "plan.yaml", "--size", "4.5kB", "-o", "out", "--quiet")
    assert pw.Plan.load("out/plan.yaml").choices["7.weight"].method == "dense"
    fails("shrink", *CNN, "--plan", "nowhere.yaml", "-o", "out2")


def test_inspect_tells_of_damage(here):
    run("shrink", *CNN, *QUICK, "--size", "4kB", "-o", "out")
    shown = run("inspect", "out").stdout
    assert "checksum ok" in shown and "3.weight" in shown
    data = bytearray((here / "out/model.safetensors").read_bytes())
    data[-20] ^= 1
    (here / "out/model.safetensors").write_bytes(data)
    assert "checksum" in fails("inspect", "out")
    assert "checksum" in fails("eval", "out", "--reference", CNN[0], "--data", CNN[2])


def test_eval_of_a_classifier(here):
    run("shrink", *CNN, *QUICK, "--bits", "12", "-o", "out")
    found = json.loads(run("eval", "out", "--reference", *CNN, "--json").stdout)
    assert found["top1_agreement"] > 0.8 and found["relative_error"] < 0.3
    assert found["batch_size"] == 8 and found["ms_before"] > 0 and found["ms_after"] > 0
    assert "same class ranked first" in run("eval", "out", "--reference", *CNN).stdout
    assert "--reference" in fails("eval", "out")  # a factory in report.json is never called unasked
    assert "--data" in fails("eval", "out", "--reference", CNN[0])


def test_methods_lists_options_and_presets(here):
    shown = run("methods").stdout
    assert "entropy-gptq" in shown and "preset no-data:" in shown


def test_without_data_the_weights_decide_and_it_is_said(here):
    result = run("shrink", CNN[0], *QUICK, "--size", "5kB", "-o", "out")
    assert "no --data" in result.stderr and "no-data" in result.stderr
    assert run("shrink", CNN[0], *QUICK, "--size", "5kB", "-o", "out", "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("shrink", *CNN, "-o", "o"), "exactly one of --size, --bits and --ratio"),
        (("shrink", *CNN, "-o", "o", "--size", "4kB", "--bits", "2"), "--size and --bits were given"),
        (("shrink", *CNN, "-o", "o", "--size", "big"), "size 'big' is not understood"),
        (("shrink", *CNN, "-o", "o", "--size", "100"), "smallest reachable"),
        (("plan", *CNN, "--size", "4kB", "--methods", "gptr"), "did you mean 'gptq'"),
        (("plan", *CNN, "--size", "4kB", "--preset", "small"), "smallest"),
        (("plan", *CNN, "--size", "4kB", "--solver", "magic", *QUICK), "unknown solver"),
        (("plan", *CNN, "--size", "4kB", "--distortion", "magic"), "unknown distortion"),
        (("plan", "nowhere", "--size", "4kB"), "there is no directory nowhere"),
        (("plan", "here/model", "--size", "4kB"), "there is no directory here/model"),
        (("plan", "weights.pt", "--size", "4kB"), "is a pickle"),
        (("plan", "weights.safetensors", "--size", "4kB"), "is a single file"),
        (("plan", "here", "--size", "4kB"), "no config.json"),
        (("plan", "cli_models:nothing", "--size", "4kB"), "cannot find cli_models:nothing"),
        (("plan", "no_such_module:f", "--size", "4kB"), "cannot find no_such_module:f"),
        (("plan", "cli_models:broken", "--size", "4kB"), "RuntimeError: no such luck"),
        (("plan", "cli_models:number", "--size", "4kB"), "must return an nn.Module"),
        (("plan", CNN[0], "--data", "nowhere.txt", "--size", "4kB"), "no data file nowhere.txt"),
        (("plan", CNN[0], "--data", "text.txt", "--size", "4kB"), "has no tokenizer"),
        (("plan", CNN[0], "--data", "weights.pt", "--size", "4kB"), "is a pickle"),
        (("plan", CNN[0], "--data", "cli_models:number", "--size", "4kB"), "must return or yield batches"),
        (("plan", CNN[0], "--data", "cli_models:torn", "--size", "4kB"), "cli_models:torn raised OSError: disk"),
        (("inspect", "here"), "not a pennyweight artifact"),
        (("inspect", "nowhere"), "not a directory"),
        (("eval", "here", "--reference", CNN[0]), "not a pennyweight artifact"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(here, arguments, words):
    (here / "here").mkdir()
    (here / "weights.pt").write_bytes(b"x")
    (here / "text.txt").write_text("one\n")
    save_file({"x": torch.zeros(2)}, here / "weights.safetensors")
    assert words in fails(*arguments)
    assert not (here / "o").exists()


def test_data_files_become_batches(here):
    source = load_source(CNN[0])
    images = np.random.default_rng(0).standard_normal((40, 3, 4, 4))
    np.save("a.npy", images)
    np.savez("b.npz", images, np.arange(40))
    np.savez("c.npz", x=images, y=np.arange(40, dtype=np.uint8))
    save_file({"only": torch.zeros(5, 2)}, "d.safetensors")
    (batch, rest) = load_data("a.npy", source, 36)
    assert batch.shape == (32, 3, 4, 4) and rest.shape == (4, 3, 4, 4) and batch.dtype == torch.float32
    (batch,) = load_data("b.npz", source, 10)
    assert isinstance(batch, tuple) and batch[1].tolist() == list(range(10)) and batch[1].dtype == torch.int64
    (batch,) = load_data("c.npz", source, 10)
    assert batch.keys() == {"x", "y"} and batch["y"].dtype == torch.int64
    assert load_data("d.safetensors", source, 512)[0].shape == (5, 2)
    assert [len(b) for b in load_data("cli_models:images", source, 9)] == [8, 8]
    assert load_data(None, source, 9) is None


def test_data_files_that_cannot_be_used(here):
    source = load_source(CNN[0])
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save("text.npy", np.array(["a"]))
    np.savez("uneven.npz", x=np.zeros((3, 1)), y=np.zeros(2))
    np.save("scalar.npy", np.array(1.0))
    for name in ("objects.npy", "text.npy", "uneven.npz", "scalar.npy"):
        with pytest.raises(DataError, match=name):
            load_data(name, source, 10)


def test_hub_names_need_an_owner_and_an_offline_hub_is_one_line(here, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise OSError("cannot reach the hub\nand much more")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    assert "cannot reach the hub" in fails("plan", "owner/model", "--size", "1MB")
    with pytest.raises(ArtifactError, match="no directory bert-tiny"):
        load_source("bert-tiny")


def test_a_sentence_encoder_from_end_to_end(here):
    pytest.importorskip("transformers")
    from test_sentence_encoder import TEXTS, make_encoder_directory

    make_encoder_directory(here / "tiny")
    (here / "text.txt").write_text("\n".join(TEXTS) + "\n\n")
    result = run("shrink", "tiny", "--data", "text.txt", *QUICK, "--bits", "12", "-o", "out")
    assert "pooler.dense.weight has no influence" in result.stderr
    assert (here / "out/1_Pooling/config.json").exists()
    found = json.loads(run("eval", "out", "--data", "text.txt", "--json", "--quiet").stdout)
    assert found["reference"] == "tiny" and found["cosine"] > 0.95 and found["spearman"] > 0.5
    held_out = json.loads(run("eval", "out", "--samples", "8", "--json").stdout)
    assert held_out["cosine"] > 0.9
    planned = run("plan", "tiny", *QUICK, "--samples", "8", "--bits", "12")
    assert "Python's own English documentation" in planned.stderr


def test_the_demonstration_measures_what_lies_on_the_disk(here):
    pytest.importorskip("transformers")
    from test_sentence_encoder import make_encoder_directory

    source = make_encoder_directory(here / "tiny")
    with pytest.warns(PennyweightWarning, match="pooler"):
        found = demonstrate(here / "out", "9kB", source)
    assert (
        found.small_bytes
        == sum((here / "out" / f).stat().st_size for f in ("model.safetensors", "config.json"))
        <= 9000
    )
    assert found.cosine > 0.8 and found.milliseconds.keys() == {1, 32}
    assert (here / "out/report.html").exists()
    json.dumps(found.to_dict(), allow_nan=False)


def test_embedding_fidelity_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    same = embedding_fidelity(a, 3 * a)
    assert same["cosine"] == pytest.approx(1) and same["spearman"] == pytest.approx(1)
    turned = embedding_fidelity(a, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert turned["cosine"] == pytest.approx((1 + 0 + 0.5**0.5) / 3)
    assert turned["spearman"] == pytest.approx(-1)
    with pytest.raises(DataError, match="at least 3"):
        embedding_fidelity(a[:2], a[:2])


def test_output_fidelity_by_hand():
    original, small = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.eye_(original.weight)
    with torch.no_grad():
        small.weight.copy_(torch.diag(torch.tensor([1.0, 0.5])))
    found = output_fidelity(original, small, torch.tensor([[1.0, 0.0], [0.9, 1.0]]))
    # differences 0 and 0.5; deviations from the mean (0.95, 0.5): 0.05, -0.5 twice
    assert found["relative_error"] == pytest.approx((0.25 / (2 * (0.05**2 + 0.5**2))) ** 0.5, rel=1e-5)
    assert found["top1_agreement"] == 0.5


def test_progress_bars_wait_and_quiet_ones_never_show(monkeypatch):
    import io

    from rich.console import Console

    for patience, quiet, drawn in ((0.0, False, True), (1e9, False, False), (0.0, True, False)):
        monkeypatch.setattr("pennyweight.progress.PATIENCE_SECONDS", patience)
        out = io.StringIO()
        with progress_bars(Console(file=out, force_terminal=True), quiet) as progress:
            progress("observe", 1, 2)
            progress("observe", 2, 2)
        assert ("reading calibration data" in out.getvalue()) is drawn


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("PENNYWEIGHT_ISA", "avx3")
    result = CliRunner().invoke(app, ["methods"])
    if kernels.is_compiled():
        assert result.exit_code == 2
        assert "unknown instruction set in PENNYWEIGHT_ISA 'avx3'" in " ".join(result.stderr.split())
    monkeypatch.setenv("PENNYWEIGHT_ISA", "plain")
    assert CliRunner().invoke(app, ["methods"]).exit_code == 0
