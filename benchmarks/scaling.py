"""How the cost of a step grows: with the context's length (0 to 16 shots), with the answer's, and
with the number of examples whose targets are cached.

    python benchmarks/scaling.py --out results/bench/scaling.json

Random ids, for only lengths matter here. `attention` is what reading the context's keys and values
costs by itself: the attention of the teacher's question and answer tokens to prefix and sequence,
for all layers, with the keys' copies, timed in the same process. The online teacher may grow by
that (and 15 %, and 3 % of a step for noise); one with cached targets may not grow at all. Results
files keep an older word for cached targets, `remembered`.
"""

import copy

import torch
import torch.nn.functional as F

from common import Steps, arguments, configure, generated, machine, median, shown, timed, write
from icl_distill.core.hub import load_tokenizer
from icl_distill.models.loading import base_of
from icl_distill.models.teacher import CachedTargets
from icl_distill.objectives.targets import Targets

# tokens: an eighth of a mean 8-shot context, GSM8K's median question and answer
SHOT, QUESTION, ANSWER = 196, 61, 112
SHOTS, ANSWERS, EXAMPLES = (0, 4, 8, 16), (56, 112, 224), (16, 256, 4096)
MODES = ("sft", "distill_online", "distill_remembered")


def attention(steps, batch, context: int, dtype):
    """A function that does nothing but the teacher's attention over prefix and sequence, for every
    layer."""
    c, dev = base_of(steps.model).config, steps.acc.device
    B, T, H, K, d = (
        len(batch),
        len(batch[0].student_ids),
        c.num_attention_heads,
        c.num_key_value_heads,
        c.hidden_size // c.num_attention_heads,
    )

    def x(*shape):
        return torch.randn(*shape, device=dev, dtype=dtype)

    q, new, old = x(B, H, T, d), x(B, K, T, d), x(1, K, context, d)
    mask = (
        torch.ones(T, context + T, dtype=torch.bool, device=dev)
        .tril(context)[None, None]
        .expand(B, 1, -1, -1)
    )

    def f():
        for _ in range(c.num_hidden_layers):
            k, v = (
                torch.cat([old.expand(B, -1, -1, -1), new], 2).repeat_interleave(H // K, 1)
                for _ in "kv"
            )
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if dev.type == "cuda":
            torch.cuda.synchronize()

    return f


def measure(args, points) -> list[dict]:
    "Medians at each point, `(name, batch, steps)`, the points taken in turn in every round."
    seconds = [{m: [] for m in (*MODES, "attention")} for _ in points]
    for round in range(args.repeats + 1):  # the first warms up and fills the cache
        for (_, batch, steps, attend), out in zip(points, seconds, strict=True):
            for m in MODES:
                s = timed(steps, m, batch)
                if round:
                    out[m].append(s)
            with torch.no_grad():
                s = timed(attend)
            if round:
                out["attention"].append(s)
    return [
        dict(name, seconds=s, median={m: median(v) for m, v in s.items()})
        for (name, *_), s in zip(points, seconds, strict=True)
    ]


def main():
    p = arguments(__doc__)
    p.set_defaults(batch=2)
    args = p.parse_args()
    cfg = configure(args)
    tok = load_tokenizer(cfg.model.name)
    dtype = getattr(torch, args.dtype)
    shared = Steps(cfg, args, generated(1, len(tok)), tok, MODES)

    def point(name, context, answer):
        data = generated(args.batch, len(tok), context, QUESTION, answer)
        steps = copy.copy(shared)
        steps.teachers = shared.teachers_of(data)
        return name, data.aligned, steps, attention(steps, data.aligned, context, dtype)

    out = dict(
        context=measure(args, [point(dict(shots=n), n * SHOT, ANSWER) for n in SHOTS]),
        answer=measure(args, [point(dict(tokens=a), 8 * SHOT, a) for a in ANSWERS]),
    )
    out["examples"] = lookups(args, shared, tok, dtype)
    first = out["context"][0]["median"]

    def at(shots: int, i: int) -> dict:
        "Seconds of each mode in round i, without a context (0) or with the longest (-1)."
        return {m: s[i] for m, s in out["context"][shots]["seconds"].items()}

    def each(f):
        "The median over the rounds of f(without a context, with the longest)."
        return median(f(at(0, i), at(-1, i)) for i in range(args.repeats))

    def grown(m):
        return each(lambda first, last: last[m] - first[m])

    spread = max(r["seconds_per_batch"] for r in out["examples"]) - min(
        r["seconds_per_batch"] for r in out["examples"]
    )
    met = dict(
        online_grows_like_attention=grown("distill_online")
        <= 1.15 * grown("attention") + 0.03 * first["sft"],
        remembered_is_flat_in_context=abs(
            each(
                lambda first, last: (
                    last["distill_remembered"] / last["sft"]
                    - first["distill_remembered"] / first["sft"]
                )
            )
        )
        <= 0.10,
        remembered_is_flat_in_examples=spread <= 0.01 * first["sft"],
    )
    write(
        args.out,
        dict(
            what="seconds of forward and backward of one micro-batch",
            model=args.model,
            batch=args.batch,
            repeats=args.repeats,
            dtype=args.dtype,
            device=args.device,
            shot_tokens=SHOT,
            question_tokens=QUESTION,
            answer_tokens=ANSWER,
            **out,
            growth={m: grown(m) for m in (*MODES, "attention")},
            met=met,
            environment=machine(),
        ),
    )
    for axis in ("context", "answer"):
        for r in out[axis]:
            print(
                axis,
                {k: v for k, v in r.items() if k in ("shots", "tokens")},
                {shown(m): round(v, 3) for m, v in r["median"].items()},
            )
    for r in out["examples"]:
        print(r)
    print("; ".join(f"{shown(k)}: {'yes' if v else 'NO'}" for k, v in met.items()))


def lookups(args, steps, tok, dtype) -> list[dict]:
    "What it costs to look a batch's targets up among many, in RAM."
    K, rows = steps.cfg.teacher.top_k, []
    targets = Targets(
        torch.randn(ANSWER, K).to(dtype),
        torch.randint(len(tok), (ANSWER, K)).int(),
        torch.randn(ANSWER),
    )
    cache, data = CachedTargets("many"), generated(max(EXAMPLES), len(tok), SHOT, QUESTION, ANSWER)
    for n in EXAMPLES:
        for a in data.aligned[len(cache.ram) : n]:
            cache.put(a, targets)
        teacher = steps.teacher(data, cache)
        batch = data.aligned[:n][:: max(1, n // args.batch)][: args.batch]
        teacher(batch)
        rows.append(
            dict(
                examples=n,
                bytes=cache.bytes,
                seconds_per_batch=median(timed(teacher, batch) for _ in range(50)),
            )
        )
        assert teacher.stats["computed"] == 0
    return rows


if __name__ == "__main__":
    main()
