"""Fixtures shared by all tests. Nothing here needs a network."""
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import transformers
from helpers import random_blocks, small_model
from hypothesis import settings

from evoprune_nb.data import TokenPool, load_pools
from evoprune_nb.models import load_model
from evoprune_nb.database import LevelDatabase, build_database

settings.register_profile("promises", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("promises")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same global random state."
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny():
    "The embedded model. Tests that change a model copy it first."
    return load_model("tiny")[0]


@pytest.fixture(scope="session")
def tokenizer():
    return load_model("tiny")[1]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    "English text that every machine has: Python's own language reference, one topic a document."
    path = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
    return path


@pytest.fixture(scope="session")
def pools(corpus, tokenizer) -> dict[str, TokenPool]:
    return load_pools(corpus, tokenizer, seq_len=64, tokens={"calibration": 2048, "tuning": 4096, "heldout": 1024})


@pytest.fixture(scope="session")
def database(tiny, pools, tmp_path_factory) -> LevelDatabase:
    "A level database of the tiny model, heads taken off freely."
    return build_database(tiny, pools["calibration"].draw(2048, seed=0), tmp_path_factory.mktemp("tiny") / "database", progress=False)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    "A small random model and its level database."
    model = small_model("llama-gqa")
    return model, build_database(model, random_blocks(), tmp_path_factory.mktemp("small") / "database", progress=False)
