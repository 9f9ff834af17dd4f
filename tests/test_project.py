"""The rules of the house: rooms, sizes, what an import costs, notebooks, links, configs, pins."""

import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

root = Path(__file__).resolve().parent.parent
package = root / "icl_distill"
ORDER = """
core: files sections inputs objective schema config hub pace devices
core: together checkpoints strict results record_lines metrics runs
data: examples rows shapes formats word_problems small_tasks tasks system_text
data: contexts templates prompts also alignment encoding
objectives: targets policy sums losses whole_vocabulary chunked_loss hidden_states
models: taps quantization loading sharding shared_prefix tensor_files target_cache teacher
models: decoding generation mixed_decoding vllm_engine engines
training: batches teachers fill whole_model state step gains filters on_policy trackers setup loop
training: answers reasons labels
train
evaluation: statistics draws over_seeds power conditions records shards scores tables seeds jobs
evaluation: evaluate harness browse style arms plots figures grid study study_table study_figure
app: estimate memory plan launched monitor launch widgets export preflight data_report usage serving
app: card report bake push quickstart doctor methods command bake_command cells study_command cli
testing
docs
"""
LINES_OF_A_MODULE = 320
LINES_OF_A_FUNCTION = 40
PARAMETERS = 6
LINES_OF_A_CELL = 40
LINES_OF_A_CLASS = 110
CELLS_OF_A_PAGE = 40


def in_order() -> list[str]:
    "Every module of the package, the lowest first."
    out = []
    for line in ORDER.split("\n"):
        room, colon, names = line.partition(": ")
        out += [f"{room}.{name}" for name in names.split()] if colon else line.split()
    return out


def name_of(file: Path) -> str:
    "`core.files` of icl_distill/core/files.py"
    return ".".join(file.relative_to(package).with_suffix("").parts)


rank = {name: i for i, name in enumerate(in_order())}
modules = sorted(name_of(f) for f in package.rglob("*.py") if not f.stem.startswith("_"))
notebooks = sorted(
    f
    for f in (root / "nbs").rglob("*.ipynb")
    if not any(part.startswith((".", "_")) for part in f.relative_to(root).parts)
)
by_module = pytest.mark.parametrize("name", modules)
by_name = pytest.mark.parametrize(
    "nb", notebooks, ids=lambda f: f.relative_to(root / "nbs").as_posix()
)


def text_of_module(name: str) -> str:
    return (package / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")


def cells(nb):
    return json.loads(nb.read_text(encoding="utf-8"))["cells"]


def joined(x):
    return x if isinstance(x, str) else "".join(x)


def source(cell):
    return joined(cell["source"])


def code(nb):
    return [source(c) for c in cells(nb) if c["cell_type"] == "code"]


def markdown(nb):
    return [source(c) for c in cells(nb) if c["cell_type"] == "markdown"]


def outputs(nb):
    return [o for c in cells(nb) for o in c.get("outputs", [])]


# --- rooms


def absolute(name: str, node: ast.ImportFrom) -> str:
    "What `from … import` in module `name` names, without the package; '' for the package."
    if node.level:
        base = name.split(".")[: -node.level]
        return ".".join([*base, *filter(None, [node.module])])
    module = node.module or ""
    if module != "icl_distill" and not module.startswith("icl_distill."):
        return "another package"
    return module.removeprefix("icl_distill").lstrip(".")


def project_imports(name: str, text: str):
    "The project's modules that the text of module `name` imports, anywhere in it."
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("icl_distill."):
                    yield alias.name.removeprefix("icl_distill.")
        elif isinstance(node, ast.ImportFrom):
            module = absolute(name, node)
            if module in rank:
                yield module
            else:  # a room, or the package: what is imported may be a module
                for alias in node.names:
                    if (inner := f"{module}.{alias.name}".lstrip(".")) in rank:
                        yield inner


def violations(name: str, text: str) -> list[str]:
    return [
        f"{name} imports {other}, which is not below it"
        for other in project_imports(name, text)
        if rank.get(other, -1) >= rank[name]
    ]


def test_every_module_has_its_place():
    assert set(modules) == set(rank)


@by_module
def test_imports_run_down(name):
    assert violations(name, text_of_module(name)) == []


@pytest.mark.parametrize(
    "line",
    [
        "from icl_distill.training.loop import train",
        "from ..training.loop import train",
        "from .alignment import Aligned",
        "from . import alignment",
        "from icl_distill.training import loop",
        "from ..training import loop",
        "import icl_distill.training.loop as t",
        "from icl_distill import train",
        "def f():\n    from ..objectives.losses import mse",
    ],
)
def test_a_violation_is_found(line):
    assert len(violations("data.alignment", line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "from .tasks import Task",
        "from ..core.files import InputError",
        "import icl_distill",
        "from torch import train",
        "import train",
        "from icl_distill import __version__",
    ],
)
def test_a_lower_room_is_none(line):
    assert violations("data.alignment", line) == []


# --- sizes


@by_module
def test_modules_are_short(name):
    assert len(text_of_module(name).splitlines()) <= LINES_OF_A_MODULE


def functions(name: str):
    for node in ast.walk(ast.parse(text_of_module(name))):
        if isinstance(node, ast.FunctionDef):
            yield node


@by_module
def test_functions_are_short(name):
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in functions(name)
        if node.end_lineno - node.lineno + 1 > LINES_OF_A_FUNCTION
    }
    assert long == {}


