"The house rules: floors, what an import costs, notebooks, links, configs, pins."
import ast, json, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest, yaml
from packaging.requirements import Requirement
from packaging.version import Version

root = Path(__file__).resolve().parent.parent
FLOORS = [["hub"], ["config"], ["devices"], ["tasks"], ["prompts", "statistics"], ["alignment", "losses"], ["models", "estimate"], ["teacher", "generation"], ["train", "evaluation"], ["figures"], ["launch", "doctor"], ["widgets"], ["cli"]]
floor_of = {name: i for i, names in enumerate(FLOORS) for name in names}
modules = sorted(f.stem for f in (root/"icl_distill").glob("*.py") if not f.stem.startswith("_"))
notebooks = sorted(f for f in (root/"nbs").rglob("*.ipynb") if not any(p.startswith((".", "_")) for p in f.relative_to(root).parts))
by_name = pytest.mark.parametrize("nb", notebooks, ids=lambda f: f.stem)

def cells(nb): return json.loads(nb.read_text(encoding="utf-8"))["cells"]
def joined(x): return x if isinstance(x, str) else "".join(x)
def source(cell): return joined(cell["source"])
def code(nb): return [source(c) for c in cells(nb) if c["cell_type"] == "code"]
def markdown(nb): return [source(c) for c in cells(nb) if c["cell_type"] == "markdown"]
def outputs(nb): return [o for c in cells(nb) for o in c.get("outputs", [])]

# --- floors

def project_imports(text):
    "The project's modules that `text` imports, anywhere in it."
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("icl_distill."))
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".")
            if node.level == 0 and path[0] != "icl_distill": continue
            if node.level == 0: path = path[1:]
            yield from ([path[0]] if path and path[0] else (a.name for a in node.names))

def violations(name, text):
    return [f"{name} imports {m}, which is not on a lower floor" for m in project_imports(text) if m in floor_of and floor_of[m] >= floor_of[name]]

def test_every_module_has_a_floor(): assert set(modules) <= set(floor_of)

@pytest.mark.parametrize("name", modules)
def test_imports_run_down(name): assert violations(name, (root/"icl_distill"/f"{name}.py").read_text(encoding="utf-8")) == []

@pytest.mark.parametrize("line", ["from icl_distill.train import fit", "from .train import fit", "from . import train", "from icl_distill import train", "import icl_distill.train as t",
    "def f():\n    from .losses import x", "from .alignment import x"])
def test_a_violation_is_found(line): assert len(violations("alignment", line)) == 1

@pytest.mark.parametrize("line", ["from .tasks import Task", "import icl_distill", "from torch import train", "import train", "from icl_distill import __version__"])
def test_a_lower_floor_is_none(line): assert violations("alignment", line) == []

# --- what an import costs

def imported(names, forbidden):
    "Which of `forbidden` are loaded after importing the project's modules `names` in a fresh interpreter."
    script = f"import importlib, sys, json\nfor n in {names!r}: importlib.import_module(n)\nprint(json.dumps([m for m in {forbidden!r} if m in sys.modules]))"
    return json.loads(subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

optional = ["vllm", "tensorboard", "ipywidgets", "jupyterlab", "nbdev", "fastcore", "pytest"]

def test_package_import_is_free(): assert imported(["icl_distill"], ["torch", "transformers", "numpy", "yaml", "omegaconf", *optional]) == []

def test_light_modules_do_not_import_torch():
    light = [f"icl_distill.{m}" for m in ("hub", "config", "devices", "tasks", "statistics", "figures") if m in modules]
    assert imported(light, ["torch", "transformers", "peft", "datasets"]) == []

def test_optional_packages_stay_optional(): assert imported([f"icl_distill.{m}" for m in modules], optional) == []

# --- notebooks

machine_path = re.compile(r"(?<![\w.~/+-])/(?:root|home|tmp|work|Users|mnt|opt)/\w")

def committed():
    "Files that are tracked, or would be."
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True)
    if done.returncode: pytest.skip("not a git checkout")
    return [f for f in map(root.joinpath, filter(None, done.stdout.split("\0"))) if f.is_file() and not f.is_symlink()]

