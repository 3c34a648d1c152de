"""A sentence model for EleutherAI's lm-evaluation-harness: ``--model sentcompress``. Needs the extra ``eval``.

Importing this module registers the model. Releases of the harness after 0.4.13 import it by the entry point in the
group ``lm_eval.models``. Release 0.4.13 has no entry points, but imports the functions of a task file that ``--tasks``
names by its path, and those in :data:`TASKS` are here. ``sentcompress lm-eval`` runs the harness after this import.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sentcompress.benchmark.causality_checks import check_causality
from sentcompress.benchmark.continuation import score_continuation
from sentcompress.benchmark.harness_options import (
    ModelArguments,
    available_device,
    generation_settings,
    model_folder,
)
from sentcompress.benchmark.heldout_text import HeldoutDocument, heldout_documents
from sentcompress.benchmark.measurements.causality import require_causal
from sentcompress.benchmark.models import ModelFolder, Models
from sentcompress.benchmark.scoring import check_document, score_document
from sentcompress.benchmark.sentence_scoring import window_size
from sentcompress.distributed import process_count, processes
from sentcompress.errors import InputError
from sentcompress.files import expand_home
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.modeling.saved_models import load_saved_tokenizer, load_sentence_lm
from sentcompress.recipe import load_recipe
from sentcompress.text.lossless_tokenizer import lossless
from sentcompress.text.progress import Bar
from sentcompress.text.segmentation import Sentence, sentences_to_ids

try:
    import lm_eval.models  # noqa: F401 - else ours is the only one: the harness adds its own to an empty list
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string, warning_once
except ImportError as error:
    raise InputError(
        f"the evaluation harness needs the package lm-eval ({error})", fix="pip install 'sentcompress[eval]'"
    ) from error

TASKS = Path(__file__).parent / "lm_eval_tasks"
"""The tasks that sentcompress adds; they need no network."""

_log = logging.getLogger(__name__)


@register_model("sentcompress")
class SentenceHarnessLM(LM):
    """A saved SentenceLM as the harness sees it.

    Several processes, started with ``accelerate launch`` or ``torchrun``, share the requests.

    Args:
        pretrained: its folder, such as ``OUT/graft``.
        arguments: the others of :class:`ModelArguments`.

            - ``context_sentences``: sentences of context; None takes what the model was trained on
              (``graft.max_sentences`` of the recipe beside it), else all the backbone has positions for. Longer texts
              are read in windows, as in ``bench quality``.
            - ``dtype``: of the weights; ``auto`` leaves them as they were saved.
            - ``device``: see :func:`available_device`.
            - ``batch_size``, ``max_batch_size``: the harness passes them; texts are processed one at a time.
            - ``trust_remote_code``: the harness passes it for the tasks' data sets. No code is loaded from a model.

    Raises:
        InputError: an argument is unknown or its value does not fit.
        CausalityError: the model sees the future.
        ModelFolderError: the folder holds no SentenceLM.
    """

    def __init__(self, pretrained: str | None = None, **arguments: Any) -> None:
        super().__init__()
        given = {"pretrained": pretrained, **arguments}
        wanted = ModelArguments.checked({name: value for name, value in given.items() if value is not None})
        folder = model_folder(wanted.pretrained)
        if process_count() > 1:
            state = processes()
            self._rank, self._world_size, self._device = (
                state.process_index,
                state.num_processes,
                state.device,
            )
        else:
            self._device = available_device(wanted.device)
        self.model = load_sentence_lm(folder).to(self._device)
        require_causal(check_causality(self.model))
        if wanted.dtype != "auto":
            self.model.to(getattr(torch, wanted.dtype))
        self.tokenizer = load_saved_tokenizer(folder)
        self.generator = SentenceGenerator(self.model, self.tokenizer)
        self.lossless = lossless(self.tokenizer)
        context_sentences = wanted.context_sentences
        if context_sentences is None and (folder / "recipe.yaml").is_file():
            context_sentences = load_recipe(str(folder / "recipe.yaml")).graft.max_sentences
        self.window = window_size(self.model, context_sentences)
        self._template: str | None = None
        if wanted.context_sentences and self.window < wanted.context_sentences:
            _log.warning("the backbone has positions for only %d sentences of context", self.window)
        if wanted.batch_size != "1":
            _log.warning(
                "texts are processed one at a time; batch_size=%s changes nothing", wanted.batch_size
            )

    # ---- how the harness makes a model, and its chat templates and processes

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> SentenceHarnessLM:
        """A model from ``--model_args``; an argument given there overrides the harness's option of that name."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(given | arg_dict))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> SentenceHarnessLM:
        """Like :meth:`create_from_arg_obj`, from ``name=value,name=value``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's chat template that ``--apply_chat_template`` asks for, which is then used for all prompts.

        Raises:
            InputError: the tokenizer has none, or none of this name.
        """
        if not chat_template:
            return None
        known = self.tokenizer.chat_template
        if isinstance(known, dict):
            known = known.get("default" if chat_template is True else chat_template)
        if known is None:
            raise InputError(
                "--apply_chat_template: the tokenizer saved with the model has no chat template"
                + (f" {chat_template!r}" if isinstance(chat_template, str) else ""),
                fix="leave --apply_chat_template out; the model then gets the prompts as plain text",
            )
        self._template = str(known)
        return self._template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one prompt. Its special tokens become ordinary text, as in training."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                chat_template=self._template or self.chat_template(True),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of every process, along the first dimension."""
        from accelerate.utils import gather

        return gather(tensor) if self.world_size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """One object of each process, in the process ``dst``; None in the others."""
        from accelerate.utils import gather_object

        found = gather_object([obj]) if self.world_size > 1 else [obj]
        return found if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world_size > 1:
            processes().wait_for_everyone()

    # ---- what the harness asks of a model

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
                self.lossless,
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
                nats = check_document(document, tally, self.lossless).nats
            found.append(-nats)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context to the first of its stop strings, which is left out.

        Of a context of more sentences than the window holds, the last half a window is read. An empty one, or one of
        white space alone, is continued from the start latent. Settings are those of
        :class:`sentcompress.generation.GenerationSettings`; draws follow the harness's ``--seed``.

        Raises:
            InputError: a setting that generation does not have. All are checked before the first text is written.
        """
        plans = [generation_settings(request.args[1]) for request in requests]
        found = []
        shown = self._shown("generate_until", requests, disable_tqdm)
        for request, (until, settings) in zip(shown, plans, strict=True):
            found.append(_cut(self._pieces(request.args[0], settings), until))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _pieces(self, context: str, settings: GenerationSettings) -> Iterator[str]:
        """The continuation of a context, piece by piece."""
        sentences = self._sentences(context) if context.strip() else []
        if len(sentences) >= self.window:
            warning_once(
                _log,
                f"contexts of more than {self.window - 1} sentences are cut to their last {self.window // 2}",
            )
            context = "".join(text for text, _ in sentences[-(self.window // 2) :])
        if sentences:
            yield from self.generator.stream(context, settings)
        elif self.model.config.start_latent:
            stream = self.lossless.streamed(begins=True)
            for _, ids in self.generator.continue_sentences([[]], settings):
                yield stream.add(ids)
            yield stream.add([], ends=True)
        else:
            warning_once(_log, "the model has no start latent: the answer to an empty context is left empty")

    def _shown(self, what: str, requests: Sequence[Any], quiet: bool) -> Iterable[Any]:
        with Bar(f"lm-eval: {what}", len(requests), enabled=not quiet) as bar:
            for request in requests:
                yield request
                bar.advance(1)


def _cut(pieces: Iterable[str], until: Sequence[str]) -> str:
    """Text up to the first stop string; no more is written than the sentence it is found in."""
    text = ""
    for piece in pieces:
        text += piece
        ends = [text.index(stop) for stop in until if stop in text]
        if ends:
            return text[: min(ends)]
    return text


# ---- what the tasks in TASKS load


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
    try:
        folder = ModelFolder(Path(expand_home(run or pretrained or "")))
        recipe = folder.recipe()
    except InputError as error:
        if run is not None:
            raise
        raise InputError(
            f"the task sentcompress_heldout takes its documents from the run of the model: {error.message}",
            fix="add --metadata run=OUT, the folder of a run",
        ) from None
    settings = recipe.bench.model_copy(update={"max_bytes_per_document": None})
    documents = heldout_documents(Models(recipe, folder).corpus, settings)
    rows = [{"text": "".join(d.texts), "source": d.source} for d in documents]
    return {"test": Dataset.from_list(rows)}


def choices(**_others: Any) -> dict[str, Any]:
    """Our multiple-choice items: a dataset of one split ``test``."""
    from datasets import Dataset

    lines = (TASKS / "sotu_choice.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
