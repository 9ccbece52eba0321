"""Lowered programs in the real runtime, against transformers: on, off, swapped, and with a single sign flipped."""

from collections.abc import Callable

import pytest
import torch
from conftest import MAX_SEQ_LEN, random_adapter, some_tokens, tiny_model, transformers_logits
from executorch.exir._serialize._program import deserialize_pte_binary
from torch import Tensor

from lordba.adapter import Adapter
from lordba.blob import HEADER, MAGIC, RECORD
from lordba.errors import LordbaError
from lordba.export.executorch import lowering
from lordba.export.executorch.capture import Captured, capture
from lordba.export.executorch.lowering import lower
from lordba.export.executorch.quantize import quantize_base
from lordba.export.executorch.target import ExecuTorchProbe
from lordba.export.verify import OP_LIMIT
from lordba.models import BaseModel
from lordba.runtime.bundle import Bundle
from lordba.runtime.executorch_runner import Program
from lordba.runtime.session import Session
from lordba.scales import ScaleCode

TOLERANCE = 2e-5
MODES = ("ptd", "input")
TOKENS = some_tokens(48)
PROMPT = 9


def session_logits(session: Session, tokens: list[int] = TOKENS, prompt: int = PROMPT) -> Tensor:
    """One prefill, then a decode step per token: logits from the last prompt token on, [T - prompt + 1, vocabulary]."""
    session.reset()
    rows = [session.feed(tokens[:prompt])]
    rows += [session.feed([token]) for token in tokens[prompt:]]
    return torch.stack([torch.from_numpy(row) for row in rows])


def run(program: Program, blob: Tensor, tokens: list[int] = TOKENS) -> Tensor:
    """Prefill a program of input mode; logits of the last token, [vocabulary]."""
    return program.execute([torch.tensor([tokens]), torch.tensor([0]), blob])[0].flatten().clone()


