"The model card, the adapter's folder, the way to the hub, and the report."

import dataclasses
import json
import re
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import escape

from icl_distill.app.card import (
    PROMPT_ANSWERS,
    Baked,
    card_text,
    eval_results,
    limits,
    metadata,
    recipe,
    result_notes,
    result_rows,
    write_adapter,
)
from icl_distill.app.report import SHOWN, examples, flipped, report_html, write_report
from icl_distill.app.usage import Usage, base_name, fenced, hub_id, prompt_code
from icl_distill.core.checkpoints import ADAPTER_CONFIG, seal
from icl_distill.core.config import ModelConfig, PromptConfig, load_config, replace
from icl_distill.data.contexts import Context
from icl_distill.data.prompts import Prompter
from icl_distill.testing import (
    REAL_MODEL,
    fake_bake,
    noisy_adapter,
    raises,
    real_tokenizer,
    tiny_folder,
    tiny_model,
)

BAD = "<script>alert(1)</script> & ``` {{ 1 + 1 }} {% raw %}"
HOME = "/" + "home/someone"
cfg = load_config("quickstart", ["train.steps=40", f"run={HOME}/runs/sums"])
bake, blind = fake_bake(cfg), fake_bake(cfg, labelled=False)
both = pytest.mark.parametrize("baked", [bake, blind], ids=["labelled", "unlabelled"])


def with_model(name, baked=bake, **more):
    "The bake, as if of another base model."
    model = ModelConfig(name=name, dtype="float32", **more)
    return dataclasses.replace(baked, cfg=replace(baked.cfg, model=model))


def parts(card):
    "Metadata and body of a card."
    empty, head, body = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), body


# --- what a bake is


def test_parts_must_belong_together():
    with raises("sft", "records are not given"):
        dataclasses.replace(bake, records={k: v for k, v in bake.records.items() if k != "sft"})
    with raises("test-0", "question is not given"):
        dataclasses.replace(bake, questions={})
    conditions = {k: c for k, c in bake.results.conditions.items() if k != "baked"}
    with raises("condition 'baked'", "zero_shot"):
        results = bake.results.model_copy(update=dict(conditions=conditions))
        dataclasses.replace(bake, results=results)


def test_the_rival_is_the_prompt_where_it_was_measured():
    assert (bake.rival, blind.rival) == ("few_shot", "sft")
    assert blind.results.set == PROMPT_ANSWERS and not blind.labelled and bake.labelled


# --- the card


@both
def test_metadata_are_the_hubs(baked):
    head, _ = parts(card_text(baked, "me/sums"))
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-generation"
    assert {"lora", "few-shot-distillation", "context-distillation"} <= set(head["tags"])
    assert "base_model" not in head  # pypi: is no hub id
    (model,) = head["model-index"]
    (result,) = model["results"]
    (metric,) = result["metrics"]
    assert model["name"] == "me/sums" and result["dataset"]["name"] == baked.results.set
    assert metric["value"] == pytest.approx(baked.results.conditions["baked"].accuracy, abs=5e-5)
    assert metric["type"] == ("accuracy" if baked.labelled else "agreement")


def test_further_sets_are_in_the_index():
    results = bake.results
    further = results.conditions["sft"].model_copy(update=dict(accuracy=0.25))
    conditions = dict(results.conditions)
    conditions["baked"] = conditions["baked"].model_copy(update=dict(sets={"harder": further}))
    changed = results.model_copy(update=dict(conditions=conditions))
    found = metadata(cfg, "sums", eval_results(changed, "baked")).to_dict()
    values = {
        one["dataset"]["name"]: one["metrics"][0]["value"]
        for one in found["model-index"][0]["results"]
    }
    assert values == {"test": 0.875, "harder": 0.25}


