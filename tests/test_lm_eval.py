"Our scores and those of lm-evaluation-harness's own gsm8k task, on the same texts: identical."

import json
import random
from pathlib import Path

import pytest
import yaml

from icl_distill.data.examples import Example
from icl_distill.data.tasks import Task

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed (pip install -e '.[lm_eval]')"
)

root = Path(__file__).resolve().parent.parent
scorer = Task("gsm8k", [], [], {})


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


def harness_task():
    "The task file that lm-eval ships."
    folder = Path(lm_eval.__file__).parent / "tasks" / "gsm8k"
    task = yaml.safe_load((folder / "gsm8k.yaml").read_text())
    (metric,) = task["metric_list"]
    assert metric["metric"] == "exact_match"
    names = [filters["name"] for filters in task["filter_list"]]
    assert names == ["strict-match", "flexible-extract"]
    assert "{{answer}}" in task["doc_to_target"]
    return task


def harness_scores(name, texts, golds):
    "By the filter of this name: whether each text is right."
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters import build_filter_ensemble

    task = harness_task()
    settings = without(task["metric_list"][0], "metric", "aggregation", "higher_is_better")
    items = [
        Instance(
            request_type="generate_until",
            doc={"answer": gold},
            arguments=("", {}),
            idx=0,
            resps=[text],
        )
        for text, gold in zip(texts, golds, strict=True)
    ]
    filters = next(f["filter"] for f in task["filter_list"] if f["name"] == name)
    steps = [(step["function"], without(step, "function")) for step in filters]
    build_filter_ensemble(name, steps).apply(items)
    found = [item.filtered_resps[name] for item in items]
    return [
        bool(exact_match_fn(predictions=[answer], references=[gold], **settings)["exact_match"])
        for answer, gold in zip(found, golds, strict=True)
    ]


def agree(texts, golds):
    "Texts on which the two differ, and how many were right by each rule."
    examples = [Example(str(i), "q", gold) for i, gold in enumerate(golds)]
    ours = [scorer.score(text, e) for text, e in zip(texts, examples, strict=True)]
    strict = [score.correct for score in ours]
    flexible = [score.correct_flexible for score in ours]
    odd, right = [], []
    for name, mine in (("strict-match", strict), ("flexible-extract", flexible)):
        theirs = harness_scores(name, texts, golds)
        right.append(sum(theirs))
        for text, gold, a, b in zip(texts, golds, theirs, mine, strict=True):
            if a != b:
                odd.append((text, gold))
    return odd, right


def generated():
    "Each text, with its gold one, in the results of this checkout's tasks with number answers."
    pairs = []
    for task in ("gsm8k_smollm2", "quickstart"):
        for path in sorted((root / "results" / task).glob("**/records/*.jsonl")):
            rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            pairs += [(row["text"], f"worked\n#### {row['gold']}") for row in rows if "text" in row]
    return pairs


def test_generated_texts():
    pairs = generated()
    assert len(pairs) >= 500
    odd, right = agree([text for text, _ in pairs], [gold for _, gold in pairs])
    assert not odd, odd[:5]
    assert all(0 < n < len(pairs) for n in right)


HARD = [
    "#### 72",
    "####72",
    "#### 72.",
    "#### $72",
    "#### 7,2",
    "#### 72\n#### 73",
    "#### 73\n#### 72",
    "### 72",
    "#### -72",
    "#### - 72",
    "#### 72 apples",
    "#### 72,",
    "#### .",
    "#### ,72",
    "72",
    "the answer is 72",
    "the answer is $72.00",
    "72.00",
    "72.0",
    "it is 1,072",
    "1 072",
    "-72",
    "5-72",
    "7 2",
    "",
    " ",
    "\n",
    "#### ",
    "#### seventy-two",
    "$",
    "$72",
    "72$",
    "72%",
    "...",
    "72...",
    "#### 72...",
    "#### ٧٢",
    "#### ７２",
    "#### 72\u00a0",
    "####\u00a072",
    "#### 072",
    "#### 7.2e1",
    "Question: 9? #### 72",
    "#### 72####73",
    "#### #### 72",
    "#### 1\n\nQuestion: x\nAnswer: #### 72",
    "the [invalid] #### x",
    "#### --72",
    "#### 72-",
    "12/72",
    "3*24=72",
    "<<3*24=72>>72",
    "#### 72.5",
    "#### 72.",
    "72.",
    "$72,000",
    "#### $-72",
    "#### -$72",
    "#### 72\r\n",
    "#### 72\t",
    "\u2028#### 72",
    "#### 72'000",
]
GOLDS = [72, -72, "1,072", 0, "72.5", "72,000", 7]


def test_hard_cases():
    texts = [text for text in HARD for _ in GOLDS]
    odd, right = agree(texts, [f"so\n#### {gold}" for _ in HARD for gold in GOLDS])
    assert not odd, odd[:5]
    assert all(right)


PIECES = [
    "#### ",
    "####",
    "#",
    " ",
    "\n",
    "-",
    ",",
    ".",
    "$",
    "%",
    "1",
    "7",
    "72",
    "0",
    "1,072",
    "72.5",
    "x",
    "The answer is ",
    "=",
    "²",
    "٢",
    "\u00a0",
    "A",
] + ["#### ", "72"] * 6


def test_made_up_texts():
    "Pieces that answers are made of, in any order."
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(0, 7))) for _ in range(3000)]
    golds = [f"so\n#### {rng.choice([72, 7, '1,072', '72.5', -7, 0])}" for _ in texts]
    odd, right = agree(texts, golds)
    assert not odd, odd[:5]
    assert all(n > 30 for n in right)