def error(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


@pytest.fixture(scope="session")
def references(tiny_base: BaseModel, north_south: dict[str, Adapter]) -> dict[str | None, Tensor]:
    """transformers' logits of every token, [T, vocabulary]; None is the base alone."""
    wanted: dict[str | None, Adapter | None] = {None: None, **north_south}
    return {name: transformers_logits(tiny_base.model, TOKENS, adapter) for name, adapter in wanted.items()}


@pytest.fixture(scope="session")
def sessions(tiny_bundle: Callable[..., Bundle]) -> Callable[[str], Session]:
    """A fresh session on the float program of a mode."""
    return lambda mode: Session(tiny_bundle("none", mode))


@pytest.mark.parametrize("mode", MODES)
def test_program_equals_transformers_with_every_adapter(sessions, references, mode):
    session = sessions(mode)
    for name in ("north", None, "south"):
        session.use(name)
        for prompt in (PROMPT, 1, 40):
            assert error(session_logits(session, prompt=prompt), references[name][prompt - 1 :]) <= TOLERANCE
    assert error(references["north"], references["south"]) > 1e4 * TOLERANCE
    assert error(references["north"], references[None]) > 1e4 * TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_swapping_is_the_same_as_loading_anew(sessions, tiny_bundle, mode):
    session = sessions(mode)
    for name in ("north", "south", None, "north"):
        session.use(name)
        assert torch.equal(session_logits(session), session_logits(Session(tiny_bundle("none", mode), name)))


def test_the_cache_holds_exactly_max_seq_len_tokens(sessions, tiny_base):
    session, tokens = sessions("input"), some_tokens(MAX_SEQ_LEN)
    expected = transformers_logits(tiny_base.model, tokens)[-1]
    assert error(torch.from_numpy(session.feed(tokens)), expected) <= TOLERANCE  # longer than one input may be
    with pytest.raises(LordbaError, match=r"1 tokens after 64 .* --max-seq-len"):
        session.feed([5])
    session.reset()
    with pytest.raises(LordbaError, match="65 tokens after 0"):
        session.feed([5] * (MAX_SEQ_LEN + 1))
    assert session.length == 0


def flipped(data: bytes, module: int, factor: int) -> bytes:
    """The adapter with one sign changed: the first of A (factor 0) or B (factor 1) of a module."""
    start = data.index(MAGIC)
    record = RECORD.unpack_from(data, start + HEADER.size + RECORD.size * module)
    changed = bytearray(data)
    changed[start + record[4 + factor]] ^= 1
    return bytes(changed)


def test_a_single_flipped_sign_shows(tiny_bundle, tiny_base, north_south):
    bundle = tiny_bundle("none", "input")
    program = Program(bundle.program)
    data = bundle.adapter_file("north").read_bytes()

    def logits(data: bytes) -> Tensor:
        return run(program, torch.frombuffer(bytearray(data), dtype=torch.uint8))

    expected = transformers_logits(tiny_base.model, TOKENS, north_south["north"])[-1]
    parity = error(logits(data), expected)
    assert parity <= TOLERANCE
    for module in range(len(bundle.manifest.modules)):
        for factor in (0, 1):
            assert error(logits(flipped(data, module, factor)), expected) > 30 * parity, (module, factor)


def test_a_single_flipped_sign_shows_in_a_ptd(tiny_bundle, references, tmp_path):
    bundle = tiny_bundle("none", "ptd")
    broken = tmp_path / "broken.ptd"
    broken.write_bytes(flipped(bundle.adapter_file("north").read_bytes(), 7, 0))
    program = Program(bundle.program, broken)
    found = program.execute([torch.tensor([TOKENS]), torch.tensor([0])])[0].flatten()
    assert error(found, references["north"][-1]) > 100 * TOLERANCE


def test_one_program_takes_adapters_of_any_rank_code_and_part(tiny_bundle, tiny_base, north_south):
    program = Program(tiny_bundle("none", "input").program)
    slot = capture(tiny_base.model, north_south, MAX_SEQ_LEN).slot
    ranks = {ScaleCode.FP32: 1, ScaleCode.FP16: 3, ScaleCode.INT8: 40}
    adapters = [random_adapter(tiny_base.model, r, code, seed=r) for code, r in ranks.items()]
    adapters += [random_adapter(tiny_base.model, 16, only=("k_proj", "0.mlp.down_proj"))]
    for adapter in adapters:
        expected = transformers_logits(tiny_base.model, TOKENS, adapter)[-1]
        assert error(run(program, slot.blob_of(adapter)), expected) <= 2 * TOLERANCE
    assert slot.blob_of(adapters[0]).numel() < slot.blob_of(adapters[2]).numel()


def lowered_input_mode(model, adapter: Adapter, base_quant: str = "none") -> tuple[Program, Captured, Tensor]:
    captured = capture(model, {"a": adapter}, MAX_SEQ_LEN)
    quantize_base(captured.module, base_quant)
    blob = captured.slot.blob_of(adapter)
    return Program(lower(captured, blob, "input", {}).pte), captured, blob


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "phi"])
def test_other_families(family):
    model = tiny_model(family)
    adapter = random_adapter(model, seed=3)
    program, captured, blob = lowered_input_mode(model, adapter)
    off = captured.slot.blob_of(None)
    assert error(run(program, blob), transformers_logits(model, TOKENS, adapter)[-1]) <= TOLERANCE
    for adapter_or_none, bits in ((None, off), (adapter, blob)):
        expected = transformers_logits(model, TOKENS, adapter_or_none)
        for i, token in enumerate(TOKENS[:32]):
            found = program.execute([torch.tensor([[token]]), torch.tensor([i]), bits])[0].flatten()
            assert error(found, expected[i]) <= TOLERANCE


def test_adapters_are_added_in_place(tiny_bundle):
    """But for the first residual, the embedding: the norm reads that too, and in another delegate call."""
    plan = deserialize_pte_binary(tiny_bundle("none", "input").program.read_bytes()).program.execution_plan[0]
    ours = {i for i, op in enumerate(plan.operators) if (op.name, op.overload) == lowering.OP}
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    places = [
        [plan.values[value].val.allocation_info for value in (call.args[lowering.BASE_ARGUMENT], call.args[-1])]
        for call in calls
        if getattr(call, "op_index", None) in ours
    ]
    assert [base == out for base, out in places] == [True, False, *[True] * 6]


