"A study by the real command: what it runs, what it says of failures, and what comes out."

import json
import subprocess
import sys
import time

import pytest
import yaml
from helpers_training import equal, wait_for
from typer.testing import CliRunner

from icl_distill.app.cells import _environment
from icl_distill.app.cli import app
from icl_distill.app.study_command import answers_of, costs_of
from icl_distill.core.config import load_config, shipped_configs
from icl_distill.core.runs import Run
from icl_distill.data.examples import Example, with_wrong_answers
from icl_distill.evaluation.grid import read_study, state_of
from icl_distill.evaluation.power import holm
from icl_distill.evaluation.seeds import combine
from icl_distill.evaluation.study import read_study_results
from icl_distill.testing import quiet_environment, raises, tiny_folder

SHIPPED = next(iter(shipped_configs().values())).parent / "studies"
COMMAND = [sys.executable, "-c", "from icl_distill.app.cli import main\nmain()", "study"]
SMALL = ["model.dtype=float32", "task.n_train=12", "task.n_dev=4", "task.n_test=6"]
SMALL += ["context.n_shots=2", "teacher.top_k=16", "train.steps=2", "train.save_every=1"]
SMALL += ["train.batch_size=2", "train.lr=0.01", "evaluate.max_new_tokens=4"]
ARMS = {
    "sft": "loss.weight=0",
    "kl": ["loss.kind=forward_kl", "train.save_every=2"],  # one checkpoint: none to choose
    "broken": "context.n_shots=12",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a tiny model and the file of a study, one of whose arms cannot be trained."
    folder = tmp_path_factory.mktemp("study")
    model = tiny_folder(folder / "model", initializer_range=0.3)
    write(
        folder / "study.yaml",
        title="Does it work?",
        base="quickstart",
        folder=str(folder / "runs"),
        overrides=[f"model.name={model}", *SMALL],
        axes={"arm": ARMS},
        against={"arm": "sft"},
        seeds=[1, 2],
        choose="dev",
        retention=["task.name=names", "task.n_train=8", "task.n_test=5"],
    )
    return folder


def write(path, **keys):
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def done(place):
    "After the command: its study, its results, and what it said."
    env = quiet_environment(TQDM_DISABLE="1")
    told = subprocess.run(
        [*COMMAND, str(place / "study.yaml"), "--jobs", "2"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 1, told.stderr  # one arm failed
    results = read_study_results(place / "runs" / "study.json")
    return read_study(str(place / "study.yaml")), results, told


def test_what_fails_is_named_and_the_rest_goes_on(done):
    study, results, told = done
    states = {cell.name: state_of(cell) for cell in study.cells}
    assert [name for name in states if states[name] == "finished"] == [
        "sft-1",
        "kl-1",
        "sft-2",
        "kl-2",
    ]
    assert set(results.unfinished) == {"broken-1", "broken-2"}
    assert "context.n_shots is 12" in results.unfinished["broken-1"]
    assert "failed: broken-2: error: context.n_shots is 12" in told.stderr
    assert "[6/6]" in told.stderr and "left" in told.stderr
    assert "Traceback" not in told.stderr


def test_comparisons_are_those_of_two_arms(done):
    study, results, _ = done
    places = {
        on: [[place(cell, on) for cell in study.groups[name]] for name in ("kl", "sft")]
        for on, place in (("test", results_file), ("retention", results_file))
    }
    assert [(c.a, c.b, c.on) for c in results.contrasts] == [
        ("kl", "sft", "test"),
        ("kl", "sft", "retention"),
    ]
    for contrast in results.contrasts:
        arm = combine(*places[contrast.on])
        name = "student" if contrast.on == "retention" else "step_2"
        assert contrast.difference.per_seed == arm.difference[name].per_seed
        assert contrast.difference.interval == arm.difference[name].interval
        assert contrast.p == arm.difference[name].p and [contrast.p_holm] == holm([contrast.p])
        assert contrast.seeds == [1, 2]


def results_file(cell, on):
    folder = "evaluation" if on == "test" else "retention"
    return cell.run.path / folder / "results.json"


def test_what_is_measured(done):
    "The base model once for each group, the second task behind shots, one checkpoint by dev."
    study, results, _ = done
    conditions = {cell.name: [*cell.run.results().conditions] for cell in study.cells[:2]}
    assert [len(x) for x in conditions.values()] == [3, 1]
    assert conditions["sft-1"][:2] == ["zero_shot", "few_shot"]
    own, dev = study.cells[0].run.results(), study.cells[0].run.results("dev")
    assert own.selected.condition == conditions["sft-1"][-1] and len(dev.conditions) == 2
    assert own.selected.accuracy_dev == max(c.accuracy for c in dev.conditions.values())
    assert not study.cell("kl-1").run.usual_evaluation("dev").exists()
    second = study.cells[0].retained.results()
    assert {c.n_shots for c in second.conditions.values()} == {2} and second.task == "names"
    assert set(results.base) == {"sft"}
    assert set(results.base["sft"]) == {"zero_shot", "few_shot", "retention_base"}
    assert results.groups["kl"].accuracy.per_seed == [
        next(iter(cell.run.results().conditions.values())).accuracy for cell in study.groups["kl"]
    ]


def test_files_are_written(done, place):
    files = {path.name for path in (place / "runs").iterdir() if path.is_file()}
    assert {"study.json", "study.md", "study.png", "study_retention.png"} <= files
    table = (place / "runs" / "study.md").read_text()
    assert "Does it work?" in table and "Not finished: broken-1, broken-2." in table


def test_a_cell_is_the_run_that_train_gives(done, tmp_path):
    study, *_ = done
    cell = study.cell("kl-1")
    given = ["train", "quickstart", *cell.given[:-1], f"run={tmp_path / 'run'}"]
    out = CliRunner().invoke(app, given, catch_exceptions=False)
    assert out.exit_code == 0, out.output
    mine, theirs = (run.checkpoint_path(2) for run in (Run(tmp_path / "run"), cell.run))
    assert equal(mine, theirs)


def test_commands_name_what_is_missing(done, place):
    file = str(place / "study.yaml")
    out = CliRunner().invoke(app, ["study", file, "--commands"], catch_exceptions=False)
    assert out.output.splitlines() == [
        f"icl-distill study {file} --cell broken-{seed}" for seed in (1, 2)
    ]


def test_the_plan_says_what_is_left(done, place):
    out = CliRunner().invoke(
        app,
        ["study", str(place / "study.yaml"), "--dry-run"],
        catch_exceptions=False,
        env={"COLUMNS": "200"},
    )
    assert "6 cells: 3 arm × 2 seeds; 4 finished" in out.output
    assert "No estimate: context.n_shots is 12" in out.output


def test_another_config_is_refused(done, place):
    "Results of other settings are neither used nor overwritten."
    changed = place / "changed.yaml"
    changed.write_text("extends: study.yaml\nretention: [task.name=dates, task.n_train=8]\n")
    study = read_study(str(changed))
    with raises("is of another config", "task.name: names -> dates", "another `folder`"):
        state_of(study.cells[0])
    text = (place / "study.yaml").read_text()
    changed.write_text(text.replace("train.lr=0.01", "train.lr=0.02"))
    with raises("train.lr: 0.01 -> 0.02"):
        state_of(read_study(str(changed)).cells[0])


@pytest.mark.slow
def test_a_killed_study_leaves_no_cell_behind_and_goes_on(done, place, tmp_path):
    finished, *_ = done
    text = (place / "study.yaml").read_text().replace(str(place / "runs"), str(tmp_path / "runs"))
    (tmp_path / "study.yaml").write_text(text.replace("- 1\n- 2\n", "- 1\n"))
    given = [*COMMAND, str(tmp_path / "study.yaml")]
    env = quiet_environment(TQDM_DISABLE="1")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    study = read_study(str(tmp_path / "study.yaml"))
    first = study.cells[0]
    process = subprocess.Popen(given, env=env, **quiet)
    wait_for(lambda: first.run.checkpoints_path.exists(), process, 300)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while alive(first.name, tmp_path) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(first.name, tmp_path)
    assert state_of(first) == "begun"
    subprocess.run(given, env=env, **quiet)
    last = first.run.checkpoint_path(2)
    assert equal(last, finished.cells[0].run.checkpoint_path(2))
    again = [json.loads(x) for x in first.run.metrics_path.read_text().splitlines()]
    assert again == finished.cells[0].run.metrics()


def alive(name, folder) -> bool:
    "Is a process of this cell there?"
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if name in words and any(str(folder) in word for word in words):
            return True
    return False


def test_jobs_share_cores_and_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    seen = [_environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert seen == ["4", "6", "4"]
    assert _environment(0, 1)["CUDA_VISIBLE_DEVICES"] == "4,6"


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_studies_can_be_read(name):
    "All cells differ, are compared, and lie in a folder of their own."
    study = read_study(name)
    assert study.file.folder == f"runs/studies/{name}" and study.file.retention
    assert len(study.cells) == len({cell.config.run for cell in study.cells})
    for cell in study.cells:
        base = study.baseline(cell)
        assert base is None or base in study.groups


HOURS = {"controls": 1.75, "mse": 1.25, "prefix_direction": 1.25, "top_k": 0.75, "when": 1.25}


@pytest.mark.parametrize("name", HOURS)
def test_small_studies_are_small(name):
    "What its file promises of one core, at 40 GFLOP/s and five answers a second, on a busy one."
    study = read_study(name)
    costs = costs_of(study)
    training = sum(costs[cell.group].flops for cell in study.cells)
    answers = sum(answers_of(cell, study.file.choose) for cell in study.cells)
    assert training / 40e9 + answers / 5 < 3600 * HOURS[name]


def test_wrong_answers_are_trained_on_and_not_read(tmp_path):
    "The shots of the teacher stay right; data and run change."
    from icl_distill.core.hub import load_tokenizer
    from icl_distill.data.prompts import Prompter
    from icl_distill.data.tasks import load_task
    from icl_distill.training.batches import prepare

    given = ["task.n_train=20", "task.n_test=4", "loss.kind=forward_kl", "loss.weight=1"]
    right, wrong = (
        load_config("methods/sft", [*given, f"task.wrong_share={share}"]) for share in (0, 0.5)
    )
    tok = load_tokenizer(right.model.name)
    a, b = (prepare(c, load_task(c.task), Prompter(tok, c.prompt)) for c in (right, wrong))
    assert a.prefixes == b.prefixes and a.hash != b.hash
    assert [x.id for x in a.aligned] == [x.id for x in b.aligned]
    differ = sum(x.student_ids != y.student_ids for x, y in zip(a.aligned, b.aligned, strict=True))
    assert differ == 6  # of the 12 that are no shots


def test_one_alone_cannot_exchange_its_answer():
    with raises("task.wrong_share=0.1 of 8", "fewer than two"):
        with_wrong_answers([Example(str(i), str(i), "x") for i in range(8)], 0.1, 0)
