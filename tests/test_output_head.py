"An output head that is trained: loss and gradients are those of the model's own logits."

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.testing import assert_close

from icl_distill.data.alignment import Aligned, pack
from icl_distill.core.config import LoraConfig, load_config
from icl_distill.objectives.sums import SUMS
from icl_distill.models.loading import TrainedHead, add_lora, adapter_off, frozen_head, trained_head
from icl_distill.models.teacher import Teacher
from icl_distill.testing import tiny_model
from icl_distill.training.setup import _head
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step

PAD = 0
ARCHITECTURES = dict(
    granite=dict(logits_scaling=8.0),
    cohere=dict(logit_scale=0.0625),
    gemma2=dict(final_logit_softcapping=3.0),
    llama={},
)
kinds = pytest.mark.parametrize("kind", ARCHITECTURES)


def tiny(kind):
    sizes = dict(vocab_size=90, intermediate_size=48, initializer_range=0.3, pad_token_id=PAD)
    return tiny_model(kind, **sizes, **ARCHITECTURES[kind])


def with_adapter(kind, *modules):
    model = add_lora(tiny(kind), LoraConfig(r=4, dropout=0.0, target_modules=list(modules)))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    return model


def examples():
    torch.manual_seed(1)

    def ids(n):
        return torch.randint(3, 90, (n,)).tolist()

    context = ids(9)
    rests = [(ids(n), a) for n, a in ((9, 4), (7, 2), (11, 6))]
    return [Aligned(str(i), r, context + r, a, "c") for i, (r, a) in enumerate(rests)]


def config(tmp_path):
    more = ["teacher.top_k=16", "loss.weight=0.5", "train.batch_size=3"]
    return load_config("quickstart", [f"run={tmp_path}", *more])


def logits_of(model, rows, n_answers):
    "The model's own, of whole sequences; at the positions that predict the answers."
    packed = pack(rows, n_answers, PAD)
    inputs = dict(input_ids=packed.input_ids, attention_mask=packed.attention_mask)
    logits = model(**inputs, position_ids=packed.position_ids).logits
    return logits[packed.rows, packed.cols].float(), packed.labels


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def by_brute_force(model, batch, cfg):
    n_answers = [a.n_answer for a in batch]
    with adapter_off(model):
        teacher, _ = logits_of(model, [a.teacher_ids for a in batch], n_answers)
    student, labels = logits_of(model, [a.student_ids for a in batch], n_answers)
    top = teacher.topk(cfg.teacher.top_k, dim=-1)
    ce = nn.functional.cross_entropy(student, labels, reduction="sum")
    distill = (student.gather(1, top.indices) - top.values).square().mean(-1).sum()
    model.zero_grad()
    ((ce + cfg.loss.weight * distill) / len(labels)).backward()
    return ce.detach(), distill.detach(), gradients(model)


@kinds
def test_loss_and_gradients_are_of_the_models_own_logits(kind, tmp_path):
    model, cfg, batch = with_adapter(kind, "q_proj", "lm_head"), config(tmp_path), examples()
    assert cfg.loss.kind == "mse"
    head = _head(model, cfg, main=False)
    assert isinstance(head, TrainedHead)
    ce, distill, want = by_brute_force(model, batch, cfg)
    model.zero_grad()
    teacher = Teacher(model, head, PAD, cfg.teacher.top_k)
    sums = backward_step(
        Learner(Student(model), teacher, head, Accelerator(cpu=True), cfg.loss, PAD), [batch]
    )
    got = gradients(model)
    assert_close(sums[SUMS.index("ce")], ce, rtol=1e-5, atol=1e-4)
    assert_close(sums[SUMS.index("distill")], distill, rtol=1e-5, atol=1e-4)
    assert any("lm_head" in name and grad.abs().max() > 0 for name, grad in want.items())
    for name in want:
        scale = want[name].abs().max().item()
        assert_close(got[name], want[name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2"])
def test_scale_and_cap_are_no_trifle(kind, tmp_path):
    "The same step with the bare module for a head is another model's: the test above can fail."
    model, cfg, batch = with_adapter(kind, "q_proj", "lm_head"), config(tmp_path), examples()
    ce, _, _ = by_brute_force(model, batch, cfg)
    bare = model.get_base_model().get_output_embeddings()
    learner = Learner(Student(model), None, bare, Accelerator(cpu=True), cfg.loss, PAD)
    sums = backward_step(learner, [batch])
    assert abs(sums[SUMS.index("ce")] - ce) > 0.1 * ce


@kinds
def test_trained_and_frozen_heads_agree(kind):
    "Without an adapter the trained head is the frozen one, to the bit; with one, none is frozen."
    model = with_adapter(kind, "q_proj")
    hidden = torch.randn(5, 32)
    assert torch.equal(trained_head(model)(hidden), frozen_head(model)(hidden))
    assert frozen_head(with_adapter(kind, "lm_head")) is None