def test_the_base_model_is_named_where_it_is_on_the_hub(tmp_path):
    assert hub_id("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"
    qwen = with_model("Qwen/Qwen3-1.7B").cfg
    named = metadata(qwen, "me/sums", []).to_dict()
    assert named["base_model"] == "Qwen/Qwen3-1.7B" and "base_model_relation" not in named
    merged = metadata(qwen, "me/sums", [], True).to_dict()
    assert merged["library_name"] == "transformers" and "lora" not in merged["tags"]
    assert merged["base_model_relation"] == "finetune"
    for name in (REAL_MODEL, str(tmp_path), "./a", "~/a", "/a/b", "plain", "a/b/c"):
        assert hub_id(name) is None
        assert "base_model" not in metadata(with_model(name).cfg, "me/sums", []).to_dict()


@both
def test_the_card_has_every_condition_and_interval(baked):
    _, body = parts(card_text(baked, "me/sums"))
    for name, c in baked.results.conditions.items():
        low, high = c.ci95
        interval = f"{100 * c.accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        assert re.search(rf"\| {name} +\| +{c.n} \| +{re.escape(interval)} \|", body)
    pairs = [p for p in baked.results.paired if p.a == "baked"]
    assert len(pairs) == (2 if baked.labelled else 1)
    for p in pairs:
        low, high = p.difference_ci95
        assert f"{100 * p.difference:+.1f} points" in body
        assert f"[{100 * low:+.1f}, {100 * high:+.1f}]" in body
    assert baked.verdict in body and all(sentence in body for sentence in limits(baked))
    for count in (baked.labels.questions, baked.labels.agreed, cfg.context.n_shots):
        assert re.search(rf"\b{count}\b", body)


def test_agreement_is_never_called_accuracy():
    texts = ["\n".join([*result_rows(blind)[0], *result_notes(blind)]), report_html(blind)]
    texts.append(parts(card_text(blind, "sums"))[1])
    for text in texts:
        said = text.replace("agreement is no accuracy", "")
        assert "agreement with the prompt" in said and "accuracy" not in said.lower()
        assert "no gold answers" in said
    assert "## Accuracy" in card_text(bake, "sums") and "<h2>Accuracy</h2>" in report_html(bake)
    assert "agreement" not in report_html(bake).partition("<h2>Config")[0]


def test_no_path_is_published(tmp_path):
    folder = tiny_folder(tmp_path / "base")
    baked = with_model(str(folder))
    card = card_text(baked, "sums")
    assert str(tmp_path) not in card and HOME not in card
    assert base_name(baked.cfg) == "base" and "`base`, a local folder" in card


def test_the_recipe_is_yaml_of_the_config():
    kept = yaml.safe_load(recipe(cfg))
    assert kept.pop("seed") == cfg.seed
    for section, values in kept.items():
        for key, value in values.items():
            assert value == getattr(getattr(cfg, section), key), (section, key)
    assert "path" not in recipe(cfg) and kept["train"]["lr"] == 5e-4


def test_gold_answers_are_said_to_be_gold():
    gold = dataclasses.replace(bake, labels=None)
    assert "trained on gold answers" in card_text(gold, "sums")
    assert "Mistakes of the prompted model" not in card_text(gold, "sums")


@given(text=st.text(alphabet="`a\n", max_size=30))
@example(text="```\n# not a heading\n````")
def test_nothing_leaves_its_fence(text):
    first, *inside, last = fenced(text).split("\n")
    assert first == last + "text" and set(last) == {"`"}
    assert not any(line.startswith(last) for line in inside)


def test_a_question_of_another_person_is_shown_as_it_is():
    evil = dataclasses.replace(bake, questions=dict.fromkeys(bake.questions, BAD + "\ud800"))
    head, body = parts(card_text(evil, "sums"))
    assert head["model-index"][0]["name"] == "sums"
    assert f"````text\nQuestion: {BAD}?\nAnswer:\n````" in body


# --- how it is asked

tok = real_tokenizer()
words = st.text("abXY 019\"\\'{}`<>#%\néß日本…", min_size=1, max_size=20)
forms = st.builds(
    PromptConfig,
    template=st.sampled_from(["plain", "chat"]),
    system=st.none() | words.map(lambda text: f"s{text}{{question}}"),
    question_format=words.map(lambda text: f"{text} {{question}}"),
    enable_thinking=st.booleans(),
)


@given(form=forms, question=words.map(lambda text: f"q{text}"))
def test_the_code_makes_our_prompt(form, question):
    prompter = Prompter(tok, form)
    space = {"tok": tok}
    exec(prompt_code(prompter), space)
    text = space["prompt"](question)
    assert text == prompter.render(Context(), question).plain
    assert tok(text, add_special_tokens=False).input_ids == prompter.encode(
        prompter.render(Context(), question)
    )


def test_a_bos_is_spelled_out():
    from tokenizers.processors import TemplateProcessing

    from icl_distill.core.hub import load_tokenizer

    own = load_tokenizer(REAL_MODEL)
    bos = own.bos_token
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=None, special_tokens=[(bos, own.bos_token_id)]
    )
    prompter = Prompter(own, PromptConfig(template="plain"))
    ids = prompter.prompt_ids(Context(), "Why?")
    assert ids[0] == own.bos_token_id
    space = {}
    exec(prompt_code(prompter), space)
    assert own(space["prompt"]("Why?"), add_special_tokens=False).input_ids == ids


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a tiny base model `base`, a sealed `checkpoint`, and the published `sums`."
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("place")
    folder = tiny_folder(place / "base")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=5.0)
    base.generation_config.save_pretrained(folder)  # defaults that the code must not heed
    noisy_adapter(base).save_pretrained(place / "raw")
    info = dict(step=40, base_model=str(folder), base_hash="0" * 16)
    seal(place / "raw", place / "checkpoint", info)
    baked = with_model(str(folder))
    card = card_text(baked, "sums")
    out = write_adapter(baked.cfg, place / "checkpoint", place / "sums", card)
    assert out == place / "sums"
    return SimpleNamespace(path=place, baked=baked, checkpoint=place / "checkpoint")


