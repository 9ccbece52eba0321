"""The app's own way from a prompt to an answer, in a JVM: bundle, tokenizer, bank, session, stream, against Python's.

LORDBA_ANDROID_JVM: the command that scripts/android_jvm.sh builds; with LORDBA_REQUIRE_ANDROID=1 it must be set.
"""

import json
import os
import subprocess

import pytest
from conftest import MAX_SEQ_LEN

from lordba.adapter import load_adapter
from lordba.export.bundle import export_executorch
from lordba.export.target import ExportOptions
from lordba.models import load_base
from lordba.run import load_tokenizer
from lordba.runtime.bundle import read_bundle
from lordba.runtime.install import write_blob
from lordba.runtime.session import Session

PROMPT = "The old man and the sea, naïve ½"
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def command() -> str:
    found = os.environ.get("LORDBA_ANDROID_JVM")
    if not found and os.environ.get("LORDBA_REQUIRE_ANDROID"):
        pytest.fail(
            "LORDBA_REQUIRE_ANDROID is set and LORDBA_ANDROID_JVM is not; set it to what scripts/android_jvm.sh says"
        )
    if not found:
        pytest.skip("LORDBA_ANDROID_JVM is not set: scripts/android_jvm.sh builds the app's runner for a JVM")
    return found


def test_the_app_answers_what_the_session_answers(command, tiny_folder, tiny_adapters, tmp_path):
    north, south = (load_adapter(tiny_adapters[name]) for name in ("north", "south"))
    options = ExportOptions(
        tmp_path / "bundle", base_quant="none", adapter_mode="input", max_seq_len=MAX_SEQ_LEN, android=True
    )
    export_executorch(load_base(tiny_folder), {"north": north, "south": south}, options)
    bundle = read_bundle(options.output)
    tokenizer = load_tokenizer(bundle)
    expected = {}
    for name in (None, "north", "south"):
        ids = list(Session(bundle, name).generate(tokenizer.encode(PROMPT).ids, NEW_TOKENS))
        expected[name or "none"] = {"ids": ids, "text": tokenizer.decode(ids)}
    assert len({tuple(row["ids"]) for row in expected.values()}) == 3  # or nothing would be shown
    asked = ["none", "north", "south", "none", f"again={tiny_adapters['south']}", "north"]
    run = subprocess.run(
        [command, "text", str(options.output), PROMPT, str(NEW_TOKENS), *asked],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [row["adapter"] for row in rows] == ["none", "north", "south", "none", "again", "north"]
    for row in rows:
        answer = expected["south" if row["adapter"] == "again" else row["adapter"]]
        assert [int(token) for token in row["ids"].split()] == answer["ids"]
        assert row["text"] == answer["text"]
    write_blob(bundle, south, tmp_path / "again")  # the exporter's own file has room at its end
    assert read_bundle(options.output).adapter_file("again").read_bytes() == (tmp_path / "again").read_bytes()
