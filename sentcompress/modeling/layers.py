"""The blocks of the sentence encoder and decoder, and the layout of uneven sentences that they work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sentcompress.modeling.configuration import SentenceVAEConfig


class Ragged:
    """The layout of ``S`` sentences with ``T`` tokens in all, the longest of ``L`` tokens.

    Linear layers see one flat row per token, ``[T, ...]``; only attention lays sentences out side by side,
    ``[S, L, ...]``. So padding costs nothing where nearly all the arithmetic is.

    Args:
        lengths: ``[S]`` int64, tokens of each sentence, each at least 1.
        streams: ``[S]`` int64, the text each sentence belongs to; the sentences of one text are adjacent and in order.
            None: each is a text of its own.
    """

    def __init__(self, lengths: Tensor, streams: Tensor | None = None) -> None:
        self.lengths = lengths
        self.streams = streams
        self.num_sentences = int(lengths.shape[0])
        self.max_length = int(lengths.max()) if self.num_sentences else 0
        columns = torch.arange(self.max_length, device=lengths.device)
        self.mask = columns[None, :] < lengths[:, None]
        """``[S, L]`` bool, True at tokens; padding is on the right."""
        self.index = self.mask.flatten().nonzero().squeeze(1)
        """``[T]`` int64, index of each token in the flattened ``[S * L]``."""

    @property
    def positions(self) -> Tensor:
        """``[T]`` position of each token in its sentence, from 0."""
        return self.index % self.max_length

    @property
    def sentence_ids(self) -> Tensor:
        """``[T]`` number of the sentence each token belongs to."""
        return self.index // self.max_length

    def pad(self, flat: Tensor) -> Tensor:
        """``[T, ...] -> [S, L, ...]``, zeros at padding."""
        if self.index.numel() == self.mask.numel():
            return flat.reshape(self.num_sentences, self.max_length, *flat.shape[1:])
        padded = flat.new_zeros(self.mask.numel(), *flat.shape[1:]).index_copy(0, self.index, flat)
        return padded.view(self.num_sentences, self.max_length, *flat.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """``[S, L, ...] -> [T, ...]``."""
        return padded.reshape(-1, *padded.shape[2:]).index_select(0, self.index)

    def longer_by(self, extra: int) -> Ragged:
        """The layout in which every sentence has ``extra`` more positions."""
        return Ragged(self.lengths + extra, self.streams)

    # ---- sentences of one text, for attention across sentence borders

    @property
    def starts(self) -> Tensor:
        """``[S]`` where each sentence begins among the ``T`` positions."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def stream_starts(self) -> Tensor:
        """``[S]`` where the text of each sentence begins among the ``T`` positions."""
        if self.streams is None:
            return self.starts
        begins = torch.ones_like(self.streams, dtype=torch.bool)
        begins[1:] = self.streams[1:] != self.streams[:-1]
        return torch.where(begins, self.starts, 0).cummax(0).values

    @property
    def stream_positions(self) -> Tensor:
        """``[T]`` index of each position in its text, from 0."""
        positions = torch.arange(len(self.index), device=self.lengths.device)
        return positions - self.stream_starts[self.sentence_ids]

    def with_context(self, flat: Tensor, context: int) -> Tensor:
        """``[T, ...] -> [S, context + L, ...]``: each sentence preceded by the ``context`` positions before it."""
        columns = torch.arange(-context, self.max_length, device=self.lengths.device)
        indices = (self.starts[:, None] + columns).clamp(0, len(self.index) - 1)
        return flat.index_select(0, indices.flatten()).view(*indices.shape, *flat.shape[1:])

    def context_mask(self, context: int) -> Tensor:
        """``[S, L, context + L]`` bool: a position sees the context of its own text, and its sentence so far."""
        columns = torch.arange(-context, self.max_length, device=self.lengths.device)
        before = (columns < 0) & (self.starts[:, None] + columns >= self.stream_starts[:, None])
        rows = torch.arange(self.max_length, device=self.lengths.device)
        own = (columns >= 0) & (columns <= rows[:, None])
        return before[:, None, :] | own


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """``[S, L, H] -> [S, heads, L, H / heads]``."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(states: Tensor) -> Tensor:
    """``[S, heads, L, d] -> [S, L, heads * d]``."""
    return states.transpose(1, 2).flatten(2)


def rotation(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles (arXiv 2104.09864) of ``positions [...]``: ``[..., size / 2]`` each."""
    half = size // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=positions.device) / half)
    angles = positions[..., None] * frequencies
    return angles.cos(), angles.sin()


