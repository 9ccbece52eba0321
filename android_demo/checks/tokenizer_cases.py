"""Writes SmolLM2's tokenizer.json and what Python's tokenizers makes of some texts, for TokenizerTest.kt.

`python android_demo/checks/tokenizer_cases.py FOLDER`; exits with 3 where SmolLM2 is not installed.
"""

import json
import sys
from importlib.resources import files
from pathlib import Path

from lordba.errors import LordbaError
from lordba.models import default_model

GOLDEN_CASES = Path(__file__).parents[2] / "tests" / "golden" / "demo" / "tokenizer" / "cases.json"


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        model = default_model()
    except LordbaError as error:
        print(f"SmolLM2's own tokenizer is not tested: {error}")
        sys.exit(3)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(model.parent), gguf_file=model.name, local_files_only=True)
    tokenizer = loaded.backend_tokenizer
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = [case["text"] for case in json.loads(GOLDEN_CASES.read_text())]
    texts += [(files("lordba.export") / "parity_text.txt").read_text(), Path(__file__).read_text()]
    cases = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
    (folder / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main()
