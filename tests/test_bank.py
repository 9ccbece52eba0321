"""AdapterBank: generations take turns, adapters come and go in one step, memory stays within the budget."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import random_adapter, random_module, some_tokens, tiny_model

from lordba import Adapter, AdapterBank, LordbaError
from lordba.runtime import bundle as bundle_module
from lordba.runtime import executorch_runner
from lordba.runtime.bundle import MANIFEST_NAME, Bundle, read_bundle
from lordba.runtime.session import Session

TOKENS = some_tokens(8)
SOON = 5.0  # seconds; for what must happen
BEFORE = 0.05  # and for what must not


class FakeRunner:
    """A runtime whose logits tell the adapter in use; notes every load and swap."""

    longest = 4

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.loads: list[str | None] = []
        self.swaps: list[str | None] = []

    def load(self, adapter):
        self.loads.append(adapter)
        return [adapter, self.bundle.adapter_file(adapter)]

    def use(self, loaded):
        self.swaps.append(loaded[0])
        self.in_use = loaded[0]

    def write(self, adapter, path):
        if adapter.base_fingerprint is None:
            raise LordbaError("cannot be written")
        path.write_text("an adapter")

    def run(self, tokens, start):
        names = ["none", *sorted(entry.name for entry in self.bundle.manifest.adapters)]
        return np.eye(100, dtype=np.float32)[names.index(self.in_use or "none")]


@pytest.fixture
def golden(tmp_path) -> Bundle:
    """A bundle that no runtime reads, with the adapters a, b and c of 10 bytes each."""
    source = read_bundle(Path(__file__).parent / "golden" / "demo" / "bundle")
    folder = tmp_path / "bundle"
    shutil.copytree(source.folder, folder)
    record = json.loads((folder / MANIFEST_NAME).read_text())
    (entry,) = record["adapters"]
    (listed,) = (file for file in record["files"] if file["path"] == entry["file"])
    data = (folder / entry["file"]).read_bytes()
    for name in "abc":
        (folder / f"adapters/{name}").write_bytes(data)
    record["adapters"] = [entry | {"name": name, "file": f"adapters/{name}", "file_bytes": 10} for name in "abc"]
    record["eos_ids"] = []
    record["files"] += [listed | {"path": f"adapters/{name}"} for name in "abc"]
    (folder / MANIFEST_NAME).write_text(json.dumps(record | {"app": "keeps what it does not know"}))
    return read_bundle(folder)


@pytest.fixture
def runner(golden) -> FakeRunner:
    return FakeRunner(golden)


@pytest.fixture
def bank(golden, runner) -> AdapterBank:
    return AdapterBank(golden, budget=25, runner=runner)


@pytest.fixture
def adapter(golden) -> Adapter:
    path = next(path for path in golden.manifest.modules if path)
    module = random_module(16, 16, 8)
    return Adapter({path: module}, module.s_in.code, base_fingerprint=golden.manifest.base["fingerprint"])


class Started(threading.Thread):
    """A thread that runs a call; `done` says whether it has returned, `join` raises what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call, self._error = call, None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self._error = error

    @property
    def done(self) -> bool:
        super().join(BEFORE)
        return not self.is_alive()

    def join(self, timeout: float | None = SOON) -> None:
        super().join(timeout)
        assert not self.is_alive()
        if self._error:
            raise self._error


def once(bank: AdapterBank, name: str | None) -> None:
    with bank.use(name) as session:
        session.feed([1])


