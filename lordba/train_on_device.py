"""`python -m lordba.train_on_device BUNDLE`: a new adapter from text, trained by the bundle's own training program.

What runs here is what runs on a phone: ExecuTorch's runtime, lordba's native library and a loop; no PyTorch.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lordba.adapter_folder import StoredModule, write_adapter_folder
from lordba.console import console, progress_bar, run_command
from lordba.errors import LordbaError
from lordba.files import check_new_folder, new_file, sha256_of
from lordba.run import load_tokenizer
from lordba.runtime.bundle import Bundle, is_adapter_name, read_bundle
from lordba.runtime.device_latents import read_latents
from lordba.runtime.device_trainer import OPTIMIZERS, SCALE_CODES, DeviceTrainer, Optimizer, PackedModule
from lordba.runtime.install import install
from lordba.training.resume import check_same_run
from lordba.training.schedule import learning_rate
from lordba.training.text_examples import IGNORED, Sequence, read_sequences

REPORT_NAME, CHECKPOINT_NAME = "training.json", "checkpoint"
LARGEST_NORM = 1.0
RATES = {"adamw": 1e-3, "adamw8bit": 1e-3, "sgd": 0.1}
EXAMPLES = """examples:
  python -m lordba.export --target executorch --train               a bundle that can train
  python -m lordba.train_on_device bundle-executorch --data notes.txt --adapter notes
  python -m lordba.train_on_device bundle-executorch --data more.txt --adapter notes2 --init notes --steps 20
  python -m lordba.run bundle-executorch --adapter notes --prompt "Dear"

The same command again resumes after an interruption, from the checkpoint in the output folder.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        "python -m lordba.train_on_device",
        description="Train an adapter with a bundle's training program and install it into the bundle.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("bundle", type=Path, help="a folder made by lordba.export --target executorch --train")
    add("--data", type=Path, required=True, metavar="FILE", help=".txt, or .jsonl of text or of prompt and completion")
    add("--adapter", required=True, metavar="NAME", help="of the new adapter; one of this name is replaced")
    add("--init", metavar="NAME", help="start from this adapter of the bundle (default: from nothing)")
    add("--output", type=Path, metavar="DIR", help="folder for checkpoint, adapter and report (default: NAME-training)")
    add("--steps", type=int, default=100, metavar="N", help="(default: 100)")
    add("--batch-size", type=int, default=1, metavar="N", help="sequences a step, one after the other (default: 1)")
    add("--max-length", type=int, default=128, metavar="N", help="tokens of a sequence (default: 128)")
    add(
        "--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="adamw8bit: a byte per moment; sgd has momentum"
    )
    rates = ", ".join(f"{name} {rate:g}" for name, rate in RATES.items())
    add("--lr", type=float, help=f"learning rate (default: {rates})")
    add("--warmup", type=int, metavar="N", help="steps until the full learning rate (default: a twentieth of all)")
    add("--scales", choices=tuple(SCALE_CODES), default="log4", help="of the result (default: log4)")
    add("--save-every", type=int, default=10, metavar="N", help="steps between checkpoints (default: 10)")
    add("--seed", type=int, default=0)
    return result


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter that was packed here; what install.Installable asks of it."""

    modules: Mapping[str, PackedModule]
    scale_code: str
    base_model_name_or_path: str | None
    base_fingerprint: str | None
    r: int
    nbytes: int
    fp16_lora_bytes: int


def check(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on others, and refuse what cannot be."""
    for name in ("steps", "batch_size", "save_every"):
        if getattr(options, name) < 1:
            raise LordbaError(f"--{name.replace('_', '-')} must be at least 1, found {getattr(options, name)}")
    options.lr = RATES[options.optimizer] if options.lr is None else options.lr
    options.warmup = math.ceil(options.steps / 20) if options.warmup is None else options.warmup
    if options.max_length < 2 or not options.lr > 0:
        raise LordbaError("--max-length must be at least 2 and --lr more than 0")
    if not is_adapter_name(options.adapter):
        raise LordbaError(f"--adapter {options.adapter!r} is no usable file name; take letters, digits, - _ and .")
    if not options.data.is_file():
        raise LordbaError(f"{options.data}: no such file; give a .txt or .jsonl file")
    options.output = options.output or Path(f"{options.adapter}-training")
    if not (options.output / CHECKPOINT_NAME).is_file():
        check_new_folder(options.output, replaceable_if=REPORT_NAME)


