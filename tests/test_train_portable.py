"""The portable training program in ExecuTorch's own TrainingModule, as the stock Android package has it."""

import pytest
import torch
from conftest import MAX_SEQ_LEN, some_tokens, tiny_model
from training_programs import R, StraightThrough, adapted_paths, eager_loss, inference_base

from lordba.export.executorch.train_program import training_program

LAYERS = 2
TOKENS = some_tokens(33)
TARGETS = [*TOKENS[1:], -100]
TARGETS[4:8] = [-100] * 4


@pytest.mark.slow  # torch's joint export and ExecuTorch's passes over it take most of a minute
def test_gradients_and_steps_equal_eager_ones(base_quant="int4"):
    from executorch.extension.training import _load_for_executorch_for_training_from_buffer, get_sgd_optimizer

    model = tiny_model(num_hidden_layers=LAYERS)
    paths = adapted_paths(model)
    made = training_program(model, "portable", paths, R, base_quant, MAX_SEQ_LEN, "sha256:ab")
    assert made.entry["form"] == "portable" and made.entry["requires"] == []
    module = _load_for_executorch_for_training_from_buffer(made.pte)
    inputs = (torch.tensor([TOKENS]), torch.tensor([TARGETS]))
    module.forward_backward("forward", inputs)
    latents = module.named_parameters()
    assert len(latents) == 2 * len(paths)
    eager = inference_base("llama", base_quant, LAYERS)
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for path in paths:
        a, b = (latents[f"model.{path}.lordba_{factor}"] for factor in "AB")
        b.copy_(0.2 * torch.randn(b.shape, generator=generator))  # the program's own memory
        layers[path] = StraightThrough(eager.get_submodule(path), a, b)
        eager.set_submodule(path, layers[path])
    learned = sum(target != -100 for target in TARGETS)
    loss = eager_loss(eager, TOKENS, TARGETS, 1 / learned)
    loss.backward()
    found = module.forward_backward("forward", inputs)[0].item()
    assert found == pytest.approx(loss.item(), rel=1e-5)
    gradients = module.named_gradients()
    for path, layer in layers.items():
        for factor, latent in zip("AB", (layer.a, layer.b), strict=True):
            gradient = gradients[f"model.{path}.lordba_{factor}"]
            assert torch.cosine_similarity(gradient.flatten(), latent.grad.flatten(), 0) > 0.9999, (path, factor)
            assert gradient.norm().item() == pytest.approx(latent.grad.norm().item(), rel=1e-3)
    # A text of another length, and steps: the losses of eager training.
    optimizer = torch.optim.SGD([p for layer in layers.values() for p in (layer.a, layer.b)], 0.3, momentum=0.9)
    inside = get_sgd_optimizer(latents, 0.3, 0.9, 0, 0, False)
    tokens = some_tokens(MAX_SEQ_LEN)
    longer = (torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]]))
    ours, theirs = [], []
    for _ in range(6):
        ours.append(module.forward_backward("forward", longer)[0].item())
        inside.step(module.named_gradients())
        loss = eager_loss(eager, tokens[:-1], tokens[1:], 1 / (MAX_SEQ_LEN - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=0.01) and ours[-1] < ours[0] - 0.2