def usage_at(place, form):
    prompter = Prompter(tok, PromptConfig(template=form))
    return Usage(place.baked.cfg, prompter, "sums", "What is 1 plus 1?", 40)


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_the_code_runs(place, form, monkeypatch, capsys):
    "peft, the merged model and the pipeline say the same, and what greedy decoding says."
    from icl_distill.models.engines import TransformersEngine

    monkeypatch.chdir(place.path)
    usage = usage_at(place, form)
    space = {}
    exec(usage.blocks["The prompt"][1], space)
    exec(usage.blocks["With peft"][1], space)
    said = [capsys.readouterr().out]
    space["model"].merge_and_unload().save_pretrained("merged")
    space["tok"].save_pretrained("merged")
    capsys.readouterr()
    for heading in ("With transformers, merged", "By `pipeline`"):
        exec(usage.blocks[heading][1], space)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    engine = TransformersEngine(tiny_model(), tok, usage.prompter.stop_ids)
    engine.attach({"sums": str(place.checkpoint)})
    prompt = usage.prompter.prompt_ids(Context(), usage.question)
    ((_, answer),) = engine.generate([prompt], "sums", cfg.evaluate.max_new_tokens)
    assert answer.text.strip() and said[0].strip() == answer.text.strip()


def test_code_for_vllm_is_python_and_knows_its_ranks(place):
    usage = usage_at(place, "plain")
    _, code = usage.blocks["With vLLM"]
    compile(code, "vllm", "exec")
    assert "max_lora_rank=16" in code and 'LoRARequest("baked", 1, adapter)' in code
    for rank, known in ((1, "max_lora_rank=8,"), (17, "max_lora_rank=32,")):
        lora = replace(cfg.lora, r=rank)
        other = dataclasses.replace(usage, cfg=replace(usage.cfg, lora=lora))
        assert known in other.blocks["With vLLM"][1]
    huge = dataclasses.replace(usage, cfg=replace(usage.cfg, lora=replace(cfg.lora, r=513)))
    assert "With vLLM" not in huge.blocks


def test_a_revision_and_foreign_code_are_told(place):
    baked = with_model("a/b", revision="v2", trust_remote_code=True)
    usage = Usage(baked.cfg, Prompter(tok, cfg.prompt), "me/sums", "?")
    options = 'dtype="float32", revision="v2", trust_remote_code=True'
    assert options in usage.blocks["With peft"][1] and options in usage.blocks["With vLLM"][1]
    assert "checkpoints/STEP merged" in usage.blocks["As a plain model"][1]


# --- the folder


