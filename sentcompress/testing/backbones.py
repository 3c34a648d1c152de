"""check_backbone: equivalence, causality, mask, positions, padding, cache, gradients, saving."""

from __future__ import annotations

import copy
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sentcompress.contracts.backbone import Backbone
from sentcompress.contracts.proof import Reference, prove_backbone, reference_of
from sentcompress.registry import get_registry
from sentcompress.testing.checks import CheckFailed, Subject


def check_backbone(
    cls: type[Backbone], options: Any | None = None, *, causal_lm: PreTrainedModel | None = None
) -> None:
    """Check that a backbone adapter fulfils its contract.

    For each of its ``tiny_configs`` and attention implementations: given token embeddings instead of latents, it must
    return the library's own hidden states (within 1e-5). Later positions must not change earlier states. It must honour
    the mask and the positions; left padding and the cache must not change the result. Gradients must reach the latents
    and every block, and the token embeddings can be dropped. A backbone built by ``from_config`` and loaded from the
    ``state_dict`` must be equal; if the class is registered, so must a grafted model that was saved and loaded.

    Args:
        options: raw options or an ``Options`` instance.
        causal_lm: a small fp32 transformers LM to check instead of ``tiny_configs``.

    Raises:
        CheckFailed: says in one sentence what is wrong.
    """
    __tracebackhide__ = True
    subject = Subject("backbone", cls, options)
    if causal_lm is not None:
        _check(subject, copy.deepcopy(causal_lm).eval(), f"on a {type(causal_lm).__name__}")
        return
    if not cls.tiny_configs:
        subject.fail(
            "has no tiny_configs", "add small configurations of its family to check, or pass causal_lm="
        )
    for number, shape in enumerate(cls.tiny_configs):
        settings = dict(shape)
        model_type = settings.pop("model_type", "")
        config = subject.call(f"tiny_configs[{number}]", lambda: AutoConfig.for_model(model_type, **settings))  # noqa: B023
        if cls.model_types and config.model_type not in cls.model_types:
            subject.fail(
                f"has tiny_configs[{number}] of type '{config.model_type}'",
                f"its model_types are {cls.model_types}",
            )
        for attention in cls.attention_implementations(config):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                lm = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), attn_implementation=attention
                ).eval()
                _check(subject, lm, f"on a tiny {model_type} with {attention} attention")


def _check(subject: Subject, lm: PreTrainedModel, where: str) -> None:
    try:
        reference = reference_of(lm)
    except ValueError as error:
        raise CheckFailed(f"{subject.name} {where}: {error}") from error
    whole = copy.deepcopy(lm)
    backbone: Backbone = subject.call(
        "from_causal_lm", lambda: subject.cls.from_causal_lm(lm, subject.options)
    )
    for finding in prove_backbone(backbone, reference):
        if not finding.passed:
            raise CheckFailed(
                f"{subject.name} {where}: {finding.problem} (difference {finding.delta:.1e}, at most "
                f"{finding.allowed:.0e} is allowed)"
            )
    _shape(subject, backbone, reference, where)
    _gradients(subject, backbone, reference, where)
    _saving(subject, backbone, reference, whole, where)


def _states(backbone: Backbone, inputs: Tensor) -> Tensor:
    rows, positions = inputs.shape[:2]
    causal = torch.ones(positions, positions, dtype=torch.bool).tril().expand(rows, 1, -1, -1)
    return backbone(inputs, causal, torch.arange(positions).expand(rows, -1))[0]


def _shape(subject: Subject, backbone: Backbone, reference: Reference, where: str) -> None:
    width = backbone.token_embeddings(reference.input_ids).shape[-1]
    if backbone.hidden_size != width:
        subject.fail(
            f"{where} says hidden_size {backbone.hidden_size}", f"its token embeddings are {width} wide"
        )
    blocks = subject.call("blocks", lambda: backbone.blocks)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        subject.fail(
            f"{where} returns {type(blocks).__name__} as blocks", "it must return a non-empty nn.ModuleList"
        )
    for name in ("num_heads", "max_positions"):
        value = subject.call(name, lambda: getattr(backbone, name))  # noqa: B023
        if not isinstance(value, int) or value < 1:
            subject.fail(f"{where} says {name} {value!r}", "it must be a positive int")


def _gradients(subject: Subject, backbone: Backbone, reference: Reference, where: str) -> None:
    inputs = backbone.token_embeddings(reference.input_ids).detach().requires_grad_()
    # Not a plain sum: after a final LayerNorm it is constant.
    _states(backbone, inputs).square().cumsum(-1).mean().backward()
    if inputs.grad is None or not inputs.grad.abs().sum(-1).gt(0).all():
        subject.fail(f"{where} gives no gradient to some latents", "the encoder could not be trained")
    for number, block in enumerate(backbone.blocks):
        if not any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in block.parameters()):
            subject.fail(
                f"{where} gives no gradient to block {number}", "every block must contribute to the result"
            )
    backbone.zero_grad()


@torch.no_grad()
def _saving(
    subject: Subject, backbone: Backbone, reference: Reference, whole: PreTrainedModel, where: str
) -> None:
    inputs = backbone.token_embeddings(reference.input_ids)
    expected = _states(backbone, inputs)
    config = copy.deepcopy(whole.config)
    subject.call("drop_token_embeddings", backbone.drop_token_embeddings)
    try:
        backbone.token_embeddings(reference.input_ids)
    except RuntimeError:
        pass
    else:
        subject.fail(
            f"{where} still embeds tokens after drop_token_embeddings",
            "token_embeddings must raise RuntimeError",
        )
    bare: Backbone = subject.call(
        "from_config", lambda: subject.cls.from_config(config, subject.options)
    ).eval()
    state = backbone.state_dict()
    if (there := set(bare.state_dict())) != set(state):
        subject.fail(
            f"{where} has different weights when built by from_config ({sorted(there ^ set(state))[0]})",
            "both must have the same names, without token embeddings",
        )
    bare.load_state_dict(state)
    if not torch.equal(_states(bare, inputs), expected):
        subject.fail(
            f"{where} returns different states after from_config and load_state_dict", "they must be equal"
        )
    if (found := get_registry().find("backbone", subject.cls)) is not None:
        _saved_graft(subject, whole, found[0], where)


def _saved_graft(subject: Subject, lm: PreTrainedModel, name: str, where: str) -> None:
    """Save and load a grafted model: transformers builds it on the meta device and loads the saved weights."""
    from sentcompress.modeling import SentenceLM
    from sentcompress.modeling.grafting import graft, wrap_backbone
    from sentcompress.recipe import BackboneSpec, Recipe
    from sentcompress.testing.tiny import tiny_passages, tiny_vae

    spec = BackboneSpec(name=name, model="tiny", options=subject.options.model_dump())
    width = lm.get_input_embeddings().weight.shape[0]
    backbone = wrap_backbone(spec, lm)
    vae = tiny_vae(width, hidden_size=backbone.hidden_size, num_heads=1)
    model = graft(Recipe(name="check", backbone=spec), vae, backbone).eval()
    batch = tiny_passages(width)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = SentenceLM.from_pretrained(folder).eval()
    if not torch.equal(loaded(**batch).hidden_states, model(**batch).hidden_states):
        subject.fail(
            f"{where} returns different states after the grafted model was saved and loaded",
            "all state must be in its state_dict or follow from its configuration",
        )
