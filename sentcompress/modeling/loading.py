"""Finding and loading what a run starts from: the LLM, its tokenizer, and our own model folders.

Weights are read from safetensors only and remote code is never run, whatever a folder says.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sentcompress.errors import InputError, ModelFolderError, OfflineError, PluginError, did_you_mean
from sentcompress.modeling.configuration import SentenceLMConfig, SentenceVAEConfig
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.vae import SentenceVAE
from sentcompress.recipe import BackboneSpec
from sentcompress.registry import get_registry

SAFE = {"trust_remote_code": False}


def resolve_backbone(spec: BackboneSpec) -> str:
    """The folder or hub name behind an alias; a folder or hub name comes back as it is.

    Raises:
        InputError: it can be neither.
    """
    aliases = get_registry().get("backbone", spec.name).aliases  # type: ignore[attr-defined]
    target = aliases.get(spec.model, spec.model)
    if target.startswith("package:"):
        package, _, inner = target.removeprefix("package:").partition("/")
        found = find_spec(package)
        folder = (
            Path(found.submodule_search_locations[0]) / inner
            if found and found.submodule_search_locations
            else None
        )
        if folder is None or not (folder / "config.json").is_file():
            raise InputError(f"backbone.model: '{spec.model}' is not in the installed package '{package}'")
        return str(folder)
    if Path(target).is_dir():
        if not (Path(target) / "config.json").is_file():
            raise ModelFolderError(
                f"backbone.model: folder '{target}' has no config.json",
                fix="give a folder written by save_pretrained",
            )
        return target
    if "/" not in target or target.startswith((".", "/", "~")):
        raise InputError(
            f"backbone.model: '{spec.model}' is no alias of the '{spec.name}' adapter and no folder."
            f"{did_you_mean(spec.model, aliases)}",
            fix=f"use an alias ({', '.join(aliases)}), a hub name such as facebook/opt-125m, or a local folder",
        )
    return target


def _quiet() -> None:
    """No retries of the hub's around our one message, and no progress bars in a file or pipe."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def _from_hub(source: str, revision: str | None, load: Any, **arguments: Any) -> Any:
    """Call a transformers loader; say what to do when the hub cannot be reached or lacks it."""
    _quiet()
    try:
        return load(source, revision=revision, **SAFE, **arguments)
    except (OSError, ValueError, ImportError, KeyError) as error:
        text = " ".join(str(error).split())
        if Path(source).is_dir():
            raise ModelFolderError(f"'{source}' cannot be loaded: {text[:300]}") from error
        raise OfflineError(
            f"backbone.model: '{source}' is not in the local cache and could not be fetched from the hub: "
            f"{text[:200]}",
            fix="check the name and the network; offline, download it elsewhere, copy the folder here and give "
            "its path, or use the alias opt-tiny, which is part of this package",
        ) from error


def load_backbone_config(spec: BackboneSpec, *, weights: bool = True) -> Any:
    """The LLM's transformers configuration, refused when the adapter does not serve its type.

    Args:
        weights: False where only the shape matters: then a published shape that the adapter knows is enough.
    """
    source = resolve_backbone(spec)
    adapter: Any = get_registry().get("backbone", spec.name)
    types = adapter.model_types
    if not weights and source in adapter.published_configs:
        shape = dict(adapter.published_configs[source])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    else:
        config = _from_hub(source, spec.revision, AutoConfig.from_pretrained)
    if config.model_type not in types:
        raise InputError(
            f"backbone.name: adapter '{spec.name}' serves {', '.join(types)}, but '{spec.model}' is of type "
            f"'{config.model_type}'",
            fix="choose the adapter for that type ('sentcompress plugins' lists them)",
        )
    return config


def load_causal_lm(spec: BackboneSpec, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """The LLM in fp32, pretrained or (``init: random``) with random weights."""
    config = load_backbone_config(spec, weights=spec.init == "pretrained")
    if spec.init == "random":
        return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).float()
    model = _from_hub(
        resolve_backbone(spec),
        spec.revision,
        AutoModelForCausalLM.from_pretrained,
        attn_implementation=attn_implementation,
        use_safetensors=True,
    )
    return model.float()


def load_backbone_tokenizer(spec: BackboneSpec) -> Any:
    """The LLM's tokenizer.

    Raises:
        InputError: it has no end or padding token we could use.
    """
    tokenizer = _from_hub(resolve_backbone(spec), spec.revision, AutoTokenizer.from_pretrained)
    if tokenizer.eos_token_id is None:
        raise InputError(f"backbone.model: the tokenizer of '{spec.model}' has no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = int(1e30)  # we measure lengths ourselves; its warning would only mislead
    return tokenizer


def read_config(folder: Path | str, expected: str | None = None) -> dict[str, Any]:
    """``config.json`` of a model folder of ours.

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
        raise ModelFolderError(f"folder '{folder}' has no config.json, so it is not {what}{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(f"{file}: damaged: {error}", fix="train or copy the model again") from None
    allowed = {expected} if expected else {SentenceVAEConfig.model_type, SentenceLMConfig.model_type}
    if model_type not in allowed:
        raise ModelFolderError(f"'{folder}' holds a model of type '{model_type}', not {what}")
    return config


def _load(folder: Path | str, cls: type, model_type: str, **arguments: Any) -> Any:
    _quiet()
    config = read_config(folder, model_type)
    check_plugins(config.get("plugins", []))
    try:
        return cls.from_pretrained(folder, use_safetensors=True, **arguments).eval()  # type: ignore[attr-defined]
    except Exception as error:
        if isinstance(error, PluginError | MemoryError):
            raise
        text = " ".join(str(error).split())[:300]
        raise ModelFolderError(
            f"'{folder}': the weights cannot be loaded: {text}",
            fix="the file may be cut short: copy the folder again, or take an earlier one under checkpoints/",
        ) from error


def load_vae(folder: Path | str) -> SentenceVAE:
    """A trained SentenceVAE, in eval mode."""
    return _load(folder, SentenceVAE, SentenceVAEConfig.model_type)


def load_sentence_lm(folder: Path | str, attn_implementation: str = "sdpa") -> SentenceLM:
    """A grafted SentenceLM, in eval mode."""
    return _load(folder, SentenceLM, SentenceLMConfig.model_type, attn_implementation=attn_implementation)


def load_saved_tokenizer(folder: Path | str) -> Any:
    """The tokenizer saved with a model of ours."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **SAFE)
    except Exception as error:
        raise ModelFolderError(f"'{folder}': its tokenizer cannot be loaded: {error}") from error
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def load_segmenter(vae_config: SentenceVAEConfig, tokenizer: Any) -> Any:
    """The segmenter a model was trained with, its learned state restored."""
    record = vae_config.segmenter
    segmenter = get_registry().create("segmenter", record["name"], record.get("options"))
    segmenter.load_state(record.get("state") or {})
    segmenter.prepare(tokenizer, None)
    return segmenter


def check_plugins(records: list[dict[str, str]]) -> None:
    """Refuse a model whose plugin is missing, naming the package to install; warn about another version."""
    registry = get_registry()
    for record in records:
        try:
            registry.owner(record["kind"], record["name"])
        except PluginError as error:
            raise PluginError(
                f"the model needs {record['kind']} '{record['name']}' of package '{record['package']}' "
                f"{record['version']}, which is not there ({error.message.splitlines()[0]})",
                fix=f"pip install {record['package']}=={record['version']}",
            ) from None
