"Our scores and lm-evaluation-harness's own gsm8k filters and metric, on the same texts: identical."

import json
import random
from pathlib import Path

import pytest
import yaml

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed (pip install -e '.[lm_eval]')"
)

from icl_distill.data.examples import Example
from icl_distill.data.tasks import Task

root = Path(__file__).resolve().parent.parent
scorer = Task("gsm8k", [], [], {})


def harness():
    "(filter's name, texts, gold answers) -> one score a text, by the task file that lm-eval ships."
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters import build_filter_ensemble

    task = yaml.safe_load(
        (Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text()
    )
    (metric,) = task["metric_list"]
    settings = {
        k: v for k, v in metric.items() if k not in ("metric", "aggregation", "higher_is_better")
    }
    assert (
        metric["metric"] == "exact_match"
        and [f["name"] for f in task["filter_list"]] == ["strict-match", "flexible-extract"]
        and "{{answer}}" in task["doc_to_target"]
    )

    def scores(name, texts, golds):
        filters = next(f["filter"] for f in task["filter_list"] if f["name"] == name)
        items = [
            Instance(
                request_type="generate_until",
                doc={"answer": g},
                arguments=("", {}),
                idx=0,
                resps=[t],
            )
            for t, g in zip(texts, golds)
        ]
        build_filter_ensemble(
            name,
            [(f["function"], {k: v for k, v in f.items() if k != "function"}) for f in filters],
        ).apply(items)
        return [
            bool(
                exact_match_fn(predictions=[i.filtered_resps[name]], references=[g], **settings)[
                    "exact_match"
                ]
            )
            for i, g in zip(items, golds)
        ]

    return scores


def agree(texts, golds):
    "Texts on which the two differ, and how many were right by each rule."
    ours, lm = (
        [scorer.score(t, Example(str(i), "q", g)) for i, (t, g) in enumerate(zip(texts, golds))],
        harness(),
    )
    pairs = [
        (lm("strict-match", texts, golds), [s.correct for s in ours]),
        (lm("flexible-extract", texts, golds), [s.correct_flexible for s in ours]),
    ]
    odd = [
        (t, g) for theirs, mine in pairs for t, g, a, b in zip(texts, golds, theirs, mine) if a != b
    ]
    return odd, [sum(a) for a, _ in pairs]


def generated():
    "Every text in the results of this checkout's tasks with numbers for answers, with its gold one."
    files = sorted(
        f
        for task in ("gsm8k_smollm2", "quickstart")
        for f in (root / "results" / task).glob("**/records/*.jsonl")
    )
    return [
        (r["text"], f"worked\n#### {r['gold']}")
        for f in files
        for r in map(json.loads, f.read_text(encoding="utf-8").splitlines())
        if "text" in r
    ]


def test_generated_texts():
    pairs = generated()
    assert len(pairs) >= 500
    odd, right = agree(*zip(*pairs))
    assert not odd and all(0 < n < len(pairs) for n in right)


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
    texts = [t for t in HARD for _ in GOLDS]
    odd, right = agree(texts, [f"so\n#### {g}" for _ in HARD for g in GOLDS])
    assert not odd, odd[:5]
    assert all(right)


def test_made_up_texts():
    "Pieces that answers are made of, in any order."
    rng, pieces = (
        random.Random(0),
        [
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
        ]
        + ["#### ", "72"] * 6,
    )
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 7))) for _ in range(3000)]
    golds = [f"so\n#### {rng.choice([72, 7, '1,072', '72.5', -7, 0])}" for _ in texts]
    odd, right = agree(texts, golds)
    assert not odd, odd[:5]
    assert all(n > 30 for n in right)
