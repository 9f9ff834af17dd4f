"""The gradient of one batch in micro-batches of several sizes: `python tests/gradients.py FOLDER`.

Run alone, or by `accelerate launch` in several processes; each writes FOLDER/WORLD_RANK.pt, a
dictionary 'examples/size' -> what came of it. Sizes with too few micro-batches to go round are
left out.
"""

import sys

import torch
from accelerate import Accelerator
from helpers_training import PAD, TOY, gradient_of

from icl_distill.core.config import load_config
from icl_distill.core.files import InputError
from icl_distill.data.prompts import Prompter
from icl_distill.models.loading import frozen_head
from icl_distill.models.teacher import Teacher
from icl_distill.testing import noisy_adapter, real_tokenizer, tiny_model
from icl_distill.training.batches import micro_batches, prepare
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step

EXAMPLES = (8, 7, 5)
SIZES = (8, 4, 3, 2, 1)


def gradients(accelerator):
    "'examples/size' -> gradient, sums, norm, and how many examples each micro-batch has."
    over = ["prompt.template=chat", "context.n_shots=3", "teacher.top_k=16"]
    cfg = load_config("quickstart", over)
    data = prepare(cfg, TOY, Prompter(real_tokenizer(), cfg.prompt))
    model = noisy_adapter(tiny_model())
    head = frozen_head(model)
    student = accelerator.prepare(Student(model))
    teacher = Teacher(model, head, PAD, 16, prefixes=data.prefixes)
    learner = Learner(student, teacher, head, accelerator, cfg.loss, PAD)
    rank, world = accelerator.process_index, accelerator.num_processes
    out = {}
    for n in EXAMPLES:
        for size in SIZES:
            try:
                micros = micro_batches(data.aligned[3 : 3 + n], size, rank, world)
            except InputError:
                continue  # seven single ones in two processes
            model.zero_grad()
            sums = backward_step(learner, micros)
            norm = accelerator.clip_grad_norm_(student.parameters(), 1e9)
            out[f"{n}/{size}"] = dict(
                grad=gradient_of(model).clone(),
                sums=accelerator.reduce(sums, "sum"),
                norm=norm,
                shape=torch.tensor([len(micro) for micro in micros]),
            )
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    result = gradients(accelerator)
    world, rank = accelerator.num_processes, accelerator.process_index
    torch.save(result, f"{sys.argv[1]}/{world}_{rank}.pt")
    accelerator.end_training()
