"""The licence of everything that `pip install icl_distill` brings.

    python tests/licenses.py > LICENSES-runtime.md

in an environment made with constraints.txt.
"""

import importlib.metadata
import re
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
PERMISSIVE = {
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSD",
    "0BSD",
    "ISC",
    "PSF-2.0",
    "MIT-CMU",
    "Zlib",
    "CC0-1.0",
    "CNRI-Python",
    "BSL-1.0",
    "Apache-2.0 WITH LLVM-exception",
}
AS_IT_IS = {"certifi": {"MPL-2.0"}, "tqdm": {"MPL-2.0"}}  # file-level copyleft: used unmodified
WORDS = [
    ("apache", "Apache-2.0"),
    ("mozilla public license 2|mpl-2", "MPL-2.0"),
    ("python software foundation", "PSF-2.0"),
    ("isc license", "ISC"),
    ("2-clause", "BSD-2-Clause"),
    ("3-clause", "BSD-3-Clause"),
    (r"\bbsd\b", "BSD"),
    (r"\bmit\b", "MIT"),
]


def name_of(r):
    return re.sub(r"[-_.]+", "-", r).lower()


def closure(root=root) -> dict:  # name -> metadata
    "What settings.ini requires at run time, and what that requires, as installed here."
    ini = ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    todo, found = [Requirement(r) for r in ini["DEFAULT"]["requirements"].split()], {}
    while todo:
        r = todo.pop()
        if name_of(r.name) in found:
            continue
        d = importlib.metadata.distribution(r.name)
        found[name_of(r.name)] = d.metadata
        todo += [
            q
            for q in map(Requirement, d.requires or [])
            if q.marker is None or any(q.marker.evaluate(dict(extra=e)) for e in r.extras or {""})
        ]
    return dict(sorted(found.items()))


def licences(meta) -> set[str]:
    "Of one package: its SPDX expression, or its classifiers, or its licence field's first line."
    if (spdx := meta.get("License-Expression")) or re.fullmatch(
        r"[\w.-]+( (AND|OR|WITH) [\w.-]+)+", meta.get("License") or ""
    ):
        return set(re.split(r" AND | OR ", spdx or meta["License"]))
    said = [c for c in meta.get_all("Classifier") or [] if c.startswith("License")] or [
        (meta.get("License") or "").strip().split("\n")[0]
    ]
    return {
        next((name for pattern, name in WORDS if re.search(pattern, s.lower())), s or "unknown")
        for s in said
    }


def table() -> str:
    rows = [
        f"| {n} | {m['Version'].split('+')[0]} | {', '.join(sorted(licences(m)))} |"
        for n, m in closure().items()
    ]
    return "\n".join(
        [
            "# Licences of what is installed at run time",
            "",
            "Written by `tests/licenses.py` from the packages' own metadata, with the versions of "
            "`constraints.txt` (CPU build of torch). `certifi` and `tqdm` are in part under the "
            "MPL-2.0,",
            "which asks for the source of *changed* files; they are used unchanged. The CUDA "
            "builds of torch bring NVIDIA's libraries, under NVIDIA's licences, and triton (MIT).",
            "",
            "| package | version | licence |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    print(table(), end="")
