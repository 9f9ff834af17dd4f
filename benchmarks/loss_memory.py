"""Peak memory and time of the loss alone, forward and backward: chunked against plain PyTorch.

    python benchmarks/loss_memory.py [--device cuda] [--quick] [--out results/bench/loss_memory.json]

Plain is what one would write without this package: all logits at once, cross-entropy in float32, a gather at the teacher's ids, autograd.
On a CPU, memory is the high-water mark of the resident set of a process that does nothing else (above what it held before); on CUDA, `max_memory_allocated`.
Time is taken in one process, the two ways in turn, after a warm-up; medians are compared.
"""
import argparse, gc, json, os, platform, statistics, subprocess, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F

from icl_distill.config import LossConfig
from icl_distill.losses import Head, Targets, chunked_loss

GRID = [(49152, 576), (128256, 2048), (151936, 2048)]   # vocabulary and hidden size of SmolLM2-135M, Llama-3.2-1B, Qwen3-1.7B
POSITIONS = (256, 1024, 4096)
LIMITS = dict(memory=0.25, time=1.1)                    # chunked / plain: memory at 4,096 positions, time everywhere

def inputs(V:int, D:int, A:int, device:str, dtype:torch.dtype, K:int=256):
    g = torch.Generator().manual_seed(0)
    weight = torch.empty(V, D, dtype=dtype).normal_(0, D**-0.5, generator=g).to(device)
    hidden = torch.randn(A, D, generator=g).to(device, dtype).requires_grad_()
    labels = torch.randint(V, (A,), generator=g).to(device)
    ids = torch.stack([torch.randint(V//K, (A,), generator=g)+i*(V//K) for i in range(K)], 1).int().to(device)
    return hidden, labels, weight, Targets(torch.randn(A, K, generator=g).to(device, dtype), ids, torch.full((A,), 12., device=device))

def plain(hidden, labels, weight, targets, chunk):
    logits = (hidden @ weight.T).float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    delta = logits.gather(1, targets.ids.long())-targets.values.float()
    (loss+0.5*delta.square().mean(-1).sum()).backward()

def chunked(hidden, labels, weight, targets, chunk):
    chunked_loss(hidden, labels, Head(weight), targets, LossConfig(kind="mse", weight=0.5, chunk_size=chunk)).total.backward()

WAYS = dict(plain=plain, chunked=chunked)

def resident(key:str)->int: # bytes; `VmHWM` is the high-water mark
    return next(int(line.split()[1])*1024 for line in open("/proc/self/status") if line.startswith(key))

def peak(way:str, V:int, D:int, A:int, a:argparse.Namespace)->int:
    "Bytes above the inputs; runs in a process of its own."
    x = inputs(V, D, A, a.device, getattr(torch, a.dtype))
    small = inputs(1024, 8, 8, a.device, getattr(torch, a.dtype), 8)
    WAYS[way](*small, a.chunk)                       # libraries and threads are there
    if a.device == "cuda":
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        WAYS[way](*x, a.chunk); torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()-before
    gc.collect()
    before, mark = resident("VmRSS"), resident("VmHWM")
    WAYS[way](*x, a.chunk)
    after = resident("VmHWM")
    if after == mark: raise RuntimeError("the loss stayed below what making its inputs took: no peak to report")
    return after-before

def seconds(V:int, D:int, A:int, a:argparse.Namespace)->dict[str, list[float]]:
    "Wall-clock seconds of each repetition, the ways in turn."
    x, out = inputs(V, D, A, a.device, getattr(torch, a.dtype)), {w: [] for w in WAYS}
    sync = torch.cuda.synchronize if a.device == "cuda" else lambda: None
    for i in range(a.repeats+1):
        for way in list(WAYS)[::1 if i % 2 else -1]:
            x[0].grad = None; sync(); start = time.perf_counter()
            WAYS[way](*x, a.chunk); sync()
            if i: out[way].append(round(time.perf_counter()-start, 5))   # the first is a warm-up
    return out

def in_child(way:str, V:int, D:int, A:int, a:argparse.Namespace)->int:
    cmd = [sys.executable, __file__, "--child", way, str(V), str(D), str(A), "--device", a.device, "--dtype", a.dtype, "--chunk", str(a.chunk), "--threads", str(a.threads)]
    done = subprocess.run(cmd, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{way} at V={V}, A={A} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])

def machine(a:argparse.Namespace)->dict:
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()) if os.path.exists("/proc/cpuinfo") else platform.processor()
    return dict(device=torch.cuda.get_device_name() if a.device == "cuda" else cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), python=platform.python_version(),
        torch=torch.__version__, system=f"{platform.system()} {platform.machine()}")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--chunk", type=int, default=256, help="answer positions per chunk (loss.chunk_size)")
    p.add_argument("--repeats", type=int, default=5, help="timed repetitions of each way")
    p.add_argument("--hidden", type=int, help="one hidden size for all vocabularies, instead of the models' own")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--quick", action="store_true", help="a small vocabulary, to see that it runs")
    p.add_argument("--out", help="write the results to this JSON file")
    p.add_argument("--child", nargs=4, metavar=("WAY", "V", "D", "A"), help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.device == "cuda" and not torch.cuda.is_available(): raise SystemExit("--device cuda: this machine (or this build of PyTorch) has none")
    if a.child: return print(peak(a.child[0], *map(int, a.child[1:]), a))
    rows = []
    for V, D in [(16384, 64)] if a.quick else GRID:
        for A in (256, 2048) if a.quick else POSITIONS:
            D = a.hidden or D
            bytes_ = {w: in_child(w, V, D, A, a) for w in WAYS}
            secs = seconds(V, D, A, a)
            median = {w: statistics.median(s) for w, s in secs.items()}
            ratio = dict(memory=round(bytes_["chunked"]/bytes_["plain"], 4), time=round(median["chunked"]/median["plain"], 4))
            rows.append(dict(V=V, D=D, A=A, peak_bytes=bytes_, seconds=secs, median_seconds=median, ratio=ratio))
            print(f"V={V:>6} D={D:>4} A={A:>4}   peak {bytes_['plain']/2**20:>7.0f} -> {bytes_['chunked']/2**20:>5.0f} MiB ({ratio['memory']:.2f})"
                f"   median {median['plain']:.3f} -> {median['chunked']:.3f} s ({ratio['time']:.2f})", flush=True)
    big = max(r["A"] for r in rows)
    met = dict(memory=all(r["ratio"]["memory"] <= LIMITS["memory"] for r in rows if r["A"] == big), time=all(r["ratio"]["time"] <= LIMITS["time"] for r in rows))
    print(f"memory <= {LIMITS['memory']} of plain at A={big}: {'yes' if met['memory'] else 'NO'};  time <= {LIMITS['time']} of plain: {'yes' if met['time'] else 'NO'}")
    if a.out:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        Path(a.out).write_text(json.dumps(dict(benchmark="loss_memory", settings=dict(dtype=a.dtype, chunk=a.chunk, repeats=a.repeats, top_k=256, quick=a.quick, kind="mse"),
            limits=LIMITS, met=met, machine=machine(a), rows=rows), indent=1)+"\n")

if __name__ == "__main__": main()
