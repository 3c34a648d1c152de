"""An LLM outside the comparison that scores how likely a text is after its prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from sentcompress.benchmark.heldout_text import HeldoutDocument
from sentcompress.benchmark.measurements.quality import QualityScore
from sentcompress.benchmark.scoring import score_token_model
from sentcompress.contracts.proof import TOLERANCE, reference_of
from sentcompress.errors import InputError, SentCompressError
from sentcompress.modeling.llm_loading import load_backbone_tokenizer, load_causal_lm, resolve_backbone
from sentcompress.recipe import BackboneSpec
from sentcompress.text.lossless_tokenizer import lossless

WHERE = "bench.text_judge (--judge)"


class Judge:
    """A causal LM, loaded when it is first used.

    Args:
        model: an alias, hub name, local folder or GGUF file.
        device: where it runs.

    Raises:
        InputError: there is no such model.
    """

    def __init__(self, model: str, device: torch.device) -> None:
        self.name, self.device = model, device
        self._spec = BackboneSpec(model=model)
        with _named_in_errors():
            self._source = resolve_backbone(self._spec)

    def is_backbone(self, backbone: BackboneSpec) -> bool:
        """Whether it is the LLM that a run started from, and so not independent."""
        try:
            return backbone.init == "pretrained" and resolve_backbone(backbone) == self._source
        except InputError:
            return False  # the run was made on another machine

    def load(self) -> None:
        """Load it now.

        Raises:
            InputError: it cannot be loaded, or is not a causal LM.
        """
        _ = self.model, self.tokenizer

    @cached_property
    def model(self) -> PreTrainedModel:
        with _named_in_errors():
            model = load_causal_lm(self._spec).eval().to(self.device)
            try:
                reference = reference_of(model)
            except ValueError as error:
                raise InputError(
                    f"backbone.model: '{self.name}' cannot judge: {error}",
                    fix="use another causal LM, such as smollm2-135m",
                ) from error
        if reference.leak > TOLERANCE * max(1.0, float(reference.hidden_states.abs().max())):
            raise InputError(
                f"{WHERE}: '{self.name}' sees later tokens, so its likelihoods are meaningless",
                fix="use a causal LM, such as smollm2-135m",
            )
        return model

    @cached_property
    def tokenizer(self) -> Any:
        with _named_in_errors():
            return load_backbone_tokenizer(self._spec)

    def score(
        self,
        system: str,
        prompts: Sequence[str],
        texts: Sequence[str],
        progress: Callable[[], None] = lambda: None,
    ) -> QualityScore:
        """Score texts given their prompts: each byte of the texts counts once, and none of the prompts'.

        Args:
            system: the system that wrote them.

        Raises:
            CoverageError: the judge's tokenizer does not give a text back.
        """
        documents = [
            HeldoutDocument(number, f"text of '{system}'", [], [prompt, text], whole=False)
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]
        bos = self.tokenizer.bos_token_id
        return score_token_model(
            self.model,
            documents,
            lossless(self.tokenizer),
            self.tokenizer.eos_token_id if bos is None else bos,
            system=system,
            progress=progress,
        )


@contextmanager
def _named_in_errors() -> Iterator[None]:
    """Name this field in errors of the loaders, which name the backbone's."""
    try:
        yield
    except SentCompressError as error:
        message = error.message.replace("backbone.model", WHERE, 1)
        raise type(error)(message, fix=error.fix) from error
