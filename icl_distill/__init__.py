"""Few-shot distillation: bake worked examples into a model's weights.

    from icl_distill import Run, bake, evaluate, load_config, train

Names are imported when they are used: `import icl_distill` itself loads no torch.
"""

__version__ = "0.1.0"

import importlib
import sys
from types import ModuleType

_WHERE = {
    "Run": "icl_distill.core.runs",
    "bake": "icl_distill.app.bake",
    "evaluate": "icl_distill.evaluation.evaluate",
    "load_config": "icl_distill.core.config",
    "train": "icl_distill.training.labels",
}
__all__ = ["Run", "bake", "evaluate", "load_config", "train"]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__():
    return sorted({*globals(), *__all__})


class _Script(ModuleType):
    "The module `icl_distill.train`; called, it is the function of the same name."

    def __call__(self, *args, **kwargs):
        return __getattr__("train")(*args, **kwargs)


class _Package(ModuleType):
    "Importing `icl_distill.train` binds a module to the name `train`: it stays one to call."

    def __setattr__(self, name, value):
        if name == "train" and isinstance(value, ModuleType):
            value.__class__ = _Script
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
