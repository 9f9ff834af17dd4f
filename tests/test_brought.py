"What people bring: their questions, templates, tokenizers, models, adapters and files."

import itertools

import pytest

from icl_distill.core.config import ContextConfig
from icl_distill.core.files import InputError
from icl_distill.data.contexts import Contexts
from icl_distill.data.examples import Example
from icl_distill.data.tasks import split_dev

# --- the same question


def with_other_spaces(n):
    "Pairs of examples whose questions differ in white space alone, and as many single ones."
    spaces = itertools.cycle(["What is  {}?", " What is {}?", "What is {}?\n", "What\tis\u00a0{}?"])
    rows = []
    for i in range(n):
        rows += [f"What is {i}?", next(spaces).format(i), f"And {i}?"]
    return [Example(f"train-{i}", question, f"#### {i}") for i, question in enumerate(rows)]


@pytest.mark.parametrize("kind", ["per_example", "fixed", "pool", "shuffled_answers"])
def test_a_question_with_other_spaces_is_never_in_its_own_context(kind):
    train = with_other_spaces(8)
    contexts = Contexts(ContextConfig(kind=kind, n_shots=6, pool_size=4), train)
    asked = 0
    for example in train:
        if example.id in contexts.reserved:
            continue
        try:
            shown = contexts(example).shots
        except InputError:  # every context of the pool shows it
            assert kind == "pool"
            continue
        asked += 1
        own = example.question.split()
        assert all(shot.question.split() != own for shot in shown)
    assert asked >= 4


def test_n_dev_counts_the_questions_that_occur_once():
    train = with_other_spaces(4)
    with pytest.raises(InputError, match="12 training examples .4 questions occur once"):
        split_dev(train, 5, 0)
