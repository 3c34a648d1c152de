"""``bench scaling-law``: known laws are found again, in results.json files written by the code that writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from sentcompress.benchmark.measurement import SENTENCE_MODEL
from sentcompress.benchmark.measurements.quality import DocumentScore, ModelCounts, Quality, QualityScore
from sentcompress.benchmark.results import Results, Row, read_results, write_results
from sentcompress.benchmark.runner import run_bench
from sentcompress.cli import main
from sentcompress.errors import InputError
from sentcompress.pipeline import run_recipe
from sentcompress.provenance import Honesty
from sentcompress.recipe import build_recipe
from sentcompress.studies.power_laws import fit_line, fit_surface, seed_interval, t_quantile
from sentcompress.studies.scaling_law import (
    PARAMETERS,
    RATIO,
    TOKENS,
    Fit,
    ScalingLaw,
    scaling_law,
)
from sentcompress.studies.scaling_points import BASELINE, flops
from sentcompress.studies.scaling_report import gap_line, markdown, render

Law = Callable[[float, float], float]
SIZES = (1e6, 4e6, 16e6)
BUDGETS = (1e5, 4e5, 16e5, 64e5)
DOCUMENTS = (3000, 2000)


def score(system: str, bits: float, counts: ModelCounts | None, documents=DOCUMENTS) -> QualityScore:
    size = sum(documents)
    return QualityScore(
        system=system,
        bits_per_byte=bits,
        perplexity=10.0,
        nats=bits * math.log(2) * size,
        bytes=size,
        targets=size // 4,
        baseline_tokens=size // 4,
        context="",
        counts=counts,
        documents=[
            DocumentScore(
                document=i, source=f"{i}.txt", bytes=n, covered_bytes=n, nats=1, targets=1, baseline_tokens=1
            )
            for i, n in enumerate(documents)
        ],
    )


def write_run(
    folder: Path,
    size: float,
    tokens: float,
    ours: float,
    twin: float,
    *,
    seed: int = 0,
    opponent: float | None = None,
    change: Callable[[Results], None] = lambda _: None,
    **recipe: object,
) -> Path:
    """A finished run's ``bench/results.json``, as far as quality goes."""
    raw = {"name": "law", "seed": seed, "graft": {"steps": int(tokens / 100)}, "backbone": {"init": "random"}}
    made = build_recipe(raw | recipe, [], "")
    shape = {"trainable_parameters": int(size), "backbone_parameters": int(size)}
    counts = {
        SENTENCE_MODEL: ModelCounts(
            **shape,
            parameters=int(3 * size),
            table_parameters=1000,
            tokens_per_position=10.0,
            training_tokens={"vae": 5000, "graft": int(tokens)},
        ),
        BASELINE: ModelCounts(
            **shape,
            parameters=int(2 * size),
            table_parameters=0,
            tokens_per_position=1.0,
            # Seen with a start token before each passage: a few more.
            training_tokens={"baseline": int(tokens * 1.01)},
        ),
    }
    scores = [
        score(SENTENCE_MODEL, ours, counts[SENTENCE_MODEL]),
        score(BASELINE, twin, counts[BASELINE]),
        score("unigram", 2.2, None),
    ]
    if opponent is not None:
        small = counts[BASELINE].model_copy(
            update={
                "backbone_parameters": int(size / 4),
                "training_tokens": {"opponent-x": int(tokens * 1.01)},
            }
        )
        scores.append(score("opponent x", opponent, small))
    honesty = Honesty(
        command=f"sentcompress run law --out {folder}",
        commit="0" * 12,
        recipe=made.name,
        recipe_digest=made.digest(),
        device="cpu (made up)",
        dtype="float32",
        threads=1,
        seed=seed,
        training_tokens=int(tokens),
        mean_sentence_tokens=10.0,
        packages={"numpy": "2"},
    )
    results = Results(
        title=made.name,
        created="2026-01-01T00:00:00+00:00",
        quality=scores,
        rows=[Row(part="quality", system=s.system, figures=s.figures(), honesty=honesty) for s in scores],
        recipe=made.model_dump(mode="json"),
    )
    change(results)
    write_results(results, folder / "bench")
    return folder


