"""Speed: equal work on both sides, honest about what could not be run; the arithmetic of break-even."""

from __future__ import annotations

import pytest
import torch

from sentcompress.benchmark.measurement import SENTENCE_MODEL
from sentcompress.benchmark.measurements.speed import SpeedRun
from sentcompress.benchmark.models import Models
from sentcompress.benchmark.speed_runs import measure_speed
from sentcompress.benchmark.throughput import LargestTokenBatch, by_processes
from sentcompress.benchmark.timing import (
    BACKBONE,
    IN_PLACE,
    LOOKUP,
    STATIC,
    SentenceSystem,
    TokenSystem,
    make_prompts,
)
from sentcompress.errors import InputError, RunError
from sentcompress.estimate.roofline import (
    backbone_bytes_per_token,
    backbone_cache_bytes,
    bandwidth,
    module_bytes,
    sentence_bytes_per_token,
)
from sentcompress.estimate.shapes import random_models, random_sentences
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.generation.backbone_cache import GROWTH_SLOTS
from sentcompress.recipe import BenchSettings, Recipe, build_recipe, load_recipe
from sentcompress.testing import tiny_opt, tiny_sentence_lm

LENGTHS = [5, 2, 9, 4]
SENTENCE_IDS = random_sentences([3, 6, 1, 8, 5], 500, seed=0)
SETTINGS = BenchSettings(
    repeats=2, prompt_tokens=10, new_tokens=9, batch_sizes=[1, 3], head="shortlist-exact", profile=True
)


@pytest.fixture(scope="module")
def report():
    return measure_speed(
        tiny_sentence_lm(),
        tiny_opt(),
        sentences=SENTENCE_IDS,
        sentence_lengths=LENGTHS,
        settings=SETTINGS,
        trained=False,
        bos_token_id=2,
    )


def test_prompts_have_exactly_the_tokens_asked_for():
    prompts = make_prompts(SENTENCE_IDS, 10, 3)
    assert [len(prompt.tokens) for prompt in prompts] == [10, 10, 10]
    assert prompts[0].sentences[:3] == SENTENCE_IDS[:3]
    assert prompts[0].tokens != prompts[1].tokens


def test_every_system_is_measured_at_every_batch_size(report):
    assert [(run.batch_size, run.system) for run in report.runs] == [
        (1, BACKBONE),
        (1, SENTENCE_MODEL),
        (1, LOOKUP),
        (3, BACKBONE),
        (3, SENTENCE_MODEL),
    ]
    for run in report.runs:
        assert run.output_tokens_per_second > 0
        assert run.first_token_seconds > 0
        assert (run.ratio is None) == (run.system == BACKBONE)
        assert len(run.ratios) == (0 if run.system == BACKBONE else SETTINGS.repeats)
        assert (run.roofline_share is not None) == (run.batch_size == 1 and run.system != LOOKUP)
    assert {(s.what, s.reason) for s in report.skipped} == {
        (STATIC, "on a CPU, generate does not compile with a static cache"),
        (LOOKUP, "transformers supports it at batch size 1 only"),
    }
    assert report.sentence_lengths == LENGTHS


def test_the_figures_asked_for_first_stand_at_the_top(report):
    ours = next(run for run in report.runs if run.system == SENTENCE_MODEL)
    assert report.output_ratio == ours.ratio
    assert report.prefill_ratio > 0
    assert report.fallback_rate == ours.fallback_rate
    assert 0 <= report.fallback_rate <= 1
    assert report.roofline_share == ours.roofline_share
    assert report.head == "shortlist-exact"


def test_the_profile_says_where_all_of_the_time_goes(report):
    for system, parts in ((BACKBONE, 3), (SENTENCE_MODEL, 6)):
        for batch in (1, 3):
            entries = [e for e in report.profile if (e.system, e.batch_size) == (system, batch)]
            assert len(entries) == parts
            assert sum(e.share for e in entries) == pytest.approx(1)
            assert all(e.milliseconds_per_token > 0 for e in entries if e.part != "sampling")


