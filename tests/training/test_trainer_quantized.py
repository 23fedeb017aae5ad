"""4-bit and 8-bit bases: perturbed steps, curvature, resuming and merging over bitsandbytes' layers."""

import logging

import pytest
import torch
from helpers.models import (
    OLD_NAME,
    ROW_LENGTH,
    Gradients,
    assert_close,
    assert_equal_states,
    batch,
    language_rows,
    lora_llama,
    multiplied_gradients,
    pin,
    quick_arguments,
    tiny_llama,
    trained_state,
)
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pm_hf import InputError, PMConfig, PMTrainer, estimate_curvature, merge_adapters
from pm_hf.adapters.folder import open_adapter
from pm_hf.models.contexts import keep_differentiable

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says that it casts to float16
pytestmark = [
    pytest.mark.filterwarnings(OLD_NAME),
    pytest.mark.filterwarnings("ignore:.*inputs will be cast from:UserWarning"),
]
WIDTH = 64  # a block of 4-bit weights
BITS = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8 bits": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(WIDTH).save_pretrained(folder)
    return folder


@pytest.fixture(params=BITS)
def base(request, checkpoint):
    """A function that loads the quantized base."""
    config = BitsAndBytesConfig(**BITS[request.param])
    return lambda: AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, device_map="cpu")


def make_trainer(folder, model, callbacks=(), **settings) -> PMTrainer:
    settings = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0} | settings
    args = quick_arguments(folder, PMConfig, **settings)
    return PMTrainer(
        model=model, args=args, train_dataset=language_rows(24), eval_dataset=language_rows(4), callbacks=[*callbacks]
    )


def layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def test_the_perturbed_gradients_are_those_of_a_model_whose_product_was_multiplied(tmp_path, monkeypatch, base):
    factors = [1.5, 0.5]
    pin(monkeypatch, *factors)
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    make_trainer(tmp_path, lora_llama(base()), [kept := Gradients()], **settings).train()
    parts = [batch(language_rows(24)[:2]), batch(language_rows(24)[2:4])]
    assert {type(layer).__name__ for layer in layers(lora_llama(base())).values()} <= {"Linear4bit", "Linear8bitLt"}
    assert_close(kept.found[0], multiplied_gradients(lora_llama(base()).train(), parts, factors), 1e-4)


def test_training_lowers_the_loss_leaves_the_base_and_resumes_bit_for_bit(tmp_path, base):
    saving = {"save_strategy": "steps", "save_steps": 20, "max_steps": 40, "learning_rate": 3e-2}
    trainer = make_trainer(tmp_path, lora_llama(base()), **saving)
    before = [layer.base_layer.weight.detach().clone() for layer in layers(trainer.model).values()]
    inputs = batch(language_rows(24))
    start = trainer.model.eval()(**inputs).loss.item()
    trainer.train()
    assert trainer.model.eval()(**inputs).loss.item() < 0.8 * start
    after = [layer.base_layer.weight for layer in layers(trainer.model).values()]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    evaluating = make_trainer(tmp_path, lora_llama(base()), eval_strategy="steps", eval_steps=10, **saving)
    evaluating.train()
    assert_equal_states(trained_state(trainer.model), trained_state(evaluating.model))
    resumed = make_trainer(tmp_path, lora_llama(base()), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert_equal_states(trained_state(trainer.model), trained_state(resumed.model))


def example_gradients(model, data) -> dict[str, torch.Tensor]:
    """Mean over examples of the squared gradient of each adapted weight, (out, in), one example at a time.

    The layer's output is y + Ex with E = 0 of the weight's shape, so the gradient of E is the weight's.
    """
    found = {}
    for name, layer in layers(model).items():
        E = torch.zeros(layer.out_features, layer.in_features, requires_grad=True)
        handle = layer.register_forward_hook(lambda _, args, output, E=E: output + args[0] @ E.T)
        squares = []
        for row in data:
            (gradient,) = torch.autograd.grad(model(**batch([row])).loss, E)
            squares.append(gradient.square())
        handle.remove()
        found[name.removeprefix("base_model.model.")] = torch.stack(squares).mean(0)
    return found


def test_the_curvature_is_the_mean_squared_gradient_of_each_example(base):
    data = language_rows(6)
    one_by_one = [batch([row]) for row in data]  # what 8 bits make of a row depends on the others in its batch
    curvature = estimate_curvature(lora_llama(base()), one_by_one, adapter="default")
    other = lora_llama(base()).eval()
    keep_differentiable(other)
    assert_close(dict(curvature.S), example_gradients(other, data))


def test_adapters_of_a_quantized_base_merge_as_any_others(tmp_path, base):
    for name in ("one", "two"):
        trainer = make_trainer(tmp_path, lora_llama(base()), seed=len(name), learning_rate=3e-2)
        trainer.train()
        trainer.save_model(str(tmp_path / name))
    merge_adapters(str(tmp_path / "two"), str(tmp_path / "out"), into=str(tmp_path / "one"), coefficient=0.25)
    one, two, merged = (open_adapter(tmp_path / name) for name in ("one", "two", "out"))
    for module in merged.scaling:
        expected = one.product(module).dense() + 0.25 * two.product(module).dense()
        torch.testing.assert_close(merged.product(module).dense(), expected, rtol=1e-5, atol=1e-6)
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "out")).eval()
    by_hand = base()
    x = torch.arange(ROW_LENGTH)[None]
    with torch.no_grad():
        found, plain = loaded(x).logits, by_hand(x).logits
    assert (found - plain).abs().max() > 0.05


def test_weights_that_let_no_gradient_pass_are_refused(tmp_path, checkpoint):
    """On CPUs with bfloat16 instructions 4-bit layers take such a layout when they are evaluated."""
    config = BitsAndBytesConfig(**BITS["4 bits"])
    model = lora_llama(AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, device_map="cpu"))
    with torch.no_grad():
        model.eval()(**batch(language_rows(2)))
    if not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in model.modules()):
        pytest.skip("this CPU has no bfloat16 instructions, the layout is not taken")
    message = "q_proj.base_layer were laid out for inference .*; load the base again"
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, model)
    with pytest.raises(InputError, match=message):
        estimate_curvature(model, [batch(language_rows(2))], adapter="default")