def write_grid(
    folder: Path, ours: Law, twin: Law, *, sizes=SIZES, budgets=BUDGETS, seeds: int = 1, noise: float = 0.0
) -> Path:
    """A folder of runs, as a sweep leaves it, on two laws of size and tokens."""
    draw = np.random.default_rng(0)
    for n in sizes:
        for d in budgets:
            for seed in range(seeds):
                tokens = d * (1 + 0.004 * seed)  # another seed reads other passages
                bits = [
                    law(n, d) * math.exp(noise * draw.standard_normal())
                    for law, d in ((ours, tokens), (twin, tokens * 1.01))
                ]
                write_run(folder / f"n{n:.0f}-d{d:.0f}-s{seed}", n, tokens, *bits, seed=seed)
    return folder


def by_tokens(bits: float, alpha: float) -> Law:
    """So many bits per byte at 100,000 tokens, whatever the size."""
    return lambda _, d: bits * (d / 1e5) ** -alpha


FALLING, RISING = by_tokens(2, 0.01), by_tokens(2, -0.01)


def fitted(law: ScalingLaw, curve: str, against: str) -> list[Fit]:
    return [fit for fit in law.fits if fit.curve == curve and fit.against == against]


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "scaling-law", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


# ---- the mathematics


def test_quantiles_of_students_t():
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 30: 2.0423, 1000: 1.9623}
    for degrees, quantile in known.items():
        assert t_quantile(degrees) == pytest.approx(quantile, abs=1e-4)


@pytest.mark.parametrize("points", [3, 5, 8])
def test_intervals_hold_the_truth_as_often_as_they_say(points: int):
    draw = np.random.default_rng(points)
    x = 1e5 * 3.0 ** np.arange(points)
    repeats, slope, crossing = 2000, 0, 0
    for _ in range(repeats):
        noise = np.exp(0.01 * draw.standard_normal(points))
        line = fit_line(x, 1.2 * (x / 1e6) ** -0.05 * noise)
        slope += line.interval[0] <= 0.05 <= line.interval[1]
        low, high = line.crossing_interval
        truth = 1e6 * 1.2**20
        crossing += (low is None or low <= truth) and (high is None or truth <= high)
    assert 0.94 <= slope / repeats <= 0.96
    assert 0.93 <= crossing / repeats <= 1.0  # an unbounded one is taken for the whole line


def test_the_joint_law_is_found_again_and_its_intervals_hold():
    draw = np.random.default_rng(0)
    n, d = (a.ravel() for a in np.meshgrid([1e6, 3e6, 1e7, 3e7], [1e6, 4e6, 16e6, 64e6]))
    loss = 0.7 + 50 * n**-0.3 + 30 * d**-0.25
    exact = fit_surface(n, d, loss)
    for name, truth in {"E": 0.7, "A": 50, "alpha": 0.3, "B": 30, "beta": 0.25}.items():
        assert getattr(exact, name) == pytest.approx(truth, rel=1e-3)
    noisy = fit_surface(n, d, loss * np.exp(0.003 * draw.standard_normal(16)))
    for name, truth in (("E", 0.7), ("alpha", 0.3), ("beta", 0.25)):
        assert noisy.intervals[name][0] < truth < noisy.intervals[name][1]


def test_a_joint_law_that_the_points_do_not_determine_has_no_intervals():
    n, d = (a.ravel() for a in np.meshgrid([1e6, 3e6, 1e7], [1e6, 4e6, 16e6]))
    flat = fit_surface(n, d, 30 * d**-0.25)  # size does nothing, and there is no floor
    assert flat.intervals == {}
    assert flat.beta == pytest.approx(0.25, abs=0.01)


def test_seeds_are_drawn_anew_only_where_each_point_has_several():
    assert seed_interval([1, 2, 4], [[3, 3.1], [2], [1, 1.1]]) is None
    low, high = seed_interval([1, 2, 4], [[3, 3.1], [2, 2.1], [1, 1.1]])
    assert low < 0.77 < high
    assert seed_interval([1, 2, 4], [[4, 4], [2, 2], [1, 1]]) == pytest.approx((1, 1))


def test_lines_refuse_what_has_no_logarithm():
    with pytest.raises(ValueError, match="3 different"):
        fit_line([1, 2, 2], [1, 1, 1])
    with pytest.raises(ValueError, match="positive"):
        fit_line([1, 2, 3], [1, 0, 1])


