"""`python -m lordba.run`: text on stdout and nothing else, the adapter's effect, and mistakes in one line."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import MAX_SEQ_LEN

from lordba import run
from lordba.console import run_command
from lordba.runtime.bundle import Bundle
from lordba.runtime.session import Session

PROMPT = "Once upon a time"


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Bundle]) -> Bundle:
    return tiny_bundle("none", "ptd")


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lordba.run", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            run_command(run.main)
        return (exited.value.code, *capsys.readouterr())

    return command


def expected_text(bundle: Bundle, adapter: str | None, n: int) -> str:
    tokenizer = run.load_tokenizer(bundle)
    return tokenizer.decode(list(Session(bundle, adapter).generate(tokenizer.encode(PROMPT).ids, n)))


def test_stdout_is_the_text_alone(bundle):
    command = [sys.executable, "-m", "lordba.run", bundle.folder, "--prompt", PROMPT, "--adapter", "north"]
    command += ["--max-new-tokens", "12"]
    result = subprocess.run(command, capture_output=True, check=True)
    assert result.stdout.decode() == expected_text(bundle, "north", 12) + "\n"


@pytest.mark.parametrize("mode", ["ptd", "input"])
def test_the_adapter_changes_the_answer(command, tiny_bundle, mode):
    bundle = tiny_bundle("none", mode)
    texts = {}
    for name in ("none", "north", "south"):
        code, texts[name], _ = command(bundle.folder, "--prompt", PROMPT, "--adapter", name, "--max-new-tokens", 20)
        assert code == 0
        assert texts[name] == expected_text(bundle, None if name == "none" else name, 20) + "\n"
    assert len(set(texts.values())) == 3


def test_the_base_alone_is_the_default_and_answers_repeat(command, bundle):
    arguments = [bundle.folder, "--prompt", PROMPT, "--max-new-tokens", 20]
    assert command(*arguments) == command(*arguments, "--adapter", "none")


def test_generation_ends_with_the_cache(command, bundle):
    tokenizer = run.load_tokenizer(bundle)
    prompt = tokenizer.encode(PROMPT).ids
    tokens = list(Session(bundle, "south").generate(prompt, 1000))
    assert len(prompt) + len(tokens) <= MAX_SEQ_LEN + 1
    code, text, _ = command(bundle.folder, "--prompt", PROMPT, "--adapter", "south", "--max-new-tokens", 1000)
    assert (code, text) == (0, tokenizer.decode(tokens) + "\n")


def test_generation_ends_with_an_end_token(bundle):
    session = Session(bundle, "north")
    prompt = run.load_tokenizer(bundle).encode(PROMPT).ids
    tokens = list(session.generate(prompt, 8))
    session.bundle.manifest.eos_ids.append(tokens[3])
    try:
        session.reset()
        assert list(session.generate(prompt, 8)) == tokens[: tokens.index(tokens[3])]
    finally:
        session.bundle.manifest.eos_ids.pop()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompt", PROMPT, "--adapter", "east"], "no adapter 'east'; it holds north, south, none"),
        (["--prompt", PROMPT * 20], "--max-seq-len"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", PROMPT, "--max-new-tokens", "-1"], "--max-new-tokens"),
        ([], "--prompt"),
    ],
)
def test_mistakes(command, bundle, arguments, said):
    code, out, err = command(bundle.folder, *arguments)
    assert code == 2 and out == "" and said in err


def test_no_bundle(command, tmp_path):
    code, out, err = command(tmp_path / "nowhere", "--prompt", PROMPT)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"error: {tmp_path}/nowhere/manifest.json: not found") and "lordba.export" in err


def test_help_teaches(command):
    code, out, _ = command("--help")
    assert code == 0 and "examples:" in out and "--adapter" in out
