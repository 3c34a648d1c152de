"""How a sentence model scores the sentences of a text: every target and every decision, one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sentcompress.benchmark.heldout_text import Window
from sentcompress.errors import CoverageError
from sentcompress.generation.shortlist_head import ShortlistHead
from sentcompress.modeling.losses import LOGITS_BUDGET, TokenLoss
from sentcompress.modeling.sentence_lm import START, SentenceLM, positions_in_passages
from sentcompress.modeling.vae import pad_sentences


class Recorder(TokenLoss):
    """Cross-entropy that keeps the nats of each target, counts end marks, and counts targets that are padding.

    Args:
        eos: the end mark's token.
        pad: the padding's.
        greedy: also note whether each target is what greedy decoding would write there.
        states: also keep the hidden states the targets were predicted from.
    """

    def __init__(self, eos: int, pad: int, *, greedy: bool = False, states: bool = False) -> None:
        super().__init__(gamma=0.0)
        seen = {"eos": eos, "pad": pad, "ends": 0, "padding": 0, "nats": [], "greedy": [], "states": []}
        object.__setattr__(self, "seen", seen)
        object.__setattr__(self, "greedy", greedy)
        object.__setattr__(self, "states", states)

    def __call__(self, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, nll = super().__call__(hidden_states, weight, targets)
        seen: dict[str, Any] = self.seen  # type: ignore[attr-defined]
        ends = targets == seen["eos"]
        seen["ends"] += int(ends.sum())
        if seen["pad"] != seen["eos"]:
            seen["padding"] += int((targets == seen["pad"]).sum())
        seen["nats"].append((targets.cpu().numpy(), nll.double().cpu().numpy()))
        if self.greedy:  # type: ignore[attr-defined]
            seen["greedy"].append(_likeliest(hidden_states, weight, targets, ends, seen["eos"]).cpu().numpy())
        if self.states:  # type: ignore[attr-defined]
            seen["states"].append(hidden_states)
        return loss, nll


def _likeliest(hidden_states: Tensor, weight: Tensor, targets: Tensor, ends: Tensor, eos: int) -> Tensor:
    """``[T]`` bool: whether each target is the arg-max; as in generation, no sentence begins with its end mark."""
    first = torch.cat([ends.new_ones(1), ends[:-1]])
    found = []
    rows = max(1, LOGITS_BUDGET // len(weight))
    for begin in range(0, len(targets), rows):
        block = slice(begin, begin + rows)
        logits = (hidden_states[block] @ weight.t()).float()
        logits[first[block], eos] = float("-inf")
        found.append(logits.argmax(-1) == targets[block])
    return torch.cat(found)


@dataclass
class WindowScores:
    """Negative log-likelihoods of the ``n`` sentences of a window.

    Attributes:
        nats: ``[n]`` of each sentence with its end mark; 0 where it is context.
        before: ``[n]`` of the decision before each: to go on, or to begin the document; 0 where not scored.
        stop: of the decision to stop after the last one; 0 where none is due.
        targets: ``[n]`` tokens and end marks scored.
        decisions: ``[n]`` bool, whether the decision after each was scored.
        target_nats: ``[T]`` targets and their nats, in the order of the text.
        greedy: ``[T]`` bool, whether each is the arg-max; empty unless asked for.
        end_nats: of the end marks.
    """

    nats: np.ndarray
    before: np.ndarray
    stop: float
    targets: np.ndarray
    decisions: np.ndarray
    target_nats: tuple[np.ndarray, np.ndarray]
    greedy: np.ndarray
    end_nats: float


def window_size(model: SentenceLM, context_sentences: int | None = None) -> int:
    """Sentences a window holds: ``context_sentences``, or all the backbone has positions for."""
    room = model.backbone.max_positions // model.latents - int(model.config.start_latent)
    return max(2, min(context_sentences or room, room))


@contextmanager
@torch.no_grad()
def without_llm(model: SentenceLM, sentences: Sequence[Sequence[int]]) -> Iterator[None]:
    """Put the mean of the LLM's states over some ``sentences`` of one text in the place of each state.

    No earlier sentence reaches the decoder then, except through the tokens in its own window.
    """
    device = next(model.parameters()).device
    input_ids, mask = pad_sentences(sentences, device, model.config.pad_token_id)
    start = [START] if model.config.start_latent else []
    index = torch.tensor([[*start, *range(len(sentences))]], device=device)
    rows = model.rows(model.encode(input_ids, mask.long()), index)
    passage_ids = torch.zeros_like(index)
    states, _ = model.backbone_states(rows, passage_ids == 0, passage_ids, positions_in_passages(passage_ids))
    mean = states.mean((0, 1))

    def constant(_: Any, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        batch, positions, _width = output[0].shape
        return mean.repeat(batch, positions // len(mean), 1), output[1]

    hook = model.backbone.register_forward_hook(constant)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def score_window(
    model: SentenceLM,
    sentences: Sequence[Sequence[int]],
    window: Window,
    *,
    ends: bool,
    what: str,
    greedy: bool = False,
    shortlist: ShortlistHead | None = None,
) -> WindowScores:
    """Score a window of a document's sentences from ``window.first_scored`` on.

    Args:
        model: in eval mode; it can score sentence 0 only where it has a start latent.
        sentences: token ids of all sentences of the document.
        ends: the document ends with its last sentence, so the decision to stop there is scored.
        what: the document, for messages.
        greedy: also find out which targets are the arg-max.
        shortlist: score what is written with the tokens that it predicts for each sentence.

    Raises:
        CoverageError: padding was scored, or not one end mark per sentence.
    """
    device = next(model.parameters()).device
    inside = sentences[window.start : window.stop]
    count = len(inside)
    input_ids, mask = pad_sentences(inside, device, model.config.pad_token_id)
    start = [START] if model.config.start_latent and window.start == 0 else []
    index = torch.tensor([[*start, *range(count)]])
    scored = torch.arange(window.start, window.stop) >= window.first_scored
    last = torch.zeros(count, dtype=torch.bool)
    last[-1] = ends and window.stop == len(sentences)
    eos = model.config.eos_token_id
    recorder = Recorder(eos, model.config.pad_token_id, greedy=greedy, states=shortlist is not None)
    output = model(
        input_ids=input_ids,
        attention_mask=mask.long(),
        sentence_index=index.to(device),
        passage_ids=torch.zeros_like(index).to(device),
        scored=scored.to(device),
        last=last.to(device),
        token_loss=recorder,
    )
    seen: dict[str, Any] = recorder.seen  # type: ignore[attr-defined]
    if seen["padding"]:
        raise CoverageError(f"{what}: {seen['padding']} targets are padding")
    if seen["ends"] != int(scored.sum()):
        raise CoverageError(f"{what}: {seen['ends']} end marks were scored for {int(scored.sum())} sentences")
    stop = output.stop_nll.double().cpu().numpy()
    begin = float(output.start_nll)
    targets, nats = (np.concatenate(columns) for columns in zip(*seen["nats"], strict=True))
    sentence_nats = output.sentence_nll.double()
    if shortlist is not None:
        conditioning = output.hidden_states[0, : count + len(start)][
            scored.nonzero().squeeze(1) + len(start) - 1
        ]
        counts = output.targets[scored].tolist()
        pieces = [
            shortlist.nll(states, candidates, wanted)
            for states, candidates, wanted in zip(
                torch.cat(seen["states"]).split(counts),
                shortlist.candidates(conditioning),
                torch.from_numpy(targets).to(device).split(counts),
                strict=True,
            )
        ]
        nats = torch.cat(pieces).double().cpu().numpy()
        sentence_nats[scored] = torch.stack([piece.double().sum() for piece in pieces])
    return WindowScores(
        nats=sentence_nats.cpu().numpy(),
        before=np.array([begin, *stop[:-1]]),
        stop=float(stop[-1]) if bool(last[-1]) else 0.0,
        targets=output.targets.cpu().numpy(),
        decisions=output.decisions.cpu().numpy(),
        target_nats=(targets, nats),
        greedy=np.concatenate(seen["greedy"]) if greedy else np.zeros(0, dtype=bool),
        end_nats=float(nats[targets == eos].sum()),
    )
