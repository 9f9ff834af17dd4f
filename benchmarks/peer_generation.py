"""`generate` of transformers against our engine, on the same prompts.

Both decode greedily with the same float weights and stop ids, in batches of `--batch`, up to
`--max-new-tokens` new tokens, or to a stop id. The prompts are context and question of `--prompts`
examples at a time, sorted by length for both. `generate` reads each prompt as a whole; our engine
reads what all prompts begin with once per call, and does not copy it for each row. In float32 the
answers must be equal; in other types their share is written down.
"""

import time

from transformers import GenerationConfig

from common import in_turn, median, paired
from icl_distill.data.prompts import Prompter
from icl_distill.models.decoding import left_pad
from icl_distill.models.generation import TransformersEngine
from icl_distill.models.loading import load_model
from peer_trainers import Setting


def prompts_of(data, args) -> list[list[list[int]]]:
    "The prompts of each call, the longest first."

    def prompts(batch):
        return sorted((a.teacher_ids[: -a.n_answer] for a in batch), key=len, reverse=True)

    return [prompts(data.batch(step, args.prompts, 0)) for step in range(args.repeats)]


class Plain:
    "`transformers`' own `generate`, a batch at a time."

    def __init__(self, model, tok, stop_ids, args):
        self.model, self.args, self.stop_ids = model, args, stop_ids
        self.pad_id = tok.pad_token_id
        model.generation_config = GenerationConfig()  # nothing of the model's own: greedy
        self.how = GenerationConfig(
            do_sample=False,
            max_new_tokens=args.max_new_tokens,
            eos_token_id=stop_ids,
            pad_token_id=self.pad_id,
        )

    def __call__(self, prompts) -> list[list[int]]:
        size = self.args.batch
        starts = range(0, len(prompts), size)
        return [ids for start in starts for ids in self.answers(prompts[start : start + size])]

    def answers(self, prompts) -> list[list[int]]:
        ids, real = (x.to(self.model.device) for x in left_pad(prompts, self.pad_id))
        out = self.model.generate(ids, attention_mask=real.long(), generation_config=self.how)
        return [self.until_stop(row) for row in out[:, ids.shape[1] :].tolist()]

    def until_stop(self, ids: list[int]) -> list[int]:
        stops = [i for i, token in enumerate(ids) if token in self.stop_ids]
        return ids[: stops[0]] if stops else ids


class Engine:
    "Our engine."

    def __init__(self, model, tok, stop_ids, args):
        self.engine = TransformersEngine(model, tok, stop_ids, args.batch)
        self.most = args.max_new_tokens

    def __call__(self, prompts) -> list[list[int]]:
        found = dict(self.engine.generate(prompts, max_new_tokens=self.most))
        return [found[i].ids for i in range(len(prompts))]


class Timed:
    "Seconds per prompt of a call; `answers` are those of all calls, by call."

    def __init__(self, way):
        self.way, self.answers = way, {}

    def __call__(self, call) -> float:
        number, prompts = call
        start = time.perf_counter()
        self.answers[number] = self.way(prompts)
        return (time.perf_counter() - start) / len(prompts)


def compare(setting: Setting, data) -> dict:
    "Raises `SystemExit` where answers in float32 differ."
    args = setting.args
    stop_ids = Prompter(setting.tok, setting.cfg.prompt).stop_ids
    model = load_model(setting.cfg.model).to(args.device)
    given = model, setting.tok, stop_ids, args
    ways = dict(hf_generate=Timed(Plain(*given)), engine=Timed(Engine(*given)))
    calls = list(enumerate(prompts_of(data, args)))
    for way in ways.values():
        way((0, calls[0][1][: args.batch]))
    seconds = in_turn(ways, calls)
    answers = [
        [x for call in sorted(way.answers.items()) for x in call[1]] for way in ways.values()
    ]
    equal = [a == b for a, b in zip(*answers, strict=True)]
    if args.dtype == "float32" and not all(equal):
        raise SystemExit(f"{equal.count(False)} of {len(equal)} greedy answers are not generate's")
    return dict(
        what="seconds per prompt of greedy generation, context and question as the prompt",
        prompts=args.prompts,
        max_new_tokens=args.max_new_tokens,
        answers=len(equal),
        equal_share=sum(equal) / len(equal),
        new_tokens=sum(map(len, answers[1])),
        seconds=seconds,
        median={name: median(x) for name, x in seconds.items()},
        ratio=dict(hf_generate_over_engine=paired(seconds, "hf_generate", "engine")),
    )
