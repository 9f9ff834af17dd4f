"The widgets without a browser: what they show is what training uses, and the controls move it."

import html
import json
import re

import IPython.display
import pytest
import torch

from icl_distill.data.alignment import align
from icl_distill.core.config import PromptConfig
from icl_distill.core.files import InputError
from icl_distill.objectives.losses import KINDS
from icl_distill.data.contexts import Context
from icl_distill.data.prompts import Prompter
from icl_distill.data.examples import Example
from icl_distill.app.monitor import paper
from icl_distill.app.widgets import (
    alignment_html,
    explore_alignment,
    lab_losses,
    loss_lab,
    panel,
    readings,
    targets_html,
    explore_targets,
)
from icl_distill.testing import noisy_adapter, real_tokenizer, tiny_model

tok = real_tokenizer()
shots = (
    Example("a", "How many legs have 3 cats?", "3 * 4 = 12"),
    Example("b", "2 cars < 1 & 'more'?", "2 * 4 = 8"),
)
contexts = {"two": Context(shots), "none": Context()}
mine = Example("q", "What is <b>2 + 3</b>?", "2 + 3 = 5")


@pytest.fixture
def shown(monkeypatch):
    "What was displayed."
    out = []
    monkeypatch.setattr(IPython.display, "display", lambda x, **kw: out.append(x))
    for v in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(v, raising=False)
    return out


@pytest.fixture
def widget(shown, monkeypatch):
    "The controls and the text of the panel that was shown to a live notebook."
    import icl_distill.app.monitor as module

    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    monkeypatch.setattr(module, "display_live", lambda w, static: shown.append((w, static)))

    def get():
        box, static = shown[-1]
        *controls, out = box.children
        assert out.value == static
        return {c.description: c for c in controls}, out

    return get


def boxes(page):
    return [html.unescape(x) for x in re.findall(r"line-height:16px'>(.*?)</div>", page)]


def predicted(page):
    return [html.unescape(x) for x in re.findall(r"font-weight:bold'>→(.*?)</div>", page)]


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("name", contexts)
def test_alignment_page(template, name):
    "The student's tokens, the teacher's last, each answer token once per reader; no HTML typed."
    al = align(Prompter(tok, PromptConfig(template=template)), contexts[name], mine)
    page = alignment_html(tok, al)

    def show(ids):
        return [t.replace("Ġ", "·").replace("Ċ", "↵") for t in tok.convert_ids_to_tokens(ids)]

    assert predicted(page) == show(al.answer_ids) * 2 and "<b>2" not in page
    read = boxes(page)
    n = len(al.student_ids)
    assert read[:n] == show(al.student_ids)
    rest = [b for b in read[n:] if "⋯" not in b]
    assert rest == show(al.teacher_ids[-len(rest) :]) and ("⋯" in page) == (name == "two")
    if name == "none":
        assert read[n:] == read[:n]


def test_the_predicting_positions():
    "The position in front of a box that predicts is that of the packed batch's columns."
    al = align(Prompter(tok, PromptConfig(template="plain")), contexts["two"], mine)
    page = alignment_html(tok, al)
    at = [
        int(m) for m in re.findall(r"color:#222'>(\d+)</div><div[^>]*>[^<]*</div><div[^>]*>→", page)
    ]

    def cols(ids):
        return list(range(len(ids) - al.n_answer - 1, len(ids) - 1))

    assert at == cols(al.student_ids) + cols(al.teacher_ids)


def test_static_and_live_show_the_same(shown, widget):
    explore_alignment(tok, contexts, "What is 2 + 3?", "2 + 3 = 5", PromptConfig(template="plain"))
    controls, out = widget()
    assert list(controls) == ["question", "answer", "template", "context"] and "→5" in out.value
    controls["answer"].value = "It is 7"
    assert "→7" in out.value and "→5" not in out.value
    controls["context"].value = "none"
    assert "⋯" not in out.value
    controls["template"].value = "chat"
    assert "im_start" in out.value
    controls["answer"].value = " "
    assert "the answer is empty" in out.value
    controls["answer"].value = "5"
    assert "→5" in out.value


def test_without_widgets(shown):
    explore_alignment(tok, contexts, "What is 2 + 3?", "2 + 3 = 5")
    loss_lab()
    assert "class='alignment'" in shown[0].data and "data:image/png" in shown[1].data
    panel(lambda x: x, x="<i>x</i>")
    assert shown[2].data == paper("<i>x</i>")


def test_a_bundle_has_both(shown, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    monkeypatch.setattr("icl_distill.app.monitor.live", lambda: True)
    panel(lambda x: f"<p>{x}</p>", x=["a", "b"])
    assert (
        shown[0]["text/html"] == paper("<p>a</p>")
        and "application/vnd.jupyter.widget-view+json" in shown[0]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A tiny base model and a checkpoint of it."
    base = tiny_model()
    model, folder = noisy_adapter(tiny_model(), noise=0.2), tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    (folder / "checkpoint.json").write_text(
        json.dumps(dict(step=1, base_model="tiny", base_hash="0" * 16))
    )
    return base, folder, model


def test_readings(trained):
    "Three readers, against a plain forward pass; the base model is afterwards as it was."
    base, folder, model = trained
    al = align(Prompter(tok, PromptConfig(template="plain")), contexts["two"], mine)
    said = readings(base, al, folder)

    def plain(m, ids):
        with torch.no_grad():
            return (
                m(input_ids=torch.tensor([ids]))
                .logits[0, -al.n_answer - 1 : -1]
                .float()
                .log_softmax(-1)
            )

    for who, m, ids in (
        ("teacher", base, al.teacher_ids),
        ("student before", base, al.student_ids),
        ("student after", model.eval(), al.student_ids),
    ):
        torch.testing.assert_close(said[who], plain(m, ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(said["student after"], said["student before"], atol=1e-3)
    assert list(readings(base, al)) == ["teacher", "student before"] and not [
        n for n, _ in base.named_parameters() if "lora" in n
    ]
    with pytest.raises(InputError, match="no such folder"):
        readings(base, al, "gone")


def test_targets_page(trained):
    base, folder, _ = trained
    al = align(Prompter(tok, PromptConfig(template="plain")), contexts["two"], mine)
    said = readings(base, al, folder)
    page = targets_html(tok, al, said, 1, 5)
    top = said["teacher"][1].exp().topk(5)
    assert (
        page.count("<table") == 3
        and page.count("✓") == 3
        and f"{100 * top.values[0]:.1f} %" in page
    )
    assert all(w in page for w in said) and page.count("KL ") == 2


def test_target_explorer_moves(trained, widget):
    base, folder, _ = trained
    prompter = Prompter(tok, PromptConfig(template="plain"))
    explore_targets(base, prompter, contexts["two"], mine, folder)
    controls, out = widget()
    was = out.value
    controls["token"].value = 2
    assert out.value != was
    rows = out.value.count("<tr")
    controls["show"].value = 12
    assert out.value.count("<tr") > rows


def test_loss_lab(widget):
    "Only the MSE sees a shift; with neither noise nor shift all is zero."
    still, moved = (lab_losses(2.0, 64, shift, 0.5) for shift in (0.0, 3.0))
    assert (
        all(abs(still[k] - moved[k]) < 1e-3 for k in KINDS if k != "mse")
        and moved["mse"] > still["mse"] + 5
    )
    assert all(abs(v) < 1e-6 for v in lab_losses(1.0, 64, 0.0, 0.0).values())
    loss_lab()
    controls, out = widget()
    was = out.value
    for name in ("temperature", "K", "shift", "noise"):
        controls[name].value = controls[name].max
        assert out.value != was
        was = out.value
