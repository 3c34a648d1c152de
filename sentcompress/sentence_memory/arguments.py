"""The arguments of a SentenceMemory: what can be checked before its LLM is loaded, and the file that holds them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from sentcompress.contracts import Segmenter
from sentcompress.errors import InputError, ModelFolderError, PluginError
from sentcompress.files import read_json
from sentcompress.registry import get_registry
from sentcompress.sentence_memory.policy import Policy
from sentcompress.sentence_memory.slow_storage import make_storage
from sentcompress.text.segmentation import saved_segmenter

SETTINGS = "memory.json"
"""File beside an LLM that was trained with a memory: the memory, its options, and the segmenter."""


def check_arguments(
    memory: str,
    options: dict[str, Any],
    *,
    segmenter: str | Segmenter,
    max_sentence_tokens: int,
    storage: str,
    folder: str | Path | None,
    cache_bits: int | None,
    full_prompts: bool | None,
    positions: str,
    max_positions: int | None,
    recent_bytes: int | None,
) -> Policy:
    """Build the memories from their names and options, and refuse what is wrong whatever the LLM is.

    The arguments are those of :class:`~sentcompress.SentenceMemory`. Which blocks can recall, and where positions can
    be re-indexed, depends on the LLM.

    Raises:
        InputError: an argument or option is unknown or wrong.
        PluginError: there is no such memory or segmenter.
    """
    policy = Policy.parse(memory, options, also=[*ARGUMENTS, "recall_blocks"])
    if isinstance(segmenter, str):
        get_registry().get("segmenter", segmenter)
    if not isinstance(max_sentence_tokens, int) or max_sentence_tokens < 1:
        raise InputError(
            f"max_sentence_tokens: {max_sentence_tokens!r}", fix="use a whole number, at least 1"
        )
    make_storage(storage, folder)
    if cache_bits not in (None, 8):
        raise InputError(f"cache_bits: {cache_bits}", fix="use 8, or None for what the LLM computes")
    if positions not in ("original", "reindexed"):
        raise InputError(f"positions={positions!r} is unknown", fix="use 'original' or 'reindexed'")
    if positions == "original" and max_positions is not None:
        raise InputError("max_positions is only for positions='reindexed'", fix="leave it out")
    if full_prompts is not None and not isinstance(full_prompts, bool):
        raise InputError(f"full_prompts: {full_prompts!r}", fix="use True or False, or leave it out")
    if full_prompts and positions == "reindexed":
        raise InputError(
            "full_prompts: not with positions='reindexed'", fix="leave one of the two arguments out"
        )
    if recent_bytes is not None:
        _check_budget(policy, recent_bytes)
    return policy


def _check_budget(policy: Policy, recent_bytes: int) -> None:
    if type(recent_bytes) is not int or recent_bytes < 1:
        raise InputError(f"recent_bytes: {recent_bytes!r}", fix="use a whole number, such as 2000000")
    if "recent_tokens" not in policy.options:
        raise InputError(
            f"memory '{policy.name}' keeps no recent tokens, which recent_bytes would limit",
            fix="add window to it, such as window+recall, or leave out recent_bytes",
        )
    for other in ("recent_tokens", "recent_share"):
        if policy.options.get(other) is not None:
            raise InputError(f"recent_bytes and {other} exclude each other", fix="leave out one of them")


ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(check_arguments).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)
"""Names of the arguments that are checked here."""


def read_settings(folder: str | Path, tokenizer: Any, memory: str | None) -> tuple[str, dict[str, Any]]:
    """The memory that an LLM was trained with, and its arguments.

    Args:
        memory: another memory than that one; then its options are left out.

    Raises:
        ModelFolderError: the folder has no ``memory.json``, or it is damaged, or names what does not exist.
    """
    file = Path(folder) / SETTINGS
    if not file.is_file():
        raise ModelFolderError(
            f"'{folder}' has no {SETTINGS}: its LLM was not trained with a memory",
            fix="name a memory: SentenceMemory(model, tokenizer, 'window+recall')",
        )
    settings = read_json(file)
    try:
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
        trained, options, spec = settings["memory"], settings["options"], settings["segmenter"]
        segmenter = saved_segmenter(spec["name"], spec["options"], spec["state"], tokenizer)
        known: dict[str, Any] = {
            "segmenter": segmenter,
            "max_sentence_tokens": int(settings["max_sentence_tokens"]),
        }
        if memory is None:
            try:
                Policy.parse(trained, {name: options[name] for name in options if name not in ARGUMENTS})
            except (InputError, PluginError) as error:
                raise ModelFolderError(f"{file}: {error.message}", fix=error.fix) from None
        options["recall_blocks"] = settings["recall_blocks"] or "auto"
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFolderError(
            f"{file}: damaged: {type(error).__name__}: {error}", fix="copy or train the model again"
        ) from None
    return memory or trained, known | (options if memory is None else {})


def within_bytes(policy: Policy, recent_bytes: int, token_bytes: int) -> Policy:
    """The same memories with as many recent tokens as fit into a budget.

    Args:
        token_bytes: of one token on the device, in all blocks.

    Raises:
        InputError: not even one fits.
    """
    if recent_bytes < token_bytes:
        raise InputError(
            f"recent_bytes: {recent_bytes:,} bytes are less than one token takes in this LLM",
            fix=f"use at least {token_bytes}",
        )
    return Policy.parse(policy.name, policy.options | {"recent_tokens": recent_bytes // token_bytes})
