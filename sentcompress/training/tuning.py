"""Which weights of a backbone train (all, low-rank adapters, the last blocks, none), and gradient checkpointing."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from sentcompress.errors import InputError, did_you_mean
from sentcompress.recipe import LoraSettings, TuneSettings
from sentcompress.training.sharding import collected, whole_state


def recompute_activations(model: nn.Module) -> None:
    """Turn gradient checkpointing on, by the method name that this version of transformers uses."""
    enable: Any = (
        getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def apply_tune(llm: nn.Module, blocks: nn.ModuleList, settings: TuneSettings, where: str) -> None:
    """Freeze an LLM, or add adapters to it, in place (``tune``: full, lora, frozen, last-n).

    Args:
        llm: the backbone adapter or causal LM.
        blocks: its blocks, first to last.
        where: the recipe section, for messages.

    Raises:
        InputError: ``last_n`` is more than there are blocks, a target of the adapters is in no block, or they cannot
            have dropout.
    """
    if settings.tune == "full":
        return
    llm.requires_grad_(False)
    if settings.tune == "last-n":
        if settings.last_n > len(blocks):
            raise InputError(
                f"{where}.last_n: {settings.last_n}, but the backbone has {len(blocks)} blocks",
                fix=f"set it to at most {len(blocks)}",
            )
        for block in list(blocks)[-settings.last_n :]:
            block.requires_grad_(True)
    elif settings.tune == "lora":
        _add_adapters(blocks, settings.lora, f"{where}.lora")


def _add_adapters(blocks: nn.ModuleList, settings: LoraSettings, where: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, rarely needed

    # Inside a bare module: peft would take what has a transformers configuration for a model of transformers.
    holder = nn.Module()
    holder.blocks = blocks
    matrices = [name for name, module in holder.named_modules() if _is_linear(module)]
    experts = [f"blocks.{name}" for name, _ in _expert_stacks(blocks)]
    if settings.target_modules != "all-linear":
        wanted = tuple(f".{name}" for name in settings.target_modules)
        known = sorted({name.rpartition(".")[2] for name in (*matrices, *experts)})
        for name in settings.target_modules:
            if not any(f".{known_one}".endswith(f".{name}") for known_one in (*matrices, *experts)):
                raise InputError(
                    f"{where}.target_modules: the backbone's blocks have no linear layer '{name}'."
                    f"{did_you_mean(name, known)}",
                    fix=f"use {', '.join(known)}, or all-linear",
                )
        matrices = [name for name in matrices if f".{name}".endswith(wanted)]
        experts = [name for name in experts if f".{name}".endswith(wanted)]
    if not matrices and not experts:
        raise InputError(
            f"{where}.target_modules: the backbone's blocks have no linear layers",
            fix="use tune: full or last-n",
        )
    if experts and settings.dropout:
        raise InputError(
            f"{where}.dropout: {settings.dropout}, but adapters of a mixture's experts cannot have dropout: the "
            f"weights of all experts are one parameter ({_without_index(experts[0])})",
            fix="set it to 0, or name the layers to adapt, without the experts, in target_modules",
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=matrices,
        target_parameters=experts or None,
    )
    with warnings.catch_warnings():
        # It finds out by itself how Conv1D stores its weights, but warns that it was not told.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        inject_adapter_in_model(config, holder)


def _is_linear(module: nn.Module) -> bool:
    """Not subclasses with a forward of their own, such as routers: adapters could not be merged into their weights."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _expert_stacks(blocks: nn.ModuleList) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters ``[experts, ., .]``, by name: the matrices of all experts of a mixture."""
    for name, module in blocks.named_modules():
        for field, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, _ConvNd):
                yield f"{name}.{field}", parameter


@contextmanager
def without_adapters(lm: nn.Module) -> Iterator[None]:
    """For a block in which an LLM with adapters is what it was before, without dropout."""
    adapters: list[Any] = [module for module in lm.modules() if hasattr(module, "get_delta_weight")]
    training = lm.training
    lm.eval()
    for adapter in adapters:
        adapter.enable_adapters(False)
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enable_adapters(True)
        lm.train(training)


def unreached_weights(blocks: Iterable[nn.Module]) -> str:
    """What adapters do not reach of the blocks' matrices, in one line; empty if they reach all or there are none."""
    total, missed = 0, dict[str, int]()
    for block in blocks:
        adapted = {id(_adapted(module)) for module in block.modules() if hasattr(module, "get_delta_weight")}
        if not adapted:
            return ""
        for name, parameter in block.named_parameters():
            if parameter.ndim < 2 or ".lora_" in name or name.endswith("bias"):
                continue
            total += parameter.numel()
            if id(parameter) not in adapted:
                missed[_plain(name)] = missed.get(_plain(name), 0) + parameter.numel()
    if not missed:
        return ""
    reached = 1 - sum(missed.values()) / total
    return f"LoRA adapts {reached:.1%} of the blocks' weights; frozen: {', '.join(sorted(missed))}"


def _adapted(adapter: Any) -> nn.Parameter:
    """The weight that one of peft's adapters adds to."""
    return getattr(adapter.get_base_layer(), getattr(adapter, "parameter_name", "weight"))


def _plain(name: str) -> str:
    """The name of a module or parameter before adapters were added; they may be nested."""
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name)


def _without_index(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", name)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with adapters merged into the weights they adapt, complete in the first process.

    The model itself does not change, so training continues bit by bit. All processes must call this.
    """
    deltas = {
        f"{_plain(name)}.{getattr(module, 'parameter_name', 'weight')}": collected(
            module.get_delta_weight("default")
        )
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    state: dict[str, Tensor] = {}
    for key, value in whole_state(model).items():
        if ".lora_" in key:
            continue
        plain = _plain(key)
        delta = deltas.get(plain)
        state[plain] = value if delta is None else value + delta.to(value.dtype)
    return state