@by_module
def test_functions_take_few_parameters(name):
    many = {}
    for node in functions(name):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [a.arg for a in given if a.arg not in ("self", "cls")]
        if len(names) > PARAMETERS:
            many[node.name] = names
    assert many == {}


@by_module
def test_no_method_is_attached_from_outside(name):
    found = [
        ast.unparse(node)
        for node in ast.parse(text_of_module(name)).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        for part in ast.walk(target)
        if isinstance(part, ast.Attribute)
    ]
    assert found == []


# --- what an import costs


def imported(names, forbidden):
    "Which of `forbidden` are loaded after importing the project's modules `names` afresh."
    script = (
        f"import importlib, sys, json\nfor n in {names!r}: importlib.import_module(n)\n"
        f"print(json.dumps([m for m in {forbidden!r} if m in sys.modules]))"
    )
    return loaded(script)


def loaded(script: str):
    "What a script in a fresh interpreter prints in its last line, as JSON."
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


heavy = [
    "torch",
    "transformers",
    "peft",
    "datasets",
    "pandas",
    "scipy",
    "statsmodels",
    "matplotlib",
]
optional = ["vllm", "tensorboard", "ipywidgets", "jupyterlab", "nbdev", "fastcore", "pytest"]


def test_package_import_is_free():
    assert imported(["icl_distill"], [*heavy, "numpy", "yaml", "pydantic", *optional]) == []


def test_core_does_not_import_torch():
    names = [f"icl_distill.{m}" for m in modules if m.startswith("core.")]
    assert imported([*names, "icl_distill.app.cli"], [*heavy, *optional]) == []


@pytest.mark.parametrize(
    "args", [["--help"], ["config", "online_v1"], ["report", "results/quickstart"]], ids=" ".join
)
def test_light_commands_are_light(args):
    script = (
        f"import sys, json\nsys.argv = ['icl-distill', *{args!r}]\n"
        "from icl_distill.app.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code, e.code\n"
        f"print('\\n'+json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    )
    assert loaded(script) == []


def test_optional_packages_stay_optional():
    assert imported([f"icl_distill.{m}" for m in modules], optional) == []


# --- notebooks

machine_path = re.compile(r"(?<![\w.~/+-])/(?:root|home|tmp|work|Users|mnt|opt)/\w")


def committed():
    "Files that are tracked, or would be."
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [
        f
        for f in map(root.joinpath, filter(None, done.stdout.split("\0")))
        if f.is_file() and not f.is_symlink()
    ]


def text_of(file):
    "The text of a file; of a notebook its sources and text outputs; '' of a binary one."
    if file.suffix == ".ipynb":
        texts = [*code(file), *markdown(file)]
        for o in outputs(file):
            texts += [
                joined(o.get("text", "")),
                *o.get("traceback", []),
                *(joined(v) for k, v in o.get("data", {}).items() if k.startswith("text/")),
            ]
        return "\n".join(texts)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_no_machine_paths():
    found = {
        str(f.relative_to(root)): m.group()
        for f in committed()
        if (m := machine_path.search(text_of(f)))
    }
    assert found == {}


def test_machine_paths_are_found():
    assert machine_path.search("File " + "/" + "home/me/x.py") and not machine_path.search(
        "https://x.org/home/me ~/.cache ./tmp/x runs/work/x"
    )


@by_name
def test_notebook_is_clean(nb):
    assert [o.get("ename") for o in outputs(nb) if o["output_type"] == "error"] == []
    assert [joined(o["text"]) for o in outputs(nb) if o.get("name") == "stderr"] == []
    shown = [joined(o.get("data", {}).get("text/plain", "")) for o in outputs(nb)]
    assert [text for text in shown if "%|" in text or "\x1b" in text] == []
    kept = "widgets" in json.loads(nb.read_text(encoding="utf-8"))["metadata"]
    assert kept <= any("widget-view" in str(o.get("data")) for o in outputs(nb))
    assert [c for c in code(nb) if re.search(r"^\s*if (False|0):", c, re.MULTILINE)] == []


@by_name
def test_a_page_is_not_too_long(nb):
    "Counted are the cells that a reader sees."
    seen = [c for c in cells(nb) if not re.match(r"#\|\s*(hide|default_exp)", source(c))]
    assert len(seen) <= CELLS_OF_A_PAGE


@by_name
def test_an_export_cell_defines_one_public_thing(nb):
    many = []
    for text in code(nb):
        if not re.match(r"#\|\s*export", text):
            continue
        body = ast.parse(re.sub(r"^[#%!].*$", "", text, flags=re.MULTILINE)).body
        names = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        if sum(not name.startswith("_") for name in names) > 1:
            many.append(names)
    assert many == []


def is_one_class(text: str) -> bool:
    body = ast.parse(re.sub(r"^[#%!].*$", "", text, flags=re.MULTILINE)).body
    return len(body) == 1 and isinstance(body[0], ast.ClassDef)


@by_name
def test_export_cells_are_short(nb):
    "A class is whole, and so its cell may be longer; its methods are functions like others."
    long = []
    for text in code(nb):
        if not re.match(r"#\|\s*export", text):
            continue
        lines = sum(not line.startswith("#|") for line in text.strip().splitlines())
        if lines > (LINES_OF_A_CLASS if is_one_class(text) else LINES_OF_A_CELL):
            long.append(text.splitlines()[1])
    assert long == []


@by_name
def test_title_cell_holds_nothing_else(nb):  # nbdev makes front matter of it and drops the rest
    first = markdown(nb)[0]
    assert re.fullmatch(r"# \S.*\n\n> \S.*(\n- .*)*", first), (
        f"the first cell is a title, an empty line and a one-line '>' subtitle, not {first!r}"
    )


def broken_links(nb):
    for text in markdown(nb):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
            r"(?:src|href)=[\"']([^\"']+)", text
        ):
            if re.match(r"[a-z]+:|#", target):
                continue
            if not (nb.parent / target.split("#")[0]).exists():
                yield target


