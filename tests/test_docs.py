"""The docs as Quarto gets them: the notebooks processed by nbdev, their links, anchors, leftovers
and images; README.md, llms.txt and the site's other files."""

import base64
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run import ENVIRONMENT, ROOT, copy_of_sources, sources

SITE = "https://icl-distill.github.io/icl_distill/"
OPTIONS = {
    "echo",
    "output",
    "code-fold",
    "code-summary",
    "label",
    "fig-cap",
    "fig-alt",
    "warning",
}  # of cells, that Quarto reads and does not show

# --- processing


@pytest.fixture(scope="session")
def proc(tmp_path_factory):
    "The folder that Quarto is called in, and the names of sources that nbdev changed on the way."
    out = tmp_path_factory.mktemp("proc")
    script = (
        "from nbdev.quarto import refresh_quarto_yml; from nbdev.serve import proc_nbs; "
        "refresh_quarto_yml(); proc_nbs(n_workers=0)"
    )
    with copy_of_sources() as copy:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            cwd=copy,
            env={**ENVIRONMENT, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        old, new = sources(ROOT), sources(copy)
        (copy / "_proc").rename(out / "_proc")
    return out / "_proc", [str(f) for f in sorted({*old, *new}) if old.get(f) != new.get(f)]


@pytest.fixture(scope="session")
def pages(proc):  # name, such as studies/bake.ipynb -> its cells
    "Every processed notebook."
    return {
        f.relative_to(proc[0]).as_posix(): json.loads(f.read_text(encoding="utf-8"))["cells"]
        for f in sorted(proc[0].rglob("*.ipynb"))
    }


def joined(x):
    return x if isinstance(x, str) else "".join(x)


def texts(cells):
    "What a page shows as prose: its Markdown cells, and the outputs that are Markdown."
    for c in cells:
        if c["cell_type"] == "markdown":
            yield joined(c["source"])
        for o in c.get("outputs", []):
            if "text/markdown" in o.get("data", {}):
                yield joined(o["data"]["text/markdown"])


def bare(text):  # without code
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def front_matter(cells):
    return yaml.safe_load(
        re.fullmatch(r"---\n(.*)\n---\s*", joined(cells[0]["source"]), re.DOTALL)[1]
    )


# --- links


def slug(heading):  # pandoc's, which for our headings is GitHub's too
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(
        r"^[^a-z]+", "", re.sub(r"\s", "-", re.sub(r"[^\w\s.-]", "", text.lower()).strip())
    )


def anchors(text):
    "What a link into this Markdown can name."
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return (
        {slug(h) for h in re.findall(r"^#{1,6} +(.+?)(?: *\{[^}]*\})? *$", text, re.MULTILINE)}
        | set(re.findall(r"\{#([\w-]+)", text))
        | set(re.findall(r'\bid="([\w-]+)"', text))
    )


def page_anchors(cells):
    labels = {
        m
        for c in cells
        if c["cell_type"] == "code"
        for m in re.findall(r"^#\| label: (\S+)", joined(c["source"]), re.MULTILINE)
    }
    return labels.union(*map(anchors, texts(cells)))


def targets(text):
    text = bare(text)
    return re.findall(r"\]\(([^)\s]+)(?: [^)]*)?\)", text) + re.findall(
        r'\b(?:src|srcset|href)="([^"]+)"', text
    )


def broken(name, cells, pages, folder):
    "Links of a page that lead nowhere: to no page, no file, or no anchor."
    by_html = {
        Path(n).with_name(front_matter(c)["output-file"]).as_posix(): n for n, c in pages.items()
    }
    for text in texts(cells):
        for target in targets(text):
            path, _, anchor = target.partition("#")
            if path.startswith(SITE):
                found = by_html.get(path.removeprefix(SITE) or "index.html")
            elif re.match(r"[a-z]+:", path):
                continue
            else:
                found = os.path.normpath(Path(name).parent / path) if path else name
            if found is None or not (folder / found).is_file():
                yield f"{target}: no such page or file"
            elif anchor and found in pages and anchor.lower() not in page_anchors(pages[found]):
                yield f"{target}: no such place on that page"


def test_links_of_pages_resolve(proc, pages):
    assert {n: b for n, c in pages.items() if (b := list(broken(n, c, pages, proc[0])))} == {}


@pytest.mark.parametrize(
    "link",
    [
        "[x](no.ipynb)",
        "[x](b.ipynb#nowhere)",
        "[x](#nowhere)",
        f"[x]({SITE}nothing.html)",
        f"[x]({SITE}b.html#nowhere)",
        "![x](no.png)",
        '<img src="no.png">',
    ],
)
def test_a_broken_link_is_found(link, tmp_path):

    def page(name, text):
        return [
            dict(cell_type="raw", source=f"---\noutput-file: {name}.html\n---\n"),
            dict(cell_type="markdown", source=text),
        ]

    pages = {
        "a.ipynb": page("a", f"# Here we are\n{link}"),
        "b.ipynb": page("b", "## Two, `three`\n"),
    }
    for n in pages:
        (tmp_path / n).touch()
    assert len(list(broken("a.ipynb", pages["a.ipynb"], pages, tmp_path))) == 1
    pages["a.ipynb"][1]["source"] = (
        f"# Here we are\n[x](b.ipynb#two-three) [y](#here-we-are) [z]({SITE}b.html) `[x](no.ipynb)`"
    )
    assert list(broken("a.ipynb", pages["a.ipynb"], pages, tmp_path)) == []


def test_links_of_readme_resolve():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in targets(text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        assert not path or (ROOT / path).is_file(), target
        if anchor and not path:
            assert anchor in anchors(text), target


def test_symbols_are_links(pages):
    "nbdev turns a name in backticks into a link to its page."
    assert any(
        f"[`align`]({SITE}data/alignment.html#align)" in text
        for text in texts(pages["data/08_alignment.ipynb"])
    )


# --- front matter, leftovers, images


def test_front_matter(proc, pages):
    assert proc[1] == [], (
        "the docs build changes sources; nbs/nbdev.yml is perhaps not what settings.ini gives"
    )
    for name, cells in pages.items():
        fm = front_matter(cells)
        assert (
            fm["title"].strip()
            and fm["description"].strip()
            and re.fullmatch(r"\w+\.html", fm["output-file"])
        ), name
    files = [Path(n).with_name(front_matter(c)["output-file"]) for n, c in pages.items()]
    assert len(set(files)) == len(files)


def leftovers(cells):
    "What a reader would see and should not."
    labels = page_anchors(cells)
    for text in texts(cells):
        prose = bare(text)
        yield from re.findall(r"\{\{.*|^#\|.*|\b(?:TODO|FIXME|XXX)\b.*", prose, re.MULTILINE)
        yield from (
            f"@{r}"
            for r in re.findall(r"(?<![\w@])@((?:fig|tbl|eq|sec|lst)-[\w-]+)", prose)
            if r not in labels
        )
        fences = re.findall(r"^(:{3,})(.*)$", prose, re.MULTILINE)
        depth = [0]
        for _, rest in fences:
            depth.append(depth[-1] + (1 if rest.strip() else -1))
        if depth[-1] or min(depth) < 0:
            yield "::: that is not closed, or closes nothing"
    for c in cells:
        if c["cell_type"] == "code":
            yield from (
                line
                for line in re.findall(r"^\s*#\|.*", joined(c["source"]), re.MULTILINE)
                if line.strip()[2:].split(":")[0].strip() not in OPTIONS
            )


def test_no_leftovers(pages):
    assert {n: found for n, c in pages.items() if (found := list(leftovers(c)))} == {}


@pytest.mark.parametrize(
    "cell",
    [
        dict(cell_type="markdown", source=s)
        for s in (
            "a {{< video x >}}",
            "::: {.callout-note}\nopen",
            ":::\n",
            "see @fig-none",
            "#| hide",
            "TODO: write",
        )
    ]
    + [
        dict(cell_type="code", source="#| hide\nx = 1", outputs=[]),
        dict(cell_type="code", source="x = 1", outputs=[dict(data={"text/markdown": "FIXME"})]),
    ],
    ids=lambda c: c["source"],
)
def test_a_leftover_is_found(cell):
    assert len(list(leftovers([cell]))) == 1
    fine = [
        dict(cell_type="markdown", source="`{{` @fig-x\n::: {.callout-note}\ntext\n:::"),
        dict(cell_type="code", source="#| label: fig-x\n#| fig-alt: a\nx", outputs=[]),
    ]
    assert list(leftovers(fine)) == []


def without_alt(cells):
    "Images that a screen reader could say nothing about."
    for c in cells:
        if any(
            k.startswith("image/") for o in c.get("outputs", []) for k in o.get("data", {})
        ) and not re.search(r"^#\| fig-alt: *\S", joined(c["source"]), re.MULTILINE):
            yield joined(c["source"])[:80]
    for text in texts(cells):
        yield from re.findall(r"!\[\s*\]\([^)]*\)", bare(text))
        yield from (
            t
            for t in re.findall(r"<img\b[^>]*>", bare(text))
            if not re.search(r'\balt="[^"]{10,}"', t)
        )


def test_images_have_alternative_texts(pages):
    assert {n: w for n, c in pages.items() if (w := list(without_alt(c)))} == {}
    assert (
        list(
            without_alt(
                [
                    dict(
                        cell_type="markdown",
                        source=(ROOT / "README.md").read_text(encoding="utf-8"),
                    )
                ]
            )
        )
        == []
    )


@pytest.mark.parametrize(
    "cell",
    [
        dict(cell_type="markdown", source="![](x.png)"),
        dict(cell_type="markdown", source='<img src="x.png">'),
        dict(cell_type="code", source="plot()", outputs=[dict(data={"image/png": ""})]),
    ],
    ids=lambda c: c["source"],
)
def test_a_missing_alternative_text_is_found(cell):
    assert len(list(without_alt([cell]))) == 1


# --- what fits on a screen

WIDTH, CELLS = 100, 60


def shown_text(output):
    "What an output shows as preformatted text."
    data = output.get("data", {})
    if any(k.startswith("image/") or k in ("text/html", "text/markdown") for k in data):
        return ""
    return joined(output.get("text", "")) or joined(data.get("text/plain", ""))


def too_wide(cells):
    outputs = [o for c in cells for o in c.get("outputs", [])]
    return [line for o in outputs for line in shown_text(o).splitlines() if len(line) > WIDTH]


def test_outputs_are_narrow(pages):
    found = {n: w for n, c in pages.items() if (w := too_wide(c))}
    assert found == {}, "`python tests/notebook.py --fold` breaks lines; show a table as Markdown"


def test_pages_have_few_cells(pages):
    assert {n: len(c) for n, c in pages.items() if len(c) > CELLS} == {}


@pytest.mark.parametrize(
    "output, wide",
    [
        (dict(text=["x" * 101]), True),
        (dict(data={"text/plain": "x" * 101}), True),
        (dict(text=["x" * 100 + "\n"]), False),
        (dict(data={"text/plain": "x" * 101, "text/html": "<p>"}), False),
    ],
)
def test_a_wide_output_is_found(output, wide):
    assert bool(too_wide([dict(cell_type="code", source="", outputs=[output])])) == wide


def signatures(cells):
    "The signatures that nbdev writes above what a page defines."
    for c in cells:
        if "show_doc(" in joined(c["source"]):
            for o in c.get("outputs", []):
                text = joined(o.get("data", {}).get("text/markdown", ""))
                yield from re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)


def test_signatures_hold_no_raw_links(pages):
    found = [s for c in pages.values() for s in signatures(c)]
    assert len(found) > 100 and [s for s in found if "](" in s] == []


def test_source_is_folded_where_it_is_not_the_method(pages):
    def state(name):
        text = "\n".join(joined(c["source"]) for c in pages[name] if c["cell_type"] == "code")
        return set(re.findall(r"^#\| code-fold: (\w+)$", text, re.MULTILINE))

    assert "show" in state("objectives/02_losses.ipynb") and state("core/01_files.ipynb") == {
        "true"
    }


# --- images


def image_names(text):
    names = re.findall(r"!\[[^]]*\]\(([^)\s]+)", bare(text))
    return [*names, *re.findall(r'<(?:img|source)\b[^>]*\bsrc(?:set)?="([^"]+)"', bare(text))]


def not_built(name, cells, folder):
    "Images of a page that Quarto does not copy: it copies `resources`."
    quarto = yaml.safe_load((folder / "_quarto.yml").read_text())
    built = {f for pattern in quarto["project"]["resources"] for f in folder.glob(pattern)}
    for text in texts(cells):
        for image in image_names(text):
            if not re.match(r"[a-z]+:", image):
                place = Path(os.path.normpath((folder / name).parent / image))
                if place not in built:
                    yield image


def test_images_are_built(proc, pages):
    assert {n: w for n, c in pages.items() if (w := list(not_built(n, c, proc[0])))} == {}
    named = [i for t in texts(pages["index.ipynb"]) for i in image_names(t)]
    assert {"images/reading-light.svg", "images/reading-dark.svg"} <= set(named)


def test_an_image_that_is_not_built_is_found(proc):
    lost = '![x](images/no.svg) <img src="../images/reading-dark.svg"> <source srcset="no.png">'
    page = [dict(cell_type="markdown", source=lost)]
    assert list(not_built("studies/x.ipynb", page, proc[0])) == ["images/no.svg", "no.png"]


def test_readme_follows_the_readers_system():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<picture>") == 1 and "for-dark" not in text
    assert 'dark)" srcset="nbs/images/reading-dark.svg"' in text


INCHES = 5.6  # a text of 8 points has 8 pixels then, on a telephone 400 pixels wide


def inches(png: bytes) -> float:  # as its pHYs chunk has it
    at = png.index(b"pHYs")
    pixels, a_metre = struct.unpack(">I", png[16:20]) + struct.unpack(">I", png[at + 4 : at + 8])
    return 39.37 * pixels / a_metre


def stored_pictures(cells):
    outputs = [o for c in cells for o in c.get("outputs", [])]
    pictures = [o.get("data", {}).get("image/png") for o in outputs]
    return [base64.b64decode(joined(picture)) for picture in pictures if picture]


def test_pictures_can_be_read_on_a_telephone(pages):
    found = {n: [inches(png) for png in stored_pictures(c)] for n, c in pages.items()}
    assert sum(map(len, found.values())) > 20
    assert {n: wide for n, wide in found.items() if max(wide, default=0) > INCHES} == {}
    small = r"fontsize=[0-7](?!\d)"
    assert [n for n, c in pages.items() for x in c if re.search(small, joined(x["source"]))] == []


def test_captions_are_text(pages):
    """Quarto has no form of a captioned figure for the `.html.md` of a page and leaves the caption
    out; Jupyter, GitHub and Colab never show one. So what belongs to a figure stands below it."""
    captioned = r"^#\| (?:fig-cap|label: fig-)"
    assert [
        n for n, c in pages.items() for x in c if re.search(captioned, joined(x["source"]), re.M)
    ] == []


# --- pages to be run elsewhere

COLAB = "https://colab.research.google.com/github/icl-distill/icl_distill/blob/main/nbs/"
BINDER = "https://mybinder.org/v2/gh/icl-distill/icl_distill/main?urlpath=lab/tree/nbs/"
ELSEWHERE = ["method", "studies/quickstart", "app/12_bake"]


@pytest.mark.parametrize("page", ELSEWHERE)
def test_a_page_opens_in_colab_and_binder(page):
    "It links to itself, and its first code cell fetches the project to where the page lies."
    cells = json.loads((ROOT / "nbs" / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    for service in (COLAB, BINDER):
        assert any(f"]({service}{page}.ipynb)" in joined(c["source"]) for c in cells)
    code = [joined(c["source"]) for c in cells if c["cell_type"] == "code"]
    first = next(c for c in code if "default_exp" not in c)
    assert "#| eval: false" in first and '"google.colab" in' in first
    where = re.search(r"%cd icl_distill/(\S+)", first)[1]
    up = re.search(r"%pip install -q (\S+)", first)[1]
    assert where == Path("nbs", page).parent.as_posix()
    assert os.path.normpath(f"{where}/{up}") == "."


def test_links_to_such_services_are_those_pages(pages):
    found = {t for c in pages.values() for text in texts(c) for t in targets(text)}
    assert {t for t in found if "colab" in t or "mybinder" in t} == {
        f"{service}{page}.ipynb" for page in ELSEWHERE for service in (COLAB, BINDER)
    }


def test_what_binder_installs():
    "This package with the pins, torch for CPUs, and a Python that both accept."
    lines = (ROOT / ".binder" / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if not line.startswith(("#", "--extra-index-url "))]
    assert wanted[0] == "-c ../constraints.txt" and wanted[-1] == "."
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in wanted[1:-1] if line not in pins] == []
    assert any(line.endswith("/whl/cpu") for line in lines)
    python = (ROOT / ".binder" / "runtime.txt").read_text().strip()
    assert python in {"python-3.11", "python-3.12"}


# --- the site's other files


def test_llms_lists_the_pages(pages):
    listed = re.findall(r"\]\(([^)]+)\)", (ROOT / "nbs" / "llms.txt").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(
        f"{SITE}{Path(n).with_name(front_matter(c)['output-file']).as_posix()}.md"
        for n, c in pages.items()
    )


def test_site_files_reach_quarto(proc):
    quarto = yaml.safe_load((proc[0] / "_quarto.yml").read_text())
    for pattern in quarto["project"]["resources"]:
        assert list(proc[0].glob(pattern)), pattern
    for card in ("open-graph", "twitter-card"):
        image = quarto["website"][card]["image"]  # whole: a page in a folder would lose it
        assert image.startswith(SITE) and (proc[0] / image.removeprefix(SITE)).is_file()
    for f in (quarto["format"]["html"]["css"], *quarto["metadata-files"], "llms.txt", "404.qmd"):
        assert (proc[0] / f).is_file(), f
    missing = (proc[0] / "404.qmd").read_text()
    assert (
        yaml.safe_load(missing.split("---")[1])["title"]
        and targets(missing)
        and [t for t in targets(missing) if not (proc[0] / t).is_file()] == []
    )


def test_quarto_config_is_a_link():
    done = subprocess.run(
        ["git", "ls-files", "-s", "nbs/_quarto.yml"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode or not done.stdout:
        pytest.skip("not a git checkout")
    assert (
        done.stdout.startswith("120000 ")
        and os.readlink(ROOT / "nbs" / "_quarto.yml") == "../_quarto.yml"
    )


def test_pictures_are_what_the_index_draws(tmp_path, monkeypatch):
    "The hidden cells of the index, run elsewhere, draw the committed pictures."
    import matplotlib

    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    backend, scope = matplotlib.get_backend(), {}
    matplotlib.use("Agg")
    for c in cells:
        if c["cell_type"] == "code" and joined(c["source"]).startswith("#| hide"):
            exec(joined(c["source"]), scope)
    matplotlib.use(backend)
    for f in ("reading-light.svg", "reading-dark.svg"):
        assert (tmp_path / "images" / f).read_text() == (ROOT / "nbs" / "images" / f).read_text()
    assert struct.unpack(
        ">II", (ROOT / "nbs" / "images" / "social-card.png").read_bytes()[16:24]
    ) == (1200, 630)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_licence_and_citation():
    licence = (ROOT / "LICENSE").read_text()
    assert (
        "Apache License" in licence
        and "Version 2.0, January 2004" in licence
        and "END OF TERMS AND CONDITIONS" in licence
    )
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        cff["cff-version"] == "1.2.0"
        and cff["license"] == "Apache-2.0"
        and {"message", "title", "authors", "version"} <= cff.keys()
    )


def test_publishing_waits_for_the_tests():
    "The site is published after everything has passed, from the folder that nbdev writes."

    def load(name):
        return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())

    deploy, test = load("deploy.yml"), load("test.yml")
    assert (
        deploy["jobs"]["test"]["uses"] == "./.github/workflows/test.yml"
        and deploy["jobs"]["deploy"]["needs"] == "test"
    )
    assert any(s.get("run") == ".ci/run" for s in test["jobs"]["test"]["steps"])
    steps = deploy["jobs"]["deploy"]["steps"]

    def at(what):
        return next(i for i, step in enumerate(steps) if what in json.dumps(step))

    assert (
        at("nbdev_docs") < at("upload-pages-artifact") < at("deploy-pages")
        and steps[at("upload-pages-artifact")]["with"]["path"] == "_docs"
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+", steps[at("quarto-actions")]["with"]["version"])
    assert deploy["concurrency"]["cancel-in-progress"] is False