def largest(budget: int, **settings: object) -> list[SpeedRun]:
    report = measure_speed(
        tiny_sentence_lm(),
        tiny_opt(),
        sentences=SENTENCE_IDS,
        sentence_lengths=LENGTHS,
        settings=SETTINGS.model_copy(
            update={
                "profile": False,
                "batch_sizes": [1],
                "break_even": False,
                "largest_batch": True,
                "memory_budget_bytes": budget,
            }
            | settings
        ),
        trained=False,
        bos_token_id=2,
    )
    return report.runs[3:]


def test_the_largest_batch_is_what_each_cache_fits_for():
    # tiny OPT: keys and values of 3 blocks of width 32 in fp32.
    position = 2 * 3 * 32 * 4
    start, prompt, new = 1, 10, 9
    sentences, room = 3, GROWTH_SLOTS  # 3, 6 and 1 tokens; 9 new ones are fewer cells than there is room for
    vae = tiny_sentence_lm().config.vae_config
    decoder = 2 * vae.decoder_layers * 32 * 4 * (vae.max_sentence_tokens + 1)
    budget = 200_000
    rows = {
        BACKBONE: budget // (position * (start + prompt + new)),
        SENTENCE_MODEL: budget // (position * (start + sentences + room) + decoder),
        IN_PLACE: budget // (position * (start + prompt + new)),
    }
    runs = largest(budget)
    assert {run.system: run.batch_size for run in runs} == rows
    for run in runs:
        assert run.output_tokens_per_second > 0
        assert run.prefill_tokens_per_second is None
        assert run.total_ratio is None
        assert "largest batch in 0.000186 GiB" in run.note
    in_8_bits = next(run for run in largest(budget, cache="int8") if run.system == SENTENCE_MODEL)
    assert in_8_bits.batch_size > 1.5 * rows[SENTENCE_MODEL]  # the decoder's stays as it is


def test_copies_of_a_read_prompt_are_continued_as_the_prompt_itself():
    model, (prompt,) = tiny_sentence_lm(), make_prompts(SENTENCE_IDS, 10, 1)
    generator = SentenceGenerator(model, None)
    settings = GenerationSettings(max_new_tokens=9, stop_threshold=1)
    (alone, copies) = (
        [[tokens for n, tokens in generator.continue_sentences(*asked) if n == row] for row in range(rows)]
        for rows, asked in (
            (1, ([prompt.sentences], settings)),
            (3, ([prompt.sentences] * 3, settings, generator.prefix_of(prompt.sentences))),
        )
    )
    assert copies == alone * 3
    backbone = tiny_opt()
    system = LargestTokenBatch(backbone, [2, *prompt.tokens], 9, 10**6, static=False)
    in_place = LargestTokenBatch(backbone, [2, *prompt.tokens], 9, 10**6, static=True)
    assert system.write([], 9) == in_place.write([], 9) == 9


def test_a_budget_for_not_even_one_text_is_refused():
    with pytest.raises(InputError, match=r"bench.memory_budget_bytes: 5,000 bytes, but .* takes 15,360"):
        largest(5000)


def test_break_even_and_advice_are_given(report):
    assert len(report.advice) == 5
    assert "roofline" in report.advice[0]  # a model of hidden size 32
    assert "speculative decoding" in report.advice[-1]
    assert "quantization" in report.advice[-1]
    assert {
        "batch_sizes_tested",
        "sentence_length_faster_from",
        "text_length_ratios",
    } <= report.break_even.keys()


def test_every_system_writes_as_many_tokens():
    prompts = make_prompts(SENTENCE_IDS, 10, 2)
    assert TokenSystem(BACKBONE, tiny_opt(), 2).write(prompts, 9) == 9
    assert SentenceSystem(tiny_sentence_lm(), LENGTHS).write(prompts, 9) == 9


def test_forced_lengths_are_kept_and_end_marks_are_paid_for(monkeypatch):
    model = tiny_sentence_lm()
    steps = []
    plain = type(model.vae.decoder).step
    monkeypatch.setattr(
        type(model.vae.decoder), "step", lambda self, *a, **k: steps.append(1) or plain(self, *a, **k)
    )
    settings = GenerationSettings(max_new_tokens=20, stop_threshold=1, sentence_lengths=tuple(LENGTHS))
    generator = SentenceGenerator(model, None)
    written = [len(ids) for _, ids in generator.continue_sentences([SENTENCE_IDS], settings)]
    assert written == [*LENGTHS]
    assert len(steps) == sum(LENGTHS) + 3  # the last sentence was cut by max_new_tokens, the others end
    steps.clear()
    rows = list(generator.continue_sentences([SENTENCE_IDS[:2]] * 2, settings))
    assert [len(ids) for row, ids in rows if row == 1][:3] == LENGTHS[1:]  # rows are uneven, as text is