def training_of(bundle: Bundle, max_length: int) -> Path:
    """The training program of a bundle, if it takes sequences of this length."""
    training = bundle.manifest.training
    if training is None:
        raise LordbaError(f"{bundle.folder}: holds no training program; export it with --target executorch --train")
    if training["form"] != "fused":
        raise LordbaError(
            f"{bundle.folder}: its training program is {training['form']}, for ExecuTorch's TrainingModule; "
            "this command needs: python -m lordba.export --target executorch --train fused"
        )
    if max_length > training["max_seq_len"]:
        raise LordbaError(
            f"--max-length {max_length}: the program takes {training['max_seq_len']} tokens; give less, or export with "
            "a larger --max-seq-len"
        )
    return bundle.folder / training["program"]


class Loop:
    """Steps of a run; what a step does follows from the options and its number alone."""

    def __init__(self, trainer: DeviceTrainer, sequences: list[Sequence], options: argparse.Namespace) -> None:
        self.trainer, self.sequences, self.options = trainer, sequences, options
        self.losses: list[float] = []

    def step(self) -> float:
        """One step; the mean loss of its batch in nats per learned token, before it."""
        number, options = len(self.losses), self.options
        batch = [self.sequences[i] for i in self._places(number)]
        weight = 1 / sum(sequence.targets for sequence in batch)
        loss = 0.0
        for sequence in batch:
            following = [*sequence.labels[1:], IGNORED]
            loss += self.trainer.add(sequence.ids, following, weight)
        if not math.isfinite(loss):
            raise LordbaError(f"the loss of step {number + 1} is {loss}: training diverged; lower --lr")
        self.trainer.update(learning_rate(number, options.steps, options.lr, options.warmup), LARGEST_NORM)
        self.losses.append(loss)
        return loss

    def _places(self, step: int) -> list[int]:
        """Which examples a step sees: every epoch is another permutation."""
        count, size = len(self.sequences), self.options.batch_size
        orders = {
            epoch: np.random.default_rng([self.options.seed, epoch]).permutation(count)
            for epoch in {at // count for at in range(step * size, (step + 1) * size)}
        }
        return [int(orders[at // count][at % count]) for at in range(step * size, (step + 1) * size)]


def describe(options: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    """All that decides the result: a run resumes only where this is the same."""
    decisive = ("init", "steps", "batch_size", "max_length", "optimizer", "lr", "warmup", "seed")
    return {name: getattr(options, name) for name in decisive} | {
        "data": sha256_of(options.data),
        "base": bundle.manifest.base["fingerprint"],
    }


def resume(loop: Loop, checkpoint: Path, description: dict[str, Any]) -> None:
    """Go on from a checkpoint, if there is one of this very run."""
    if not checkpoint.is_file():
        return
    note = json.loads(loop.trainer.load(checkpoint))
    check_same_run(checkpoint, note["description"], description, "remove the file")
    loop.losses = note["losses"]


def pack(trainer: DeviceTrainer, bundle: Bundle, code: str) -> PackedAdapter:
    """The trained adapter as signs and scales: the latents' own signs and their implied scales (docs/format.md)."""
    named = {path: i for i, path in enumerate(bundle.manifest.modules) if path and trainer.modules[i].r}
    modules = {path: trainer.pack(i, code) for path, i in named.items()}
    sizes = [trainer.modules[i] for i in named.values()]
    return PackedAdapter(
        modules=modules,
        scale_code=code,
        base_model_name_or_path=bundle.manifest.base["name"],
        base_fingerprint=bundle.manifest.base["fingerprint"],
        r=max(m.r for m in sizes),
        nbytes=sum(module.nbytes for module in modules.values()),
        fp16_lora_bytes=sum(2 * m.r * (m.d_in + m.d_out) for m in sizes),
    )


def save_folder(adapter: PackedAdapter, folder: Path) -> None:
    """Write the canonical adapter folder."""
    modules = {}
    for path, m in adapter.modules.items():
        r, d_in, d_out = m.sizes
        ranges = (None, None, None) if m.ranges is None else tuple(m.ranges)
        modules[path] = StoredModule(r, d_in, d_out, m.a_signs, m.b_signs, m.scales, ranges)
    name, fingerprint = adapter.base_model_name_or_path, adapter.base_fingerprint
    write_adapter_folder(folder, modules, adapter.scale_code, name, fingerprint, {"task_type": "CAUSAL_LM"})


def template_of(bundle: Bundle) -> Path | None:
    """The data file whose form an adapter's takes, where adapters are data files of the program."""
    return bundle.adapter_file(None) if bundle.manifest.adapter_mode == "ptd" else None


def install_packed(bundle: Bundle, name: str, trainer: DeviceTrainer, adapter: PackedAdapter) -> Bundle:
    """Put the adapter into the bundle in one step, in the form that its program reads."""

    def write(packed: PackedAdapter, path: Path) -> None:
        trainer.write_adapter(path, packed.scale_code, template_of(bundle))

    return install(bundle, name, adapter, write)


def check_room(bundle: Bundle, trainer: DeviceTrainer, options: argparse.Namespace) -> None:
    """Raise, before the work, if the program has no room for an adapter with these scales."""
    trial = options.output / ".adapter"
    try:
        trainer.write_adapter(trial, options.scales, template_of(bundle))
    finally:
        trial.unlink(missing_ok=True)


def main() -> None:
    options = parser().parse_args()
    check(options)
    bundle = read_bundle(options.bundle, "executorch")
    program = training_of(bundle, options.max_length)
    if options.init is not None:
        bundle.adapter(options.init)
    tokenizer = load_tokenizer(bundle)

    def encode(text: str, special: bool) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=special).ids

    sequences = read_sequences(options.data, encode, bundle.manifest.eos_ids[:1], options.max_length)
    trainer = DeviceTrainer(program, Optimizer(options.optimizer), options.seed)
    if options.init is not None:
        read_latents(bundle, options.init, trainer)
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = options.output / CHECKPOINT_NAME
    check_room(bundle, trainer, options)
    loop, description = Loop(trainer, sequences, options), describe(options, bundle)
    resume(loop, checkpoint, description)
    resumed, started = len(loop.losses), time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task("training", total=options.steps, completed=resumed)
        while len(loop.losses) < options.steps:
            loss = loop.step()
            bar.update(task, advance=1, description=f"training, loss {loss:.3f}")
            if len(loop.losses) % options.save_every == 0 or len(loop.losses) == options.steps:
                trainer.save(checkpoint, json.dumps({"description": description, "losses": loop.losses}).encode())
    seconds = time.monotonic() - started
    adapter = pack(trainer, bundle, options.scales)
    save_folder(adapter, options.output / "adapter")
    bundle = install_packed(bundle, options.adapter, trainer, adapter)
    report(loop, options, adapter, description, seconds / max(1, options.steps - resumed), bundle)


def report(
    loop: Loop,
    options: argparse.Namespace,
    adapter: PackedAdapter,
    description: dict[str, Any],
    seconds: float,
    bundle: Bundle,
) -> None:
    """Every loss into the report; where the adapter lies and how to use it to the user."""
    record = {"description": description, "losses": loop.losses, "seconds_per_step": seconds, "bytes": adapter.nbytes}
    with new_file(options.output / REPORT_NAME) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
    few = max(1, min(10, options.steps // 4))
    first, last = (sum(part) / few for part in (loop.losses[:few], loop.losses[-few:]))
    out = console()
    out.print(
        f"{options.steps} steps, {seconds:.2f} s each; loss {first:.3f} (mean of the first {few}) -> {last:.3f} "
        f"(of the last {few})",
        soft_wrap=True,
    )
    entry = bundle.adapter(options.adapter)
    out.print(
        f"{bundle.folder / entry.file}: {entry.file_bytes:,} bytes; {options.output / 'adapter'}: {entry.bytes:,} "
        f"bytes of signs and {entry.scale_code} scales",
        soft_wrap=True,
    )
    out.print(
        f'next: python -m lordba.run {bundle.folder} --adapter {options.adapter} --prompt "Once upon a time"',
        soft_wrap=True,
    )


if __name__ == "__main__":
    run_command(main)
