"From a run to the hub, by the real command and the real client, against a stand-in server."

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import yaml
from huggingface_hub import HfApi, RepoUrl
from standin_hub import stand_in
from transformers import AutoModelForCausalLM, AutoTokenizer

from icl_distill.app.cli import main
from icl_distill.app.push import Destination, Published, chosen, push, push_run
from icl_distill.core.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from icl_distill.core.runs import Run
from icl_distill.evaluation.evaluate import config_for_evaluation, evaluate
from icl_distill.models.loading import load_adapter
from icl_distill.testing import fake_run, quiet_environment, raises


@pytest.fixture(scope="module")
def hub():
    with stand_in() as server:
        yield server


def command(*args, env, cwd=None):
    "The command in a process of its own."
    call = [sys.executable, "-c", "from icl_distill.app.cli import main; main()", *map(str, args)]
    return subprocess.run(call, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


def called(hub, *args, cwd=None, **more):
    "As a user who is logged in, with a network."
    return command(*args, env=quiet_environment() | hub.environment() | more, cwd=cwd)


@pytest.fixture
def here(hub, monkeypatch, capsys):
    "The same in this process, with the real client: (exit code, stdout, stderr)."

    def run(*args, endpoint=hub.address):
        client = HfApi(endpoint=endpoint, token="hf_nobody")
        monkeypatch.setattr("icl_distill.app.push._client", lambda to: client)
        monkeypatch.setattr(sys, "argv", ["icl-distill", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("icl_distill.app.cli.calm_threads", lambda: None)
    return run


def on_disk(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def parts(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


# --- the real command, the real client


def test_an_adapter_goes_into_a_private_repository(hub, uninterrupted, tmp_path):
    done = called(hub, "push", uninterrupted, "me/sums")
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/me/sums" in done.stdout and "step 12" in done.stdout
    assert hub.repositories["me/sums"]["private"]
    sent = hub.files("me/sums")
    assert sent == on_disk(uninterrupted / "adapter")
    assert {"README.md", ADAPTER_CONFIG, ADAPTER_WEIGHTS, "tokenizer.json"} <= set(sent)
    head, body = parts(sent["README.md"].decode())
    assert head["library_name"] == "peft" and "model-index" not in head
    assert "not evaluated" in body and "12 steps" in body and 'adapter = "me/sums"' in body
    assert str(uninterrupted).encode() not in b"".join(sent.values())
    for name, text in sent.items():
        (tmp_path / name).write_bytes(text)
    cfg, ids = Run(uninterrupted).config, torch.tensor([[1, 5, 9]])
    base = AutoModelForCausalLM.from_pretrained(cfg.model.name, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)(ids).logits.clone()
    base = AutoModelForCausalLM.from_pretrained(cfg.model.name, dtype=torch.float32)
    ours = load_adapter(base, Run(uninterrupted).checkpoints()[-1].folder)(ids).logits
    assert torch.equal(ours, theirs)


def test_a_merged_model_is_opened_after_it_is_there(hub, here, uninterrupted, tmp_path):
    at = Run(uninterrupted).checkpoint_path(6)
    code, said, _ = here("push", at, "plain", "--merge", "--public", "--revision", "v1")
    assert not code and said.strip().endswith("/me/plain/tree/v1") and "step 6" in said
    assert not hub.repositories["me/plain"]["private"] and not hub.files("me/plain")
    of_it = [line for line in hub.asked if "me/plain" in line]
    assert "/settings" in of_it[-1] and any("/commit/v1" in line for line in of_it[:-1])
    sent = hub.files("me/plain", "v1")
    assert sent == on_disk(uninterrupted / "merged")
    head, body = parts(sent["README.md"].decode())
    assert head["library_name"] == "transformers" and "### With peft" not in body
    assert 'merged = "plain"' in body and "6 steps" in body
    for name, text in sent.items():
        (tmp_path / name).write_bytes(text)
    ids = AutoTokenizer.from_pretrained(tmp_path)("1 plus 1", return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        Run(uninterrupted).config.model.name, dtype=torch.float32
    )
    ours = load_adapter(base, at)(ids).logits
    torch.testing.assert_close(merged(ids).logits, ours, rtol=1e-4, atol=1e-4)


def test_a_public_repository_is_written_to_on_demand_only(hub, here, uninterrupted):
    hub.add("me/open", private=False)
    code, _, said = here("push", uninterrupted, "me/open")
    assert code == 2 and said.startswith("error: ") and "--public" in said
    assert hub.files("me/open") == {}


def test_offline_nothing_is_sent(hub, uninterrupted):
    before = len(hub.asked)
    done = called(hub, "push", uninterrupted, "me/sums", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr and "nothing may leave" in done.stderr
    assert len(hub.asked) == before


def test_without_a_network_nothing_is_lost(here, uninterrupted):
    code, out, said = here("push", uninterrupted, "me/sums", endpoint="http://127.0.0.1:9")
    assert code == 2 and out == "" and said.startswith("error: ")
    assert "ConnectError" in said and "Nothing is lost" in said


def test_what_is_known_to_fail_is_said_before_any_work(tmp_path, monkeypatch):
    "The folder is not even looked for."
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    with raises("not a name", "cannot be a name on the hub"):
        push_run(tmp_path / "none", Destination("not a name"), merged=True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with raises("me/sums", "hf auth login"):
        push_run(tmp_path / "none", Destination("me/sums"), merged=True)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    with raises("me/sums", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        push_run(tmp_path / "none", Destination("me/sums"), merged=True)


def test_from_a_csv_of_ones_own_to_an_adapter_on_the_hub(hub, tmp_path, answering):
    def even(n):
        return f"Is {n} even?,{'no' if n % 2 else 'yes'}\n"

    (tmp_path / "shots.csv").write_text("question,answer\n" + "".join(map(even, range(100, 104))))
    (tmp_path / "test.csv").write_text("question,answer\n" + "".join(map(even, range(200, 203))))
    asked = "".join(f"Is {n} even?\n" for n in range(120, 132))
    (tmp_path / "questions.csv").write_text("question\n" + asked)
    args = ["bake", "--model", answering, "--shots", "shots.csv", "--questions", "questions.csv"]
    args += ["--test", "test.csv", "--out", "out", "--push-to", "me/even"]
    args += ["prompt.template=plain", "model.dtype=float32", "train.steps=2", "save_every=2"]
    args += ["batch_size=2", "warmup_steps=0", "answers.labeller_steps=2", "lora.r=2"]
    args += ["answers.shot_repeats=1", "evaluate.max_new_tokens=6"]
    done = called(hub, *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"{hub.address}/me/even")
    assert hub.repositories["me/even"]["private"]
    assert hub.files("me/even") == on_disk(tmp_path / "out" / "adapter")
    head, body = parts(hub.files("me/even")["README.md"].decode())
    (measured,) = head["model-index"][0]["results"]
    results = Run(tmp_path / "out").results()
    accuracy = results.conditions["baked"].accuracy
    assert measured["metrics"][0]["value"] == pytest.approx(accuracy, abs=5e-5)
    assert "SFT on the shots" in body and "## Limits" in body and "# me/even" in body


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    from icl_distill.testing import answering_folder

    return str(answering_folder(tmp_path_factory.mktemp("models") / "yes"))


# --- which checkpoint, which card


class Hub:
    "A stand-in for `HfApi` that keeps what it is given, or fails at one of its calls."

    def __init__(self, fails_at=None, error=None):
        self.fails_at, self.error, self.calls = fails_at, error, []

    def _called(self, name):
        self.calls.append(name)
        if self.fails_at == name:
            raise self.error

    def create_repo(self, repo_id, *, exist_ok, private):
        self._called("create_repo")
        assert exist_ok and private
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def repo_info(self, repo_id):
        self._called("repo_info")
        return SimpleNamespace(private=True)

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
        self._called("upload_folder")
        self.card = (folder_path / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_what_was_measured_of_this_checkpoint(uninterrupted):
    cfg = config_for_evaluation(str(uninterrupted), ["steps=[6, 12]", "max_new_tokens=4"])
    results = evaluate(cfg, progress=False)
    hub = Hub()
    sent, _ = push_run(Run(uninterrupted).checkpoint_path(6), Destination("me/sums"), api=hub)
    head, body = parts(hub.card)
    assert sent.condition == "step_6" and "row `step_6`" in body and "| step_12" in body
    value = head["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert value == pytest.approx(results.conditions["step_6"].accuracy, abs=5e-5)
    assert str(uninterrupted) not in hub.card and cfg.model.name not in hub.card


def test_the_checkpoint_is_devs_choice_or_the_newest(uninterrupted):
    assert chosen(uninterrupted)[1].step == 12
    over = ["steps=[6, 12]", "max_new_tokens=4"]
    evaluate(config_for_evaluation(str(uninterrupted), [*over, "split=dev"]), progress=False)
    results = evaluate(config_for_evaluation(str(uninterrupted), over), progress=False)
    assert results.selected
    assert f"step_{chosen(uninterrupted)[1].step}" == results.selected.condition


def test_what_is_no_run_is_said(tmp_path):
    with raises("neither a checkpoint nor a run", tmp_path):
        push_run(tmp_path, Destination("me/sums"), api=Hub())
    run = fake_run(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    run.checkpoint_path(20).rename(tmp_path / "elsewhere" / "step_000020")
    with raises("outside its run"):
        chosen(tmp_path / "elsewhere" / "step_000020")
    assert chosen(run.path)[1].step == 10
    with raises("nothing to push", tmp_path):
        push(tmp_path, Destination("me/sums"), Hub())


def test_a_damaged_checkpoint_is_named_and_no_older_one_sent(tmp_path):
    run = fake_run(tmp_path / "run")
    (run.checkpoint_path(20) / ADAPTER_WEIGHTS).write_bytes(b"half")
    with raises("step_000020", "damaged"):
        chosen(run.path)
    assert chosen(run.checkpoint_path(10))[1].step == 10


def test_a_folder_of_something_else_is_left_alone(uninterrupted, tmp_path):
    run, checkpoint = chosen(uninterrupted)
    published = Published(Run(tmp_path), checkpoint, run.config, merged=True)
    published.folder.mkdir()
    (published.folder / "thesis.tex").write_text("mine")
    from icl_distill.app.push import write_merged

    with raises("no merged model's folder", published.folder):
        write_merged(checkpoint.folder, published.folder, "card")
    assert [file.name for file in published.folder.iterdir()] == ["thesis.tex"]


# --- failures of the hub


def hub_errors():
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    return [
        OfflineModeIsEnabled("offline mode is enabled"),
        LocalTokenNotFoundError("no token"),
        HFValidationError("no repo id"),
        HTTPError("502 of the server\nits page"),
        ConnectionError(),
    ]


@pytest.fixture
def parcel(tmp_path):
    "A folder to be sent."
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(dict(r=4)))
    (tmp_path / "README.md").write_text("---\n---\n")
    return tmp_path


@pytest.mark.parametrize("call", ["create_repo", "repo_info", "upload_folder"])
@pytest.mark.parametrize("error", hub_errors(), ids=lambda e: type(e).__name__)
def test_a_failure_of_the_hub_is_a_sentence(parcel, call, error):
    before = on_disk(parcel)
    said = str(error).split("\n")[0] or "no reason given"
    with raises("me/sums", type(error).__name__, said, "Nothing is lost", parcel):
        push(parcel, Destination("me/sums"), Hub(call, error))
    assert on_disk(parcel) == before


def test_a_mistake_of_ours_is_no_failure_of_the_hub(parcel):
    with raises("unexpected", kind=TypeError):
        push(parcel, Destination("me/sums"), Hub("create_repo", TypeError("unexpected")))