def apply_rotation(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[..., d]`` by angles ``[..., d / 2]``; the two halves are the coordinates."""
    first, second = states.chunk(2, -1)
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotate(states: Tensor, positions: Tensor) -> Tensor:
    """Rotary position encoding of ``[N, heads, d]`` at ``positions [N]``; attention sees only their differences."""
    cos, sin = rotation(positions, states.shape[-1])
    return apply_rotation(states, cos[:, None], sin[:, None])


def latents_first(embeddings: Tensor, latents: Tensor, positions: Tensor) -> Tensor:
    """The next input of each row: the latent at its position ``[B]`` if there is one, else ``embeddings [B, H]``."""
    rows = torch.arange(len(embeddings), device=embeddings.device)
    k = latents.shape[1]
    return torch.where((positions < k)[:, None], latents[rows, positions.clamp_max(k - 1)], embeddings)


@dataclass
class LayerCache:
    """Keys and values of one decoder block: those of the context, then those of the sentence.

    Attributes:
        keys, values: ``[B, heads, columns, d]``.
    """

    keys: Tensor
    values: Tensor

    def keep(self, rows: Tensor) -> LayerCache:
        """Select rows ``[B']``."""
        return LayerCache(self.keys[rows], self.values[rows])


@dataclass
class CacheSlot:
    """Where the cache stores the next position of each row, and which columns it attends to; the same in every block.

    Attributes:
        rows: ``[b]`` int64, the rows that advance, with ``column [b]``; None if all rows write the same column.
        column: the column of the new keys and values.
        first, end: range of columns to attend to.
        mask: ``[B, 1, 1, end - first]`` bool, the visible ones among them; None: all.
        angles: cosine and sine ``[b, 1, 1, d / 2]``; None without rotary positions.
        active: ``[B]`` bool, which of all ``rows`` advance; the cache of the others does not change. None: all.
    """

    rows: Tensor | None
    column: Tensor | int
    first: int
    end: int
    mask: Tensor | None
    angles: tuple[Tensor, Tensor] | None
    active: Tensor | None = None


class SelfAttention(nn.Module):
    """Multi-head self-attention over sentences of uneven length (torch SDPA)."""

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, layout: Ragged, *, causal: bool) -> Tensor:
        """``[T, H] -> [T, H]``; a token sees its own sentence, with ``causal`` only the tokens before it."""
        q, k, v = (
            split_heads(x, self.num_heads) for x in layout.pad(self.qkv_proj(hidden_states)).chunk(3, -1)
        )
        # Padding is on the right, so a causal mask already hides it from every real token.
        mask = None if causal else layout.mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout
        )
        return self.out_proj(layout.unpad(join_heads(attended)))

    def forward_across(
        self, hidden_states: Tensor, layout: Ragged, context: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Causal attention that also sees the ``context`` positions before the sentence, in its own text.

        Returns:
            ``[T, H]``, and the keys and values ``[T, heads, d]``.
        """
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in self.qkv_proj(hidden_states).chunk(3, -1))
        q, k = rotate(q, layout.stream_positions), rotate(k, layout.stream_positions)
        # Texts of one sentence have no context.
        seen = context if layout.streams is not None else 0
        attended = F.scaled_dot_product_attention(
            layout.pad(q).transpose(1, 2),
            layout.with_context(k, seen).transpose(1, 2),
            layout.with_context(v, seen).transpose(1, 2),
            attn_mask=layout.context_mask(seen)[:, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(layout.unpad(join_heads(attended))), (k, v)

    def step(self, hidden_states: Tensor, cache: LayerCache, slot: CacheSlot) -> Tensor:
        """One position per row: ``[b, H] -> [b, H]``; writes its keys and values into the cache."""
        states = self.qkv_proj(hidden_states).view(len(hidden_states), 3, self.num_heads, -1)
        q, k, v = states.unbind(1)
        if slot.angles is not None:
            q, k = apply_rotation(states[:, :2], *slot.angles).unbind(1)
        # Under autocast these are in bf16, but the cache has the dtype of the latents.
        k, v = k.to(cache.keys.dtype), v.to(cache.values.dtype)
        if slot.rows is None:
            cache.keys[:, :, slot.column] = k
            cache.values[:, :, slot.column] = v
        else:
            if slot.active is not None:
                active = slot.active[:, None, None]
                k = torch.where(active, k, cache.keys[slot.rows, :, slot.column])
                v = torch.where(active, v, cache.values[slot.rows, :, slot.column])
            cache.keys[slot.rows, :, slot.column] = k
            cache.values[slot.rows, :, slot.column] = v
        partial = slot.rows is not None and len(q) < len(cache.keys)
        if partial:  # attention with all rows costs less than copying the keys of some
            q = q.new_zeros(len(cache.keys), *q.shape[1:]).index_copy(0, slot.rows, q)
        attended = F.scaled_dot_product_attention(
            q[:, :, None],
            cache.keys[:, :, slot.first : slot.end],
            cache.values[:, :, slot.first : slot.end],
            attn_mask=slot.mask,
        )
        if partial:
            attended = attended[slot.rows]
        return self.out_proj(attended.squeeze(2).flatten(1))


class CrossAttention(nn.Module):
    """Attention of the decoder's tokens to the sentence's latents.

    With one latent the attention weight is exactly 1, so the result is ``out_proj(v_proj(latent))`` whatever
    the token is: it is computed once per sentence and added at every position.
    """

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def prepare(self, latents: Tensor) -> tuple[Tensor, ...]:
        """What depends only on the latents ``[S, k, H]``: ``(added [S, H],)``, or keys and values."""
        if latents.shape[1] == 1:
            return (self.out_proj(self.v_proj(latents[:, 0])),)
        keys, values = self.k_proj(latents), self.v_proj(latents)
        return split_heads(keys, self.num_heads), split_heads(values, self.num_heads)

    def attend(self, hidden_states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention from ``[S, L, H]`` to keys and values ``[S, heads, k, d]``."""
        q = split_heads(self.q_proj(hidden_states), self.num_heads)
        return self.out_proj(join_heads(F.scaled_dot_product_attention(q, keys, values)))

    def forward(self, hidden_states: Tensor, layout: Ragged, prepared: tuple[Tensor, ...]) -> Tensor:
        """``[T, H] -> [T, H]``."""
        if len(prepared) == 1:
            return prepared[0].index_select(0, layout.sentence_ids)
        return layout.unpad(self.attend(layout.pad(hidden_states), *prepared))

    def step(self, hidden_states: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        """One position per row: ``[B, H] -> [B, H]``."""
        if len(prepared) == 1:
            return prepared[0]
        return self.attend(hidden_states[:, None], *prepared).squeeze(1)


class AddedLatents(nn.Module):
    """The latents, projected and added at every position of a block."""

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.latents * config.hidden_size, config.hidden_size)

    def prepare(self, latents: Tensor) -> tuple[Tensor, ...]:
        return (self.proj(latents.flatten(1)),)

    def forward(self, hidden_states: Tensor, layout: Ragged, prepared: tuple[Tensor, ...]) -> Tensor:
        return prepared[0].index_select(0, layout.sentence_ids)

    def step(self, hidden_states: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        return prepared[0]


class Unpack(nn.Module):
    """Gives each position its part of the latents by a matrix of its own: the inverse of the fusion ``pack``.

    Attention selects by content. That the fifth word in the latents belongs at the fifth position is a product of
    position and latents, which attention learns slowly.
    """

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.size = config.unpack_size
        width = config.latents * config.hidden_size
        self.read = nn.Linear(width, (config.max_sentence_tokens + 1) * self.size, bias=False)
        self.widen = nn.Linear(self.size, config.hidden_size, bias=False)

    def prepare(self, latents: Tensor) -> Tensor:
        """``[S, k, H] -> [S, positions, size]``, computed once per sentence."""
        return self.read(latents.flatten(1)).unflatten(1, (-1, self.size))

    def forward(self, unpacked: Tensor, sentence_ids: Tensor, positions: Tensor) -> Tensor:
        """The summand for ``positions [T]`` of the sentences ``sentence_ids [T]``: ``[T, H]``."""
        return self.widen(unpacked[sentence_ids, positions])


class FeedForward(nn.Sequential):
    """Linear, GELU, linear; ``feedforward_size`` wide."""

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__(
            nn.Linear(config.hidden_size, config.feedforward_size),
            nn.GELU(),
            nn.Linear(config.feedforward_size, config.hidden_size),
        )


class EncoderBlock(nn.Module):
    """Self-attention in both directions within the sentence, then feed-forward."""

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config)
        self.feedforward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feedforward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, layout: Ragged) -> Tensor:
        attended = self.attention(self.attention_norm(hidden_states), layout, causal=False)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.feedforward(self.feedforward_norm(hidden_states)))