# ---- runs on disk


def test_known_exponents_come_back_from_results_files(tmp_path):
    write_grid(tmp_path, lambda n, d: 40 * n**-0.08 * d**-0.12, lambda n, d: 20 * n**-0.07 * d**-0.1)
    law = scaling_law([tmp_path])
    assert len(law.points) == 12
    for curve, by_tokens, by_size in (
        (SENTENCE_MODEL, 0.12, 0.08),
        (BASELINE, 0.1, 0.07),
        (RATIO, 0.02, 0.01),
    ):
        assert [f.exponent for f in fitted(law, curve, TOKENS)] == pytest.approx([by_tokens] * 3, abs=1e-4)
        assert [f.exponent for f in fitted(law, curve, PARAMETERS)] == pytest.approx([by_size] * 4, abs=1e-4)
    assert {fit.system for fit in law.joint} == {SENTENCE_MODEL, BASELINE}
    assert law.heldout.bytes == 5000
    assert not law.skipped
    assert not law.notes


def test_a_joint_law_comes_back_for_both(tmp_path):
    write_grid(
        tmp_path,
        lambda n, d: 0.6 + 50 * n**-0.3 + 40 * d**-0.3,
        lambda n, d: 0.5 + 50 * n**-0.3 + 30 * d**-0.25,
    )
    law = scaling_law([tmp_path])
    ours, twin = law.joint
    assert (ours.E, ours.alpha, ours.beta) == pytest.approx((0.6, 0.3, 0.3), rel=1e-3)
    assert (twin.E, twin.alpha, twin.beta) == pytest.approx((0.5, 0.3, 0.25), rel=1e-3)
    gap = next(gap for gap in law.gaps if gap.against == TOKENS and gap.at == SIZES[0])
    around = 50 * SIZES[0] ** -0.3
    assert gap.joint_limit == pytest.approx((0.6 + around) / (0.5 + around), rel=1e-3)
    assert f"the ratio tends to {gap.joint_limit:.3f}" in gap_line(gap)


def with_opponent(folder: Path, *, without: tuple[float, ...] = ()) -> Path:
    """A grid of runs with an opponent, but for those of some budgets."""
    for n in SIZES:
        for d in BUDGETS:
            theirs = 0.5 + 50 * n**-0.3 + 20 * (d * 1.01) ** -0.2
            bits = (0.6 + 50 * n**-0.3 + 40 * d**-0.3, 0.5 + 50 * n**-0.3 + 30 * (d * 1.01) ** -0.25)
            run = folder / f"n{n:.0f}-d{d:.0f}"
            write_run(run, n, d, *bits, opponent=None if d in without else theirs)
    return folder