@by_name
def test_links_resolve(nb):
    assert list(broken_links(nb)) == []


def listed(x):
    if isinstance(x, str):
        return [x] if x.endswith(".ipynb") else []
    return [f for y in (x.values() if isinstance(x, dict) else x) for f in listed(y)]


def test_sidebar_lists_every_notebook_once():
    bar = listed(yaml.safe_load((root / "nbs" / "sidebar.yml").read_text()))
    assert sorted(bar) == [f.relative_to(root / "nbs").as_posix() for f in notebooks]


def test_quarto_config():
    assert (root / "nbs" / "_quarto.yml").read_text() == (root / "_quarto.yml").read_text()
    for f in (
        "_quarto.yml",
        "nbs/nbdev.yml",
        "nbs/sidebar.yml",
        "CITATION.cff",
        *(f".github/workflows/{w}.yml" for w in ("test", "deploy")),
    ):
        assert yaml.safe_load((root / f).read_text())


# --- configs, commands, pins


CONFIGS = [*(root / "configs").glob("*.yaml"), *(root / "configs" / "methods").glob("*.yaml")]


@pytest.mark.parametrize(
    "name", sorted(f.relative_to(root / "configs").with_suffix("").as_posix() for f in CONFIGS)
)
def test_config_loads(name):
    from icl_distill.core.config import load_config, shipped_configs

    assert load_config(name) == load_config(shipped_configs()[name])
    assert load_config(f"configs/{name}.yaml") == load_config(name)


def test_readme_has_one_test_command():
    lines = (root / "README.md").read_text().splitlines()
    assert sum(line.endswith("python tests/run.py") for line in lines) == 1
    assert subprocess.run(["bash", "-n", root / ".ci" / "run"]).returncode == 0


def settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def test_version_is_one():
    import icl_distill

    assert (
        icl_distill.__version__
        == settings()["version"]
        == yaml.safe_load((root / "CITATION.cff").read_text())["version"]
    )


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, Version]:
    text = (root / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    split = [line.split("==") for line in lines]
    return {normal(name): Version(version) for name, version in split}


def requirements() -> list[Requirement]:
    lists = [
        text
        for key, text in settings().items()
        if key.endswith("requirements") and not key.startswith("vllm")
    ]
    return [Requirement(one) for text in lists for one in text.split()]


def not_met(wanted: Requirement, pin: Version | None) -> bool:
    return pin is None or pin not in wanted.specifier


def test_constraints_pin_every_requirement():
    pinned = pins()
    wrong = [
        str(wanted) for wanted in requirements() if not_met(wanted, pinned.get(normal(wanted.name)))
    ]
    assert wrong == []
