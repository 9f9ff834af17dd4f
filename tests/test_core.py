"The torch-free core: files, checkpoints, results, records, metrics, runs."

import contextlib
import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from icl_distill.core import checkpoints, files
from icl_distill.core.checkpoints import (
    Checkpoint,
    checkpoints_of,
    find_checkpoints,
    keep_newest,
    process_file,
    remove_checkpoint,
    remove_unfinished,
    seal,
    step_folder,
)
from icl_distill.core.files import (
    InputError,
    digest,
    file_hash,
    flush,
    input_errors,
    run_lock,
    write_text,
)
from icl_distill.core.metrics import cut_metrics, read_metrics
from icl_distill.core.record_lines import RecordLine, parse_line, read_records
from icl_distill.core.results import (
    Reported,
    Results,
    read_reported,
    read_results,
    write_reported,
    write_results,
)
from icl_distill.core.runs import Evaluation, Run

ROOT = Path(__file__).resolve().parent.parent
HASH = "0123456789abcdef"
MEASURED_FILES = sorted((ROOT / "results").rglob("results.json"))
RECORDS_FILES = sorted((ROOT / "results").rglob("records/*.jsonl"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)

# imports


@pytest.mark.parametrize("module", ["checkpoints", "record_lines", "results", "runs"])
def test_core_is_light(module):
    "No tensor library, and no numpy or pandas."
    code = f"import sys, icl_distill.core.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pandas"}
    assert not heavy & set(done.stdout.split())