def stock_partitioner():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


@pytest.mark.parametrize("base_quant", ["none", "int4"])
def test_our_partitioner_settings_change_no_number(monkeypatch, base_quant):
    """They rest on a key that XNNPACK does not document."""
    model = tiny_model(num_hidden_layers=1)
    adapter = random_adapter(model)
    ours, _, blob = lowered_input_mode(model, adapter, base_quant)
    monkeypatch.setattr(lowering, "_partitioner", stock_partitioner)
    stock, _, _ = lowered_input_mode(model, adapter, base_quant)
    for tokens in (TOKENS, TOKENS[:1]):
        assert torch.equal(run(ours, blob, tokens), run(stock, blob, tokens))


@pytest.mark.parametrize("fault", ["lost", "twice"])
def test_a_program_without_all_its_adapters_is_refused(fault):
    model = tiny_model(num_hidden_layers=1)
    adapter = random_adapter(model, only=("o_proj", "down_proj"))
    captured = capture(model, {"a": adapter}, MAX_SEQ_LEN)
    down = captured.module.layers[0].down
    if fault == "lost":
        object.__setattr__(down, "_slot", None)
    else:  # its op reads o_proj's place
        down._first = 0
    with pytest.raises(LordbaError, match=r"1 of 2 modules have no lordba::sign_adapter .*layers\.0\.mlp\.down_proj"):
        lower(captured, captured.slot.blob_of(adapter), "input", {})


@pytest.mark.parametrize("base_quant", ["int4", "int8"])
class TestQuantized:
    """Their logits prove little, so that the adapter ops are looked at one by one."""

    @pytest.fixture
    def captured(self, tiny_base, north_south, base_quant) -> Captured:
        result = capture(tiny_base.model, north_south, MAX_SEQ_LEN)
        quantize_base(result.module, base_quant)
        return result

    @pytest.mark.parametrize("name", [None, "north", "south"])
    def test_program_is_near_the_eager_decoder(self, tiny_bundle, references, north_south, captured, base_quant, name):
        session = Session(tiny_bundle(base_quant), name)
        captured.slot.blob = captured.slot.blob_of(north_south.get(name))
        captured.module.all_logits = True
        with torch.no_grad():
            eager = captured.module(torch.tensor([TOKENS]), torch.tensor([0]))[0, PROMPT - 1 :]
        found = session_logits(session)
        assert mean_kl(eager, found) < 1e-4
        distance = {other: mean_kl(logits[PROMPT - 1 :], found) for other, logits in references.items()}
        assert min(distance, key=distance.__getitem__) == name and sorted(distance.values())[1] > 0.1, distance

    def test_adapter_ops_by_themselves(self, captured, north_south, base_quant):
        blobs = {name: captured.slot.blob_of(adapter) for name, adapter in north_south.items()}
        probe = ExecuTorchProbe(captured, torch.tensor(TOKENS), north_south)
        for name, adapter in north_south.items():
            assert 0 < probe.worst_error(name) <= OP_LIMIT
            assert probe.error_of(adapter, blobs[name]) == probe.worst_error(name)
        assert probe.error_of(north_south["north"], blobs["south"]) > 0.1
        one_sign = bytearray(flipped(blobs["north"].numpy().tobytes(), 13, 1))
        assert probe.error_of(north_south["north"], torch.frombuffer(one_sign, dtype=torch.uint8)) > 1e3 * OP_LIMIT
        assert probe.error_of(north_south["north"], captured.slot.blob_of(None)) == pytest.approx(1)


def mean_kl(reference: Tensor, found: Tensor) -> float:
    p, q = (logits.double().log_softmax(-1) for logits in (reference, found))
    return (p.exp() * (p - q)).sum(-1).mean().item()
