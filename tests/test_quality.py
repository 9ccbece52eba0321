"""The quality benchmark: baselines against oracles, bytes against files, figures against eager layers, and reruns."""

import copy
import json
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from loras import random_lora

from lordba.adapter import load_adapter
from lordba.errors import LordbaError
from lordba.layers import attach
from lordba.lora import LoraModule, read_lora

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import quality
from comparison.baselines import (
    Compressed,
    loraquant,
    pack_codes,
    round_to_nearest,
    rtn,
    svd_gauge,
    unpack_codes,
)
from comparison.methods import METHODS, convert
from comparison.problems import problems
from comparison.report import claims, markdown
from comparison.subjects import Decoder, tiny

METHODS_RUN = "base,lora-r16,lora-r1,admm-r16,rtn2,svid,svid_mixed,admm_qat,direct"


def data_bytes(path: Path) -> int:
    """The bytes of a safetensors file behind its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


# Baselines


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_are_packed_as_numpy_packs_their_bits(bits):
    codes = torch.randint(0, 2**bits, (53,), generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, bits)
    all_bits = (codes.numpy()[:, None] >> np.arange(bits)) & 1
    assert packed.numpy().tobytes() == np.packbits(all_bits.flatten().astype(np.uint8), bitorder="little").tobytes()
    assert torch.equal(unpack_codes(packed, bits, 53), codes)


def test_rounding_to_nearest_by_hand():
    row = torch.tensor([[0.0, 1.0, 2.0, 3.25, -1.0, -3.0, 5.0]])
    stored, value = round_to_nearest(row, 2, group=4)
    # Levels 0, 13/12, 26/12, 39/12 and -3, -1/3, 7/3, 5; steps in fp16.
    steps = [float(np.float16(3.25 / 3)), float(np.float16(8 / 3))]
    assert stored["least"].tolist() == [0.0, -3.0] and stored["scale"].tolist() == steps
    assert unpack_codes(stored["codes"], 2, 7).tolist() == [0, 1, 2, 3, 1, 0, 3]
    wanted = [0, steps[0], 2 * steps[0], 3 * steps[0], steps[1] - 3, -3, 3 * steps[1] - 3]
    assert value[0].tolist() == pytest.approx(wanted, abs=1e-12)
    stored, value = round_to_nearest(row, 1, group=4)
    means = [float(np.float16(6.25 / 4)), 3.0]
    assert stored["scale"].tolist() == means and "least" not in stored
    assert value[0].tolist() == [means[0]] * 4 + [-3.0, -3.0, 3.0]
    assert stored["codes"].tolist() == [0b0110000]


@pytest.mark.parametrize("bits", [2, 4])
def test_every_value_goes_to_the_nearest_level(bits):
    matrix = torch.randn(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stored, value = round_to_nearest(matrix, bits, group=64)
    for row in range(3):
        for g in range(4):
            part = matrix[row, 64 * g : 64 * (g + 1)]
            least, scale = (stored[name].view(3, 4)[row, g].double() for name in ("least", "scale"))
            levels = least + scale * torch.arange(2**bits)
            nearest = levels[(part[:, None] - levels).abs().argmin(1)]
            torch.testing.assert_close(value[row, 64 * g : 64 * (g + 1)], nearest, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 2])
def test_bytes_of_round_to_nearest(bits):
    module = random_lora(192, 128, 16)
    groups = 16 * (192 + 128) // 64
    assert rtn(module, bits).nbytes == 16 * (192 + 128) * bits // 8 + groups * 2 * bits


def test_loraquant_splits_by_explained_energy():
    module = random_lora(192, 144, 16)
    found = loraquant(module, ratio=0.8, group=64)
    b, a = module.factors()
    energy = torch.linalg.svdvals(b @ a)[:16].square()
    high = next(h for h in range(1, 17) if energy[:h].sum() >= 0.8 * energy.sum())
    assert 1 < high < 16
    assert found.stored["high_a.codes"].numel() * 4 == high * 144
    assert found.stored["low_a.codes"].numel() * 8 == (16 - high) * 144
    assert found.b.shape == b.shape and found.a.shape == a.shape


def test_loraquant_with_many_bits_is_the_lora():
    module = random_lora(96, 72, 8)
    b, a = module.factors()
    whole = loraquant(module, ratio=1.0, bits=8, group=24)
    error = (whole.b @ whole.a - b @ a).norm() / (b @ a).norm()
    assert error < 0.01
    assert (loraquant(module, ratio=0.5, bits=8, group=24).b @ a - b @ a).norm() > 0.1 * (b @ a).norm()


def test_loraquant_refines_each_component():
    module = random_lora(192, 144, 16)
    b, a = svd_gauge(*module.factors())
    torch.testing.assert_close(b @ a, torch.matmul(*module.factors()))
    found = loraquant(module, ratio=1.0)
    plain = [round_to_nearest(factor, 2, 128)[1] for factor in (b.T, a)]
    for k in range(16):
        wanted = torch.outer(b[:, k], a[k])
        refined = (torch.outer(found.b[:, k], found.a[k]) - wanted).norm()
        assert refined <= (torch.outer(plain[0][k], plain[1][k]) - wanted).norm() * (1 + 1e-9)


def decoded(stored: dict[str, torch.Tensor], name: str, bits: int, rows: int, n: int, group: int) -> torch.Tensor:
    """A factor from nothing but what a file holds."""
    codes = unpack_codes(stored[f"{name}.codes"], bits, rows * n).view(rows, n).double()
    at = torch.arange(n) // group
    scale = stored[f"{name}.scale"].view(rows, -1)[:, at].double()
    if f"{name}.least" not in stored:
        return scale * (1 - 2 * codes)
    return scale * codes + stored[f"{name}.least"].view(rows, -1)[:, at].double()


@pytest.mark.parametrize("bits", [1, 2])
def test_what_is_stored_is_all_that_is_needed(bits, tmp_path):
    """And its bytes are those of a file."""
    module = random_lora(100, 72, 4)
    found = rtn(module, bits)
    safetensors.torch.save_file(found.stored, tmp_path / "m.safetensors")
    assert data_bytes(tmp_path / "m.safetensors") == found.nbytes
    stored = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert torch.equal(decoded(stored, "a", bits, 4, 72, 64), found.a)
    assert torch.equal(decoded(stored, "b", bits, 4, 100, 64).T, found.b)


def test_zeros_stay_zeros():
    zero = LoraModule(torch.randn(4, 24), torch.zeros(16, 4), 1.0)
    for found in (rtn(zero, 1), rtn(zero, 2), loraquant(zero)):
        assert isinstance(found, Compressed) and not (found.b @ found.a).any()


# Tasks


def test_word_problems_have_the_answers_that_they_say():
    rules = [
        (r"has (\d+) \w+ and finds (\d+) more", lambda a, b: a + b),
        (r"has (\d+) \w+ and loses (\d+)", lambda a, b: a - b),
        (r"has (\d+) \w+, gets (\d+) more and gives (\d+)", lambda a, b, c: a + b - c),
        (r"buys (\d+) bags with (\d+)", lambda a, b: a * b),
        (r"has (\d+) \w+\. \w+ has (\d+) more", lambda a, b: 2 * a + b),
        (r"(\d+) friends share (\d+)", lambda a, b: b // a),
    ]
    found = list(islice(problems(seed=0), 500))
    used = set()
    for question, answer in found:
        ((rule, numbers),) = [(rule, m.groups()) for rule in rules if (m := re.search(rule[0], question))]
        assert rule[1](*map(int, numbers)) == answer >= 0, question
        used.add(rule[0])
    assert len(used) == len(rules) and len({question for question, _ in found}) == 500
    assert found == list(islice(problems(seed=0), 500)) != list(islice(problems(seed=1), 500))


def test_exact_match_is_what_greedy_decoding_answers():
    subject = tiny()
    model: Any = subject.model
    examples = []
    for example in subject.held_out[:6]:
        read = example.ids[: int((example.labels == -100).sum())]
        said = model.generate(read[None], attention_mask=torch.ones_like(read[None]), max_new_tokens=3, do_sample=False)
        labels = said[0].clone()
        labels[: len(read)] = -100
        examples.append(type(example)(said[0], labels))
    judged = Decoder("tiny", "own", "exact_match", model, quality_split(examples))
    assert judged.judge(None).value == 1
    for example in examples[:2]:
        example.labels[-1] = (example.labels[-1] + 1) % 256
    assert judged.judge(None).value == pytest.approx(4 / 6)


def test_subjects_share_a_model_and_not_each_others_adapters():
    first = tiny()
    before = first.judge(None).loss
    first.use({path: (torch.ones(w.shape[0], 1), torch.ones(1, w.shape[1])) for path, w in first.weights.items()})
    assert abs(first.judge(None).loss - before) > 0.1
    second = Decoder("tiny", "own", "loss", first.model, quality_split(first.held_out), weights=first.weights)
    second.use({})
    assert second.judge(None).loss == before


def quality_split(examples: list[Any]) -> Any:
    from demo_data import Split

    return Split(examples, examples)


# The command


def run(monkeypatch_context: pytest.MonkeyPatch, work: Path, *options: object) -> None:
    words = ["quality", "--quick", "--work", work, "--methods", METHODS_RUN, *options]
    monkeypatch_context.setattr(sys, "argv", [str(word) for word in words])
    quality.main()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick comparison with two seeds: its folder, with result.json and plot.svg in it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, work, "--json", work / "result.json", "--plot", work / "plot.svg")
    torch.set_num_threads(threads)
    return work


def test_rows_have_the_agreed_shape(finished):
    document = json.loads((finished / "result.json").read_text())
    assert document.keys() == {"machine", "conditions", "rows"}
    keys = {"model", "task", "method", "r", "scale_code", "seed", "bytes", "metric", "value", "kl_to_lora"}
    assert all(row.keys() >= keys for row in document["rows"])
    assert len(document["rows"]) == 2 * len(METHODS_RUN.split(","))
    of = {(row["method"], row["r"], row["seed"]): row for row in document["rows"]}
    assert of["lora", 16, 0]["kl_to_lora"] == 0 < of["admm", 16, 0]["kl_to_lora"] < of["svid", 16, 0]["kl_to_lora"]
    assert of["lora", 16, 0]["loss"] < of["base", 0, 0]["loss"]
    assert of["lora", 16, 0]["loss"] != of["lora", 16, 1]["loss"]
    assert of["base", 0, 0]["loss"] == of["base", 0, 1]["loss"]


def test_bytes_are_those_of_the_files(finished):
    rows = {(row["method"], row["r"]): row for row in json.loads((finished / "result.json").read_text())["rows"]}
    for method, r in (("lora", 16), ("lora", 1), ("admm_qat", 16), ("direct", 16)):
        file = finished / "adapters" / "tiny-arithmetic-seed0" / f"{method}-r{r}" / "adapter_model.safetensors"
        assert rows[method, r]["bytes"] == data_bytes(file)


def test_kl_is_that_of_the_eager_layers(finished):
    """The LoRA merged by hand, the adapter unmerged through the op, KL by torch's own function."""
    folder = finished / "adapters" / "tiny-arithmetic-seed0"
    subject = tiny()
    lora, signs = copy.deepcopy(subject.model), copy.deepcopy(subject.model)
    for path, module in read_lora(folder / "lora-r16").modules.items():
        b, a = module.factors()
        lora.get_submodule(path).weight.data += (b @ a).float()
    attach(signs, load_adapter(folder / "direct-r16"))
    total, count = 0.0, 0
    with torch.no_grad():
        for example in subject.held_out:
            judged = example.labels[1:] != -100
            ours, theirs = (m(input_ids=example.ids[None]).logits[0, :-1][judged] for m in (signs, lora))
            total += torch.nn.functional.kl_div(
                ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True
            ).item()
            count += int(judged.sum())
    row = json.loads((finished / "rows" / "tiny-arithmetic-direct-r16-seed0.json").read_text())
    assert row["kl_to_lora"] == pytest.approx(total / count, rel=1e-3) and total > 0