# files


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.text("ab\r\n é"))
def test_written_text_is_what_was_given(first, second):
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "deep" / "x.txt"
        for text in (first, second):
            write_text(path, text)
            assert path.read_bytes() == text.encode()
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, error):
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def fail(*args):
        raise error

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(type(error)):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(tmp_path):
    "A process writes long texts over each other; what is read is always one of them, whole."
    path = tmp_path / "x.txt"
    write_text(path, "0" * 100_000)
    code = (
        "import sys; from icl_distill.core.files import write_text\n"
        "for i in range(300): write_text(sys.argv[1], str(i % 10) * 100_000)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as writer:
        seen = set()
        while writer.poll() is None:
            text = path.read_text()
            assert text == text[:1] * 100_000
            seen.add(text[0])
    assert writer.returncode == 0 and len(seen) > 1


@given(json_values, json_values)
def test_digest_tells_json_values_apart(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (digest(a) == digest(b)) == same
    assert len(digest(a)) == 16 and set(digest(a)) <= set("0123456789abcdef")


@given(st.dictionaries(st.text(), st.integers(), max_size=5))
def test_digest_does_not_depend_on_the_order_of_keys(d):
    assert digest(d) == digest(dict(reversed(d.items())))


@pytest.mark.parametrize("path", RECORDS_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_digests_are_those_of_before(path):
    "They stand in the records on people's disks."
    header = json.loads(path.read_text().splitlines()[0])
    assert digest(header["identity"]) == header["hash"]


@given(st.binary(max_size=200))
def test_file_hash_is_sha256sum(data):
    import hashlib

    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "x"
        path.write_bytes(data)
        assert file_hash(path) == hashlib.sha256(data).hexdigest()


def test_flush_takes_files_and_folders(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    (tmp_path / "x").write_text("x")
    flush(tmp_path / "x")
    flush(tmp_path)
    assert len(synced) == 2
    with pytest.raises(OSError):
        os.fstat(synced[-1])  # closed again


def test_input_errors_are_said_and_bugs_are_not(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    for error in (InputError("no such file: x"), full):
        with pytest.raises(SystemExit) as left, input_errors():
            raise error
        assert left.value.code == 2
    assert capsys.readouterr().err == f"error: no such file: x\nerror: {full}\n"
    for bug in (ValueError("x"), OSError(errno.EACCES, "x")):
        with pytest.raises(type(bug)), input_errors():
            raise bug


def test_run_lock_keeps_other_processes_out(tmp_path):
    folder = tmp_path / "run"
    code = (
        "import sys; from icl_distill.core.files import run_lock\n"
        "with run_lock(sys.argv[1], 'training'): print('got it')"
    )

    def other():
        command = [sys.executable, "-c", code, str(folder)]
        return subprocess.run(command, capture_output=True, text=True)

    with run_lock(folder, "training"):
        done = other()
        assert f"another process is training in {folder}: wait for it, or" in done.stderr
    assert not folder.exists()
    assert other().stdout == "got it\n"
    with contextlib.suppress(KeyError), run_lock(folder, "training"):
        (folder / "config.yaml").write_text("")
        raise KeyError
    assert [p.name for p in folder.iterdir()] == ["config.yaml"]


# checkpoints


def weights(value: bytes = b"\0\0\0\0") -> bytes:
    "A safetensors file with one number."
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + value


def fill(folder: Path, **settings):
    folder.mkdir(parents=True)
    settings = {"r": 16, "target_modules": ["v_proj", "q_proj"]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(weights())
    (folder / "config.yaml").write_text("model:\n  dtype: float16\n")
    (folder / "state.pt").write_bytes(b"state")
    (folder / process_file(0)).write_bytes(b"random")


def write(run: Path, step: int, **info) -> Path:
    final = run / "checkpoints" / step_folder(step)
    hidden = final.with_name(f".{final.name}")
    fill(hidden)
    seal(hidden, final, {"step": step, "base_model": "tiny", "base_hash": HASH} | info)
    return final


def test_a_sealed_checkpoint_reads(tmp_path):
    folder = write(tmp_path, 20, data="d", processes=1)
    for whole in (False, True):
        found = Checkpoint.read(str(folder), HASH, whole)
        assert (found.step, found.base_model, found.base_hash) == (20, "tiny", HASH)
        assert found.info["data"] == "d" and found.folder == folder
    assert found.lora_rank() == 16 and found.dtype == found.config().model.dtype == "float16"
    assert Checkpoint(folder, found.info | {"dtype": "float32"}).dtype == "float32"
    names = {p.name for p in folder.iterdir()} - {"checkpoint.json"}
    assert set(found.info["files"]) == names
    (folder / "config.yaml").unlink()
    assert Checkpoint.read(folder).dtype is None
    with pytest.raises(InputError, match="is incomplete: config.yaml missing"):
        Checkpoint.read(folder).config()


def test_a_sealed_checkpoint_is_as_before(tmp_path):
    "The same bytes as training wrote before this module was there, whatever order peft chose."
    one = write(tmp_path / "a", 20)
    hidden = tmp_path / "b" / "checkpoints" / ".step_000020"
    fill(hidden, target_modules=["q_proj", "v_proj"])
    seal(hidden, two := hidden.with_name("step_000020"), Checkpoint.read(one).info)
    expected = '{\n  "r": 16,\n  "target_modules": [\n    "q_proj",\n    "v_proj"\n  ]\n}'
    for folder in (one, two):
        assert (folder / "adapter_config.json").read_text() == expected
    assert Checkpoint.read(one).adapter_hash() == Checkpoint.read(two).adapter_hash()
    data = b"".join(
        (one / n).read_bytes() for n in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert Checkpoint.read(one).adapter_hash() == digest(data)


@pytest.mark.parametrize(
    "file,text,said",
    [
        ("checkpoint.json", None, "is incomplete: checkpoint.json missing"),
        ("adapter_config.json", None, "is incomplete: adapter_config.json missing"),
        ("checkpoint.json", "{", "is damaged: .*line 1"),
        ("checkpoint.json", "[]", "is damaged: checkpoint.json is no object"),
        ("checkpoint.json", "{}", "is damaged: checkpoint.json lacks step, base_model, base_hash"),
        ("checkpoint.json", {"step": -1}, "is damaged: step is -1"),
        ("checkpoint.json", {"step": "20"}, "is damaged: step is '20'"),
        ("checkpoint.json", {"step": True}, "is damaged: step is True"),
        ("checkpoint.json", {"files": []}, "is damaged"),
        ("adapter_config.json", "{", "is damaged: .*line 1"),
        ("adapter_config.json", '{"r": 8}', "is damaged: adapter_config.json not as written"),
        ("adapter_model.safetensors", "cut", "is damaged"),
        ("adapter_model.safetensors", weights(b"\0\0\0\1"), "adapter_model.* not as written"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_said(tmp_path, file, text, said):
    path = write(tmp_path, 20) / file
    if isinstance(text, dict):
        text = json.dumps(json.loads(path.read_text()) | text)
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said) as error:
        Checkpoint.read(path.parent)
    assert str(path.parent) in str(error.value)


def test_whole_looks_at_all_files(tmp_path):
    folder = write(tmp_path, 20)
    (folder / "state.pt").write_bytes(b"other")
    Checkpoint.read(folder)
    with pytest.raises(InputError, match="is damaged: state.pt not as written"):
        Checkpoint.read(folder, whole=True)
    (folder / "process_0.pt").unlink()
    with pytest.raises(InputError, match="is incomplete: process_0.pt missing"):
        Checkpoint.read(folder, whole=True)
    info = json.loads((folder / "checkpoint.json").read_text())
    del info["files"]
    (folder / "checkpoint.json").write_text(json.dumps(info))
    Checkpoint.read(folder)
    with pytest.raises(InputError, match="checkpoint.json lacks files"):
        Checkpoint.read(folder, whole=True)


def test_another_base_is_refused(tmp_path):
    folder = write(tmp_path, 20)
    with pytest.raises(InputError) as error:
        Checkpoint.read(folder, "f" * 16)
    said = f"'tiny' with weights {HASH}; the model given has weights {'f' * 16}"
    assert said in str(error.value) and str(folder) in str(error.value)
    with pytest.raises(InputError, match="no such folder"):
        Checkpoint.read(tmp_path / "none")


def test_an_adapter_without_a_rank(tmp_path):
    folder = write(tmp_path, 20)
    for settings in ("{}", '{"r": "16"}', '{"r": 0}'):
        (folder / "adapter_config.json").write_text(settings)
        with pytest.raises(InputError, match="has no rank r"):
            Checkpoint(folder, {}).lora_rank()


@pytest.mark.parametrize("last", range(1, 13))  # 5 hashes, 7 flushes; then the rename
def test_a_kill_while_sealing_leaves_a_whole_checkpoint(tmp_path, monkeypatch, last):
    "Whatever call is the last that works, what stands under the name is whole."
    final = write(tmp_path, 20, data="old")
    hidden = final.with_name(".step_000020")
    fill(hidden)
    left = iter(range(last))

    def counted(real):
        def call(*args, **more):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*args, **more)

        return call

    for name in ("file_hash", "flush"):
        monkeypatch.setattr(checkpoints, name, counted(getattr(checkpoints, name)))
    with pytest.raises(KeyboardInterrupt):
        seal(hidden, final, {"step": 20, "base_model": "tiny", "base_hash": HASH, "data": "new"})
    monkeypatch.undo()
    stands = "new" if last == 12 else "old"
    assert [c.info["data"] for c in checkpoints_of(final.parent)] == [stands]


def test_checkpoints_are_listed_kept_and_removed(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    assert checkpoints_of(folder) == []
    for step in (1_000_000, 200, 999_999):
        write(tmp_path, step)
    assert [c.step for c in checkpoints_of(folder)] == [200, 999_999, 1_000_000]
    assert capsys.readouterr().err == ""
    (folder / "step_000200" / "state.pt").write_bytes(b"")
    fill(folder / ".step_000300")
    assert [c.step for c in checkpoints_of(folder)] == [999_999, 1_000_000]
    said = capsys.readouterr().err
    assert said.startswith("warning: passed over: checkpoint") and "step_000200" in said
    remove_unfinished(folder)
    assert "step_000300 was never finished; it is removed" in capsys.readouterr().err
    keep_newest(folder, None)
    keep_newest(folder, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["step_1000000", "step_999999"]


def test_removal_is_out_of_sight_first(tmp_path, monkeypatch):
    folder = write(tmp_path, 20)

    def killed(path, ignore_errors=False):
        if not ignore_errors:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(folder)
    assert not folder.exists() and checkpoints_of(folder.parent) == []


# results

SUMMARY = {"accuracy": 0.25, "n": 400, "ci95": [0.21, 0.29], "truncated": 0.0}
SUMMARY |= {"accuracy_flexible": 0.25, "mean_tokens": 16.6, "mean_prompt_tokens": 30.5}
CONDITION = SUMMARY | {"n_shots": 0, "context": "ef761e2f93912b3b"}
FIELDS = {
    "model": "tiny",
    "task": "coin flips",
    "split": "test",
    "set": "test",
    "conditions": {"zero_shot": CONDITION, "step_20": CONDITION | {"step": 20, "adapter": HASH}},
    "engine": {"name": "transformers", "why": "as given"},
    "environment": {"device": "cpu"},
    "config": {"loss": {"weight": 0.0}},
    "seed": 1,
    "commit": None,
}
PAIR = {"a": "step_20", "b": "zero_shot", "set": "test", "n": 400, "difference": 0.0}
PAIR |= {"difference_ci95": [-0.1, 0.1], "p_mcnemar": 1.0, "only_a": 3, "only_b": 3}
numbers = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1)


@given(shares, numbers, st.tuples(shares, shares).map(sorted), json_values, st.text())
def test_what_is_read_is_what_was_written(share, number, interval, value, name):
    "Every float to the last bit, every text, every config."
    cell = CONDITION | {"accuracy": share, "ci95": interval, "seconds": number, "latency": None}
    cell |= {"sets": {name: SUMMARY | {"mean_tokens": number}}}
    if isinstance(value, float) or "Infinity" in json.dumps(value):
        value = None
    change = {"conditions": {name: cell}, "config": {name: value}, "paired": []}
    results = Results.model_validate(FIELDS | change)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "results.json"
        write_results(path, results)
        again = read_results(path)
    assert again == results
    assert again.conditions[name].accuracy.hex() == share.hex()
    assert again.conditions[name].sets[name].mean_tokens.hex() == float(number).hex()


def conditions(**change) -> dict:
    return {"conditions": {"zero_shot": CONDITION | change}}


@pytest.mark.parametrize(
    "change,said",
    [
        ({"model": None}, "model: must be a valid string, got None"),
        ({"conditions": {}}, "conditions: .*at least 1 item"),
        (conditions(accuracy=25.0), "conditions.zero_shot.accuracy: must be less than or equal to"),
        (conditions(accuracy="0.25"), "conditions.zero_shot.accuracy: must be a valid number"),
        (conditions(accuracy=True), "conditions.zero_shot.accuracy"),
        (conditions(accuracy=float("nan")), "conditions.zero_shot.accuracy"),
        (conditions(n=0), "conditions.zero_shot.n: must be greater than or equal to 1, got 0"),
        (conditions(n=None), "conditions.zero_shot.n: must be a valid integer"),
        (conditions(ci95=[0.4, 0.2]), r"conditions.zero_shot: ci95 must be \[low, high\]"),
        (conditions(ci95=[0.4]), "conditions.zero_shot.ci95"),
        (conditions(ci95=None), "conditions.zero_shot.ci95 is missing; only reported"),
        (conditions(truncated=None), "conditions.zero_shot.truncated is missing"),
        (conditions(acuracy=0.1), "conditions.zero_shot.acuracy is not a known key"),
        (
            conditions(sets={"hard": SUMMARY | {"ci95": None}}),
            "zero_shot.sets.hard.ci95 is missing",
        ),
        ({"split": "train"}, "split: must be 'test' or 'dev', got 'train'"),
        ({"config": None}, "config is missing; only reported numbers may lack it"),
        ({"seed": None}, "seed is missing"),
        ({"selected": {"condition": "step_40"}}, "selected names condition 'step_40'; there are"),
        ({"paired": [PAIR | {"a": "sft"}]}, "paired names condition 'sft'; there are zero_shot"),
        ({"paired": [PAIR | {"p_mcnemar": 2}]}, "paired.0.p_mcnemar: must be less than or equal"),
        ({"schema_version": 2}, "newer icl_distill .schema_version 2; .*update the package"),
        ({"schema_version": "1"}, "schema_version: must be 1"),
    ],
)
def test_a_bad_results_file_is_named_with_key_and_expectation(tmp_path, change, said):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(FIELDS))
    read_results(path)
    path.write_text(json.dumps(FIELDS | change))
    with pytest.raises(InputError, match=said) as error:
        read_results(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_file_that_is_no_results_file(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(InputError, match="cannot be read .No such file.*evaluate"):
        read_results(path)
    for text, said in (("{", "not JSON"), ("[]", "expected a JSON object, got list")):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            read_results(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="model is missing; task is missing; .* and 2 more"):
        read_results(path)


def test_results_do_not_change():
    results = Results.model_validate(FIELDS)
    with pytest.raises(ValidationError):
        results.seed = 2
    with pytest.raises(ValidationError):
        results.conditions["zero_shot"].accuracy = 1.0


def same(old, new) -> bool:
    "Does `new` hold all of `old` at its old place?"
    if isinstance(old, dict):
        return all(key in new and same(value, new[key]) for key, value in old.items())
    if isinstance(old, list):
        return len(old) == len(new) and all(map(same, old, new))
    return type(old) is type(new) and old == new


@pytest.mark.parametrize("path", MEASURED_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_stored_results_read_and_keep_every_number(path, tmp_path):
    old = json.loads(path.read_text())
    write_results(tmp_path / "results.json", read_results(path))
    new = json.loads((tmp_path / "results.json").read_text())
    assert same(old, new) and new["schema_version"] == 1
    place = Evaluation.find(path)
    for name, cell in place.results().conditions.items():
        if not place.records_path(name).exists():
            continue
        rows = place.records(name)
        assert (len(rows), sum(r.correct for r in rows) / len(rows)) == (cell.n, cell.accuracy)


def test_there_are_stored_results():
    assert len(MEASURED_FILES) > 10 and len(RECORDS_FILES) > 10


# reported numbers

PUBLICATION = {
    "label": "reported",
    "note": "copied",
    "source": {"project": "a/b", "url": "u", "commit": "c", "date": "d", "files": ["README.md"]},
    "scoring": "last number",
    "caveats": ["one seed"],
}
ARM = {
    "model": "m",
    "task": "t",
    "split": "test",
    "set": "test",
    "conditions": {"step_200": {"accuracy": 0.6, "n": 1319, "step": 200}},
    "selected": {"condition": "step_200", "split": "test", "note": "best of five"},
    "provenance": {"study": "main", "arm": "SFT", "final_ce": {"step": 1000, "ce": 0.27}},
}
PUBLISHED = {"schema_version": 1, "publication": PUBLICATION, "results": [ARM]}


def test_reported_numbers_carry_their_publication(tmp_path):
    path = tmp_path / "reported.json"
    path.write_text(json.dumps(PUBLISHED))
    reported = read_reported(path)
    one = reported.results[0]
    assert not one.measured and one.provenance.source == reported.publication.source
    assert (one.provenance.arm, one.provenance.final_ce.ce) == ("SFT", 0.27)
    assert one.conditions["step_200"].ci95 is None and one.selected.split == "test"
    write_reported(path, reported)
    assert json.loads(path.read_text()) == PUBLISHED and read_reported(path) == reported


@pytest.mark.parametrize(
    "change,said",
    [
        ({"results": [FIELDS]}, "results.0 has no provenance"),
        ({"results": [ARM | {"provenance": {"arm": "SFT"}}]}, "results.0.provenance.study is miss"),
        ({"publication": PUBLICATION | {"label": "measured"}}, "publication.label: must be 'rep"),
        ({"publication": None}, "publication"),
        ({"results": None}, "results: must be a valid list"),
        ({"schema_version": 2}, "update the package"),
    ],
)
def test_a_bad_file_of_reported_numbers(tmp_path, change, said):
    path = tmp_path / "reported.json"
    path.write_text(json.dumps(PUBLISHED | change))
    with pytest.raises(InputError, match=said) as error:
        read_reported(path)
    assert str(error.value).startswith(f"{path}: ")


def test_reported_numbers_are_not_taken_for_measured_ones(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(PUBLISHED))
    with pytest.raises(InputError, match="model is missing"):
        read_results(path)
    without = {key: value for key, value in ARM.items() if key != "provenance"}
    with pytest.raises(ValidationError, match="engine is missing; only reported"):
        Results.model_validate(without)
    assert Reported.model_validate(PUBLISHED).results[0].provenance.label == "reported"


# records

ANSWER = {
    "id": "test-7",
    "condition": "few_shot",
    "set": "test",
    "prompt_hash": HASH,
    "n_prompt_tokens": 21,
    "text": " 12 + 3 = 15\n#### 15",
    "strict": "15",
    "flexible": None,
    "gold": "15",
    "correct": True,
    "correct_flexible": False,
    "n_tokens": 9,
    "truncated": False,
}
HEADER = {"identity": {"engine": "transformers"}, "hash": HASH}


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@given(st.lists(st.text(), unique=True, max_size=5), st.text(), st.text('{"id: ,x'))
def test_records_read_back_without_what_was_cut(ids, text, torn):
    rows = [RecordLine(**ANSWER | {"id": i, "text": text}) for i in ids]
    lines = [HEADER, *(row.model_dump() for row in rows), {"seconds": 1.5, "n": len(ids)}]
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "few_shot.jsonl"
        written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + torn
        path.write_text(written, encoding="utf-8", newline="\n")
        assert read_records(path) == rows


@pytest.mark.parametrize(
    "lines,said",
    [
        (jsonl(HEADER) + "{\n" + jsonl(ANSWER), "line 2: not JSON"),
        (jsonl(HEADER, ANSWER, ANSWER), "line 3: item 'test-7' is there twice"),
        (jsonl(HEADER, ANSWER | {"correct": 1}), "line 2: correct: must be a valid boolean, got 1"),
        (jsonl(HEADER, {"id": "x"}), "line 2: condition is missing"),
        (jsonl({"identity": {}}), "line 1: hash is missing"),
        (jsonl([1]), "line 1: expected a JSON object, got list"),
        (jsonl(HEADER, {"seconds": "1", "n": 0}), "line 2: seconds: must be a valid number"),
    ],
)
def test_a_bad_record_is_named_with_its_line(tmp_path, lines, said):
    path = tmp_path / "few_shot.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=said) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}, ")


def test_records_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="none.jsonl: cannot be read .*beside the results file"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_records(tmp_path / "x.jsonl")
    assert parse_line(json.dumps(HEADER), "x").identity == HEADER["identity"]


# metrics


@given(
    st.dictionaries(st.integers(0, 10**6), numbers, min_size=1), st.text('{"step: 1,', min_size=1)
)
def test_metrics_are_in_order_and_the_later_line_counts(rows, torn):
    rows = [{"step": step, "ce": ce} for step, ce in rows.items()]
    doubled = [{"step": row["step"], "ce": 0.5} for row in rows] + rows
    if not torn.strip() or torn.strip().isdigit():
        torn = "{"
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "metrics.jsonl"
        path.write_text(jsonl(*doubled) + torn)
        assert read_metrics(path, "ce") == sorted(rows, key=lambda row: row["step"])
        middle = sorted(row["step"] for row in rows)[len(rows) // 2]
        cut_metrics(path, middle)
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        assert kept == [row for row in doubled if row["step"] <= middle]


@pytest.mark.parametrize(
    "text,said",
    [
        ("", "no step was logged"),
        ("{\n" + jsonl({"step": 1, "ce": 1}), "line 1: not JSON"),
        (jsonl({"step": 1}), "line 1: no finite number 'ce'"),
        (jsonl({"ce": 1}), "line 1: no finite number 'step'"),
        (jsonl({"step": 1, "ce": float("nan")}), "line 1: no finite number 'ce'"),
        (jsonl({"step": 1, "ce": True}), "line 1: no finite number 'ce'"),
        (jsonl([1]), "line 1: no finite number 'step'"),
    ],
)
def test_bad_metrics_are_named_with_their_line(tmp_path, text, said):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        read_metrics(path, "ce")
    assert str(path) in str(error.value)


def test_a_whole_last_line_counts_without_its_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "ce": 2}\n{"step": 2, "ce": 1}')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


# runs


def evaluated(path: Path, **change) -> Results:
    results = Results.model_validate(FIELDS | change)
    write_results(path, results)
    return results


def test_the_layout_is_a_promise():
    run = Run("runs/a")
    paths = {
        run.config_path: "config.yaml",
        run.environment_path: "environment.json",
        run.left_out_path: "left_out.json",
        run.metrics_path: "metrics.jsonl",
        run.teacher_path: "teacher.json",
        run.checkpoints_path: "checkpoints",
        run.checkpoint_path(200): "checkpoints/step_000200",
        run.targets_path: "targets",
        run.results_path(): "evaluation/results.json",
        run.results_path("dev"): "evaluation/dev/results.json",
        run.evaluation().csv_path: "evaluation/results.csv",
        run.evaluation().table_path: "evaluation/results.md",
        run.records_path("few_shot"): "evaluation/records/few_shot.jsonl",
        run.records_path("few_shot", "hard"): "evaluation/records/few_shot.hard.jsonl",
        run.records_path("few_shot", split="dev"): "evaluation/dev/records/few_shot.jsonl",
        run.launch_path: "launch.json",
        run.log_path: "launch.log",
        run.figures_path: "figures",
        run.bad_batch_path(1): "bad_batch_1.json",
    }
    assert {path: str(Path("runs/a") / name) for path, name in paths.items()} == {
        path: str(path) for path in paths
    }


def test_a_run_reads_what_is_in_it(tmp_path):
    run = Run(tmp_path / "run")
    assert not run.exists() and run.checkpoints() == []
    write(run.path, 20)
    run.config_path.write_text("seed: 7\n")
    run.metrics_path.write_text(jsonl({"step": 10, "ce": 2.0}))
    run.environment_path.write_text('{"device": "cpu"}')
    run.left_out_path.write_text("{}")
    results, dev = evaluated(run.results_path()), evaluated(run.results_path("dev"), split="dev")
    write_text(run.records_path("few_shot", "hard"), jsonl(HEADER, ANSWER))
    assert run.exists() and run.name == "run" and run.config.seed == 7
    assert run.metrics("ce") == [{"step": 10, "ce": 2.0}]
    assert (run.environment(), run.left_out()) == ({"device": "cpu"}, {})
    assert [c.step for c in run.checkpoints()] == [run.checkpoint(20).step] == [20]
    assert run.results() == results and run.results("dev") == dev
    assert run.records("few_shot", set="hard")[0].id == "test-7"
    with run.lock("training"), pytest.raises(InputError, match="another process is training"):
        run.lock("training").__enter__()
    assert run == Run(str(run.path)) and len({run, Run(run.path)}) == 1


def test_the_quickstart_has_its_results_straight_in_its_folder(tmp_path):
    run = Run(tmp_path)
    straight = evaluated(tmp_path / "results.json")
    write_text(tmp_path / "records" / "zero_shot.jsonl", jsonl(HEADER, ANSWER))
    assert run.results() == straight and len(run.records("zero_shot")) == 1
    assert run.usual_evaluation().results_path == tmp_path / "evaluation" / "results.json"
    assert Evaluation.find(tmp_path).results() == straight
    usual = evaluated(tmp_path / "evaluation" / "results.json", seed=2)
    assert run.results() == Evaluation.find(tmp_path).results() == usual
    assert Evaluation.find(tmp_path / "results.json").results() == straight


def test_what_is_missing_is_said_with_the_command_that_makes_it(tmp_path):
    run = Run(tmp_path)
    for ask, said in (
        (run.results, "no results on the test set; `icl-distill evaluate` writes"),
        (lambda: run.results("dev"), "on the dev set; `icl-distill evaluate evaluate.split=dev`"),
        (lambda: run.records("few_shot"), "few_shot.jsonl: cannot be read"),
        (lambda: run.config, "no config.yaml; `icl-distill train` writes it"),
        (run.metrics, "metrics.jsonl: cannot be read"),
        (run.environment, "environment.json: cannot be read .*training writes it"),
        (lambda: run.checkpoint(20), "step_000020': no such folder"),
        (lambda: Evaluation.find(tmp_path), "no results there; `icl-distill evaluate` writes"),
        (lambda: Run.find(tmp_path), "neither evaluation/results.json nor metrics.jsonl"),
        (lambda: Run.find(tmp_path / "none"), "no such folder; expected a run, or a folder of"),
    ):
        with pytest.raises(InputError, match=said) as error:
            ask()
        assert str(tmp_path) in str(error.value)
    for text, said in (("{", "not JSON"), ("[]", "expected a JSON object")):
        run.environment_path.write_text(text)
        with pytest.raises(InputError, match=said):
            run.environment()


def test_runs_are_found(tmp_path):
    evaluated(tmp_path / "b" / "evaluation" / "results.json")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    (tmp_path / "c").mkdir()
    assert [run.name for run in Run.find(tmp_path)] == ["a", "b"]
    assert Run.find(tmp_path / "b") == [Run(tmp_path / "b")]
    evaluated(tmp_path / "results.json")
    assert Run.find(tmp_path) == [Run(tmp_path / "a"), Run(tmp_path / "b"), Run(tmp_path)]


def test_the_runs_of_results_are_found():
    found = {run.name for run in Run.find(ROOT / "results" / "few_labels")}
    assert "base" in found and "sft-1" in found
    run = Run(ROOT / "results" / "few_labels" / "sft-1")
    assert run.metrics("ce")[-1]["step"] == 40 and run.environment()["python"]


def test_checkpoints_are_found_for_evaluation(tmp_path):
    for step in (20, 1_000_000, 60):
        write(tmp_path, step)
    found = find_checkpoints(tmp_path)
    assert list(found) == ["step_20", "step_60", "step_1000000"]
    assert list(find_checkpoints(str(tmp_path), [60, 20])) == ["step_20", "step_60"]
    one = tmp_path / "checkpoints" / "step_000060"
    assert find_checkpoints(one)["step_60"] == found["step_60"]
    (tmp_path / "other").mkdir()
    for path, steps, said in (
        (tmp_path / "none", (), "evaluate.checkpoints .*none': no such folder"),
        (tmp_path / "other", (), "neither a checkpoint nor a run with checkpoints/step_…"),
        (tmp_path, (7,), r"evaluate.steps \[7\]: .* has \[20, 60, 1000000\]"),
    ):
        with pytest.raises(InputError, match=said):
            find_checkpoints(path, steps)
    (one / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="step_000060' is incomplete: adapter_config.json missing"):
        find_checkpoints(tmp_path)
