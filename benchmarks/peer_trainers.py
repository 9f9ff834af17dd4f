"""The trainers of transformers and TRL, each as a step on a batch of our examples.

What a trainer's step costs is the time between its own `on_step_begin` and `on_step_end`: forward,
backward, clipping and optimiser, and of the distilling ones the putting together of the batch. No
trainer generates: each is handed the gold answer's ids in place of a completion. All have dropout 0
(TRL's SDFT switches it off), no gradient checkpointing (TRL's default is on), no bf16 autocast.

- `transformers_sft`: `transformers.Trainer` on question and answer, the prompt masked.
- `trl_sdft`: TRL's SDFTTrainer (experimental) with its `base` teacher, which under LoRA is the same
  weights with the adapter off, as ours. Its teacher reads our context and question, untruncated (by
  default it would read the last 512 tokens). Its loss: forward KL at the student's 256 largest
  logits, from full-vocabulary logits of the answer's positions; no cross-entropy.
- `trl_distillation`: TRL's DistillationTrainer as it is. Its loss: forward KL (beta 0) over the
  whole vocabulary, the head applied in tiles. Its teacher is a second copy of the weights, and can
  read only what the student reads: here question and answer.
- `trl_distillation_context`: the same trainer with its teacher's input replaced, so that it reads
  our context, question and answer. Nothing else is changed; the loss is then that of our
  `exact_online`, which `peers.py` checks.
"""

import time
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from icl_distill.core.config import Config
from icl_distill.data.alignment import Aligned
from icl_distill.models.loading import add_lora, load_model

LONGEST_ANSWER = 1024  # tokens; more than GSM8K's longest


@dataclass(frozen=True)
class Setting:
    "What every peer is built from."

    args: Any  # of the command line
    cfg: Config
    tok: Any  # the tokenizer
    example: Aligned  # trainers want a data set when they are made
    folder: str  # for what they write


class Clock(TrainerCallback):
    "Seconds of a trainer's last step."

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start


class TrainerStep:
    "`step(batch)` -> seconds of one step of that trainer; `loss` is of its last step."

    def __init__(self, trainer, rows):
        self.trainer, self.rows, self.clock = trainer, rows, Clock()
        self.loss = float("nan")
        trainer.add_callback(self.clock)
        trainer.remove_callback(PrinterCallback)

    def __call__(self, batch) -> float:
        trainer = self.trainer
        trainer.train_dataset = datasets.Dataset.from_list(self.rows(batch))
        trainer.given, trainer._step, trainer._buffered_inputs = batch, 0, None
        self.loss = trainer.train().training_loss
        return self.clock.seconds


def training_arguments(setting: Setting, kind, **more):
    "One step of one micro-batch, and nothing that is written or shown."
    return kind(
        output_dir=setting.folder,
        use_cpu=setting.args.device == "cpu",
        per_device_train_batch_size=setting.args.batch,
        gradient_accumulation_steps=1,
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


def lora_config(setting: Setting):
    "Our adapter, for trainers that put it round the model themselves."
    import peft

    lora = setting.cfg.lora
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )


def masked_labels(ids: list[int], n_answer: int) -> list[int]:
    "The ids with -100 for those that are not of the answer."
    return [-100] * (len(ids) - n_answer) + ids[-n_answer:]


def transformers_sft(setting: Setting) -> TrainerStep:
    "See the module's text."

    def rows(batch):
        return [
            dict(
                input_ids=a.student_ids,
                attention_mask=[1] * len(a.student_ids),
                labels=masked_labels(a.student_ids, a.n_answer),
            )
            for a in batch
        ]

    trainer = Trainer(
        add_lora(load_model(setting.cfg.model), setting.cfg.lora),
        training_arguments(setting, TrainingArguments),
        DataCollatorForSeq2Seq(setting.tok),
        train_dataset=datasets.Dataset.from_list(rows([setting.example])),
    )
    return TrainerStep(trainer, rows)