def test_a_setting_that_fails_is_said_not_hidden(monkeypatch):
    def broken(self, prompts, new_tokens):
        if self.options:
            raise ValueError("no such cache")
        return plain(self, prompts, new_tokens)

    plain = TokenSystem.write
    monkeypatch.setattr(TokenSystem, "write", broken)
    report = measure_speed(
        tiny_sentence_lm(),
        tiny_opt(),
        sentences=SENTENCE_IDS,
        sentence_lengths=LENGTHS,
        settings=SETTINGS.model_copy(update={"batch_sizes": [1], "repeats": 1}),
        trained=False,
        bos_token_id=2,
    )
    assert [run.system for run in report.runs] == [BACKBONE, SENTENCE_MODEL]
    assert any("no such cache" in skipped.reason for skipped in report.skipped)


def test_too_long_a_run_is_refused():
    with pytest.raises(InputError, match="positions"):
        measure_speed(
            tiny_sentence_lm(),
            tiny_opt(),
            sentences=SENTENCE_IDS,
            sentence_lengths=LENGTHS,
            settings=BenchSettings(prompt_tokens=100, new_tokens=100),
            trained=False,
            bos_token_id=2,
        )


def test_bytes_read_are_counted_from_the_tensors():
    lm = tiny_opt()
    everything = sum(p.numel() * 4 for p in lm.parameters())
    positions = lm.model.decoder.embed_positions.weight.numel() * 4
    # The token table is tied to the head, so it is read whole; positions are looked up.
    assert backbone_bytes_per_token(lm, 0) == everything - positions
    assert backbone_cache_bytes(lm.config, 4) == 2 * 3 * 32 * 4
    assert backbone_bytes_per_token(lm, 10) == everything - positions + 10 * 2 * 3 * 32 * 4
    model = tiny_sentence_lm()
    long, short = (sentence_bytes_per_token(model, 100, n) for n in (20, 2))
    assert long < short
    assert module_bytes(torch.nn.Linear(3, 5)) == 20 * 4
    assert bandwidth(torch.device("cpu"), size=2**20) > 0


def test_published_shapes_work_without_weights_or_network():
    recipe = build_recipe(
        {"name": "random", "backbone": {"model": "opt-125m", "init": "random"}}, [], "tests"
    )
    assert isinstance(recipe, Recipe)
    with torch.device("meta"):
        model, backbone = random_models(recipe)
    assert model.backbone.hidden_size == 768
    assert backbone.config.num_hidden_layers == 12
    assert backbone.config.vocab_size == 50272


def test_both_models_can_be_timed_in_other_dtypes():
    report = measure_speed(
        tiny_sentence_lm().bfloat16(),
        tiny_opt().bfloat16(),
        sentences=SENTENCE_IDS,
        sentence_lengths=LENGTHS,
        settings=SETTINGS.model_copy(update={"head": "auto", "profile": False, "break_even": False}),
        trained=False,
        bos_token_id=2,
    )
    assert report.head == "exact"
    assert report.output_ratio > 0
    assert report.advice == [] or "roofline" in report.advice[0]


def test_a_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(InputError, match=r"bench\.device: this machine has no CUDA device"):
        Models(load_recipe("strong", ["bench.device=cuda"]), None)


def test_throughput_of_a_system_that_stops_early_is_an_error():
    class Short(TokenSystem):
        def write(self, prompts, new_tokens):
            return super().write(prompts, new_tokens - 1)

    prompts = make_prompts(SENTENCE_IDS, 6, 2)
    whole, short = (kind("any", tiny_opt(), 2) for kind in (TokenSystem, Short))
    (found,) = by_processes([whole], prompts, 4, 2)
    assert (found.processes, found.efficiency, len(found.rates)) == (1, 1.0, 2)
    with pytest.raises(RunError, match="wrote 3 tokens in its processes, not 4 in each"):
        by_processes([short], prompts, 4, 2)