class DecoderBlock(nn.Module):
    """Masked self-attention, the latents (``cross-attention`` or ``add``), feed-forward."""

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.context = config.decoder_context
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config)
        self.feedforward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feedforward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.condition: CrossAttention | AddedLatents | None = None
        if config.conditioning == "cross-attention":
            self.condition_norm: nn.Module = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.condition = CrossAttention(config)
        elif config.conditioning == "add":
            self.condition_norm = nn.Identity()
            self.condition = AddedLatents(config)

    def prepare(self, latents: Tensor) -> tuple[Tensor, ...]:
        """What the block needs of the latents, computed once per sentence."""
        return () if self.condition is None else self.condition.prepare(latents)

    def forward(
        self,
        hidden_states: Tensor,
        layout: Ragged,
        prepared: tuple[Tensor, ...],
        past_key_values: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """``[T, H] -> [T, H]``; with ``decoder_context``, appends keys and values ``[T, heads, d]`` to the list."""
        normed = self.attention_norm(hidden_states)
        if self.context:
            attended, states = self.attention.forward_across(normed, layout, self.context)
            if past_key_values is not None:
                past_key_values.append(states)
        else:
            attended = self.attention(normed, layout, causal=True)
        hidden_states = hidden_states + self.dropout(attended)
        if self.condition is not None:
            conditioning = self.condition(self.condition_norm(hidden_states), layout, prepared)
            hidden_states = hidden_states + self.dropout(conditioning)
        return hidden_states + self.dropout(self.feedforward(self.feedforward_norm(hidden_states)))

    def step(
        self, hidden_states: Tensor, cache: LayerCache, slot: CacheSlot, prepared: tuple[Tensor, ...]
    ) -> Tensor:
        """One position per row: ``[B, H] -> [B, H]``."""
        hidden_states = hidden_states + self.attention.step(self.attention_norm(hidden_states), cache, slot)
        if self.condition is not None:
            hidden_states = hidden_states + self.condition.step(self.condition_norm(hidden_states), prepared)
        return hidden_states + self.feedforward(self.feedforward_norm(hidden_states))
