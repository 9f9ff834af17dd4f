"""Every page at the width of a telephone and of a desk, light and dark, in a real browser: nothing
makes it scroll sideways. The pages are the processed notebooks, nested as Quarto nests them, with
the site's own CSS but without Quarto's themes."""

import html
import json
import re
import subprocess
from pathlib import Path

import pytest
from nbconvert.filters import markdown2html
from test_browser import chromium
from test_docs import joined, pages, proc  # noqa: F401  (fixtures)

root = Path(__file__).resolve().parent.parent
WIDTHS = (400, 1400)
THEMES = {"quarto-light": "#343a40;background:#fff", "quarto-dark": "#fff;background:#222"}
HEAD = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; font: 17px/1.6 sans-serif; color: {colours} }}
main {{ max-width: 850px; margin: auto; padding: 0 12px }}
td, th {{ padding: 8px }} pre {{ overflow: auto }} p {{ overflow-wrap: break-word }}
.sourceCode {{ white-space: pre-wrap; overflow-wrap: anywhere }}
{css}</style><body class="{theme}"><main>"""
HOST = """<!doctype html><meta charset="utf-8"><body>{frames}<pre id="found"></pre><script>
addEventListener("load", () => {{
  const wide = []
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument.documentElement
    if (page.scrollWidth > page.clientWidth) {{
      const past = [...page.querySelectorAll("main *")]
        .filter(x => x.getBoundingClientRect().right > page.clientWidth)
      wide.push([frame.src.split("/").pop(), page.scrollWidth, page.clientWidth,
        past.slice(0, 3).map(x => x.outerHTML.slice(0, 90))])
    }}
  }}
  document.getElementById("found").textContent = "FOUND" + JSON.stringify(wide) + "END"
}})</script>"""


def output_html(output) -> str:
    data = {kind: joined(text) for kind, text in output.get("data", {}).items()}
    if "text/html" in data:
        return f'<div class="cell-output cell-output-display">{data["text/html"]}</div>'
    if "text/markdown" in data:
        return f'<div class="cell-output">{markdown2html(data["text/markdown"])}</div>'
    if "image/png" in data:
        source = f"data:image/png;base64,{data['image/png'].strip()}"
        return f'<div class="cell-output cell-output-display"><img src="{source}"></div>'
    text = joined(output.get("text", "")) or data.get("text/plain", "")
    return f'<div class="cell-output cell-output-stdout"><pre>{html.escape(text)}</pre></div>'


def cell_html(cell) -> str:
    source = joined(cell["source"])
    if cell["cell_type"] == "markdown":
        maths = r'<span class="math display" style="white-space:nowrap">\1</span>'
        return re.sub(r"\$\$(.+?)\$\$", maths, markdown2html(source), flags=re.DOTALL)
    if cell["cell_type"] != "code":
        return ""
    shown = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE)
    code = (
        "" if "#| echo: false" in source else f'<pre class="sourceCode">{html.escape(shown)}</pre>'
    )
    return f'<div class="cell">{code}{"".join(map(output_html, cell.get("outputs", [])))}</div>'


def write_pages(folder: Path, named: dict) -> str:
    "Write each page for each theme; the frames that show them at each width."
    css, frames = (root / "nbs" / "styles.css").read_text(), []
    for name, cells in named.items():
        body = "\n".join(map(cell_html, cells))
        for theme, colours in THEMES.items():
            head = HEAD.format(colours=colours, css=css, theme=theme)
            file = f"{theme}-{name.replace('/', '-')}.html"
            (folder / file).write_text(f"{head}{body}</main>", encoding="utf-8")
            frames += [f'<iframe src="{file}" width="{w}" height="900"></iframe>' for w in WIDTHS]
    return "".join(frames)


def too_wide(folder: Path, named: dict) -> list:
    "[file, its width, the window's, what sticks out] of pages that scroll sideways."
    (folder / "host.html").write_text(HOST.format(frames=write_pages(folder, named)))
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=60000", "--dump-dom", (folder / "host.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = re.search(r"FOUND(\[.*\])END", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.slow
def test_pages_do_not_scroll_sideways(pages, tmp_path):  # noqa: F811
    assert too_wide(tmp_path, pages) == []


@pytest.mark.slow
def test_what_is_too_wide_is_found(tmp_path):
    wide = dict(cell_type="markdown", source='<div style="width: 700px">x</div>')
    found = too_wide(tmp_path, {"a": [wide]})
    assert len(found) == 2 and all(window == 400 for _, _, window, _ in found)
