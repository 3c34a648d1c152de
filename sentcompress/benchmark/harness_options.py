"""What users of lm-evaluation-harness pass to a sentence model: checked, with messages that name the option."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from sentcompress.errors import InputError, ModelFolderError
from sentcompress.files import expand_home, read_json
from sentcompress.generation import GenerationSettings
from sentcompress.modeling.saved_models import read_config
from sentcompress.modeling.split import SPLIT
from sentcompress.registry import describe_validation_error

_log = logging.getLogger(__name__)
_NUMBERS = ("temperature", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What the harness turns into numbers."""


class ModelArguments(BaseModel):
    """What ``--model_args`` may contain, and the options that the harness passes to every model."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, protected_namespaces=())

    pretrained: str = Field(min_length=1)
    context_sentences: int | None = Field(default=None, ge=2)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    batch_size: str = "1"
    max_batch_size: int | None = Field(default=None, ge=1)
    trust_remote_code: bool = False

    @field_validator("batch_size")
    @classmethod
    def _as_the_harness_has_it(cls, value: str) -> str:
        if not re.fullmatch(r"auto(:[1-9]\d*)?|[1-9]\d*", value):
            raise PydanticCustomError("batch_size", "must be a positive number, auto or auto:N")
        return value

    @classmethod
    def checked(cls, given: dict[str, Any]) -> ModelArguments:
        """Raises InputError that names the argument and, for an unknown one, those that exist."""
        try:
            return cls(**given)
        except ValidationError as error:
            fix = (
                None
                if given.get("pretrained")
                else "--model_args pretrained=OUT/graft, with the folder of a run"
            )
            raise InputError(describe_validation_error(error, cls, "model_args"), fix=fix) from None


def model_folder(pretrained: str) -> Path:
    """The folder of a SentenceLM.

    Raises:
        ModelFolderError: it is something else; the message says how that can be evaluated.
    """
    folder = Path(expand_home(pretrained))
    try:
        read_config(folder, "sentence-lm")
    except ModelFolderError as error:
        fix = error.fix
        about = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
        if (folder / "graft" / "config.json").is_file():
            fix = f"this is the folder of a run: give pretrained={pretrained}/graft"
        elif (folder / SPLIT).is_file():
            fix = "a split LLM cannot be evaluated with the harness yet: use sentcompress bench quality"
        elif isinstance(about, dict) and about.get("model_type") == "sentence-vae":
            fix = "a SentenceVAE cannot be evaluated alone: give the folder of the graft made with it"
        elif isinstance(about, dict):
            fix = "a token-level model is evaluated with --model hf"
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", pretrained) and not folder.exists():
            fix = (
                "give the folder of a SentenceLM; a token-level model of the hub is evaluated with --model hf"
            )
        raise ModelFolderError(error.message, fix=fix) from None
    return folder


def available_device(wanted: str | None) -> torch.device:
    """The device asked for; where this machine lacks it, the first of ``cuda``, ``mps`` and ``cpu`` that it has.

    The harness asks for ``cuda:0`` unless the user names a device, and its own models use the CPU where there is no
    GPU.

    Args:
        wanted: as torch names devices, or the number of a GPU; None or ``auto`` for the best that there is.

    Raises:
        InputError: torch knows no such device.
    """
    best = next(name for name in ("cuda", "mps", "cpu") if _is_available(torch.device(name)))
    name = (wanted or "auto").strip().lower()
    if name == "auto":
        return torch.device(best)
    try:
        device = torch.device(f"cuda:{name}" if name.isdecimal() else name)
    except RuntimeError:
        raise InputError(
            f"--device {wanted}: torch knows no such device", fix="use auto, cuda, cuda:1, mps or cpu"
        ) from None
    if _is_available(device):
        return device
    _log.warning("this machine has no device '%s'; using '%s'", device, best)
    return torch.device(best)


def _is_available(device: torch.device) -> bool:
    if device.type in ("cpu", "mps"):
        return device.type == "cpu" or torch.backends.mps.is_available()
    backend: Any = getattr(torch, device.type, None)  # such as torch.cuda and torch.xpu
    found = getattr(backend, "is_available", bool)()
    return found and (device.index or 0) < backend.device_count()


def generation_settings(asked: dict[str, Any]) -> tuple[list[str], GenerationSettings]:
    """Stop strings and settings from the harness's ``gen_kwargs``.

    Raises:
        InputError: an unknown name, or a value that does not fit.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    given = {name: value for name, value in asked.items() if value is not None}
    until = [*_listed(given.pop("until", [])), *_listed(given.pop("stop", []))]
    if not all(isinstance(text, str) for text in until):
        raise InputError(f"gen_kwargs.until: must be texts, not {until}", fix="""write 'until=["\\n"]'""")
    if "do_sample" in given:  # the command line may pass it as a number or a word
        given["do_sample"] = GenerationSettings.checked(
            {"do_sample": given["do_sample"]}, "gen_kwargs"
        ).do_sample
    for name in [name for name in _NUMBERS if name in given]:
        try:
            given[name] = float(given[name])
        except (TypeError, ValueError):
            given[name] = math.nan
        if not math.isfinite(given[name]):
            raise InputError(f"gen_kwargs.{name}: must be a number, not {asked[name]!r}")
    settings: dict[str, Any] = dict(normalize_gen_kwargs(given))
    settings.pop("until")
    if settings.pop("num_beams", 1) != 1:
        raise InputError(
            "gen_kwargs.num_beams: a sentence model has no beam search", fix="leave num_beams out"
        )
    settings["max_new_tokens"] = settings.pop("max_gen_toks")
    if settings["max_new_tokens"] < 1:
        raise InputError(f"gen_kwargs.max_gen_toks: must be at least 1, not {settings['max_new_tokens']}")
    if settings.get("temperature") == 0:
        settings["do_sample"] = False
    if not settings["do_sample"]:
        settings.pop("temperature", None)
    elif "seed" not in settings:
        settings["seed"] = int(torch.randint(2**31, ()))
    return [text for text in until if text], GenerationSettings.checked(settings, "gen_kwargs")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
