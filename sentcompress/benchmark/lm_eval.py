"""A sentence model for EleutherAI's lm-evaluation-harness: ``--model sentcompress``. Needs the extra ``eval``.

Importing this module registers the model with the harness, so ``lm_eval.simple_evaluate(model="sentcompress", ...)``
works from Python. The harness finds models in no other way (it has no entry points), so ``sentcompress lm-eval`` is
its own command line after this import.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sentcompress.benchmark.causality_checks import check_causality
from sentcompress.benchmark.continuation import score_continuation
from sentcompress.benchmark.heldout_text import HeldoutDocument, heldout_documents
from sentcompress.benchmark.measurements.causality import require_causal
from sentcompress.benchmark.models import ModelFolder, Models
from sentcompress.benchmark.scoring import check_document, score_document
from sentcompress.benchmark.sentence_scoring import window_size
from sentcompress.errors import InputError
from sentcompress.files import expand_home
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.modeling.saved_models import load_saved_tokenizer, load_sentence_lm
from sentcompress.recipe import load_recipe
from sentcompress.text.lossless_tokenizer import lossless
from sentcompress.text.progress import Bar
from sentcompress.text.segmentation import Sentence, sentences_to_ids

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise InputError(
        f"the evaluation harness needs the package lm-eval ({error})", fix="pip install 'sentcompress[eval]'"
    ) from error

TASKS = Path(__file__).parent / "lm_eval_tasks"
"""The tasks that sentcompress adds; they need no network."""


@register_model("sentcompress")
class SentenceHarnessLM(LM):
    """A saved SentenceLM as the harness sees it.

    Args:
        pretrained: its folder, such as ``OUT/graft``.
        context_sentences: sentences of context; None takes what the model was trained on (``graft.max_sentences`` of
            the recipe beside it), else all the backbone has positions for. Longer texts are read in windows, as in
            ``bench quality``.
        device: None takes the GPU where there is one.
        batch_size, max_batch_size: the harness passes them; texts are scored one at a time.

    Raises:
        CausalityError: the model sees the future.
        ModelFolderError: the folder holds no SentenceLM.
    """

    def __init__(
        self,
        pretrained: str,
        context_sentences: int | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        pretrained = expand_home(pretrained)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = load_sentence_lm(pretrained).to(self._device)
        require_causal(check_causality(self.model))
        self.tokenizer = load_saved_tokenizer(pretrained)
        self.generator = SentenceGenerator(self.model, self.tokenizer)
        self.counter = lossless(self.tokenizer)
        recipe = Path(pretrained) / "recipe.yaml"
        if context_sentences is None and recipe.is_file():
            context_sentences = load_recipe(str(recipe)).graft.max_sentences
        self.window = window_size(self.model, context_sentences)

    def _sentences(self, text: str) -> list[Sentence]:
        return sentences_to_ids(text, self.generator.segmenter, self.tokenizer)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy generation would write it.

        :mod:`sentcompress.benchmark.continuation` says what counts: everything the model predicts after the
        last token of the context, up to the last token of the continuation, end marks and decisions to go on between
        sentences included. White space at the end of a context belongs to the continuation, and so does a token that
        reaches across the border.

        Raises:
            InputError: a model without a start latent would have to predict a text's first sentence.
        """
        found = []
        for request in self._shown("loglikelihood", requests, disable_tqdm):
            context, continuation = request.args
            score = score_continuation(
                self.model,
                self._sentences(context + continuation),
                len(context.rstrip()),
                self.counter,
                self.window,
            )
            found.append((-score.nats, score.greedy))
            self.cache_hook.add_partial("loglikelihood", request.args, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole documents, after the proof of ``bench quality`` that every byte was scored once.

        It counts the decision to begin, every token, every end mark, and every decision to go on or stop: what
        ``bench quality`` scores, and the first sentence, which is context there.

        Raises:
            InputError: the model has no start latent, so that it cannot predict a document's first sentence.
            CoverageError: a byte, an end mark or a decision was scored twice or never.
        """
        if not self.model.config.start_latent:
            raise InputError(
                "the model has no start latent, so it cannot predict the first sentence of a document",
                fix="graft with graft.start_latent: true, or measure it with 'sentcompress bench quality'",
            )
        found = []
        for number, request in enumerate(self._shown("loglikelihood_rolling", requests, disable_tqdm)):
            sentences = self._sentences(request.args[0])
            nats = 0.0
            if sentences:
                texts, ids = zip(*sentences, strict=True)
                document = HeldoutDocument(
                    number, "the harness", list(ids), list(texts), whole=True, first_scored=0
                )
                tally = score_document(self.model, document, self.window)
                nats = check_document(document, tally, self.counter).nats
            found.append(-nats)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context to the first of its stop strings, which is left out.

        Of a context of more sentences than the window holds, the last half a window is read. Settings are those of
        :class:`sentcompress.generation.GenerationSettings`; draws follow the harness's ``--seed``.

        Raises:
            InputError: a setting that generation does not have, or an empty context.
        """
        found = []
        for request in self._shown("generate_until", requests, disable_tqdm):
            context, asked = request.args
            until, settings = _generation_settings(asked)
            sentences = self._sentences(context)
            if len(sentences) >= self.window:
                context = "".join(text for text, _ in sentences[-(self.window // 2) :])
            found.append(_cut(self.generator.stream(context, settings), until))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _shown(self, what: str, requests: Sequence[Any], quiet: bool) -> Iterable[Any]:
        with Bar(f"lm-eval: {what}", len(requests), enabled=not quiet) as bar:
            for request in requests:
                yield request
                bar.advance(1)


def _generation_settings(asked: dict[str, Any]) -> tuple[list[str], GenerationSettings]:
    """Stop strings and settings from the harness's ``gen_kwargs``."""
    settings = normalize_gen_kwargs(asked)
    until = [text for text in settings.pop("until", None) or [] if text]
    settings["max_new_tokens"] = settings.pop("max_gen_toks")
    if not settings["do_sample"]:
        settings.pop("temperature", None)
    elif "seed" not in settings:
        settings["seed"] = int(torch.randint(2**31, ()))
    return until, GenerationSettings.checked(settings, "gen_kwargs")


def _cut(pieces: Iterable[str], until: Sequence[str]) -> str:
    """Text up to the first stop string; no more is written than the sentence it is found in."""
    text = ""
    for piece in pieces:
        text += piece
        ends = [text.index(stop) for stop in until if stop in text]
        if ends:
            return text[: min(ends)]
    return text


# ---- the command, and what the tasks in TASKS load


def run(arguments: Sequence[str]) -> None:
    """The harness's own command line, ``lm-eval run``, with our model and our tasks known to it.

    Args:
        arguments: as the harness takes them; an ``--include_path`` among them replaces that of our tasks.

    Raises:
        InputError: the harness refuses them.
    """
    before = sys.argv
    sys.argv = ["lm-eval", "run", "--include_path", str(TASKS), *arguments]
    try:
        cli_evaluate()
    except ValueError as error:
        if "No tasks specified" not in str(error):
            raise
        raise InputError(
            f"lm-eval: {error}", fix="sentcompress lm-eval --help shows the harness's options"
        ) from error
    finally:
        sys.argv = before


def heldout(pretrained: str | None = None, run: str | None = None, **_others: Any) -> dict[str, Any]:
    """The held-out documents of a run, whole: a dataset of one split ``test`` with a column ``text``.

    Args:
        pretrained: the model that is evaluated; its own run is taken when ``run`` is None.
        run: folder of a run, or of one of its models.
        _others: further arguments of the model, which the harness passes on.
    """
    from datasets import Dataset

    if run is None and pretrained is None:
        raise InputError(
            "the task sentcompress_heldout needs the folder of a run",
            fix="add --metadata run=OUT, the folder of a run",
        )
    folder = ModelFolder(Path(expand_home(run or pretrained or "")))
    recipe = folder.recipe()
    settings = recipe.bench.model_copy(update={"max_bytes_per_document": None})
    documents = heldout_documents(Models(recipe, folder).corpus, settings)
    rows = [{"text": "".join(d.texts), "source": d.source} for d in documents]
    return {"test": Dataset.from_list(rows)}


def choices(**_others: Any) -> dict[str, Any]:
    """Our multiple-choice items: a dataset of one split ``test``."""
    from datasets import Dataset

    lines = (TASKS / "sotu_choice.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
