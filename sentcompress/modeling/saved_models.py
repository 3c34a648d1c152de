"""Loads our own model folders: from safetensors only, and never with code from the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from sentcompress.errors import InputError, ModelFolderError, PluginError
from sentcompress.files import read_json
from sentcompress.modeling.configuration import SentenceLMConfig, SentenceVAEConfig
from sentcompress.modeling.llm_loading import SAFE, load_backbone_tokenizer, load_causal_lm, quiet
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.split import SPLIT, split
from sentcompress.modeling.vae import SentenceVAE
from sentcompress.modeling.weight_checks import CANNOT
from sentcompress.recipe import BackboneSpec
from sentcompress.text.boundaries import BoundaryFinder
from sentcompress.text.segmentation import saved_segmenter

LONGEST_SENTENCE = 64
"""Tokens after which a sentence of a split LLM is cut, if its segmenter has not cut it before."""


def read_config(folder: Path | str, expected: str | None = None) -> dict[str, Any]:
    """``config.json`` of a sentcompress model folder.

    Args:
        expected: ``sentence-vae`` or ``sentence-lm``; None takes either.

    Raises:
        ModelFolderError: it is not such a folder.
    """
    folder = Path(folder)
    file = folder / "config.json"
    what = {"sentence-vae": "a SentenceVAE", "sentence-lm": "a SentenceLM"}.get(
        expected or "", "a sentcompress model"
    )
    if not folder.is_dir():
        raise ModelFolderError(f"no folder '{folder}'", fix=f"give the folder of {what}")
    if not file.is_file():
        inside = [p.parent.name for p in folder.glob("*/config.json")]
        hint = f"; it holds {', '.join(sorted(inside))}: give one of these" if inside else ""
        raise ModelFolderError(f"folder '{folder}' has no config.json" + (hint or f", so it is not {what}"))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(f"{file}: damaged: {error}", fix="train or copy the model again") from None
    allowed = {expected} if expected else {SentenceVAEConfig.model_type, SentenceLMConfig.model_type}
    if not isinstance(model_type, str) or model_type not in allowed:
        raise ModelFolderError(f"'{folder}' holds a model of type {model_type!r}, not {what}")
    return config


def _load(folder: Path | str, cls: type, model_type: str, **arguments: Any) -> Any:
    quiet()
    read_config(folder, model_type)
    again = "the file may be cut short: copy the folder again, or take an earlier one under checkpoints/"
    try:
        return cls.from_pretrained(folder, **arguments)  # type: ignore[attr-defined]
    except (PluginError, MemoryError):
        raise
    except ModelFolderError as error:
        raise ModelFolderError(error.message, fix=again) from error
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ModelFolderError(f"'{folder}': {CANNOT}: {text}", fix=again) from error


def load_vae(folder: Path | str) -> SentenceVAE:
    """A trained SentenceVAE, in eval mode."""
    return _load(folder, SentenceVAE, SentenceVAEConfig.model_type)


def load_sentence_lm(folder: Path | str, attn_implementation: str = "sdpa") -> SentenceLM:
    """A grafted SentenceLM, in eval mode."""
    return _load(folder, SentenceLM, SentenceLMConfig.model_type, attn_implementation=attn_implementation)


def load_saved_tokenizer(folder: Path | str) -> Any:
    """The tokenizer saved with a sentcompress model.

    Raises:
        ModelFolderError: it cannot be loaded, or has tokens that the model does not know.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **SAFE)
    except Exception as error:
        missing = not (Path(folder) / "tokenizer.json").is_file()
        why = "there is no tokenizer.json" if missing else " ".join(str(error).split())[:300]
        raise ModelFolderError(
            f"'{folder}': its tokenizer cannot be loaded: {why}", fix="copy the folder again"
        ) from error
    tokenizer.model_max_length = int(1e30)
    _check_vocabulary(tokenizer, Path(folder))
    return tokenizer


def _check_vocabulary(tokenizer: Any, folder: Path) -> None:
    config = read_json(folder / "config.json")
    inner = config.get("vae", config) if isinstance(config, dict) else None
    size = inner.get("vocab_size") if isinstance(inner, dict) else None
    if not isinstance(size, int):
        return  # loading the model reports the problem
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= size:
        raise ModelFolderError(
            f"'{folder}': its tokenizer has a token {largest:,}, but the model's vocabulary ends before {size:,}",
            fix="copy tokenizer.json and tokenizer_config.json from where the model was trained",
        )


def load_split(folder: Path | str) -> tuple[PreTrainedModel, Any]:
    """A split LLM that was grafted, in eval mode, and its tokenizer.

    Raises:
        ModelFolderError: the folder holds none, or it is damaged.
    """
    folder = Path(folder)
    file = folder / SPLIT
    if not file.is_file():
        raise ModelFolderError(
            f"'{folder}' has no {SPLIT}, so it is not a split LLM", fix="graft one: set graft.split"
        )
    spec = BackboneSpec(model=str(folder.resolve()))
    tokenizer, saved = load_backbone_tokenizer(spec), read_json(file)
    lm = load_causal_lm(spec, is_split=True).eval()
    try:
        own = saved["segmenter"]
        segmenter = saved_segmenter(own["name"], own["options"], own["state"], tokenizer)
        first, last = int(saved["first_blocks"]), int(saved["last_blocks"])
        finder = BoundaryFinder(segmenter, tokenizer, int(saved["max_sentence_tokens"]))
        split(lm, finder, first, last)
    except (KeyError, TypeError, ValueError, InputError) as error:
        text = error.message if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise ModelFolderError(f"{file}: damaged: {text}", fix="copy or train the model again") from None
    return lm, tokenizer
