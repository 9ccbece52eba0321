"""Measure what training an adapter costs: saved activations, adapter state, the process's peak, and time per step.

    python benchmarks/memory.py --json FILE          one layer, and SmolLM2-135M with all linears: about 8 minutes
    python benchmarks/memory.py --quick              the layer alone: seconds

Saved activations are counted by storage in autograd's own hooks, parameters left out. Peaks are of one process for each
method; steps are timed in turns, in one process.
"""

import argparse
import copy
import functools
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lordba.console import console, progress_bar, quiet_libraries, run_command, table
from lordba.errors import LordbaError
from lordba.files import new_file

quiet_libraries()

import torch  # noqa: E402
from contest.native import describe_machine  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lordba.conversion.admm import signs  # noqa: E402
from lordba.layers import linear_size  # noqa: E402
from lordba.models import load_base  # noqa: E402
from lordba.training.optim import Lion8bit  # noqa: E402
from lordba.training.ste import implied_scales  # noqa: E402
from lordba.training.tuner import LordbaConfig  # noqa: E402

R = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYER = 1024  # d_in and d_out of the one layer
BASELINE = "lora_bf16"


class NaiveSte(nn.Module):
    """The formula as inference reads it, scales on activations, left to autograd with straight-through signs."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        d_in, d_out = linear_size(base) or (0, 0)
        self.a = nn.Parameter(torch.randn(R, d_in).bfloat16())
        self.b = nn.Parameter(torch.zeros(d_out, R).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        a, b = (signs(m) + (m - m.detach()) for m in (self.a, self.b))
        s_in, s_mid, s_out = (s.to(x.dtype) for s in implied_scales(self.a, self.b, 1.0))
        return self.base(x) + (((x * s_in) @ a.t() * s_mid) @ b.t()) * s_out


def naive(model: nn.Module) -> nn.Module:
    """Every target layer with a NaiveSte around it."""
    model.requires_grad_(False)
    for path, layer in list(model.named_modules()):
        if path.endswith(tuple(TARGETS)):
            model.set_submodule(path, NaiveSte(layer))
    return model


def with_peft(config: type, half: bool = True) -> Callable[[nn.Module], nn.Module]:
    """PEFT's own way; half: the adapter is in bfloat16 as the base is, else in PEFT's default, float32."""

    def build(model: nn.Module) -> nn.Module:
        settings = config(r=R, lora_alpha=R, target_modules=TARGETS)
        return get_peft_model(model, settings, autocast_adapter_dtype=not half)

    return build


@dataclass(frozen=True)
class Method:
    """How a method puts its adapter into a bfloat16 model, and what optimizes it."""

    build: Callable[[nn.Module], nn.Module]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW


METHODS = {
    "lora_bf16": Method(with_peft(LoraConfig)),
    "lora_fp32": Method(with_peft(LoraConfig, half=False)),
    "naive_ste": Method(naive),
    "lordba": Method(with_peft(LordbaConfig)),
    "lordba_fp32": Method(with_peft(LordbaConfig, half=False)),
    "lordba_lowmem": Method(with_peft(LordbaConfig), Lion8bit),
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class OneLayer(nn.Module):
    """One linear layer as a model of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(LAYER, LAYER, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def saved_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Bytes of all storages that autograd keeps for the backward pass, those of parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t  # the reference keeps the address from being used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss(model)
    return sum(t.untyped_storage().nbytes() for address, t in seen.items() if address not in own)


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Parameters, gradients and optimizer state of what is trained; call it between backward and zero_grad."""
    parameters = trainable(model)
    state = (t for of in optimizer.state.values() for t in of.values() if isinstance(t, Tensor))
    return sum(p.nbytes + (0 if p.grad is None else p.grad.nbytes) for p in parameters) + sum(t.nbytes for t in state)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[nn.Module], Tensor]) -> None:
    """One step; its gradients stay until the next."""
    optimizer.zero_grad()
    torch.autograd.backward(loss(model))
    optimizer.step()


def measure_once(model: nn.Module, method: Method, loss: Callable[[nn.Module], Tensor]) -> dict[str, int]:
    """Bytes that two steps need."""
    optimizer = method.optimizer(trainable(model))
    for _ in range(2):
        step(model, optimizer, loss)
    return {"saved_activation_bytes": saved_bytes(model, loss), "adapter_state_bytes": state_bytes(model, optimizer)}


def one_layer(tokens: int) -> list[dict[str, Any]]:
    """Rows of the single layer; its input x counts, as the layer before needs none of it."""
    x = torch.randn(1, tokens, LAYER).bfloat16().requires_grad_()
    rows = []
    for name, method in METHODS.items():
        model = method.build(OneLayer().bfloat16()).train()
        found = measure_once(model, method, lambda model: model(x).sum())
        beyond = found["saved_activation_bytes"] - x.nbytes
        unmeasured = {"peak_bytes": None, "step_ms": None}  # too small to tell
        rows.append({"scope": "layer", "method": name, **found, "saved_beyond_x_bytes": beyond, **unmeasured})
    return rows


def token_loss(tokens: int) -> Callable[[nn.Module], Tensor]:
    """The loss of a causal LM on random tokens."""
    ids = torch.randint(10, 300, (1, tokens), generator=torch.Generator().manual_seed(0))
    return lambda model: model(input_ids=ids, labels=ids).loss


def base_model(source: str | None) -> Any:
    return load_base(source).model.bfloat16()


def child(name: str, source: str | None, tokens: int) -> dict[str, int]:
    """What one method needs, in a process of its own."""
    model = base_model(source)
    loss = token_loss(tokens)
    if name == "none":  # what the base alone keeps, so that the adapters' part is known
        model.requires_grad_(False).get_input_embeddings().register_forward_hook(lambda m, i, y: y.requires_grad_())
        return {"saved_activation_bytes": saved_bytes(model.train(), loss)}
    method = METHODS[name]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: loading in float32 took more
    model = method.build(model).train()
    optimizer = method.optimizer(trainable(model))
    for _ in range(3):
        step(model, optimizer, loss)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {**measure_once(model, method, loss), "peak_bytes": int(peak[1]) * 1024 if peak else 0}


def in_child(name: str, options: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, __file__, "--child", name, "--tokens", str(options.tokens)]
    command += ["--model", options.model] if options.model else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LordbaError(f"measuring {name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def step_times(source: str | None, tokens: int, rounds: int, told: Callable[[], None]) -> dict[str, list[float]]:
    """Milliseconds of each method's steps, taken in turns over one base."""
    base, loss = base_model(source), token_loss(tokens)
    runs: dict[str, Callable[[], None]] = {}
    for name, method in METHODS.items():
        model: nn.Module = copy.deepcopy(base)
        for own, shared in zip(model.parameters(), base.parameters(), strict=True):
            own.data = shared.data
        model = method.build(model).train()
        optimizer = method.optimizer(trainable(model))
        runs[name] = functools.partial(step, model, optimizer, loss)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if i:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - started))
            told()
    return times


