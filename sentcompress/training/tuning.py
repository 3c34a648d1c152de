"""Which weights of a backbone train (all, low-rank adapters, the last blocks, none), and gradient checkpointing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sentcompress.errors import InputError
from sentcompress.recipe import TuneSettings
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
        InputError: ``last_n`` is more than there are blocks, or no module matches the adapters' targets.
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
        from peft import LoraConfig, inject_adapter_in_model  # slow to import, rarely needed

        targets = settings.lora.target_modules
        names = (
            sorted(
                {n.rsplit(".", 1)[-1] for n, m in blocks.named_modules() if isinstance(m, nn.Linear | Conv1D)}
            )
            if targets == "all-linear"
            else targets
        )
        config = LoraConfig(
            r=settings.lora.rank,
            lora_alpha=settings.lora.alpha,
            lora_dropout=settings.lora.dropout,
            target_modules=names,
        )
        try:
            inject_adapter_in_model(config, llm)
        except ValueError as error:
            raise InputError(f"{where}.lora.target_modules: {error}") from None


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with adapters merged into the weights they adapt, complete in the first process.

    The model itself does not change, so training continues bit by bit. All processes must call this.
    """
    deltas = {
        f"{name}.weight": collected(module.get_delta_weight("default"))
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    state: dict[str, Tensor] = {}
    for key, value in whole_state(model).items():
        if ".lora_" in key:
            continue
        plain = key.replace(".base_layer.", ".")
        delta = deltas.get(plain)
        state[plain] = value if delta is None else value + delta.to(value.dtype)
    return state
