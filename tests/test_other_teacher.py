"""A teacher that is another model of the same tokenizer: equal to brute force, whatever the sizes."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers_training import EXAMPLES, PAD, TOY, adapter, config, equal, files_of, go, gradient_of
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from icl_distill.core.files import InputError
from icl_distill.core.runs import Run
from icl_distill.data.alignment import pack
from icl_distill.data.prompts import Prompter
from icl_distill.evaluation.conditions import named_condition
from icl_distill.models.loading import frozen_head
from icl_distill.objectives.losses import SUMS
from icl_distill.testing import noisy_adapter, raises, real_tokenizer, tiny_model
from icl_distill.training.batches import prepare
from icl_distill.training.fill import Filling, fill_targets
from icl_distill.training.labels import check_answers
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step
from icl_distill.training.teachers import on_common_vocabulary, other_weights, teacher_of

V = len(real_tokenizer())


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    "A folder with a model of other width, depth and rows behind the tokenizer's last id."
    folder = tmp_path_factory.mktemp("teacher") / "model"
    shape = dict(hidden_size=48, num_hidden_layers=3, vocab_size=V + 13, initializer_range=0.2)
    tiny_model("qwen3", seed=7, **shape).save_pretrained(folder)
    real_tokenizer().save_pretrained(folder)
    return folder