def test_the_folder_is_an_adapter(place):
    import peft
    from transformers import AutoTokenizer

    from icl_distill.models.loading import load_adapter

    out = place.path / "sums"
    ids = torch.tensor([[1, 5, 9]])
    ours = load_adapter(tiny_model(), place.checkpoint)(ids).logits
    theirs = peft.PeftModel.from_pretrained(tiny_model(), out)(ids).logits
    assert torch.equal(ours, theirs) and not torch.equal(ours, tiny_model()(ids).logits)
    assert AutoTokenizer.from_pretrained(out)("a b").input_ids == tok("a b").input_ids
    assert (out / "README.md").read_text(encoding="utf-8") == card_text(place.baked, "sums")
    for file in out.iterdir():
        assert str(place.path).encode() not in file.read_bytes(), file.name
    assert not list(place.path.glob(".sums*"))


def test_settings_name_the_hubs_model(place, tmp_path, monkeypatch):
    import icl_distill.app.card as card

    monkeypatch.setattr(card, "load_tokenizer", lambda *_: tok)
    baked = with_model("Qwen/Qwen3-1.7B", revision="v2")
    card_of_it = card.card_text(baked, "me/sums")
    out = write_adapter(baked.cfg, place.checkpoint, tmp_path / "a", card_of_it)
    settings = json.loads((out / ADAPTER_CONFIG).read_text())
    assert settings["base_model_name_or_path"] == "Qwen/Qwen3-1.7B"
    assert settings["revision"] == "v2" and settings["r"] == 4
    head, body = parts((out / "README.md").read_text(encoding="utf-8"))
    assert head["base_model"] == "Qwen/Qwen3-1.7B" and body.startswith("\n# me/sums\n")


