"""LoRDBA in PEFT: what a trained model computes, keeps, hands over and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_adapter, random_module, smollm2_missing, some_tokens, tiny_model
from loras import random_lora
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lordba
from lordba.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, load_adapter, save_adapter
from lordba.convert import convert_lora
from lordba.errors import LordbaError
from lordba.lora import LoraAdapter, to_lora, write_lora
from lordba.models import fingerprint, load_base
from lordba.scales import ScaleCode
from lordba.training.tuner import LordbaConfig, lordba_layers, start_from

IDS = torch.tensor([some_tokens(20), some_tokens(20, seed=1)])


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model.eval()(input_ids=ids).logits


def steps(model: nn.Module, n: int = 4, ids: Tensor = IDS, rate: float = 1e-2) -> list[float]:
    """Losses of a few steps of AdamW on one batch, in the model's own mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(n):
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tuned(family: str = "llama", seed: int = 0, train: int = 4, **config) -> PeftModel:
    """A tiny model whose adapter was trained for a few steps."""
    torch.manual_seed(seed)
    quiet = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}  # no dropout
    model = get_peft_model(
        tiny_model(family, **quiet), LordbaConfig(**({"r": 4, "target_modules": "all-linear"} | config))
    )
    steps(model.train(), train)
    return model


@pytest.fixture(scope="module")
def trained() -> PeftModel:
    """Tests must not write to it."""
    return tuned()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_new_adapter_changes_nothing_and_training_helps(family):
    model = get_peft_model(tiny_model(family), LordbaConfig(r=4, target_modules="all-linear", fan_in_fan_out=True))
    assert torch.equal(logits(model), logits(tiny_model(family)))
    losses = steps(model.train())
    assert losses[-1] < losses[0] - 0.5
    lora = get_peft_model(tiny_model(family), LoraConfig(r=4, target_modules="all-linear"))
    shapes = [
        {name.replace("lora_", "lordba_"): p.shape for name, p in m.named_parameters() if p.requires_grad}
        for m in (lora, model)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_with_fp32_scales_computes_bit_for_bit_what_was_trained(family, tmp_path):
    model = tuned(family, use_rslora=True, lora_alpha=12, rank_pattern={r"layers.1.mlp.up_proj|h.0.\w+.c_attn": 3})
    with torch.no_grad():
        wanted = model.train()(input_ids=IDS).logits
    assert torch.equal(logits(model), wanted)
    lordba.pack(model, tmp_path, scales="fp32")
    base = tiny_model(family)
    adapter = load_adapter(tmp_path)
    assert adapter.base_fingerprint == fingerprint(base)
    lordba.attach(base, adapter)
    assert torch.equal(logits(base), wanted)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(family), tmp_path)), wanted)
    first = next(iter(adapter.modules.values()))
    first.b_signs[0] ^= 1  # negative control: one sign
    lordba.attach(base, adapter)
    assert not torch.equal(logits(base), wanted)


def test_packed_computes_what_was_trained_in_bfloat16(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model().bfloat16(), LordbaConfig(r=4, target_modules="all-linear"))
    losses = steps(model.train())
    assert losses[-1] < losses[0] - 0.3
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    lordba.pack(model, tmp_path, scales="fp32")
    assert load_adapter(tmp_path).base_fingerprint is None  # a cast base cannot know
    frozen = PeftModel.from_pretrained(tiny_model().bfloat16(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(frozen), logits(model))  # eval computes as the op does
    with torch.no_grad():
        fast = model.train()(input_ids=IDS).logits
    assert (fast - logits(model)).norm() < 0.02 * logits(model).norm()


@pytest.mark.parametrize("code, limit", [("fp16", 2e-3), ("int8", 2e-2), ("log4", 0.1)])
def test_other_scale_codes_come_near(trained, code, limit, tmp_path):
    lordba.pack(trained, tmp_path, scales=code)
    base, model = logits(tiny_model()), tiny_model()
    lordba.attach(model, load_adapter(tmp_path))
    wanted = logits(trained) - base
    assert (logits(model) - base - wanted).norm() < limit * wanted.norm()


def test_latents_are_saved_and_loaded(trained, tmp_path):
    trained.save_pretrained(str(tmp_path))
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), logits(trained))
    with pytest.raises(LordbaError, match=r"latents.*lordba\.pack"):
        load_adapter(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), logits(trained))
    assert steps(again.train())[-1] < steps(tuned(train=0).train())[-1]


