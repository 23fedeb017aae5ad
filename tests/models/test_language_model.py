"""Logits at the target positions against a full forward pass, and models inside their wrappers."""

import helpers.slow_language as slow
import pytest
import torch
from helpers.slow_language import CAUSAL, KINDS, SIZES, base_model, batches, logits_of, rows, task_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from pm_hf import InputError, estimate_curvature
from pm_hf.models.contexts import logits_only_at
from pm_hf.models.language_model import has_token_targets, soft_cross_entropy, target_logits, target_mask
from pm_hf.models.sharded import transformer_of, unwrapped

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def models():
    return {kind: task_model(kind).eval() for kind in KINDS}


def compiled(model):
    """Compiled without a code generator."""
    return torch.compile(model, backend="eager")


@pytest.fixture
def group():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# ---- logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", [0, 3])
def test_logits_are_those_of_a_full_forward_of_each_example_alone(models, kind, extra):
    model, examples = models[kind], rows(kind, SIZES)
    found, tokens, example = target_logits(model, batches(examples, len(examples), extra)[0])
    alone = [logits_of(model, row) for row in examples]
    torch.testing.assert_close(found, torch.cat([logits for logits, _ in alone]), rtol=1e-4, atol=1e-5)
    assert torch.equal(tokens, torch.cat([targets for _, targets in alone]))
    assert example.tolist() == [i for i, (_, targets) in enumerate(alone) for _ in targets]


@pytest.mark.parametrize("kind", KINDS)
def test_their_cross_entropy_is_the_models_own_loss(models, kind):
    batch = batches(rows(kind, SIZES), len(SIZES))[0]
    logits, tokens, _ = target_logits(models[kind], batch)
    own = models[kind](**batch).loss
    torch.testing.assert_close(nn.functional.cross_entropy(logits, tokens), own, rtol=1e-4, atol=1e-5)


def test_soft_cross_entropy_takes_the_other_tokens_as_one_event():
    torch.manual_seed(0)
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[3, 5, 8], [0, 0, 0], [1, 0, 0], [7, 2, 0]])
    weights = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.4, 0.0, 0.0], [0.3, 0.3, 0.1]], dtype=torch.float64)
    found = soft_cross_entropy(logits, tokens, weights)
    p = logits.softmax(1)
    expected = [
        -(0.5 * p[0, 3].log() + 0.25 * p[0, 5].log() + 0.25 * p[0, 8].log()),
        -p[1, 0].log(),
        -(0.4 * p[2, 1].log() + 0.6 * (1 - p[2, 1]).log()),
        -(0.3 * p[3, 7].log() + 0.3 * p[3, 2].log() + 0.1 * p[3, 0].log()),
    ]
    expected[3] = expected[3] - 0.3 * (1 - p[3, 7] - p[3, 2] - p[3, 0]).log()
    torch.testing.assert_close(found, torch.stack(expected))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    (reference,) = torch.autograd.grad(torch.stack(expected).sum(), logits)
    torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_embedding_sees_the_target_positions_only(models, kind):
    batch, seen = batches(rows(kind, SIZES), len(SIZES))[0], []
    head = transformer_of(models[kind]).get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, output: seen.append(tuple(output.shape)))
    target_logits(models[kind], batch)
    models[kind](**batch)
    handle.remove()
    whole = (*batch["labels"].shape, slow.WORDS)
    assert seen == [(1, sum(after for _, after in SIZES), slow.WORDS), whole], "and all of them afterwards"


def test_the_first_token_of_a_causal_model_is_no_target(models):
    """Nothing predicts it, whatever its label."""
    row = rows("llama", [(0, 4)])
    logits, tokens, example = target_logits(models["llama"], batches(row, 1)[0])
    assert len(logits) == len(example) == 3
    assert torch.equal(tokens, row[0]["labels"][1:])


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_without_targets_has_no_logits(models, kind):
    batch = batches(rows(kind, [(3, 2), (2, 3)]), 2)[0]
    batch["labels"][0] = -100
    logits, _, example = target_logits(models[kind], batch)
    assert set(example.tolist()) == {1}
    batch["labels"][1] = -100
    logits, tokens, example = target_logits(models[kind], batch)
    assert (logits.shape, len(tokens), len(example)) == ((0, slow.WORDS), 0, 0)


def test_the_mask_marks_where_a_token_is_predicted():
    labels = torch.tensor([[-100, -100, 5, 6], [4, 5, -100, -100]])
    shifted = [[False, True, True, False], [True, False, False, False]]
    assert target_mask(labels, shifted=True).tolist() == shifted
    assert target_mask(labels, shifted=False).tolist() == [[False, False, True, True], [True, True, False, False]]


def test_the_hook_goes_with_an_error(models):
    head = transformer_of(models["llama"]).get_output_embeddings()
    wrong = {"input_ids": torch.full((2, 3), 10_000), "labels": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(IndexError):
        target_logits(models["llama"], wrong)
    assert not head._forward_pre_hooks


def test_a_model_without_an_output_embedding_is_no_language_model():
    width = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(**width, vocab_size=9))
    with (
        pytest.raises(InputError, match="BertModel has no output embedding, so it is no language model"),
        logits_only_at(model, torch.ones(1, 2).bool()),
    ):
        pass


def test_labels_of_two_dimensions_are_tokens():
    assert has_token_targets({"labels": torch.zeros(3, 4)})
    assert not has_token_targets({"labels": torch.zeros(3)})


# ---- wrappers


def test_wrappers_come_off_however_they_are_nested(models, group):
    model, inner = models["llama"], models["llama"].get_base_model()
    parallel = nn.parallel.DistributedDataParallel
    for wrap in (
        lambda m: m,
        compiled,
        parallel,
        lambda m: compiled(parallel(m)),
        lambda m: parallel(compiled(m)),
    ):
        assert unwrapped(wrap(model)) is model
        assert transformer_of(wrap(model)) is inner
    assert transformer_of(inner) is transformer_of(compiled(inner)) is inner


def test_a_compiled_model_inside_peft_is_unwrapped():
    inner = base_model("llama")
    model = get_peft_model(compiled(inner), LoraConfig(target_modules=["q_proj"]))
    assert transformer_of(model) is inner


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_parallel_model_has_the_same_logits_and_the_same_curvature(models, kind, group):
    model, data = models[kind], batches(rows(kind, SIZES), 4)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for batch in data:
        assert torch.equal(target_logits(wrapped, batch)[0], target_logits(model, batch)[0])
    plain, found = (estimate_curvature(m, data, adapter="task", kind="factored") for m in (model, wrapped))
    assert plain.S.keys() == found.S.keys()
    assert all(torch.equal(plain.S[name], value) for name, value in found.S.items())


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_compiled_model_has_the_same_curvature(models, kind):
    data = batches(rows(kind, SIZES), 4)
    plain, found = (estimate_curvature(m, data, adapter="task") for m in (models[kind], compiled(models[kind])))
    assert plain.S.keys() == found.S.keys()
    assert all(torch.equal(plain.S[name], value) for name, value in found.S.items())