def test_an_adapter_is_replaced_and_nothing_else(place, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_adapter(place.baked.cfg, place.checkpoint, out, "---\n---\n")  # an empty folder is fine
    (out / "README.md").write_text("older")
    write_adapter(place.baked.cfg, place.checkpoint, out, "---\n---\n")
    assert (out / "README.md").read_text(encoding="utf-8").startswith("---\n")
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("mine")
    with raises("no adapter's folder", thesis):
        write_adapter(place.baked.cfg, place.checkpoint, thesis, "---\n---\n")
    with raises("no adapter's folder"):
        write_adapter(place.baked.cfg, place.checkpoint, thesis / "thesis.tex", "---\n---\n")
    assert (thesis / "thesis.tex").read_text() == "mine"
    with raises("no such folder"):
        write_adapter(place.baked.cfg, tmp_path / "none", tmp_path / "new", "---\n---\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "thesis"]


def test_a_failure_leaves_the_former_adapter(place, tmp_path, monkeypatch):
    import shutil

    out = write_adapter(place.baked.cfg, place.checkpoint, tmp_path / "out", "---\n---\n")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with raises("No space", kind=OSError):
        write_adapter(place.baked.cfg, place.checkpoint, out, "---\n---\n")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- the report


class Elements(HTMLParser):
    "Elements, attributes and text of a page."

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text, self.loads = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [a for a in attrs if a[0] in ("src", "href", "onload", "onclick", "style")]
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@both
def test_the_page_is_whole_and_alone(baked):
    page = report_html(baked)
    found = Elements(page)
    assert found.open == [] and found.loads == []
    assert not {"script", "link", "img", "iframe", "form"} & set(found.tags)
    assert not re.search(r"https?:|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page and "overflow-x: auto" in page
    assert page.count('<div class="scroll"') == found.tags.count("table")


@both
def test_the_report_holds_each_number(baked):
    text = unescape(re.sub(r"<[^>]*>", "\n", report_html(baked)))
    lines = {line.strip() for line in text.split("\n")}
    for row in result_rows(baked):
        assert {value for value in row.values() if value} <= lines
    for sentence in [*result_notes(baked), *baked.preflight, baked.verdict]:
        assert sentence in text
    assert {str(v) for v in (baked.labels.questions, baked.labels.agreed)} <= lines
    environment = baked.results.environment
    wanted = [environment["python"], baked.cfg.model.dtype, environment["device"]]
    wanted += [*environment["packages"].values(), baked.results.commit]
    assert set(wanted) <= lines
    assert "max_new_tokens: 48" in text


def test_the_same_bake_is_the_same_file(tmp_path):
    write_report(bake, tmp_path / "new" / "report.html")
    written = (tmp_path / "new" / "report.html").read_bytes()
    shuffled = {k: rows[::-1] for k, rows in reversed(bake.records.items())}
    again = dataclasses.replace(bake, records=shuffled)
    assert report_html(again).encode() == written


@both
def test_won_and_lost_are_those_of_the_comparison(baked):
    found = flipped(baked)
    p = next(p for p in baked.results.paired if (p.a, p.b) == ("baked", found.rival))
    assert (len(found.won), len(found.lost), found.n) == (p.only_a, p.only_b, p.n)
    won, lost = examples(baked)
    assert won["said"].startswith(f"{p.only_a} of {p.n} items")
    assert lost["said"].startswith(f"{p.only_b} of {p.n} items")
    for part, ids in ((won, found.won), (lost, found.lost)):
        shown = [row["question"] for row in part["rows"]]
        assert shown == [baked.questions[item] for item in ids[:SHOWN]]
        names = list(baked.results.conditions)
        for row in part["rows"]:
            marks = dict(zip(names, (one["mark"][0] for one in row["answers"]), strict=True))
            signs = (marks["baked"], marks[found.rival])
            assert signs == (("✓", "✗") if part is won else ("✗", "✓"))
    assert len(won["rows"]) == SHOWN
    assert ("The first 10 are shown" in won["said"]) == (p.only_a > SHOWN)


def test_a_bake_that_changes_nothing():
    rows = [row.model_copy(update=dict(condition="baked")) for row in bake.records["few_shot"]]
    same = dataclasses.replace(bake, records=bake.records | {"baked": rows})
    assert [part["rows"] for part in examples(same)] == [[], []]
    assert "0 of 40 items" in report_html(same)


def test_a_bake_alone():
    results = bake.results.model_copy(
        update=dict(conditions={"baked": bake.results.conditions["baked"]}, paired=[])
    )
    alone = Baked(cfg, results, {"baked": bake.records["baked"]}, bake.questions, None, [], "Done.")
    assert flipped(alone) is None and examples(alone) == []
    assert "<h2>Won</h2>" not in report_html(alone) and "<h1>Done.</h1>" in report_html(alone)
    assert "Answers to the questions" not in report_html(alone)
    assert "baked" in card_text(alone, "sums")


def test_truncated_and_missing_answers_are_told():
    cut = [row.model_copy(update=dict(truncated=True)) for row in bake.records["baked"]]
    records = bake.records | {"baked": cut, "sft": bake.records["sft"][20:]}
    won, _ = examples(dataclasses.replace(bake, records=records))
    zero_shot, few_shot, sft, baked = won["rows"][0]["answers"]
    assert baked["mark"] == "✓ right, cut off" and few_shot["mark"] == "✗ wrong"
    assert sft == dict(mark="", text="not asked")


TEXTS = [BAD, '"><img src=x onerror=alert(1)>', "</pre></table><h1>mine", "\ud800 \x00 \u2028"]


@pytest.mark.parametrize("text", TEXTS)
def test_everything_from_users_is_escaped(text):
    safe = Elements(report_html(bake)).tags
    rows = {
        name: [row.model_copy(update=dict(text=text, gold=text)) for row in rows]
        for name, rows in bake.records.items()
    }
    asked = dataclasses.replace(
        bake,
        cfg=replace(cfg, prompt=replace(cfg.prompt, system=text.replace("\ud800", "?"))),
        records=rows,
        questions=dict.fromkeys(bake.questions, text),
        verdict=text,
        preflight=[text],
    )
    page = report_html(asked)
    assert Elements(page).tags == safe
    assert page.count(str(escape(text)).replace("\ud800", "?")) > 2 * SHOWN
    page.encode("utf-8")


def test_how_often_baked_and_prompt_say_the_same_is_counted():
    found = {k: [row.strict for row in bake.records[k]] for k in ("baked", "few_shot")}
    same = sum(a == b for a, b in zip(*found.values(), strict=True)) / len(found["baked"])
    said = " ".join(result_notes(bake))
    assert f"says what the prompt says on {100 * same:.0f} %" in said and 0 < same < 1
    assert "says what the prompt says" not in " ".join(result_notes(blind))
