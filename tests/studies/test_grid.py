"""How ``--grid`` is read, what the grid points are called, and what is refused before anything runs."""

from __future__ import annotations

import pytest

from sentcompress.errors import PluginError, RecipeError
from sentcompress.studies.grid import Axis, build_grid, parse_grid, split_values, value_text


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a,b", ["a", "b"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ("{name: a, options: {b: [1, 2]}},{name: c}", ["{name: a, options: {b: [1, 2]}}", "{name: c}"]),
        ("'x, y',z", ["'x, y'", "z"]),
        ("'it''s, so',z", ["'it''s, so'", "z"]),
        (r'"a \", b",c', [r'"a \", b"', "c"]),
        ("don't,do", ["don't", "do"]),
        ("{a: 'x}, y'},b", ["{a: 'x}, y'}", "b"]),
        ("a],b", ["a]", "b"]),
        ("", [""]),
    ],
)
def test_values_are_split_at_the_outer_commas(text: str, values: list[str]):
    assert split_values(text) == values


def test_values_are_yaml():
    axes = parse_grid(["seed=0, 1", "vae.num_heads=null,4", "fusion={name: mean}"])
    assert axes == [
        Axis("seed", ("0", "1")),
        Axis("vae.num_heads", ("null", "4")),
        Axis("fusion", ("{name: mean}",)),
    ]


@pytest.mark.parametrize(
    ("grids", "overrides", "message"),
    [
        (["seed"], [], "write FIELD=VALUE,VALUE"),
        (["=1"], [], "write FIELD=VALUE,VALUE"),
        (["vae..init=a"], [], "write FIELD=VALUE,VALUE"),
        (["seed=1,,2"], [], "an empty value"),
        (["seed="], [], "an empty value"),
        (["fusion={name: a,b"], [], "'{name: a,b' is not valid YAML"),
        (["seed=1,1"], [], "'1' is given twice"),
        (["seed=1", "seed=2"], [], "seed: given twice"),
        (["fusion={name: mean}", "fusion.name=mean"], [], "one is a part of the other"),
        (["fusion={name: mean}"], ["fusion.options.latents=4"], "--grid fusion would override it"),
        (["seed=1"], ["seed=2"], "--grid seed would override it"),
    ],
)
def test_what_cannot_be_meant_is_refused(grids: list[str], overrides: list[str], message: str):
    with pytest.raises(RecipeError) as caught:
        parse_grid(grids, overrides)
    assert message in str(caught.value)


def points(*grids: str, recipe: str = "parts", overrides: tuple[str, ...] = ()):
    return build_grid(recipe, overrides, parse_grid(grids, overrides))


ATTENTION = "{name: attention, options: {latents: 4}}"


def test_every_combination_is_a_resolved_recipe():
    made = points(f"fusion={{name: mean}},{ATTENTION}", "vae.conditioning=add,prefix", overrides=("seed=3",))
    assert [point.values for point in made] == [
        ("mean", "add"),
        ("mean", "prefix"),
        ("attention latents=4", "add"),
        ("attention latents=4", "prefix"),
    ]
    last = made[-1].recipe
    assert (last.fusion.name, last.fusion.options, last.vae.conditioning, last.seed) == (
        "attention",
        {"latents": 4},
        "prefix",
        3,
    )
    assert made[-1].overrides == (f"fusion={ATTENTION}", "vae.conditioning=prefix")


def test_names_are_readable_and_do_not_depend_on_the_order():
    one = points(f"fusion={{name: mean}},{ATTENTION}", "vae.conditioning=add,prefix")
    assert one[3].name == "fusion-attention-latents-4_conditioning-prefix"
    other = points("vae.conditioning=prefix", f"fusion={ATTENTION}")
    assert other[0].name == one[3].name


def test_names_are_safe_and_tell_values_apart():
    texts = ("../../etc/x", "A", "a", "a b", "a-b", "x" * 300, "é", "con: {}")
    values = ",".join(f"'{text}'" for text in texts)
    made = points(f"name={values}")
    assert len({point.name.lower() for point in made}) == len(texts)
    for point in made:
        assert "/" not in point.name
        assert point.name.isascii()
        assert point.name.startswith("name-")
        assert len(point.name) < 140
    numbers = points("train_vae.learning_rate=1,0.1,1e-3")
    assert [point.name for point in numbers] == [f"learning_rate-{value}" for value in ("1", "0.1", "1e-3")]


def test_fields_with_the_same_last_part_keep_their_whole_names():
    made = points("train_vae.steps=5", "graft.steps=6")
    assert made[0].name == "graft.steps-6_train_vae.steps-5"
    assert points("segmenter.name=regex")[0].name == "segmenter-regex"


def test_shown_values():
    assert value_text("{name: mean, other: 1}") == "{name: mean, other: 1}"
    assert value_text("{name: mean, options: {}}") == "mean"
    assert value_text("'quoted'") == "quoted"
    assert value_text("[1, 2]") == "[1, 2]"


def test_an_option_of_another_component_names_the_runs_and_the_way_out():
    with pytest.raises(RecipeError) as caught:
        points("fusion.name=sum-norm,attention", "vae.conditioning=add,prefix", recipe="quickstart")
    text = str(caught.value)
    assert "run fusion-sum-norm_conditioning-add and 1 more: fusion.options.latents: unknown key" in text
    assert "no run was started" in text
    assert "--grid 'fusion={name: mean}" in text
    assert "--set 'fusion.options={}'" in text
    made = points("fusion.name=sum-norm,attention", recipe="quickstart", overrides=("fusion.options={}",))
    assert [point.recipe.fusion.name for point in made] == ["sum-norm", "attention"]


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        ("vae.conditioning=add,prefx", RecipeError, "run conditioning-prefx: "),
        ("vae.conditioning=add,prefx", RecipeError, "vae.conditioning: Input should be"),
        ("vae.conditionin=add,prefix", RecipeError, "every run: "),
        ("vae.conditionin=add,prefix", RecipeError, "Did you mean 'conditioning'?"),
        (
            "fusion.name=mean,meen",
            PluginError,
            "run fusion-meen: no fusion is called 'meen'. Did you mean 'mean'?",
        ),
        ("seed=1,1.0", RecipeError, "runs seed-1 and seed-1.0 are the same experiment"),
        ("bench.metrics=[]", RecipeError, "bench.metrics is empty"),
    ],
)
def test_a_bad_run_is_named_before_anything_runs(grid: str, error: type[Exception], message: str):
    with pytest.raises(error) as caught:
        points(grid)
    assert message in str(caught.value)


def test_pretraining_is_not_swept():
    with pytest.raises(RecipeError, match="compares grafted models"):
        points("seed=0,1", recipe="opt-tiny")