def test_transformers_own_loader_computes_the_same_or_refuses(trained, tmp_path):
    trained.save_pretrained(str(tmp_path / "latents"))
    lordba.pack(trained, tmp_path / "packed", scales="fp32")
    model = tiny_model()
    model.load_adapter(str(tmp_path / "latents"))
    assert torch.equal(logits(model), logits(trained))
    other = tiny_model()
    with pytest.raises(LordbaError, match="never loaded"):
        other.load_adapter(str(tmp_path / "packed"))
        logits(other)


@pytest.mark.parametrize("only", [(), ("q_proj", "0.mlp.down_proj")])
def test_a_packed_adapter_goes_on_training(only, tmp_path):
    """Also one that leaves out layers which its target_modules name, with ranks of its own."""
    adapter = random_adapter(tiny_model(), r=3, code=ScaleCode.FP32, only=only)
    modules = dict(adapter.modules)
    modules["model.layers.0.self_attn.q_proj"] = random_module(64, 64, 7, ScaleCode.FP32)
    save_adapter(Adapter(modules, ScaleCode.FP32), tmp_path / "packed")
    base = tiny_model()
    lordba.attach(base, load_adapter(tmp_path / "packed"))
    frozen = PeftModel.from_pretrained(tiny_model(), tmp_path / "packed")
    assert torch.equal(logits(frozen), logits(base))
    assert not [name for name, p in frozen.named_parameters() if p.requires_grad]
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "packed", is_trainable=True)
    torch.testing.assert_close(logits(model), logits(base), atol=1e-4, rtol=0)
    losses = steps(model.train())
    assert losses[-1] < losses[0]
    model.save_pretrained(str(tmp_path / "latents"))
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "latents")
    assert torch.equal(logits(again), logits(model))
    lordba.pack(frozen, tmp_path / "copy", scales="fp32")
    assert (tmp_path / "copy" / WEIGHTS_NAME).read_bytes() == (tmp_path / "packed" / WEIGHTS_NAME).read_bytes()


def test_adapters_side_by_side(trained, tmp_path):
    trained.save_pretrained(str(tmp_path / "one"))
    lordba.pack(tuned(seed=1), tmp_path / "two", scales="fp32")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "one", adapter_name="one")
    model.load_adapter(str(tmp_path / "two"), adapter_name="two")
    first = logits(model)
    assert torch.equal(first, logits(trained))
    model.set_adapter("two")
    second = logits(model)
    assert torch.equal(second, logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "two")))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model()))
    model.base_model.set_adapter(["one", "two"])  # both at once: their terms add up
    assert not torch.equal(logits(model), first) and not torch.equal(logits(model), second)
    model.base_model.set_adapter("one")
    model.delete_adapter("two")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), logits(tiny_model()))


def test_gradients_pass_a_frozen_adapter(trained, tmp_path):
    """A packed adapter below changes what reaches the one that is trained above it, as its latents would."""
    lordba.pack(trained, tmp_path / "packed", scales="fp32")
    trained.save_pretrained(str(tmp_path / "latents"))
    grads = []
    for name in ("packed", "latents"):
        model = PeftModel.from_pretrained(tiny_model(), tmp_path / name, adapter_name="one")
        torch.manual_seed(0)
        model.add_adapter("two", LordbaConfig(r=2, target_modules=["q_proj"]))
        model.base_model.set_adapter(["one", "two"])
        two = [p.requires_grad_() for n, p in model.named_parameters() if ".two." in n]
        grads.append(torch.autograd.grad(model.train()(input_ids=IDS, labels=IDS).loss, two))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert any(grad.any() for grad in grads[0])