def test_opponents_are_fitted_as_the_baseline_is(tmp_path, capsys):
    with_opponent(tmp_path / "runs")
    code, shown, err = call(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0, err
    law = ScalingLaw.model_validate_json((tmp_path / "out" / "scaling-law.json").read_text(encoding="utf-8"))
    ours, _, theirs = law.joint
    assert theirs.system == "opponent x"
    assert (theirs.E, theirs.alpha, theirs.beta) == pytest.approx((0.5, 0.3, 0.2), rel=1e-3)
    for curve in ("opponent x", "ratio to opponent x"):
        assert len(fitted(law, curve, TOKENS)) == len(SIZES)
        assert len(fitted(law, curve, PARAMETERS)) == len(BUDGETS)
    run, point = law.runs[0], law.points[0]
    assert run.opponents["x"].flops == 6 * (run.twin.parameters) * run.opponents["x"].training_tokens
    assert point.opponents["x"].tokens == run.opponents["x"].training_tokens
    assert point.opponents["x"].ratio.mean == pytest.approx(
        run.ours.bits_per_byte / run.opponents["x"].bits_per_byte
    )
    gap = next(
        gap for gap in law.gaps if gap.to == "opponent x" and (gap.against, gap.at) == (TOKENS, SIZES[0])
    )
    assert gap.joint_limit == pytest.approx(
        (ours.E + 50 * SIZES[0] ** -0.3) / (0.5 + 50 * SIZES[0] ** -0.3), rel=1e-3
    )
    assert ", over opponent x: " in gap_line(gap)
    assert {gap.to for gap in law.gaps} == {BASELINE, "opponent x"}
    page = (tmp_path / "out" / "scaling-law.md").read_text(encoding="utf-8")
    assert "## Opponents" in page
    assert "| opponent x | training tokens |" in page.partition("## Ratio")[2]
    assert (tmp_path / "out" / "scaling-law.png").read_bytes().startswith(b"\x89PNG")
    assert "\nOpponents" in shown


def test_an_opponent_that_some_runs_lack_is_fitted_through_the_others(tmp_path, capsys):
    with_opponent(tmp_path / "runs", without=BUDGETS[:2])
    code, shown, err = call(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0, err
    law = ScalingLaw.model_validate_json((tmp_path / "out" / "scaling-law.json").read_text(encoding="utf-8"))
    (note,) = [note for note in law.notes if note.startswith("opponent x was not measured in ")]
    assert f"'{tmp_path / 'runs' / 'n1000000-d100000'}'" in note
    assert [bool(point.opponents) for point in law.points] == [False, False, True, True] * len(SIZES)
    assert not fitted(law, "opponent x", TOKENS)
    assert len(fitted(law, "opponent x", PARAMETERS)) == 2
    assert {fit.system for fit in law.joint} == {SENTENCE_MODEL, BASELINE}
    assert "B D^-beta of opponent x: 3 sizes and 2 budgets" in " ".join(shown.split())


def test_seeds_of_a_point_are_averaged_with_their_spread(tmp_path):
    write_grid(tmp_path, by_tokens(2, 0.1), by_tokens(2, 0.1), sizes=SIZES[:1], seeds=3, noise=0.01)
    law = scaling_law([tmp_path])
    assert len(law.points) == 4
    for point in law.points:
        assert point.seeds == [0, 1, 2]
        assert len(set(point.ours.seeds)) == 3
        assert point.ours.low < point.ours.mean < point.ours.high
        assert point.ours.mean == pytest.approx(sum(point.ours.seeds) / 3)
    for fit in law.fits:
        assert fit.interval[0] < fit.exponent < fit.interval[1]
        assert fit.seeds_interval[0] < fit.exponent < fit.seeds_interval[1]
    assert "1 sizes" in next(s.reason for s in law.skipped if "joint" in s.what)


@pytest.mark.parametrize(
    ("ours", "at", "said"),
    [
        # 1.1 falls by 0.02: to 1.00 at 1e5 * 1.1^50.
        (by_tokens(2.2, 0.02), 1e5 * 1.1**50, "EXTRAPOLATION: 1.00 would be"),
        (by_tokens(2.2, 0.05), 1e5 * 1.1**20, "within what was measured"),
        (by_tokens(2.2, -0.02), None, "not reached by this fit"),
        (by_tokens(1.9, 0.02), None, "below 1.00 at the largest"),
        (by_tokens(1.5, -0.02), 1e5 * (4 / 3) ** 50, "the lead shrinks"),
    ],
)
def test_where_the_gap_closes(tmp_path, capsys, ours, at, said):
    write_grid(tmp_path / "runs", ours, by_tokens(2, 0), sizes=SIZES[:1])
    law = scaling_law([tmp_path / "runs"])
    (gap,) = law.gaps
    assert gap.crossing == (None if at is None else pytest.approx(at, rel=1e-6))
    beyond = at is not None and at > BUDGETS[-1]
    assert gap.times_beyond == (pytest.approx(at / BUDGETS[-1], rel=1e-6) if beyond else None)
    render(law, Console(width=200))
    shown = capsys.readouterr().out
    page = markdown(law, "law.png")
    assert said in shown
    assert said in page
    assert ("WARNING: nothing was measured" in shown) is beyond
    assert ("**Warning: nothing was measured" in page) is beyond
    if beyond:
        assert f"the largest measured ({BUDGETS[-1]:,.0f})" in page


def test_a_ratio_lost_in_noise_is_not_called_a_trend(tmp_path):
    write_grid(tmp_path, by_tokens(2.2, 0), by_tokens(2, 0), sizes=SIZES[:1], noise=0.02)
    (gap,) = scaling_law([tmp_path]).gaps
    assert gap.verdict.startswith("not shown whether the ratio moves")


def test_flops_count_each_weight_by_what_it_multiplies():
    shape = {
        "parameters": 100,
        "trainable_parameters": None,
        "table_parameters": 10,
        "backbone_parameters": 60,
    }
    twin = ModelCounts(**shape, tokens_per_position=1.0, training_tokens={"baseline": 1000})
    assert flops(twin, 1000) == 6 * 90 * 1000
    ours = ModelCounts(**shape, tokens_per_position=12.0, training_tokens={"graft": 1000, "vae": 500})
    assert flops(ours, 1000) == 6 * ((30 + 60 / 12) * 1000 + 30 * 500)


def test_what_is_written_and_printed(tmp_path, capsys):
    write_grid(
        tmp_path / "runs",
        lambda n, d: 44 * n**-0.08 * d**-0.12,
        lambda n, d: 20 * n**-0.07 * d**-0.1,
        seeds=2,
        noise=0.003,
    )
    out = tmp_path / "out"
    code, shown, err = call(capsys, tmp_path / "runs", "--out", out)
    assert code == 0, err
    assert {path.name for path in out.iterdir()} == {f"scaling-law.{kind}" for kind in ("json", "md", "png")}
    assert (out / "scaling-law.png").read_bytes().startswith(b"\x89PNG")
    law = ScalingLaw.model_validate_json((out / "scaling-law.json").read_text(encoding="utf-8"))
    assert len(law.runs) == 24
    assert len(law.points) == 12
    page = (out / "scaling-law.md").read_text(encoding="utf-8")
    for run in law.runs:
        assert f"| `{run.folder}` |" in page
        assert f"`{run.honesty.recipe_digest}`" in page
        assert f"`{run.honesty.command}`" in page
    assert "(scaling-law.png)" in page
    for title in ("Points", "Bits per byte: L = A x^-alpha", "Jointly", "Ratio of bits per byte"):
        assert any(line.startswith(title) for line in shown.splitlines()), title
        assert f"## {title}" in page
    assert shown.rstrip().endswith(f"scaling law: {out / 'scaling-law.md'}")


def test_pretrained_backbones_are_said(tmp_path):
    for d in BUDGETS[:2]:
        write_run(tmp_path / str(d), 1e6, d, 2.0, 2.0, backbone={"model": "opt-tiny"})
    (note,) = scaling_law([tmp_path]).notes
    assert note.startswith("the backbones were pretrained")


def test_too_few_points_for_a_line_are_said(tmp_path, capsys):
    write_grid(tmp_path / "runs", FALLING, RISING, sizes=SIZES[:2], budgets=BUDGETS[:2])
    code, out, _ = call(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0
    assert "not fitted: a line against training tokens at 1 M parameters: 2 of at least 3 budgets" in out
    assert "not fitted: a line against backbone parameters at 100,000 tokens: 2 of at least 3 sizes" in out
    assert "not fitted: the joint law" in out
    assert "alpha" not in out.replace("A N^-alpha", "")


def test_runs_may_be_given_one_by_one_and_twice(tmp_path):
    folders = [write_run(tmp_path / str(d), 1e6, d, 2.0, 2.0) for d in BUDGETS]
    law = scaling_law([*folders, tmp_path, folders[0] / "."])
    assert [run.folder for run in law.runs] == [str(folder) for folder in folders]


def test_new_runs_are_added_to_an_earlier_law(tmp_path, capsys):
    write_grid(tmp_path / "runs", FALLING, RISING, sizes=SIZES[:2])
    whole = scaling_law([tmp_path / "runs"])
    first, rest = (sorted((tmp_path / "runs").glob(f"{size}-*")) for size in ("n1000000", "n4000000"))
    assert call(capsys, *first, "--out", tmp_path / "earlier")[0] == 0
    law = scaling_law([tmp_path / "earlier" / "scaling-law.json", *rest])
    assert law.points == whole.points
    assert law.fits == whole.fits
    assert any("earlier scaling-law.json" in note for note in law.notes)
    alone = scaling_law([tmp_path / "earlier" / "scaling-law.json"])
    assert alone.runs == [run for run in whole.runs if run.backbone_parameters == SIZES[0]]


def test_an_earlier_law_must_be_one_of_the_same_text(tmp_path, capsys):
    write_grid(tmp_path / "runs", FALLING, RISING, sizes=SIZES[:1])
    assert call(capsys, tmp_path / "runs", "--out", tmp_path / "earlier")[0] == 0
    earlier = tmp_path / "earlier" / "scaling-law.json"
    other = write_run(tmp_path / "other", 4e6, 1e5, 2.0, 2.0, change=other_text)
    code, _, err = call(capsys, earlier, other, "--out", tmp_path / "out")
    assert code != 0
    assert "not scored on the same held-out text" in err
    raw = json.loads(earlier.read_text(encoding="utf-8"))
    raw["runs"][0]["seed"] = "zero"
    for text, message in (("{", "is not a scaling-law.json"), (json.dumps(raw), "runs.0.seed")):
        earlier.write_text(text, encoding="utf-8")
        code, _, err = call(capsys, earlier, "--out", tmp_path / "out")
        assert code != 0
        assert message in err
        assert str(earlier) in err


def test_the_published_page_is_what_the_published_runs_give():
    results = Path(__file__).parents[2] / "docs" / "results"
    made = markdown(scaling_law([results / "scaling-law.json"]), "law.png")
    page = (results / "scaling-law.md").read_text(encoding="utf-8")
    # Lines of the page are wrapped by hand.
    assert " ".join(page.split()).endswith(" ".join(made[made.index("## Points") :].split()))


def test_other_differences_are_said(tmp_path):
    for d, rate in zip(BUDGETS, (1e-3, 1e-3, 2e-3, 1e-3), strict=True):
        steps = {"graft": {"steps": int(d / 100), "learning_rate": rate}}
        write_run(tmp_path / str(d), 1e6, d, 2.0, 2.0, **steps)
    (tmp_path / "waiting").mkdir()
    (tmp_path / "waiting" / "recipe.yaml").touch()
    waiting, rate = scaling_law([tmp_path]).notes
    assert waiting == f"'{tmp_path / 'waiting'}' has no results yet and was left out"
    assert rate == "the recipes differ in graft.learning_rate: 0.001, 0.002"


# ---- bad input


def set_bits(system: str, value: float) -> Callable[[Results], None]:
    def change(results: Results) -> None:
        next(s for s in Quality.of(results) if s.system == system).bits_per_byte = value

    return change


def without(system: str) -> Callable[[Results], None]:
    def change(results: Results) -> None:
        Quality.put(results, [s for s in Quality.of(results) if s.system != system])

    return change


def uncounted(results: Results) -> None:
    for found in Quality.of(results):
        found.counts = None


def untold(results: Results) -> None:
    Quality.of(results)[1].counts.training_tokens = {}


def other_text(results: Results) -> None:
    for found in Quality.of(results):
        found.documents[0].covered_bytes -= 7


def other_text_of_one(results: Results) -> None:
    Quality.of(results)[1].documents[0].covered_bytes -= 7


@pytest.mark.parametrize(
    ("change", "message", "fix"),
    [
        (
            without(BASELINE),
            "'{bad}' has no figures for the baseline, equal data",
            "sentcompress baseline {bad}",
        ),
        (without(SENTENCE_MODEL), "'{bad}' has no figures for the sentence model", "bench quality {bad}"),
        (set_bits(SENTENCE_MODEL, math.inf), "{bad}", "measure again"),
        (
            set_bits(BASELINE, 0.0),
            "'{bad}': bits per byte of the baseline, equal data are 0.0",
            "leave the run out",
        ),
        (uncounted, "'{bad}' was measured by a version that did not count", "bench quality {bad}"),
        (untold, "'{bad}': it is not known on how many tokens the baseline", "baseline/run.json"),
        (other_text, "not scored on the same held-out text", "'{bad}' (4,993 bytes of 2 documents)"),
        (other_text_of_one, "'{bad}': the sentence model and the baseline", "bench quality {bad}"),
    ],
)
def test_a_bad_run_is_named_with_its_fix(tmp_path, capsys, change, message, fix):
    write_grid(tmp_path / "runs", FALLING, RISING, sizes=SIZES[:1])
    bad = write_run(tmp_path / "bad", 1e6, 3e6, 2.0, 2.0, change=change)
    code, _, err = call(capsys, tmp_path / "runs", bad, "--out", tmp_path / "out")
    assert code == 2
    assert message.format(bad=bad) in err
    assert fix.format(bad=bad) in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_nan_in_a_file_is_refused(tmp_path, capsys):
    write_grid(tmp_path / "runs", FALLING, RISING, sizes=SIZES[:1])
    bad = write_run(tmp_path / "bad", 1e6, 3e6, 2.0, 2.0)
    file = bad / "bench" / "results.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    raw["quality"][0]["bits_per_byte"] = math.nan
    file.write_text(json.dumps(raw), encoding="utf-8")
    code, _, err = call(capsys, tmp_path / "runs", bad, "--out", tmp_path / "out")
    assert code == 2
    assert f"'{bad}': bits per byte of the sentence model are nan" in err


def test_folders_that_make_no_law_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, _, err = call(capsys, tmp_path / "empty", "--out", tmp_path / "out")
    assert (code, "no results in" in err, f"bench quality {tmp_path / 'empty'}" in err) == (2, True, True)
    code, _, err = call(capsys, tmp_path / "absent", "--out", tmp_path / "out")
    assert (code, f"no folder '{tmp_path / 'absent'}'" in err) == (2, True)
    one = write_run(tmp_path / "runs" / "one", 1e6, 1e5, 2.0, 2.0)
    code, _, err = call(capsys, one, "--out", tmp_path / "out")
    assert (code, "make one point" in err, "sweep" in err) == (2, True, True)
    two = write_run(tmp_path / "runs" / "two", 1e6, 1.01e5, 2.1, 2.0)
    code, _, err = call(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    assert (code, f"'{one}' and '{two}' have the same size, budget and seed (0)" in err) == (2, True)
    code, _, err = call(capsys, tmp_path / "runs")
    assert (code, "--out" in err) == (2, True)


# ---- end to end


@pytest.mark.slow
def test_two_trained_runs(tmp_path, capsys, recipe_file):
    """Trained, measured and fitted by the real program: counts and tokens are those of the models."""
    raw = yaml.safe_load(recipe_file.read_text(encoding="utf-8")) | {"baseline": {"enabled": True}}
    raw["opponents"] = {"one": {"blocks": 1}}
    tiny = {"precision": "fp32", "eval_batches": 1}
    raw |= {"train_vae": {"steps": 2, "sentences_per_batch": 8, **tiny}}
    for steps in (1, 3):
        raw["graft"] = {
            "steps": steps,
            "max_sentences": 12,
            "passages_per_batch": 2,
            "tune": "frozen",
            **tiny,
        }
        recipe = build_recipe(raw, [], "tests")
        run_recipe(recipe, tmp_path / "runs" / str(steps))
        run_bench(["quality"], tmp_path / "runs" / str(steps), quiet=True)
    code, _, err = call(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0, err
    law = ScalingLaw.model_validate_json((tmp_path / "out" / "scaling-law.json").read_text(encoding="utf-8"))
    first, second = law.runs
    assert first.backbone_parameters == second.backbone_parameters
    for run in law.runs:
        written = {
            stage: json.loads((Path(run.folder) / stage / "run.json").read_text(encoding="utf-8"))
            for stage in ("vae", "graft", "baseline", "opponent-one")
        }
        assert run.ours.training_tokens == written["graft"]["tokens"]
        assert run.ours.vae_tokens == written["vae"]["tokens"]
        assert run.twin.training_tokens == written["baseline"]["tokens"]
        assert run.twin.trainable_parameters == run.twin.parameters  # all of it learns
        assert run.opponents["one"].training_tokens == written["opponent-one"]["tokens"]
        assert run.opponents["one"].parameters < run.twin.parameters
        assert run.ours.trainable_parameters < run.ours.parameters - run.backbone_parameters + 1
    scores = {s.system: s for s in Quality.of(read_results(tmp_path / "runs" / "3"))}
    assert scores[SENTENCE_MODEL].counts.tokens_per_position > 2
    assert scores["backbone, as it came"].counts.training_tokens == {}
    assert scores["unigram"].counts is None


def test_runs_that_share_a_point_must_be_seeds(tmp_path):
    write_run(tmp_path / "a", 1e6, 1e5, 2.0, 2.0)
    write_run(tmp_path / "b", 1e6, 1e5, 2.0, 2.0, fusion={"name": "mean"})
    with pytest.raises(InputError, match="same size, budget and seed"):
        scaling_law([tmp_path])