def whole_model(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the model with every linear layer adapted."""
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=1 + len(METHODS) * (2 + options.rounds))
        told = lambda: bar.advance(task)  # noqa: E731
        base = in_child("none", options)["saved_activation_bytes"]
        told()
        rows = []
        for name in METHODS:
            found = in_child(name, options)
            rows.append({"scope": "model", "method": name, **found, "base_saved_activation_bytes": base})
            told()
        times = step_times(options.model, options.tokens, options.rounds, told)
    for row in rows:
        own, ref = times[str(row["method"])], times[BASELINE]
        low, median, high = statistics.quantiles([a / b for a, b in zip(own, ref, strict=True)], n=4)
        row |= {"step_ms": statistics.median(own), "step_ratio": median, "step_ratio_quartiles": [low, high]}
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """One table for each scope; ratios are to PEFT's bfloat16 LoRA."""
    for scope in ("layer", "model"):
        part = [row for row in rows if row["scope"] == scope]
        if not part:
            continue
        ref = next(row for row in part if row["method"] == BASELINE)
        lines = []
        for row in part:
            saved, beside = row["saved_activation_bytes"], row.get("base_saved_activation_bytes", 0)
            total = saved - beside + row["adapter_state_bytes"]
            ref_total = ref["saved_activation_bytes"] - beside + ref["adapter_state_bytes"]
            cells = [
                f"{saved / 2**20:.2f}",
                f"{(saved - beside) / 2**20:.2f}",
                f"{row['adapter_state_bytes'] / 2**20:.2f}",
            ]
            cells += [f"{row['adapter_state_bytes'] / ref['adapter_state_bytes']:.3f}", f"{total / ref_total:.3f}"]
            if scope == "model":
                cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{row['peak_bytes'] / ref['peak_bytes']:.3f}"]
                cells += [f"{row['step_ms']:.0f}", f"{row['step_ratio']:.3f}"]
            lines.append([row["method"], *cells])
        columns = ["MiB", "saved", "adapter's", "state", "state x", "both x"]
        columns += ["peak", "peak x", "step ms", "step x"] if scope == "model" else []
        console().print(table(f"{scope}: x is the ratio to {BASELINE}", columns, lines))


def parse() -> argparse.Namespace:
    """The command line."""
    description, _, examples = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write machine, conditions and rows")
    add("--model", metavar="MODEL", help="as for lordba.export (default: SmolLM2-135M-Instruct)")
    add("--tokens", type=int, default=512, metavar="T", help="tokens per step (default: %(default)s)")
    add("--rounds", type=int, default=9, help="timed steps of each method (default: %(default)s)")
    add("--quick", action="store_true", help="the single layer alone")
    add("--child", choices=["none", *METHODS], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    if options.child:
        print(json.dumps(child(options.child, options.model, options.tokens)))
        return
    rows = one_layer(options.tokens) + ([] if options.quick else whole_model(options))
    show(rows)
    if options.json:
        conditions = {
            "tokens": options.tokens,
            "r": R,
            "layer": LAYER,
            "model": options.model or "SmolLM2-135M-Instruct",
        }
        conditions |= {"threads": torch.get_num_threads()}
        conditions["versions"] = {name: version(name) for name in ("torch", "peft", "transformers", "lordba")}
        with new_file(options.json) as path:
            report = {"machine": describe_machine(), "conditions": conditions, "rows": rows}
            path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