def test_only_the_active_adapter_is_trained():
    model = tuned()
    model.add_adapter("other", LordbaConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    before = {name: p.clone() for name, p in model.named_parameters()}
    steps(model.train())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".other." in name for name in changed)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = tuned(train=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.autograd.backward(model(input_ids=IDS, labels=IDS).loss)
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_trains_close_to_float32():
    grads = []
    for enabled in (False, True):
        model = tuned(train=2).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(input_ids=IDS, labels=IDS).loss
        torch.autograd.backward(loss)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert grads[1].dtype == torch.float32
    assert 0 < (grads[0] - grads[1]).norm() < 0.05 * grads[0].norm()


def test_dropout_is_off_in_evaluation(tmp_path):
    model = tuned(lora_dropout=0.5)
    model.train()
    assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    wanted = logits(model)
    lordba.pack(model, tmp_path, scales="fp32")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), wanted)


def test_further_modules_are_kept_with_the_latents_but_cannot_be_packed(tmp_path):
    model = tuned(modules_to_save=["lm_head"], target_modules=["q_proj"])
    model.save_pretrained(str(tmp_path / "latents"))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "latents")), logits(model))
    with pytest.raises(LordbaError, match="lm_head"):
        lordba.pack(model, tmp_path / "packed")


def test_the_trainer_trains_saves_and_resumes(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in torch.tensor([some_tokens(12, seed=i) for i in range(24)])]

    def trainer(model: PeftModel, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, save_steps=3, report_to="none",
            logging_steps=1, disable_tqdm=True, use_cpu=True, learning_rate=1e-2, lr_scheduler_type="constant",
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=data)

    whole = tuned(train=0)
    trainer(whole, 6).train()
    again = tuned(train=0, seed=1)  # other latents: everything comes from the checkpoint
    trainer(again, 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(logits(again), logits(whole))
    assert not torch.equal(logits(whole), logits(tiny_model()))


def test_an_adapter_made_by_conversion_starts_the_training():
    adapter = random_adapter(tiny_model(), r=5)
    base = tiny_model()
    lordba.attach(base, adapter)
    model = tuned(train=0, target_modules=sorted(adapter.modules))
    start_from(model, adapter)
    torch.testing.assert_close(logits(model), logits(base), atol=1e-4, rtol=0)
    with pytest.raises(LordbaError, match="down_proj"):
        start_from(tuned(train=0, target_modules=["q_proj"]), adapter)


def signs_of(model: PeftModel) -> Tensor:
    latents = [latent for layer in lordba_layers(model).values() for latent in layer.latents("default")]
    return torch.cat([latent.flatten() for latent in latents]) > 0


def test_with_the_lora_beside_its_conversion_training_flips_signs_sooner():
    sizes = {path: (m.d_out, m.d_in) for path, m in random_adapter(tiny_model(), r=4).modules.items()}
    lora = LoraAdapter({path: random_lora(*size, 4, seed=i) for i, (path, size) in enumerate(sizes.items())})
    adapter = convert_lora(lora, scale_code="fp32")[0]
    start, flipped, values = [], [], []
    for known in (None, lora):
        model = tuned(train=0, target_modules=sorted(adapter.modules))
        start_from(model, adapter, lora=known)
        start.append(signs_of(model))
        values.append(logits(model))
        steps(model.train(), rate=1e-3)
        flipped.append((signs_of(model) != start[-1]).float().mean().item())
    assert torch.equal(*start)
    torch.testing.assert_close(*values, atol=1e-4, rtol=0)
    assert flipped[1] > 0.01 and flipped[1] > 3 * flipped[0]
    for foreign in (LoraAdapter({}), LoraAdapter(lora.modules | {"model.layers.0.mlp.up_proj": random_lora(8, 8, 4)})):
        with pytest.raises(LordbaError, match="made of, or none"):
            start_from(tuned(train=0, target_modules=sorted(adapter.modules)), adapter, lora=foreign)


STOCK = """
import sys
from pathlib import Path
import torch
from conftest import tiny_model
assert "lordba.training.tuner" not in sys.modules
from peft import LoraConfig, PeftModel
for load in (lambda f: PeftModel.from_pretrained(tiny_model(), f), lambda f: tiny_model().load_adapter(f),
             lambda f: LoraConfig.from_pretrained(f)):
    try:
        load(sys.argv[1])
    except Exception as error:
        assert "LORDBA" in repr(error), repr(error)
        print("refused")
from safetensors import safe_open
print(*[name for name in safe_open(sys.argv[1] + "/adapter_model.safetensors", "pt").keys() if "lora_" in name])
"""


def test_peft_without_lordba_refuses_latents(trained, tmp_path):
    trained.save_pretrained(str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", STOCK, tmp_path], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"] * 3  # and no tensor has a name that a LoRA's reader looks for


def test_lordba_needs_no_peft():
    code = "import sys; sys.modules['peft'] = None; import lordba, lordba.convert; lordba.LordbaConfig"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "LordbaError" in done.stderr and "lordba[train]" in done.stderr


def test_what_cannot_be_trained_is_refused(trained, tmp_path):
    for bad in ({"r": 0}, {"bias": "all"}, {"lora_dropout": 1.0}, {"rank_pattern": {"q_proj": 0}}):
        with pytest.raises(LordbaError, match="LordbaConfig"):
            LordbaConfig(**bad)
    for bad in ({"format_version": 2, "scale_code": "log4"}, {"format_version": 1, "scale_code": "log2"}):
        with pytest.raises(LordbaError, match="format_version"):
            LordbaConfig(**bad)
    with pytest.raises(LordbaError, match="embed_tokens"):
        tuned(target_modules=["embed_tokens"])
    with pytest.raises(LordbaError, match="never merged"):
        trained.merge_and_unload()
    with pytest.raises(LordbaError, match="no LoRDBA adapter named 'x'"):
        lordba.pack(trained, tmp_path, adapter_name="x")
    lordba.pack(trained, tmp_path / "packed")
    with pytest.raises(LordbaError, match=r"lordba\.pack"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "packed").save_pretrained(str(tmp_path / "copy"))
    with pytest.raises(LordbaError, match="uint8"):
        PeftModel.from_pretrained(tiny_model(hidden_size=128), tmp_path / "packed")
    with pytest.raises(LordbaError, match="belongs to no layer"):
        PeftModel.from_pretrained(tiny_model(num_hidden_layers=1), tmp_path / "packed")
    trained.save_pretrained(str(tmp_path / "latents"))
    with pytest.raises(LordbaError, match="has no place"):
        PeftModel.from_pretrained(tiny_model(num_hidden_layers=1), tmp_path / "latents")
    tuned(train=0, target_modules=["q_proj"]).save_pretrained(str(tmp_path / "latents"))
    with pytest.raises(LordbaError, match="is missing from"):
        PeftModel.from_pretrained(tiny_model(num_hidden_layers=3), tmp_path / "latents")


def test_a_plain_lora_is_not_taken_for_latents(tmp_path):
    write_lora(to_lora(random_adapter(tiny_model(), r=4)), tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"peft_type": "LORDBA"}))
    with pytest.raises(LordbaError, match="lora_A"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert lordba_layers(tuned(train=0))


@pytest.mark.slow
@pytest.mark.skipif(smollm2_missing() is not None, reason=f"{smollm2_missing()}")
def test_smollm2_with_all_linears_is_packed_bit_for_bit(tmp_path):
    base = load_base().model
    ids = torch.randint(3, 40_000, (1, 24), generator=torch.Generator().manual_seed(0))
    before = logits(base, ids)
    model = get_peft_model(base, LordbaConfig(r=16, target_modules="all-linear"))
    assert len(lordba_layers(model)) == 210
    losses = steps(model.train(), 3, ids)
    assert losses[-1] < losses[0] - 0.1
    wanted = logits(model, ids)
    lordba.pack(model, tmp_path, scales="fp32")
    plain = model.unload()
    assert torch.equal(logits(plain, ids), before)
    lordba.attach(plain, load_adapter(tmp_path))
    assert torch.equal(logits(plain, ids), wanted) and not torch.equal(wanted, before)
