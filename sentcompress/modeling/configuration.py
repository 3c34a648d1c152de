"""Configurations of the two models: JSON that names the plugins they need."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PretrainedConfig

from sentcompress import __version__
from sentcompress.contracts import Segmenter
from sentcompress.errors import PluginError
from sentcompress.registry import get_registry
from sentcompress.text.segmentation import saved_segmenter


def plugin_record(kind: str, name: str) -> dict[str, str]:
    """The distribution that provides a component, to be named if the component is missing at loading."""
    plugin = get_registry().owner(kind, name)
    return {"kind": kind, "name": name, "package": plugin.package, "version": plugin.version}


def check_plugins(records: list[dict[str, str]]) -> None:
    """Refuse a model whose plugin is missing and name the package to install; warn about another version."""
    registry = get_registry()
    for record in records:
        try:
            owner = registry.owner(record["kind"], record["name"])
        except PluginError as error:
            raise PluginError(
                f"the model needs {record['kind']} '{record['name']}' of package '{record['package']}' "
                f"{record['version']}, which is not available ({error.message.splitlines()[0]})",
                fix=f"pip install {record['package']}=={record['version']}",
            ) from None
        if owner.package == record["package"] == "sentcompress":
            continue
        if (owner.package, owner.version) != (record["package"], record["version"]):
            warnings.warn(
                f"the model was made with {record['kind']} '{record['name']}' of {record['package']} "
                f"{record['version']}, but this is {owner.package} {owner.version}: results may differ",
                stacklevel=2,
            )


class SentenceVAEConfig(PretrainedConfig):
    """Shape of a SentenceVAE.

    Args:
        vocab_size: tokens of the backbone's tokenizer.
        hidden_size: width ``H`` of latents and blocks.
        num_heads: attention heads; must divide ``hidden_size``.
        encoder_layers, decoder_layers: blocks.
        feedforward_size: width of the feed-forward layers (the paper: ``2 * hidden_size``).
        dropout: in the blocks.
        conditioning: ``cross-attention``, ``add`` or ``prefix``.
        fusion: name and options of the fusion plugin.
        latents: vectors per sentence, ``k``; defined by the fusion.
        unpack_size: size of the part of the latents that each decoder position is given directly; 0 gives none.
        decoder_context: positions before the sentence that the decoder also sees; 0 as in the paper.
        max_sentence_tokens: longest sentence.
        tie_embeddings: one matrix for encoder embedding, decoder embedding and output head.
        init_std: standard deviation of the matrices' initial weights; None: the inverse square root of their inputs.
        embed_init_std: that of the embeddings.
        embedding_multiplier: factor on the token embeddings that the decoder reads.
        variational: also predict a variance of the latent (trained with a KL term).
        segmenter: name, options and learned state of the segmenter plugin.
        backbone: adapter and model that the tokenizer came from; with ``blocks: backbone`` also the options and
            configuration that the blocks are built from.
        blocks: ``own``, or ``backbone`` for the LLM's first and last blocks.
        plugins: records of the plugins that the model needs.
    """

    model_type = "sentence-vae"

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 256,
        num_heads: int = 8,
        encoder_layers: int = 1,
        decoder_layers: int = 1,
        feedforward_size: int | None = None,
        dropout: float = 0.1,
        conditioning: str = "cross-attention",
        fusion: dict[str, Any] | None = None,
        latents: int = 1,
        unpack_size: int = 0,
        decoder_context: int = 0,
        max_sentence_tokens: int = 64,
        tie_embeddings: bool = False,
        variational: bool = False,
        layer_norm_eps: float = 1e-5,
        init_std: float | None = None,
        embed_init_std: float = 0.02,
        embedding_multiplier: float = 1.0,
        segmenter: dict[str, Any] | None = None,
        backbone: dict[str, Any] | None = None,
        blocks: str = "own",
        plugins: list[dict[str, str]] | None = None,
        sentcompress_version: str = __version__,
        bos_token_id: int = 2,
        eos_token_id: int = 2,
        pad_token_id: int = 1,
        **kwargs: Any,
    ) -> None:
        if hidden_size % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide hidden_size {hidden_size}")
        if decoder_context and hidden_size // num_heads % 2:
            raise ValueError(
                f"decoder_context: rotary positions need heads of even width, not {hidden_size // num_heads}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.encoder_layers = encoder_layers
        self.decoder_layers = decoder_layers
        self.feedforward_size = feedforward_size or 2 * hidden_size
        self.dropout = dropout
        self.conditioning = conditioning
        self.fusion = fusion or {"name": "sum-norm", "options": {}}
        self.latents = latents
        self.unpack_size = unpack_size
        self.decoder_context = decoder_context
        self.max_sentence_tokens = max_sentence_tokens
        self.tie_embeddings = tie_embeddings
        self.variational = variational
        self.layer_norm_eps = layer_norm_eps
        self.init_std = init_std
        self.embed_init_std = kwargs.pop("initializer_range", embed_init_std)  # its name in older folders
        self.embedding_multiplier = embedding_multiplier
        self.segmenter = segmenter or {"name": "regex", "options": {}, "state": {}}
        self.backbone = backbone or {}
        self.blocks = blocks
        self.plugins = plugins or []
        self.sentcompress_version = sentcompress_version
        kwargs["tie_word_embeddings"] = False  # our models tie embeddings themselves
        super().__init__(
            bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs
        )

    def load_segmenter(self, tokenizer: Any) -> Segmenter:
        """The segmenter the model was trained with, its learned state restored."""
        saved = self.segmenter
        return saved_segmenter(saved["name"], saved.get("options"), saved.get("state") or {}, tokenizer)


class SentenceLMConfig(PretrainedConfig):
    """A SentenceVAE grafted onto a backbone.

    Args:
        vae: the SentenceVAE's configuration as a dictionary.
        backbone_name: adapter plugin.
        backbone_options: its options.
        backbone_config: the LLM's own transformers configuration as a dictionary.
        latent_scale: factor from the encoder's latents to the scale of the LLM's token embeddings.
        start_latent: put a learned vector before each document, so that its first sentence is predicted too.
        shortlist_rank: rank of the scores that predict a shortlist of tokens per sentence; 0 predicts none.
    """

    model_type = "sentence-lm"

    def __init__(
        self,
        vae: dict[str, Any] | None = None,
        backbone_name: str = "opt",
        backbone_options: dict[str, Any] | None = None,
        backbone_config: dict[str, Any] | None = None,
        latent_scale: float = 1.0,
        start_latent: bool = True,
        shortlist_rank: int = 0,
        plugins: list[dict[str, str]] | None = None,
        sentcompress_version: str = __version__,
        **kwargs: Any,
    ) -> None:
        self.vae = SentenceVAEConfig(**(vae or {})).to_dict()
        self.backbone_name = backbone_name
        self.backbone_options = backbone_options or {}
        self.backbone_config = backbone_config or {"model_type": "opt"}
        self.latent_scale = latent_scale
        self.start_latent = start_latent
        self.shortlist_rank = shortlist_rank
        self.plugins = plugins or []
        self.sentcompress_version = sentcompress_version
        kwargs["tie_word_embeddings"] = False
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(key, self.vae[key])
        super().__init__(**kwargs)

    @property
    def vae_config(self) -> SentenceVAEConfig:
        """The SentenceVAE's configuration as an object."""
        return SentenceVAEConfig(**{k: v for k, v in self.vae.items() if k != "model_type"})
