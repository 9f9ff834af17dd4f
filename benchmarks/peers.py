"""One training step of ours and of two peers on the same examples, interleaved in one process.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/peers.py --out results/bench/peers.json

- `trl_sdft`: TRL's SDFTTrainer (self-distillation from a teacher that reads privileged context)
  with its `base` teacher, which under LoRA is the same weights with the adapter off, as ours. It
  samples its completions; here its `_generate` returns the gold answer's ids instead, so that no
  time goes into generation. Everything else is TRL's own training step: student and teacher
  forward, full-vocabulary logits of all completion positions, top-256 forward KL, backward,
  clipping, optimiser. Its teacher prompt is our context and question, untruncated (its default cuts
  prompts to the last 512 tokens; gradient checkpointing, on by default there, is off).
- `transformers_sft`: a plain `transformers.Trainer` on question and answer with the prompt masked.
- ours: `sft`, `distill_online` (a cached prefix) and `distill_remembered` (cached targets), with
  clipping and optimiser step.

All start from the same weights, LoRA rank, dtype and batch (dropout 0, as TRL switches it off). Of
the trainers, what lies between `on_step_begin` and `on_step_end` is timed; ratios are medians of
the ratios on the same batch.
"""

import argparse
import importlib.metadata
import tempfile
import time
import warnings
from functools import partial

import datasets
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from common import (
    Steps,
    arguments,
    batches_of,
    configure,
    data_of,
    described,
    in_turn,
    machine,
    median,
    paired,
    shown,
    timed,
    write,
)
from icl_distill.core.hub import load_tokenizer
from icl_distill.models.loading import add_lora, load_model

OURS, PEERS = ["sft", "distill_online", "distill_remembered"], ["transformers_sft", "trl_sdft"]
LIMITS = dict(distillation=2.0, sft=1.0)


class Clock(TrainerCallback):
    def on_step_begin(self, *a, **kw):
        self.start = time.perf_counter()

    def on_step_end(self, *a, **kw):
        self.seconds = time.perf_counter() - self.start


def training_arguments(args, cls, folder, **more):
    return cls(
        output_dir=folder,
        use_cpu=args.device == "cpu",
        per_device_train_batch_size=args.batch,
        max_steps=1,
        learning_rate=2e-4,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
        remove_unused_columns=False,
        **more,
    )


def peer(args, cfg, tok, name, folder):
    "`step(batch)` -> seconds of that trainer's own step."
    model, clock = load_model(cfg.model), Clock()
    if name == "transformers_sft":

        def rows(batch):
            return [
                dict(
                    input_ids=a.student_ids,
                    attention_mask=[1] * len(a.student_ids),
                    labels=[-100] * (len(a.student_ids) - a.n_answer) + a.answer_ids,
                )
                for a in batch
            ]

        trainer = Trainer(
            add_lora(model, cfg.lora),
            training_arguments(args, TrainingArguments, folder),
            DataCollatorForSeq2Seq(tok),
            train_dataset=datasets.Dataset.from_list(rows([EXAMPLE])),
            callbacks=[clock],
        )
    else:
        import peft
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        class Gold(SDFTTrainer):
            def _tokenize_prompts(self, prompts):
                return [list(map(int, p.split())) for p in prompts]  # ids, as text

            def _generate(self, prompt_ids):
                return prompt_ids, self.answers

        def text(ids):
            return " ".join(map(str, ids))

        def rows(batch):
            return [
                dict(
                    prompt=text(a.student_ids[: -a.n_answer]),
                    privileged_context=text(a.teacher_ids[: -len(a.student_ids)]),
                )
                for a in batch
            ]

        conf = training_arguments(
            args,
            SDFTConfig,
            folder,
            num_generations=1,
            generate_from_teacher=True,
            teacher_model_kind="base",
            teacher_prompt_template="{privileged_context} {prompt}",
            max_prompt_length=None,
            max_completion_length=1024,
            distillation_topk=cfg.teacher.top_k,
            distillation_alpha=0.0,
            shuffle_dataset=False,
        )
        lora = peft.LoraConfig(
            r=cfg.lora.r,
            lora_alpha=cfg.lora.alpha,
            lora_dropout=0.0,
            target_modules=list(cfg.lora.target_modules),
            task_type="CAUSAL_LM",
        )
        trainer = Gold(
            model,
            conf,
            datasets.Dataset.from_list(rows([EXAMPLE])),
            processing_class=tok,
            peft_config=lora,
            callbacks=[clock],
        )

    def step(batch):
        trainer.train_dataset = datasets.Dataset.from_list(rows(batch))
        trainer.answers, trainer._step, trainer._buffered_inputs = (
            [a.answer_ids for a in batch],
            0,
            None,
        )
        trainer.train()
        return clock.seconds

    return step


def main():
    global EXAMPLE
    args = arguments(
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    ).parse_args()
    warnings.filterwarnings("ignore")
    cfg = configure(args, "lora.dropout=0")
    tok = load_tokenizer(cfg.model.name)
    data = data_of(cfg, args, tok)
    EXAMPLE, batches, steps = (
        data.aligned[0],
        batches_of(data, args),
        Steps(cfg, args, data, tok, OURS),
    )
    params = [p for p in steps.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-4, fused=args.device == "cuda")

    def ours(mode, batch):
        steps.backward(mode, batch)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory() as folder:
        ways = {m: partial(timed, ours, m) for m in OURS} | {
            n: peer(args, cfg, tok, n, folder) for n in PEERS
        }
        for f in ways.values():
            f(batches[0])
        for b in batches:
            ways["distill_remembered"](b)  # the first epoch
        seconds = in_turn(ways, batches)
    mid = {n: median(v) for n, v in seconds.items()}
    ratio = dict(
        trl_sdft_over_online=paired(seconds, "trl_sdft", "distill_online"),
        trl_sdft_over_remembered=paired(seconds, "trl_sdft", "distill_remembered"),
        sft_over_transformers_sft=paired(seconds, "sft", "transformers_sft"),
    )
    met = dict(
        distillation=ratio["trl_sdft_over_online"] >= LIMITS["distillation"],
        sft=ratio["sft_over_transformers_sft"] <= LIMITS["sft"],
    )
    versions = {n: importlib.metadata.version(n) for n in ("trl", "transformers", "peft")}

    write(
        args.out,
        dict(
            what="seconds of one training step (forward, backward, clipping, optimiser) of one "
            "micro-batch",
            **described(args, batches),
            peers=versions,
            seconds=seconds,
            median=mid,
            ratio=ratio,
            limits=LIMITS,
            met=met,
            environment=machine(),
        ),
    )
    for n, s in mid.items():
        print(f"{shown(n):20} {s:7.3f} s")
    print(
        "; ".join(f"{shown(k)}: {v:.2f}" for k, v in ratio.items()),
        "|",
        "; ".join(f"{k}: {'yes' if v else 'NO'}" for k, v in met.items()),
    )


if __name__ == "__main__":
    main()