def as_text(ids: list[int]) -> str:
    "TRL's data sets hold text; `as_ids` reads it back, in place of a tokenizer."
    return " ".join(map(str, ids))


def as_ids(text: str) -> list[int]:
    return list(map(int, text.split()))


def trl_sdft(setting: Setting) -> TrainerStep:
    "See the module's text."
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    class GoldAnswers(SDFTTrainer):
        def _tokenize_prompts(self, prompts):
            return [as_ids(p) for p in prompts]

        def _generate(self, prompt_ids):
            return prompt_ids, [a.answer_ids for a in self.given]

    def rows(batch):
        return [
            dict(
                prompt=as_text(a.student_ids[: -a.n_answer]),
                privileged_context=as_text(a.teacher_ids[: -len(a.student_ids)]),
            )
            for a in batch
        ]

    config = training_arguments(
        setting,
        SDFTConfig,
        num_generations=1,
        generate_from_teacher=True,
        teacher_model_kind="base",
        teacher_prompt_template="{privileged_context} {prompt}",
        max_prompt_length=None,
        max_completion_length=LONGEST_ANSWER,
        distillation_topk=setting.cfg.teacher.top_k,
        distillation_alpha=0.0,
        shuffle_dataset=False,
    )
    trainer = GoldAnswers(
        load_model(setting.cfg.model),
        config,
        datasets.Dataset.from_list(rows([setting.example])),
        processing_class=setting.tok,
        peft_config=lora_config(setting),
    )
    return TrainerStep(trainer, rows)


def distillation_trainers():
    "TRL's DistillationTrainer with gold answers, and the one whose teacher reads the context."
    from trl import DistillationTrainer
    from trl.trainer.utils import pad

    class GoldAnswers(DistillationTrainer):
        def _tokenize_prompts(self, prompts):
            return [as_ids(p) for p in prompts], None, {}

        def _generate_single_turn(self, *_, **__):
            return [a.answer_ids for a in self.given]

    class ContextTeacher(GoldAnswers):
        def _generate_and_score_completions(self, inputs):
            prompts = [torch.tensor(a.teacher_ids[: -a.n_answer]) for a in self.given]
            more = dict(
                teacher_ids=pad(prompts, self._tokenizer.pad_token_id, "left"),
                teacher_mask=pad([torch.ones_like(p) for p in prompts], 0, "left"),
            )
            device = self.accelerator.device
            more = {name: x.to(device) for name, x in more.items()}
            return super()._generate_and_score_completions(inputs) | more

        def _compute_loss(self, student, inputs, *rest):
            self.read = inputs["teacher_ids"], inputs["teacher_mask"]
            return super()._compute_loss(student, inputs, *rest)

        def _get_last_hidden_state(self, model, ids, mask, n_answer, **more):
            if model is self.accelerator.unwrap_model(self.teacher_model):
                columns = zip(self.read, (ids, mask), strict=True)
                ids, mask = (torch.cat([x, own[:, -n_answer:]], 1) for x, own in columns)
            return super()._get_last_hidden_state(model, ids, mask, n_answer, **more)

    return GoldAnswers, ContextTeacher


def trl_distillation(setting: Setting, context: bool = False) -> TrainerStep:
    "See the module's text; with `context` it is `trl_distillation_context`."
    from trl import DistillationConfig

    def rows(batch):
        return [dict(prompt=as_text(a.student_ids[: -a.n_answer])) for a in batch]

    config = training_arguments(
        setting,
        DistillationConfig,
        beta=0.0,
        temperature=1.0,
        max_completion_length=LONGEST_ANSWER,
        shuffle_dataset=False,
    )
    trainer = distillation_trainers()[context](
        model=load_model(setting.cfg.model),
        teacher_model=load_model(setting.cfg.model),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows([setting.example])),
        processing_class=setting.tok,
        peft_config=lora_config(setting),
    )
    return TrainerStep(trainer, rows)


def trl_distillation_context(setting: Setting) -> TrainerStep:
    "See the module's text."
    return trl_distillation(setting, context=True)
