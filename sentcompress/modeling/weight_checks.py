"""Loads weights so that a model is what its folder says: every tensor comes from the files, or the folder is refused.

transformers reports what is missing, surplus or misshapen, and fills the gaps with random numbers. Here that report is
an error that names the tensors, and NaN and infinite values are looked for too.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from sentcompress.errors import ModelFolderError

CANNOT = "the weights cannot be loaded"
SHOWN = 4
"""Names of tensors that a message lists of each kind."""

_OLD_BUFFERS = re.compile(
    r"(^|\.)(masked_bias|attn\.bias|attention\.bias|causal_mask|position_ids|(original_)?inv_freq|(cos|sin)_cached"
    r"|_float_tensor|embed_positions\.weights|decoder\.version)$"
)
"""Masks, positions and frequencies that older versions of transformers saved. The models compute them."""
_TOWERS = re.compile(r"mtp|nextn|vision|visual|image|video|audio|speech|multi_modal|mm_|.*projector|vq")
"""Modules inside a decoder's namespace that the LLM works without: towers for other inputs, drafts of later tokens."""
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "peft",
}
"""What puts a prefix before the names of all tensors."""


def load_weights(
    load: Callable[..., Any], folder: Path | str, *, what: str, strict: bool = False, **arguments: Any
) -> Any:
    """A model whose weights are all those of a folder and no others.

    Args:
        load: a ``from_pretrained`` of transformers.
        folder: its first argument: a folder or hub name.
        what: begins the message, such as ``backbone.model: '/models/llama'``.
        strict: whether every surplus tensor is refused.
        arguments: its other arguments; with ``key_mapping``, the files are those of a multimodal model.

    Returns:
        the model, in eval mode. Surplus tensors that the model does without are named in a warning: buffers that older
        versions saved, heads for another task, towers for other inputs, layers that draft later tokens.

    Raises:
        ModelFolderError: tensors are missing, have another shape or data type, hold NaN or infinite values, or belong
            to parts of the model that ``config.json`` does not have.
    """
    if Path(folder).is_dir() and "gguf_file" not in arguments:
        check_files(Path(folder), what)
    multimodal = "key_mapping" in arguments
    model, found = _load_and_report(load, folder, what, arguments)
    missing = sorted(found["missing_keys"])
    misshapen = [
        f"{name} is {list(stored)}, the model has {list(wanted)}"
        for name, stored, wanted in sorted(found["mismatched_keys"])
    ]
    surplus, separate = sorted(found["unexpected_keys"]), []
    if not (strict or missing):  # the missing tensors may be among the surplus ones, under other names
        separate = [name for name in surplus if _is_separate(model, name, multimodal)]
        surplus = [name for name in surplus if name not in separate]
    untied = _untied(model)
    findings = [
        *_finding("missing", missing),
        *_finding("surplus, so another model was saved", surplus),
        *_finding("misshapen", misshapen),
        *_finding(
            "tied to another by config.json, but the files hold both, with different values",
            untied,
        ),
        *_finding("damaged by NaN or infinite values", _not_finite(model)),
    ]
    if findings:
        raise ModelFolderError(
            f"{what}: {CANNOT}: they are not those of the {type(model).__name__} that the configuration describes:\n"
            + "\n".join(f"  - {finding}" for finding in findings),
            fix="use a text-only LLM of that family"
            if multimodal and missing
            else _fix(missing, surplus, untied),
        )
    if separate:
        warnings.warn(
            f"{what}: left out, since the LLM does not use them: {_some(separate)}",
            stacklevel=3,
        )
    return model.eval()


def _load_and_report(
    load: Callable[..., Any], folder: Path | str, what: str, arguments: dict[str, Any]
) -> Any:
    """The model, and transformers' report of missing, surplus and misshapen tensors."""
    with _silent() as said:
        try:
            return load(folder, output_loading_info=True, ignore_mismatched_sizes=True, **arguments)
        except RuntimeError as error:
            # Tensors that it could not merge, such as experts of a mixture, are named in its report only.
            named = list(dict.fromkeys(name for line in said for name in _NOT_MERGED.findall(line)))
            if not named:
                raise
            raise ModelFolderError(
                f"{what}: {CANNOT}: the parts of {_some(named)} in the files are incomplete or of different shapes",
                fix=_fix([], [], []),
            ) from error


class WholeWeights:
    """For models of sentcompress: ``from_pretrained`` takes exactly the tensors of the model, or refuses the folder."""

    @classmethod
    def from_pretrained(cls, folder: Any, *arguments: Any, **named: Any) -> Any:
        """As in transformers, but from safetensors only.

        Raises:
            ModelFolderError: see :func:`load_weights`.
        """
        load = super().from_pretrained  # type: ignore[misc]
        if named.keys() & {"output_loading_info", "ignore_mismatched_sizes"}:
            # The caller looks at the report.
            return load(folder, *arguments, **named)
        named.setdefault("use_safetensors", True)
        return load_weights(
            lambda path, **more: load(path, *arguments, **more),
            folder,
            what=f"'{folder}'",
            strict=True,
            **named,
        )


@contextmanager
def _silent() -> Iterator[list[str]]:
    """Keep what transformers logs from the terminal: it prints names from the file unescaped, and its advice does not
    fit here. Yields the messages."""
    said: list[str] = []
    logger, handler = logging.getLogger("transformers"), _Messages(said)
    before, logger.handlers = logger.handlers, [handler]
    try:
        yield said
    finally:
        logger.handlers = before