def text_of(file):
    "The text of a file; of a notebook its sources and text outputs, without images; '' of a binary one."
    if file.suffix == ".ipynb":
        texts = [*code(file), *markdown(file)]
        for o in outputs(file): texts += [joined(o.get("text", "")), *o.get("traceback", []), *(joined(v) for k, v in o.get("data", {}).items() if k.startswith("text/"))]
        return "\n".join(texts)
    try: return file.read_text(encoding="utf-8")
    except UnicodeDecodeError: return ""

def test_no_machine_paths():
    found = {str(f.relative_to(root)): m.group() for f in committed() if (m := machine_path.search(text_of(f)))}
    assert found == {}

def test_machine_paths_are_found():
    assert machine_path.search("File "+"/"+"home/me/x.py") and not machine_path.search("https://x.org/home/me ~/.cache ./tmp/x runs/work/x")

@by_name
def test_notebook_is_clean(nb):
    assert [o.get("ename") for o in outputs(nb) if o["output_type"] == "error"] == []
    assert [joined(o["text"]) for o in outputs(nb) if o.get("name") == "stderr"] == []
    assert [c for c in code(nb) if re.search(r"^\s*if (False|0):", c, re.MULTILINE)] == []

@by_name
def test_export_cells_are_short(nb):
    long = [c for c in code(nb) if re.match(r"#\|\s*export", c) and sum(not l.startswith("#|") for l in c.strip().splitlines()) > 40]
    assert [c.splitlines()[1] for c in long] == []

@by_name
def test_title_cell_holds_nothing_else(nb): # nbdev makes front matter of it and drops the rest
    first = markdown(nb)[0]
    assert re.fullmatch(r"# \S.*\n\n> \S.*(\n- .*)*", first), f"the first cell is a title, an empty line and a one-line '>' subtitle, not {first!r}"

def broken_links(nb):
    for text in markdown(nb):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text)+re.findall(r"(?:src|href)=[\"']([^\"']+)", text):
            if re.match(r"[a-z]+:|#", target): continue
            if not (nb.parent/target.split("#")[0]).exists(): yield target

@by_name
def test_links_resolve(nb): assert list(broken_links(nb)) == []

def listed(x):
    if isinstance(x, str): return [x] if x.endswith(".ipynb") else []
    return [f for y in (x.values() if isinstance(x, dict) else x) for f in listed(y)]

def test_sidebar_lists_every_notebook_once():
    bar = listed(yaml.safe_load((root/"nbs"/"sidebar.yml").read_text()))
    assert sorted(bar) == [f.relative_to(root/"nbs").as_posix() for f in notebooks]

def test_quarto_config():
    assert (root/"nbs"/"_quarto.yml").read_text() == (root/"_quarto.yml").read_text()
    for f in ("_quarto.yml", "nbs/nbdev.yml", "nbs/sidebar.yml", "CITATION.cff", *(f".github/workflows/{w}.yml" for w in ("test", "deploy"))): assert yaml.safe_load((root/f).read_text())

# --- configs, commands, pins

@pytest.mark.parametrize("name", sorted(f.stem for f in (root/"configs").glob("*.yaml")))
def test_config_loads(name):
    from icl_distill.config import load_config, shipped_configs
    assert load_config(name) == load_config(shipped_configs()[name])
    assert load_config(f"configs/{name}.yaml") == load_config(name)

def test_readme_has_one_test_command():
    assert [l for l in (root/"README.md").read_text().splitlines() if l.endswith("python tests/run.py")][1:] == []
    assert subprocess.run(["bash", "-n", root/".ci"/"run"]).returncode == 0

def settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(root/"settings.ini", encoding="utf-8")
    return ini["DEFAULT"]

def test_version_is_one():
    import icl_distill
    assert icl_distill.__version__ == settings()["version"] == yaml.safe_load((root/"CITATION.cff").read_text())["version"]

def test_constraints_pin_every_requirement():
    lines = [l for l in (root/"constraints.txt").read_text().splitlines() if l and not l.startswith("#")]
    assert [l for l in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", l)] == []
    pins = {re.sub(r"[-_.]+", "-", n).lower(): Version(v) for n, v in (l.split("==") for l in lines)}
    wanted = [Requirement(r) for k, v in settings().items() if k == "requirements" or k.endswith("_requirements") and not k.startswith("vllm") for r in v.split()]
    assert [str(r) for r in wanted if (pin := pins.get(re.sub(r"[-_.]+", "-", r.name).lower())) is None or pin not in r.specifier] == []
