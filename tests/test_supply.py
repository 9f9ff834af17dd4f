"What comes with the package: licences, no conflicts, an install without a network."

import os
import re
import shutil
import subprocess
import sys

import pytest
from licenses import AS_IT_IS, PERMISSIVE, closure, licences, root


def ours(name):
    return not re.match(r"nvidia-|cuda-|triton$", name)  # what torch's CUDA builds add


def test_licences_are_permissive():
    "An unknown licence, or one that reaches further than the file, is found here."
    odd = {
        n: licences(m)
        for n, m in closure().items()
        if ours(n) and not licences(m) <= PERMISSIVE | AS_IT_IS.get(n, set())
    }
    assert odd == {}


@pytest.mark.parametrize(
    "fields,found",
    [
        (["License-Expression: GPL-3.0-only"], {"GPL-3.0-only"}),
        (["License: Proprietary"], {"Proprietary"}),
        ([], {"unknown"}),
        (["Classifier: License :: OSI Approved :: GNU Affero General Public License v3"], None),
        (["License: MPL-2.0 AND MIT"], {"MPL-2.0", "MIT"}),
        (
            [
                "License: BSD 3-Clause License",
                "Classifier: License :: OSI Approved :: Apache Software License",
            ],
            {"Apache-2.0"},
        ),
    ],
)
def test_other_licences_are_found(fields, found):
    from email import message_from_string

    got = licences(
        message_from_string("\n".join(["Metadata-Version: 2.4", "Name: x", *fields, ""]))
    )
    if found:
        assert got == found
    if found is None or not found & {"Apache-2.0", "MPL-2.0"}:
        assert not got <= PERMISSIVE


def test_licence_list_is_whole():
    "LICENSES-runtime.md names every package that is installed, with its licence."
    listed = dict(
        re.findall(
            r"^\| ([\w-]+) \| \S+ \| (.+) \|$",
            (root / "LICENSES-runtime.md").read_text(),
            re.MULTILINE,
        )
    )
    here = {n: ", ".join(sorted(licences(m))) for n, m in closure().items() if ours(n)}
    assert {name: said for name, said in here.items() if listed.get(name) != said} == {}


def test_pip_check():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_offline_install(tmp_path):
    "A wheelhouse made from the pins; then, with no index at all, a fresh environment."
    pip = [sys.executable, "-m", "pip"]
    env = {
        k: v for k, v in os.environ.items() if k != "PYTHONPATH"
    }  # the checkout must not pass for an installed package

    def run(*command):
        how = dict(capture_output=True, text=True, check=True, env=env, cwd=tmp_path)
        return subprocess.run([str(part) for part in command], **how)

    shutil.copytree(
        root,
        tmp_path / "source",
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".*", "_*", "runs", "nbs", "assets", "results", "build", "*.egg-info", "__pycache__"
        ),
    )
    shutil.copytree(
        root / "icl_distill",
        tmp_path / "source/icl_distill",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    torch = next(
        line
        for line in (root / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    try:
        run(
            *pip,
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path / "wheels",
            tmp_path / "source",
        )
        run(
            *pip,
            "download",
            "-d",
            tmp_path / "wheels",
            "-c",
            root / "constraints.txt",
            torch,
            next((tmp_path / "wheels").glob("icl_distill-*.whl")),
        )
        run(sys.executable, "-m", "venv", tmp_path / "venv")
        python = tmp_path / "venv/bin/python"
        run(
            python,
            "-m",
            "pip",
            "install",
            "--no-index",
            "--find-links",
            tmp_path / "wheels",
            "-c",
            root / "constraints.txt",
            "icl_distill",
        )
        assert "train" in run(tmp_path / "venv/bin/icl-distill", "--help").stdout
        assert "loss:" in run(tmp_path / "venv/bin/icl-distill", "config", "online_v1").stdout
        run(python, "-m", "pip", "check")
    except subprocess.CalledProcessError as e:
        raise AssertionError(f"{e.cmd}\n{e.stdout[-2000:]}{e.stderr[-3000:]}") from None
