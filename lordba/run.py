"""`python -m lordba.run BUNDLE`: generate text from a bundle, with one of its adapters or without."""

import argparse
import sys
from pathlib import Path

from lordba.console import quiet_libraries, run_command
from lordba.errors import LordbaError
from lordba.runtime.bundle import Bundle, read_bundle

DESCRIPTION = """\
Generate from an exported bundle, greedily, through its own runtime. The text goes to stdout as it is made; stdout
carries nothing else. Another --adapter changes the answer, on the same program.
"""
EXAMPLES = """\
examples:
  python -m lordba.run bundle-executorch --prompt "Once upon a time" --adapter shakespeare
  python -m lordba.run bundle-executorch --prompt "Once upon a time" --adapter none --max-new-tokens 100
  python -m lordba.run bundle-coreml --reference --prompt "Once upon a time" --adapter shakespeare --max-new-tokens 8
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        "python -m lordba.run",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("bundle", type=Path, help="a folder made by lordba.export")
    add("--prompt", required=True, help="the text to continue")
    add("--adapter", default="none", help="an adapter of the bundle by name, or none for the base alone (default)")
    add(
        "--reference",
        action="store_true",
        help="Core ML bundles, away from Apple systems: run the package with our interpreter, which is slow",
    )
    add("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many tokens (default: 64)")
    return result


def load_tokenizer(bundle: Bundle):
    """The bundle's tokenizer (tokenizers.Tokenizer)."""
    from tokenizers import Tokenizer

    if bundle.manifest.tokenizer is None:
        raise LordbaError(f"{bundle.folder}: holds no tokenizer, so it cannot read a prompt; export it again")
    return Tokenizer.from_file(str(bundle.folder / bundle.manifest.tokenizer))


def main() -> None:
    arguments = parser().parse_args()
    if arguments.max_new_tokens < 1:
        raise LordbaError(f"--max-new-tokens must be at least 1, found {arguments.max_new_tokens}")
    bundle = read_bundle(arguments.bundle)
    adapter = None if arguments.adapter == "none" else arguments.adapter
    bundle.adapter_file(adapter)
    tokenizer = load_tokenizer(bundle)
    prompt = tokenizer.encode(arguments.prompt).ids
    if not prompt:
        raise LordbaError("--prompt is empty; give the text to continue")
    quiet_libraries()
    from lordba.runtime.bank import AdapterBank
    from lordba.runtime.session import open_runner

    bank = AdapterBank(bundle, runner=open_runner(bundle, reference=arguments.reference))
    if arguments.reference:
        print("note: the reference interpreter checks what the package computes; it is slow", file=sys.stderr)
    shown = ""
    made: list[int] = []
    with bank.use(adapter) as session:
        for token in session.generate(prompt, arguments.max_new_tokens):
            made.append(token)
            text = tokenizer.decode(made)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose bytes are not complete yet
                print(text[len(shown) :], end="", flush=True)
                shown = text
    print(tokenizer.decode(made)[len(shown) :], file=sys.stdout)


if __name__ == "__main__":
    run_command(main)
