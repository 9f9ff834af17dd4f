"""Our steps as `peers.py` times them: forward, backward, clipping and AdamW of one micro-batch.

- `sft`: no teacher; the mean cross-entropy of the answer's tokens.
- `distill_online`: the paper's loss, cross-entropy and the mean squared error of the teacher's 256
  largest logits; the teacher reads context and question, the context's keys and values are cached.
- `distill_remembered`: the same with cached targets (results files keep the older word).
- `exact_online`: forward KL over the whole vocabulary and nothing else, which is the loss of TRL's
  DistillationTrainer and of ms-swift's GKD at beta 0; the teacher as in `distill_online`.
- `exact_no_context`: as `exact_online`, but the teacher reads what the student reads.
"""

from dataclasses import replace as changed

import torch

from common import Steps
from icl_distill.core.config import replace
from icl_distill.models.teacher import Teacher
from icl_distill.objectives.sums import SUMS

OURS = ["sft", "distill_online", "distill_remembered", "exact_online", "exact_no_context"]


def without_context(batch):
    "The examples with a teacher that reads question and answer alone, as the student does."
    return [changed(a, teacher_ids=a.student_ids, context_key="") for a in batch]


class OurSteps(Steps):
    "`steps(mode, batch)` is a whole training step; all modes train the same adapter."

    def __init__(self, cfg, args, data, tok):
        super().__init__(cfg, args, data, tok, modes=OURS)
        exact = replace(cfg.loss, kind="forward_kl", weight=1.0, ce=0.0)
        self.losses = dict(exact_online=exact, exact_no_context=exact)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=2e-4, fused=args.device == "cuda")

    def teachers_of(self, data) -> dict:
        def exact(prefixes):
            return Teacher(self.model, self.head, self.pad, None, prefixes)

        more = dict(exact_online=exact(data.prefixes), exact_no_context=exact({}))
        return super().teachers_of(data) | more

    def backward(self, mode, batch):
        return super().backward(mode, without_context(batch) if "no_context" in mode else batch)

    def first_loss(self, mode, batch) -> float:
        "The mean loss of an answer's token, and no step."
        sums = self.backward(mode, batch)
        self.optimizer.zero_grad()
        return (sums[SUMS.index("total")] / sums[SUMS.index("positions")]).item()

    def __call__(self, mode, batch):
        self.backward(mode, batch)
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.acc.device.type == "cuda":
            torch.cuda.synchronize()