def test_a_run_resumes_to_the_same_rows(finished, tmp_path, monkeypatch):
    """Cells that are there are read, the others computed again, from kept adapters or from new ones."""
    import shutil

    shutil.copytree(finished, tmp_path / "work")
    rows = sorted((tmp_path / "work" / "rows").iterdir())
    for path in rows[::2]:
        path.unlink()
    shutil.rmtree(tmp_path / "work" / "adapters" / "tiny-arithmetic-seed1")
    kept = {path: path.stat().st_mtime_ns for path in rows[1::2]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(monkeypatch, tmp_path / "work")
    torch.set_num_threads(threads)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for path in rows:
        assert json.loads(path.read_text()) == json.loads((finished / "rows" / path.name).read_text())


def test_cells_of_other_settings_are_refused(finished, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(finished / "rows", tmp_path / "rows")
    path = next((tmp_path / "rows").glob("*-base-*"))
    path.write_text(path.read_text().replace('"steps": 6', '"steps": 7'))
    with pytest.raises(LordbaError, match="other settings"):
        run(monkeypatch, tmp_path)


def test_plots_and_tables_are_written(finished, tmp_path, monkeypatch, capsys):
    for name in ("plot.svg", "plot-rho.svg"):
        text = (finished / name).read_text()
        assert "LoRDBA, ADMM" in text and "SVID" in text
    run(monkeypatch, finished, "--collect", "--plot", tmp_path / "plot.svg", "--markdown", tmp_path / "tables.md")
    assert (tmp_path / "plot.svg").read_bytes() == (finished / "plot.svg").read_bytes()
    tables = (tmp_path / "tables.md").read_text()
    rows = [json.loads(path.read_text()) for path in sorted((finished / "rows").iterdir())]
    assert tables == markdown(rows) and "| LoRDBA, ADMM | 16 |" in tables
    assert "± " in capsys.readouterr().out
    assert any("KL of ADMM over that of RTN 2 bit" in line for line in claims(rows))


def test_the_order_puts_the_important_cells_first():
    cells = list(quality.cells(["tiny-arithmetic"], METHODS, seeds=2))
    assert [seed for _, seed, _ in cells][:3] == [0, 1, 0]
    assert sorted(m.key for _, seed, part in cells if seed == 0 for m in part) == sorted(m.key for m in METHODS)
    assert {"lora-r16", "admm-r16", "rtn2-r16"} <= {m.key for m in cells[0][2]}


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    for words, said in (
        (["--work", tmp_path], "--vader-sdist is missing"),
        (["--work", tmp_path, "--only", "mini"], "no such subject"),
        (["--work", tmp_path, "--collect"], "holds no cells"),
        (["--work", tmp_path, "--quick", "--methods", "admm-r5"], "--methods admm-r5"),
    ):
        monkeypatch.setattr(sys, "argv", ["quality", *map(str, words)])
        with pytest.raises(LordbaError, match=said):
            quality.main()


def test_convert_knows_every_method():
    """On a LoRA of one module: a method that names nothing would be an error."""
    from lordba.lora import LoraAdapter

    lora = LoraAdapter({"m": random_lora(64, 48, 16)})
    sizes = {m.key: convert(m, lora).nbytes for m in METHODS if m.how == "converted"}
    assert sizes["rtn1-r16"] < sizes["loraquant-r16"] < sizes["rtn2-r16"]
    assert sizes["admm-r8"] < sizes["admm-r16"] == sizes["svid-r16"] < sizes["admm-r32"]
