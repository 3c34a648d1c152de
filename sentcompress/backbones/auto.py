"""Any other causal LM of transformers, taken by its structure and used only if it proves right."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from sentcompress.contracts.causal_lm import CausalLMBackbone
from sentcompress.errors import InputError

_ENCODER_DECODERS = {
    *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}


class AutoBackbone(CausalLMBackbone):
    """Any causal LM of transformers with ``inputs_embeds`` and a key-value cache; proven when it is loaded.

    Nothing is assumed of the family: whether it is causal, honours the mask and positions, uses its cache right
    and reproduces the library's own hidden states is tried on random input before a graft, as for every adapter.
    """

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Refuse what cannot be a backbone before its weights are loaded.

        Raises:
            InputError: an encoder-decoder, or no causal LM at all.
        """
        kind = str(config.model_type)
        if getattr(config, "is_encoder_decoder", False) or kind in _ENCODER_DECODERS:
            raise InputError(
                f"backbone.model: a model of type '{kind}' is an encoder-decoder, not a decoder LLM",
                fix="use a decoder-only LLM",
            )
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in MODEL_MAPPING_NAMES:
            raise InputError(
                f"backbone.model: transformers has no causal LM of type '{kind}'",
                fix="use a decoder LLM, or write an adapter for it (docs/plugins-guide.md)",
            )
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            size = getattr(config, name, None)
            if not isinstance(size, int) or size < 1:
                found = "has no such field" if size is None else f"says {size!r}"
                raise InputError(
                    f"backbone.model: a decoder LLM needs the field '{name}', but the configuration of type '{kind}' "
                    f"{found}",
                    fix="use a decoder LLM with attention, or write an adapter for it (docs/plugins-guide.md)",
                )
