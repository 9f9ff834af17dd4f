"""ms-swift's GKD as a step on a batch of our examples.

`swift_gkd`: its GKDTrainer with a `teacher_prompt`, its mode in which the teacher reads another
prompt than the student (OPSD). The teacher is the same weights with the adapter off, as ours. The
answers are the data set's (lmbda 0: it never generates) and the loss is forward KL over the whole
vocabulary (beta 0, temperature 1, no cross-entropy), from logits of the answer's positions. Both
sequences are our ids: its templates and tokenizing are replaced, all that follows is its own. The
context stands in the teacher's sequence of each example; it has no cache of a shared beginning.

ms-swift 4.6 wants trl < 1 and peft < 0.21, so it needs an environment of its own, in which our
steps run beside it in the same process.
"""

import datasets

from icl_distill.core.hub import load_model_config, model_path
from peer_trainers import Setting, TrainerStep, lora_config, masked_labels, training_arguments


def loaded(setting: Setting):
    """The model and its (empty) template, as ms-swift loads them.

    Raises `SystemExit` for a model with code of its own, which ms-swift would run."""
    import torch
    from swift.model import MODEL_MAPPING, get_model_processor
    from swift.model.register import ModelLoader
    from swift.template import get_template

    model = setting.cfg.model
    config = load_model_config(model)
    if hasattr(config, "auto_map") and not model.trust_remote_code:
        raise SystemExit(f"{model.name} brings code, which ms-swift runs: model.trust_remote_code")
    ModelLoader.default_trust_remote_code = model.trust_remote_code
    known = config.model_type in MODEL_MAPPING
    swift_model, processor = get_model_processor(
        str(model_path(model.name)),
        model_type=config.model_type if known else None,
        torch_dtype=getattr(torch, model.dtype),
        device_map=setting.args.device,
        use_hf=True,
    )
    template = get_template(processor, template_type="dummy")
    template.set_mode("train")
    return swift_model, template


def rows(batch) -> list[dict]:
    "Messages that name the mode, and beside them the ids that are read."
    turns = [dict(role="user", content="question"), dict(role="assistant", content="answer")]
    return [
        dict(
            messages=turns,
            teacher_prompt="context and question",
            student_ids=a.student_ids,
            teacher_ids=a.teacher_ids,
            n_answer=a.n_answer,
        )
        for a in batch
    ]


def given_ids_trainer():
    "Its GKDTrainer, reading the ids of `rows`."
    from swift.rlhf_trainers.gkd_trainer import GKDTrainer
    from swift.utils import to_device

    class GivenIds(GKDTrainer):
        def _encode_samples(self, samples):
            def encoded(key):
                pairs = [(s.extra[key], s.extra["n_answer"]) for s in samples]
                return to_device(
                    self.template.data_collator(
                        [dict(input_ids=ids, labels=masked_labels(ids, n)) for ids, n in pairs]
                    ),
                    self.accelerator.device,
                )

            return encoded("student_ids"), encoded("teacher_ids")

    return GivenIds


def swift_gkd(setting: Setting) -> TrainerStep:
    "See the module's text."
    import peft
    from swift.rlhf_trainers.arguments import GKDConfig

    model, template = loaded(setting)
    config = training_arguments(
        setting,
        GKDConfig,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        check_model=False,
        dataloader_num_workers=0,
    )
    trainer = given_ids_trainer()(
        model=peft.get_peft_model(model, lora_config(setting)),
        args=config,
        template=template,
        train_dataset=datasets.Dataset.from_list(rows([setting.example])),
        teacher_use_disable_adapter=True,
    )
    return TrainerStep(trainer, rows)