class TestTurns:
    def test_each_generation_has_its_adapter(self, bank):
        for name, expected in (("a", 1), (None, 0), ("c", 3), ("a", 1)):
            with bank.use(name) as session:
                assert list(session.generate([5, 6, 7], 2)) == [expected] * 2

    def test_a_swap_waits_for_the_running_generation(self, bank, runner):
        with bank.use("a") as session:
            other = Started(lambda: once(bank, "b"))
            assert not other.done
            assert runner.swaps == ["a"] and session.feed([1]).argmax() == 1
        other.join()
        assert runner.swaps == ["a", "b"]

    def test_many_threads_never_see_anothers_adapter(self, bank):
        def work(name: str | None, expected: int) -> None:
            for _ in range(20):
                with bank.use(name) as session:
                    assert session.length == 0
                    tokens = session.generate([1], 5)
                    assert [time.sleep(0) or token for token in tokens] == [expected] * 5

        threads = [Started(lambda n=n, i=i: work(n, i)) for i, n in enumerate((None, "a", "b", "c"))]
        for thread in threads:
            thread.join()

    def test_an_error_inside_frees_the_bank(self, bank):
        with pytest.raises(ZeroDivisionError), bank.use("a"):
            raise ZeroDivisionError
        once(bank, "b")
        bank.remove("a")

    def test_a_failed_swap_is_not_taken_for_done(self, bank, runner, monkeypatch):
        once(bank, "a")
        with monkeypatch.context() as broken:
            broken.setattr(runner, "use", lambda loaded: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                once(bank, "b")
        once(bank, "a")
        assert runner.swaps == ["a", "a"]

    def test_no_session_inside_a_session(self, bank):
        with bank.use("a"):
            for call in (lambda: once(bank, "b"), lambda: bank.remove("a")):
                with pytest.raises(LordbaError, match="leave the session"):
                    call()

    def test_unknown(self, bank):
        for call in (bank.remove, lambda name: once(bank, name)):
            with pytest.raises(LordbaError, match="no adapter 'east'; it holds a, b, c, none"):
                call("east")


class TestMemory:
    def test_the_last_used_stay_loaded(self, bank, runner):
        for name in ("a", "b", "a", "c", None, "a", "b"):
            once(bank, name)
        assert runner.loads == ["a", "b", "c", None, "b"]  # c put b out, which was used longest ago
        assert bank.loaded == ["a", "b"]

    def test_the_same_adapter_again_is_no_swap(self, bank, runner):
        for name in ("a", "a", None, None, "a"):
            once(bank, name)
        assert runner.swaps == ["a", None, "a"]

    def test_one_that_exceeds_the_budget_is_used_and_not_kept(self, golden, runner):
        bank = AdapterBank(golden, budget=5, runner=runner)
        once(bank, "a")
        assert bank.loaded == [] and runner.swaps == ["a"]


class TestComingAndGoing:
    def test_install(self, bank, golden, adapter):
        once(bank, "a")
        bank.install("new", adapter)
        assert bank.names == ["a", "b", "c", "new"]
        with bank.use("new") as session:
            assert session.feed([1]).argmax() == 4
        again = read_bundle(golden.folder)  # every size and hash is right
        assert again == bank.bundle and again.adapter("new").bytes == adapter.nbytes
        assert json.loads((golden.folder / MANIFEST_NAME).read_text())["app"]

    def test_install_does_not_wait_for_a_generation(self, bank, adapter):
        with bank.use("a") as session:
            Started(lambda: bank.install("a", adapter)).join()
            assert session.feed([1]).argmax() == 1

    def test_a_new_version_is_for_the_next_use(self, bank, runner, golden, adapter):
        once(bank, "a")
        bank.install("a", adapter)
        once(bank, "a")
        assert runner.loads == runner.swaps == ["a", "a"]
        assert bank.names == ["b", "c", "a"] and not (golden.folder / "adapters/a").exists()
        bank.install("a", adapter)
        assert read_bundle(golden.folder).adapter("a").file == "adapters/a.2"
        assert sorted(path.name for path in (golden.folder / "adapters").iterdir()) == ["a.2", "b", "c", "golden.bin"]

    def test_remove(self, bank, golden):
        bank.remove("b")
        assert bank.names == ["a", "c"] and not (golden.folder / "adapters/b").exists()
        assert read_bundle(golden.folder) == bank.bundle
        with pytest.raises(LordbaError, match="no adapter 'b'"):
            once(bank, "b")

    def test_remove_waits_for_its_users_alone(self, bank):
        with bank.use("a"):
            Started(lambda: bank.remove("b")).join()
            removal = Started(lambda: bank.remove("a"))
            assert not removal.done
            assert bank.names == ["c"]
            with pytest.raises(LordbaError, match="'a' is being removed"):
                Started(lambda: once(bank, "a")).join()
        removal.join()
        assert bank.names == ["c"]

    @pytest.mark.parametrize(
        "change, said",
        [
            ({"base_fingerprint": "sha256:0"}, "was made for the base"),
            ({"modules": {"model.layers.7.q_proj": None}}, "no place"),
            ({"base_fingerprint": None}, "cannot be written"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, bank, golden, adapter, change, said):
        before = {path: path.read_bytes() for path in golden.folder.rglob("*") if path.is_file()}
        with pytest.raises(LordbaError, match=said):
            bank.install("new", replace(adapter, **change))
        assert before == {path: path.read_bytes() for path in golden.folder.rglob("*") if path.is_file()}

    @pytest.mark.parametrize("name", ["none", "", "../x", ".x", "a b", "-x"])
    def test_names(self, bank, adapter, name):
        with pytest.raises(LordbaError, match="usable file name"):
            bank.install(name, adapter)

    def test_an_interrupted_install_leaves_the_bundle_as_it_was(self, bank, golden, adapter, monkeypatch):
        def fail(*_):
            raise LordbaError("the disk is full")

        monkeypatch.setattr(bundle_module, "_write_record", fail)
        with pytest.raises(LordbaError, match="disk"):
            bank.install("a", adapter)
        assert read_bundle(golden.folder) == golden and bank.names == ["a", "b", "c"]
        assert not (golden.folder / "adapters/a.1").exists()


@pytest.mark.parametrize("mode", ["ptd", "input"])
def test_in_executorch(tiny_bundle, north_south, tmp_path, mode):
    """An installed adapter computes what the exported one does; one that cannot fit is refused."""
    source = tiny_bundle("none", mode)
    shutil.copytree(source.folder, tmp_path / "bundle")
    bank = AdapterBank(tmp_path / "bundle")
    bank.install("copy", north_south["north"])
    bank.install("few", random_adapter(tiny_model(), r=8, only=("q_proj",)))
    logits = {}
    for name in ("north", "south", None, "copy", "few"):
        with bank.use(name) as session:
            logits[name] = session.feed(TOKENS)
    for name in ("north", "south", None):
        assert np.array_equal(logits[name], Session(source, name).feed(TOKENS))
    assert np.array_equal(logits["copy"], logits["north"])
    assert not np.allclose(logits["few"], logits[None])
    wide = random_adapter(tiny_model(intermediate_size=128), only=("up_proj",))
    with pytest.raises(LordbaError, match=r"maps 64 to 128 channels in model\.layers\.0\.mlp\.up_proj"):
        bank.install("wide", replace(wide, base_fingerprint=None))
    high = random_adapter(tiny_model(), r=64)
    if mode == "ptd":
        with pytest.raises(LordbaError, match="does not fit a program"):
            bank.install("high", high)
    else:
        bank.install("high", high)
        once(bank, "high")
    assert read_bundle(tmp_path / "bundle") == bank.bundle


def test_a_data_file_is_swapped_under_the_loaded_program(tiny_bundle, monkeypatch):
    """Where more than the adapter differs, ExecuTorch loads anew and judges it."""
    bundle = tiny_bundle("none", "ptd")
    loads = []
    program = executorch_runner.Program

    def counted(*files, **options):
        loads.append(files)
        return program(*files, **options)

    monkeypatch.setattr(executorch_runner, "Program", counted)
    runner = executorch_runner.ExecuTorchRunner(bundle)
    seen = {}
    for name in ("north", "south", None, "north"):
        runner.use(runner.load(name))
        logits = runner.run(TOKENS, 0)
        assert np.array_equal(seen.setdefault(name, logits), logits)
    assert len(loads) == 1 and len({logits.tobytes() for logits in seen.values()}) == 3
    with pytest.raises(RuntimeError):
        runner.use(runner.load("south").replace(b"slot.blob", b"slot.blub"))
    assert len(loads) == 2
    assert np.array_equal(runner.run(TOKENS, 0), seen["north"])
