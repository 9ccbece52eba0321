"""`python -m lordba.train`: a LoRDBA adapter from text; from nothing, from a LoRA, or from an adapter."""

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lordba.adapter import WEIGHTS_NAME, Adapter, load_adapter, save_adapter
from lordba.console import console, progress_bar, quiet_libraries, run_command, table
from lordba.convert import convert_lora
from lordba.errors import LordbaError
from lordba.files import check_new_folder, new_file, sha256_of
from lordba.lora import LoraAdapter, find_adapter, read_config, read_lora
from lordba.models import BaseModel, fingerprint, load_base
from lordba.scales import ScaleCode

REPORT_NAME = "training.json"
DIRECT_STEPS, REFINING_STEPS = 300, 60
DIRECT_RATE, REFINING_RATE = 1e-3, 7.5e-4  # flips need way: a LoRA would go on at 3e-4 (docs/quality.md)
LION_FACTOR = 0.6  # 0.2 was clearly worse in short runs (docs/training.md)
EXAMPLES = """examples:
  python -m lordba.train --data plays.txt --output out                        from nothing
  python -m lordba.train --data plays.txt --output out --init my-lora         a LoRA: converted, then refined
  accelerate launch --multi_gpu --num_processes 8 -m lordba.train --data reviews.jsonl --output out --batch-size 64

data sets, read by Hugging Face's library (pip install 'lordba[data]'):
  reviews.parquet (.arrow, .csv, .tsv, .json), a folder of such files, or one that save_to_disk wrote
  org/name, org/name@validation, org/name:subset, 'org/name:subset@train[:1000]'    from the hub, if no such path exists
  python -m lordba.train --data openai/gsm8k:main --columns question,answer --output out

The same command again resumes after an interruption, from the last checkpoint in OUTPUT/checkpoints.
OUTPUT/adapter is the packed adapter, for lordba.export and lordba.inspect.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        "python -m lordba.train",
        description="Train a LoRDBA adapter through its signs: text in, packed adapter out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--model", metavar="MODEL", help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct)")
    add("--data", required=True, metavar="DATA", help=".txt, .jsonl, or a data set: file, folder or hub id (see below)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for adapter, checkpoints and report")
    add("--columns", metavar="NAMES", help="of --data: the text's, or prompt,completion (default: these very names)")
    add("--init", type=Path, metavar="DIR", help="start from this LoRA or LoRDBA adapter")
    add("--rank", type=int, metavar="R", help="rank of the adapter (default: 16, or that of --init)")
    add("--targets", metavar="NAMES", help="layers to adapt, with commas (default: all-linear, or those of --init)")
    add("--scales", choices=[code.value for code in ScaleCode], default="log4", help="of the result (default: log4)")
    run = result.add_argument_group("training")
    add = run.add_argument
    add("--steps", type=int, metavar="N", help=f"(default: {DIRECT_STEPS}, with --init {REFINING_STEPS})")
    add("--batch-size", type=int, default=8, metavar="N", help="sequences a step, all processes together (default: 8)")
    add("--micro-batch-size", type=int, metavar="N", help="sequences at once, to save memory (default: all)")
    add("--max-length", type=int, default=256, metavar="N", help="tokens of a sequence (default: 256)")
    add("--lr", type=float, help=f"AdamW: {DIRECT_RATE:g}, with --init {REFINING_RATE:g}; times 0.6 for lion8bit")
    add("--warmup", type=int, metavar="N", help="steps until the full learning rate (default: a twentieth of all)")
    add("--optimizer", choices=("adamw", "lion8bit"), default="adamw", help="lion8bit: one byte of state per element")
    add("--latents", choices=("float32", "bfloat16"), default="float32", help="dtype of what is trained")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base (default: bfloat16)")
    add("--base-quant", choices=("none", "int8", "int4"), default="none", help="weights of the frozen base (torchao)")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--seed", type=int, default=0)
    run = result.add_argument_group("held-out text and checkpoints")
    add = run.add_argument
    add("--eval-data", metavar="DATA", help="held-out text, as --data (default: a part of --data)")
    add("--eval-fraction", type=float, default=0.05, metavar="F", help="that part (default: 0.05)")
    add("--eval-every", type=int, default=100, metavar="N", help="steps (default: 100)")
    add("--save-every", type=int, default=50, metavar="N", help="steps between checkpoints (default: 50)")
    add("--restart", action="store_true", help="forget the checkpoints in --output")
    return result


def check(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on others, and refuse what cannot be."""
    given = options.init is not None
    if options.steps is None:
        options.steps = REFINING_STEPS if given else DIRECT_STEPS
    if options.lr is None:
        factor = LION_FACTOR if options.optimizer == "lion8bit" else 1.0
        options.lr = factor * (REFINING_RATE if given else DIRECT_RATE)
    options.warmup = math.ceil(options.steps / 20) if options.warmup is None else options.warmup
    for name in ("rank", "steps", "batch_size", "micro_batch_size", "eval_every", "save_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise LordbaError(f"--{name.replace('_', '-')} must be at least 1, found {value}")
    if given and options.targets is not None:
        raise LordbaError("--targets has no meaning with --init, which says what it adapts")
    if options.columns is not None and not 1 <= len(options.columns.split(",")) <= 2:
        raise LordbaError(f"--columns names one column (text) or two (prompt,completion), found {options.columns!r}")
    if options.max_length < 2 or not 0 <= options.eval_fraction < 1 or not options.lr > 0:
        raise LordbaError("--max-length must be at least 2, --eval-fraction in [0, 1), --lr more than 0")
    if not (options.output / "checkpoints").is_dir():
        check_new_folder(options.output, replaceable_if=REPORT_NAME)


def read(options: argparse.Namespace, source: str | None, tokenizer: Any) -> list[Any]:
    """The examples of --data or --eval-data; none of None."""
    from lordba.training.batches import read_examples

    columns = options.columns and tuple(options.columns.split(","))
    return [] if source is None else read_examples(source, tokenizer, options.max_length, columns)


def describe(options: argparse.Namespace, base: BaseModel, **data: Sequence[Any] | None) -> dict[str, Any]:
    """All that decides the result: a run resumes only where this is the same. `data`: lists of examples by name."""
    from lordba.training.batches import digest

    decisive = (
        "rank", "targets", "steps", "batch_size", "max_length", "lr", "warmup", "optimizer", "latents", "dtype",
        "base_quant", "seed", "eval_fraction",
    )  # fmt: skip
    hashes = {name: examples and digest(examples) for name, examples in data.items()}
    hashes["init"] = options.init and sha256_of(find_adapter(options.init) / WEIGHTS_NAME)
    return {"base": fingerprint(base.model), **{name: getattr(options, name) for name in decisive}, **hashes}


def prepare(options: argparse.Namespace, base: BaseModel) -> Any:
    """The PEFT model to train, at its start."""
    import torch
    from peft import PeftModel, get_peft_model

    from lordba.training.tuner import LordbaConfig, start_from

    torch.manual_seed(options.seed)
    adapter, lora, latents = read_init(options)
    base.model.to(getattr(torch, options.dtype))
    if options.base_quant != "none":
        quantize(base.model, options.base_quant)
    base.model.config.use_cache = False
    if options.gradient_checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
        base.model.enable_input_require_grads()
    float32 = options.latents == "float32"
    if latents is not None:
        model = PeftModel.from_pretrained(base.model, str(latents), is_trainable=True, autocast_adapter_dtype=float32)
    else:
        names = options.targets and options.targets.split(",")
        targets: Any = sorted(adapter.modules) if adapter else names or "all-linear"
        rank = adapter.r if adapter else options.rank or 16
        config = LordbaConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(base.model, config, autocast_adapter_dtype=float32)
        if adapter:
            start_from(model, adapter, lora=lora)
    model.peft_config["default"].base_model_name_or_path = base.name
    return model


def read_init(options: argparse.Namespace) -> tuple[Adapter | None, LoraAdapter | None, Path | None]:
    """What --init holds: an adapter, converted or packed; the LoRA that was converted; or a folder of latents."""
    if options.init is None:
        return None, None, None
    folder = find_adapter(options.init)
    config = read_config(folder)
    if config.get("peft_type") == "LORA":
        lora = read_lora(folder)
        return convert_lora(lora, options.rank, ScaleCode.FP32)[0], lora, None
    if options.rank is not None and options.rank != config.get("r"):
        raise LordbaError(
            f"{folder}: has rank {config.get('r')}, not --rank {options.rank}; only a LoRA's can be changed"
        )
    packed = config.get("format_version") is not None
    return (load_adapter(folder), None, None) if packed else (None, None, folder)


def quantize(model: Any, how: str) -> None:
    """Linear layers of the frozen base, but the head, in torchao's int8 (per channel) or int4 (groups of 32)."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    int4 = IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int4"), granularity=PerGroup(32))  # noqa: B009 (mypy)
    quantize_(model.get_decoder(), Int8WeightOnlyConfig() if how == "int8" else int4)


def main() -> None:
    options = parser().parse_args()
    check(options)
    quiet_libraries()
    import torch
    from accelerate import Accelerator

    from lordba.training.batches import split
    from lordba.training.loop import Plan, Trainer

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    base = load_base(options.model)
    training, held_out = (read(options, source, base.tokenizer) for source in (options.data, options.eval_data))
    description = describe(options, base, data=training, eval_data=held_out or None)
    if options.eval_data is None:
        training, held_out = split(training, options.eval_fraction, options.seed)
    checkpoints = options.output / "checkpoints"
    if options.restart and accelerator.is_main_process:
        shutil.rmtree(checkpoints, ignore_errors=True)
    accelerator.wait_for_everyone()

    names = ("steps", "batch_size", "lr", "warmup", "optimizer", "seed", "micro_batch_size")
    plan = Plan(*(getattr(options, name) for name in names))
    trainer = Trainer(accelerator, prepare(options, base), training, held_out, plan)
    with progress_bar() as bar:
        task = bar.add_task("training", total=plan.steps, visible=accelerator.is_main_process)

        def told(step: int, loss: float) -> None:
            bar.update(task, completed=step, description=f"training, loss {loss:.3f}")

        trainer.run(checkpoints, description, options.save_every, options.eval_every, told)
    finish(options, trainer, description, base.name)
    # DDP must let go of the process group first: as its last owner it would wait for threads that wait for Python.
    del trainer
    accelerator.free_memory()
    accelerator.end_training()


def finish(options: argparse.Namespace, trainer: Any, description: dict[str, Any], base_name: str) -> None:
    """Pack what was trained, measure the base, the start, the latents and the packed adapter, and write it all."""
    from lordba.training.packing import adapter_of
    from lordba.training.tuner import use_packed

    adapter = adapter_of(trainer.peft_model, scales=options.scales)
    use_packed(trainer.peft_model, adapter)
    losses = {}
    if trainer.held_out:
        of = trainer.log.held_out
        losses = {"start": of[0], "trained": of[options.steps], "packed": trainer.evaluate()}
        with trainer.peft_model.disable_adapter():
            losses = {"base": trainer.evaluate(), **losses}
    if not trainer.accelerator.is_main_process:
        return
    task = {"task_type": "CAUSAL_LM"}
    known: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "base_fingerprint": description["base"],
        "peft_config": task,
    }
    save_adapter(replace(adapter, **known), options.output / "adapter")
    report = {"description": description, "processes": trainer.accelerator.num_processes, "bytes": adapter.nbytes}
    with new_file(options.output / REPORT_NAME) as file:
        report |= {"losses": losses, **asdict(trainer.log)}
        file.write_text(json.dumps(report, indent=2) + "\n")
    print_result(options, adapter, losses)


def print_result(options: argparse.Namespace, adapter: Adapter, losses: dict[str, float]) -> None:
    """What was reached, and what to do with it."""
    if losses:
        rows = [[name, f"{loss:.4f}", f"{math.exp(loss):.2f}"] for name, loss in losses.items()]
        console().print(table("held-out text", ["", "nats per token", "perplexity"], rows))
    print(f"{options.output / 'adapter'}: {adapter.nbytes:,} bytes of signs and {adapter.scale_code.value} scales")
    print(f"next: python -m lordba.export --target executorch --adapter {options.output / 'adapter'}")


if __name__ == "__main__":
    run_command(main)
