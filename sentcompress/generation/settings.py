"""What a user can ask of generation; names as in transformers where there is one."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sentcompress.recipe.choices import CacheKind, HeadKind


class GenerationSettings(BaseModel):
    """Sampling and stopping. Greedy unless ``do_sample``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens to write at most; end marks are not counted."""
    max_new_sentences: int | None = Field(default=None, ge=1)
    """Sentences to write at most; finishing the prompt's last one counts."""
    max_sentence_tokens: int | None = Field(default=None, ge=1)
    """Longest sentence; null takes the model's limit."""
    do_sample: bool = False
    """Draw tokens instead of taking the likeliest."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the likeliest tokens that together have this probability."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1 makes tokens already seen less likely."""
    stop_threshold: float = Field(default=0.5, ge=0, le=1)
    """Stop when the termination layer gives at least this probability to stopping; 1 never stops."""
    seed: int | None = Field(default=None, ge=0)
    """Seeds the draws."""
    head: HeadKind = "auto"
    """How the likeliest token is found: ``exact`` computes every logit; ``shortlist-exact`` reads a quarter of the
    bytes and proves that the token is the same (on a CPU, when nothing is drawn); ``auto`` takes the faster of these
    two; ``shortlist`` knows for each sentence only the tokens predicted for it, and so may write others."""
    shortlist_tokens: int = Field(default=1024, ge=2)
    """Tokens a predicted ``shortlist`` has."""
    cache: CacheKind = "full"
    """How the backbone's keys and values are kept: as they are; in 8 bits, about a quarter of the memory; or, for a
    model on a GPU, in the computer's memory (``offloaded``), as they are or in 8 bits, and one block's at a time on
    the GPU."""
    compile: bool = False
    """torch.compile the decoder's step: on a GPU a CUDA graph, on a CPU fused loops, which pay for small models only.
    The first sentences wait for the compiler, and the last digits of sums may differ."""
    use_cache: bool = True
    """Keep keys and values of backbone and decoder; False computes all again each time (for checks)."""
    sentence_lengths: tuple[int, ...] | None = None
    """Benchmarks with untrained weights: exact tokens of each sentence in turn, cycled; nothing else ends one."""

    @model_validator(mode="after")
    def _what_is_compiled_uses_the_cache(self) -> GenerationSettings:
        if self.compile and not self.use_cache:
            raise ValueError("compile goes with use_cache: leave one of them as it is")
        return self
