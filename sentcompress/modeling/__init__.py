"""The models: SentenceVAE and SentenceLM, ordinary transformers models."""

from transformers import AutoConfig, AutoModel

from sentcompress.modeling.configuration import SentenceLMConfig, SentenceVAEConfig
from sentcompress.modeling.sentence_lm import SentenceLM, SentenceLMOutput
from sentcompress.modeling.vae import SentenceVAE, SentenceVAEOutput

AutoConfig.register(SentenceVAEConfig.model_type, SentenceVAEConfig)
AutoConfig.register(SentenceLMConfig.model_type, SentenceLMConfig)
AutoModel.register(SentenceVAEConfig, SentenceVAE)
AutoModel.register(SentenceLMConfig, SentenceLM)

__all__ = [
    "SentenceLM",
    "SentenceLMConfig",
    "SentenceLMOutput",
    "SentenceVAE",
    "SentenceVAEConfig",
    "SentenceVAEOutput",
]