class _Messages(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


_NOT_MERGED = re.compile(r"^([\w.{},*]+)\s*\|\s*CONVERSION", re.MULTILINE)
"""A row of transformers' report about tensors that it merges or splits while it loads them."""


def _finding(problem: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
    return [f"{count} {problem}: {_some(names)}"] if names else []


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _is_separate(model: PreTrainedModel, name: str, multimodal: bool) -> bool:
    """Whether a surplus tensor is nothing that the LLM of this configuration would compute with."""
    if _OLD_BUFFERS.search(name):
        return True
    prefix = f"{model.base_model_prefix}."
    inside = name.removeprefix(prefix)
    part, _, rest = inside.partition(".")
    if not name.startswith(prefix) and not hasattr(model.base_model, part):
        return part not in dict(model.named_children())
    # Layers that predict the token after the next one are stored behind the last layer.
    drafts = getattr(model.config, "num_nextn_predict_layers", None) or 0
    number = re.match(r"\d+", rest)
    layers = getattr(model.config, "num_hidden_layers", 0)
    if part == "layers" and number and layers <= int(number[0]) < layers + drafts:
        return True
    return not hasattr(model.base_model, part) and (multimodal or _TOWERS.match(part) is not None)


def _untied(model: PreTrainedModel) -> list[str]:
    """Tensors that the configuration ties, and that transformers left apart because the files hold two."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    return sorted(set(tied) - set(model.all_tied_weights_keys))


@torch.no_grad()
def _not_finite(model: nn.Module) -> list[str]:
    found = []
    # By address, so that tied tensors are looked at once.
    saved = {tensor.data_ptr(): (name, tensor) for name, tensor in model.state_dict().items()}
    for name, tensor in saved.values():
        if not tensor.is_floating_point() or tensor.is_meta or torch.isfinite(tensor.sum()):
            continue  # a sum is finite only if all its terms are
        if wrong := int(tensor.isfinite().logical_not().sum()):
            found.append(f"{name} ({wrong:,} of {tensor.numel():,})")
    return found


def weight_files(folder: Path, what: str) -> list[Path]:
    """The safetensors files of a folder, as transformers picks them.

    Raises:
        ModelFolderError: there are none, or their index is damaged or names files that are not there.
    """
    index = folder / "model.safetensors.index.json"
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    if not index.is_file():
        raise ModelFolderError(
            f"{what}: {CANNOT}: {_instead(folder)}", fix="save the model with save_pretrained(folder)"
        )
    try:
        fields = json.loads(index.read_text(encoding="utf-8"))
        _, names = fields["metadata"], sorted(set(fields["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(
            f"{what}: {CANNOT}: {index.name} is damaged: {type(error).__name__} {error}",
            fix="copy or download it again",
        ) from None
    if missing or not names:
        raise ModelFolderError(
            f"{what}: {CANNOT}: {len(missing)} of the {len(names)} files that {index.name} names are missing: "
            f"{_some(missing)}",
            fix="copy or download the missing files",
        )
    return [folder / name for name in names]


def _instead(folder: Path) -> str:
    """What a folder without weights that can be read holds."""
    if any(folder.glob("shard-*.safetensors")):
        return "its weights are the checkpoint of several processes, which only training can read"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return "its weights are pickles (.bin, .pt), which could run code and are never loaded; no model.safetensors"
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        return f"the folder has no model.safetensors; for a GGUF model, give the file itself: {_some(files)}"
    if files := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"no model.safetensors and no model.safetensors.index.json beside {_some(files)}"
    return "the folder holds no weights (model.safetensors)"


def check_files(folder: Path, what: str) -> None:
    """Refuse files that transformers would read as something they are not. Only their headers are read.

    Raises:
        ModelFolderError: files are missing or damaged, need another model, or hold encoded weights.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelFolderError(
            f"{what}: {CANNOT}: the folder holds a LoRA adapter (adapter_config.json), not a whole model",
            fix="merge it into its model (merge_and_unload() of peft), save the result and use that folder",
        )
    wrong = []
    for file in weight_files(folder, what):
        try:
            with safe_open(file, "pt") as tensors:
                kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size
            raise ModelFolderError(
                f"{what}: {CANNOT}: {file.name} ({size:,} bytes) is cut short or damaged: {error}",
                fix="copy or download it again" + (" (git lfs pull)" if size < 1000 else ""),
            ) from error
        wrong += [f"{name} ({kind})" for name, kind in kinds.items() if _is_code(name, kind)]
    if wrong:
        raise ModelFolderError(
            f"{what}: {CANNOT}: {len(wrong)} of them are stored as integers or 8-bit floats, but config.json has no "
            f"quantization_config that says what they stand for: {_some(wrong)}",
            fix="use the original weights in fp32, bf16 or fp16",
        )


def _is_code(name: str, kind: str) -> bool:
    """Whether a tensor must be decoded before it can be computed with."""
    plain = kind in ("F64", "F32", "F16", "BF16")
    return not plain and name.endswith(("weight", "bias")) and not _OLD_BUFFERS.search(name)


def _fix(missing: list[str], surplus: list[str], untied: list[str]) -> str:
    for name in surplus:
        if "lora_" in name:
            return "merge the LoRA adapter into the model (merge_and_unload() of peft) and save it again"
        for prefix, wrapper in _WRAPPERS.items():
            if missing and name.startswith(prefix):
                return (
                    f"the names begin with '{prefix}', which {wrapper} adds: save the model inside it, or remove the "
                    "prefix from the names"
                )
    if untied:
        return "set tie_word_embeddings: false in config.json if the two were trained apart, or save the model again"
    if missing and all(name.startswith(("lm_head", "embed_out", "output")) for name in missing):
        return (
            "save the model with its output head (AutoModelForCausalLM); if the head is the embedding, set "
            "tie_word_embeddings: true in config.json"
        )
    return (
        "copy or download the folder again, with the config.json that belongs to its weights; random weights are used "
        "only with backbone.init=random"
    )
