import os
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, database=None) # same examples everywhere; no clock in a verdict
settings.load_profile("project")
