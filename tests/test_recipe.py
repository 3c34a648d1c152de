"""Recipes: what is accepted, what is refused, and what the message says."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from sentcompress import recipe as recipe_module
from sentcompress.errors import PluginError, RecipeError
from sentcompress.recipe import Recipe, build_recipe, load_recipe, shipped_recipes
from sentcompress.recipe.reading import read_yaml

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, text: str | bytes, name: str = "r.yaml") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refused(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), list(overrides)).check_components()
    assert caught.value.exit_code == 2
    return str(caught.value)


REFUSED = {
    "unknown section": ("name: x\ngrafft: {}\n", ["grafft: unknown key. Did you mean 'graft'?", "r.yaml"]),
    "unknown nested key": (
        "name: x\ngraft: {stepz: 5}\n",
        ["graft.stepz: unknown key. Did you mean 'steps'?", "Known keys:"],
    ),
    "unknown key two levels down": (
        "name: x\ngraft: {lora: {rnk: 5}}\n",
        ["graft.lora.rnk: unknown key. Did you mean 'rank'?"],
    ),
    "wrong type": ("name: x\ngraft: {steps: many}\n", ["graft.steps: ", "(got 'many')"]),
    "section is a number": ("name: x\ngraft: 5\n", ["graft: ", "(got 5)"]),
    "out of range": ("name: x\nvae: {dropout: 1.5}\n", ["vae.dropout: ", "less than 1"]),
    "not a choice": ("name: x\nvae: {conditioning: magic}\n", ["vae.conditioning: ", "'cross-attention'"]),
    **{
        f"{section} that learns nothing": (
            f"name: x\n{section.replace('.', ': {')}: {{tune: frozen}}{'}' * section.count('.')}\n",
            [f"{section}.tune: ", "'full', 'lora' or 'last-n'", "(got 'frozen')"],
        )
        for section in ("baseline", "memory", "opponents.one")
    },
    "no name": ("seed: 1\n", ["name: required, but missing"]),
    "empty name": ("name: ''\n", ["name: ", "non-empty"]),
    "list": ("- a\n- b\n", ["a recipe must be a mapping of sections, not list"]),
    "empty file": ("", ["a recipe must be a mapping of sections, not NoneType"]),
    "broken YAML": ("name: x\ngraft: {steps: 5\nseed: 1\n", ["r.yaml:3:", "broken YAML"]),
    "tab": ("name: x\ngraft:\n\tsteps: 5\n", ["r.yaml:3:1: broken YAML"]),
    "true for a whole number": ("name: x\ngraft: {steps: true}\n", ["graft.steps: ", "not true or false"]),
    "yes for a number": ("name: x\ngraft: {learning_rate: yes}\n", ["graft.learning_rate: ", "(got True)"]),
    "true in a list": ("name: x\nbench: {batch_sizes: [1, true]}\n", ["bench.batch_sizes: ", "not true"]),
    "true for an option": (
        "name: x\nsegmenter: {name: regex, options: {max_tokens: on}}\n",
        ["segmenter.options.max_tokens: ", "not true or false"],
    ),
    "true in a dictionary": (
        "name: x\nbench: {max_memory: {0: true}, device_map: auto}\n",
        ["bench.max_memory: ", "not true or false"],
    ),
    "infinity": ("name: x\ngraft: {learning_rate: .inf}\n", ["graft.learning_rate: ", "finite"]),
    "NaN": ("name: x\ntrain_vae: {label_smoothing: .nan}\n", ["train_vae.label_smoothing: ", "finite"]),
    "NaN as text": ("name: x\ngraft: {learning_rate: 'nan'}\n", ["graft.learning_rate: ", "finite"]),
    "too large for a double": ("name: x\ngraft: {learning_rate: 1e400}\n", ["learning_rate: ", "finite"]),
    "a seed of 67 bits": ("name: x\nseed: 99999999999999999999\n", ["seed: ", "at most 63 bits"]),
    "a size of 67 bits": (
        "name: x\ndata: {name: text, options: {heldout_documents: 99999999999999999999}}\n",
        ["data.options.heldout_documents: ", "at most 63 bits"],
    ),
    "a fraction of a step": ("name: x\ngraft: {steps: 10.5}\n", ["graft.steps: ", "fractional part"]),
    "a date for a text": ("name: x\ndescription: 2024-01-01\n", ["description: ", "put quotes around it"]),
    "a number for a text": ("name: 5\n", ["name: ", "put quotes around it"]),
    "no for a text": ("name: no\n", ["name: ", "(got False); put quotes around it"]),
    "a section twice": (
        "name: x\ngraft: {steps: 5}\nseed: 1\ngraft: {learning_rate: 1e-3}\n",
        ["r.yaml:4:1: broken YAML: duplicate key 'graft' on lines 2 and 4"],
    ),
    "a field twice, in quotes once": (
        "name: x\ngraft:\n  steps: 5\n  'steps': 6\n",
        ["r.yaml:4:3: broken YAML: duplicate key 'steps' on lines 3 and 4"],
    ),
    "a key twice in a list": (
        "name: x\nbench: {extra_metrics: [{name: a, name: b}]}\n",
        ["duplicate key 'name'"],
    ),
    "a key twice, by an alias": (
        "name: x\nvae: {&a dropout: 0.1, *a : 0.2}\n",
        ["duplicate key 'dropout'"],
    ),
    "a tag that does not fit": (
        "name: x\ngraft: {steps: !!bool maybe}\n",
        ["broken YAML: a value does not fit its tag"],
    ),
    "two documents": ("name: x\n---\nname: y\n", ["r.yaml:2:1: broken YAML"]),
    "UTF-16": ("name: x\n".encode("utf-16"), ["not UTF-8", "save the recipe as UTF-8"]),
    "a NUL": ("name: \0\n", ["broken YAML", "#x0000"]),
    "a key that is a list": ("name: x\n? [a]\n: 1\n", ["r.yaml:2:3: broken YAML: found unhashable key"]),
    "impossible date": ("name: x\ndescription: 2024-99-99\n", ["broken YAML: month must be in 1..12"]),
    "python object": ("name: !!python/object/apply:os.getcwd []\n", ["r.yaml:1:7: broken YAML"]),
    "too deep": ("name: " + "[" * 5000, ["nested too deeply"]),
    "not UTF-8": (b"name: \xff\xfe\n", ["not UTF-8 (byte 6)", "save the recipe as UTF-8"]),
    "option unknown to the component": (
        "name: x\nsegmenter: {name: regex, options: {max_token: 5}}\n",
        ["segmenter.options.max_token: unknown key. Did you mean 'max_tokens'?"],
    ),
    "option of the wrong type": (
        "name: x\ndata: {name: jsonl, options: {heldout_documents: none}}\n",
        ["data.options.heldout_documents: ", "(got 'none')"],
    ),
    "overlap over the passage": (
        "name: x\ngraft: {max_sentences: 8, overlap_sentences: 8}\n",
        ["graft.overlap_sentences: 8 must be below graft.max_sentences (8)"],
    ),
}


@pytest.mark.parametrize(("text", "parts"), REFUSED.values(), ids=REFUSED)
def test_a_bad_recipe_is_refused_with_file_field_and_reason(tmp_path: Path, text, parts):
    message = refused(tmp_path, text)
    for part in parts:
        assert part in message


def test_all_mistakes_are_named_at_once(tmp_path: Path):
    message = refused(tmp_path, "name: x\nseed: -1\ngraft: {steps: 0}\nfoo: 1\n")
    assert [part in message for part in ("seed:", "graft.steps:", "foo: unknown key")] == [True] * 3


def test_a_missing_recipe_suggests_a_shipped_one():
    with pytest.raises(
        RecipeError, match=r"no recipe file 'paper/vae-768-h3'.*Did you mean 'paper/vae-768-h"
    ):
        load_recipe("paper/vae-768-h3")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(str(ROOT))  # a folder is not a recipe


def test_a_shipped_recipe_has_several_spellings():
    names = ["paper/vae-768-h1", "recipes/paper/vae-768-h1.yaml", str(ROOT / "recipes/paper/vae-768-h1.yaml")]
    assert len({load_recipe(name).digest() for name in names}) == 1


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("graft.steps=7", 7),
        ("graft.learning_rate=1e-4", 1e-4),  # PyYAML reads this as a string
        ("graft.vae=out/a b/vae", "out/a b/vae"),
        ("graft.vae=null", None),
        ("graft.gradient_checkpointing=true", True),
        ("bench.batch_sizes=[1, 8]", [1, 8]),
        ("data.options.paths=[a=b.txt]", ["a=b.txt"]),
        ("backbone.options={}", {}),
        ('graft.vae="#1"', "#1"),
    ],
)
def test_overrides(tmp_path: Path, override: str, value: object):
    loaded = load_recipe(write(tmp_path, "name: x\ngraft: {steps: 5, learning_rate: 2e-5}\n"), [override])
    node: object = loaded.model_dump()
    for key in override.partition("=")[0].split("."):
        node = node[key]
    assert node == value


def test_merged_keys_are_not_doubled_keys(tmp_path: Path):
    text = (
        "name: x\ntrain_vae: &one {steps: 5, keep: 3}\ngraft: &two {<<: *one, steps: 6}\n"
        "baseline: {enabled: false}\npretrain: {<<: *two, steps: 7}\n"
    )
    loaded = load_recipe(write(tmp_path, text))
    assert (loaded.graft.steps, loaded.pretrain.steps, loaded.pretrain.keep) == (6, 7, 3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5e+2", -50.0),
        ("1_000", 1000),
        ("0x1F", 31),
        ("010", "010"),
        ("1:30", "1:30"),
        ("12:30:45", "12:30:45"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("'1e-4'", "1e-4"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_values_mean_what_people_write(text: str, value: object):
    """PyYAML alone reads 1e-4 as text, 010 as 8 and 1:30 as 90."""
    read = read_yaml(f"a: {text}")["a"]
    assert (read, type(read)) == (value, type(value))


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path):
    assert load_recipe(write(tmp_path, "\ufeffname: x\n")).name == "x"


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("graft.steps", "1e3", 1000),
        ("graft.steps", "10.0", 10),
        ("graft.steps", "010", 10),
        ("graft.steps", "1_000", 1000),
        ("graft.compile", "yes", True),
        ("graft.compile", "off", False),
        ("graft.max_grad_norm", "1", 1.0),
        ("bench.batch_sizes", "[1, 2.0]", [1, 2]),
        ("bench.max_memory", "{0: 20GiB, cpu: 5}", {0: "20GiB", "cpu": 5}),
        ("seed", str(2**63 - 1), 2**63 - 1),
        ("description", "12:30", "12:30"),
    ],
)
def test_numbers_are_read_as_they_are_meant(field: str, value: str, read: object):
    node: object = load_recipe("quickstart", [f"{field}={value}"])
    for name in field.split("."):
        node = getattr(node, name)
    assert node == read


def test_later_overrides_win(tmp_path: Path):
    path = write(tmp_path, "name: x\n")
    assert load_recipe(path, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("graft.steps", "write it as field=value"),
        ("=5", "write it as field=value"),
        ("graft..steps=5", "write it as field=value"),
        ("graft.steps=[1", "not valid YAML"),
        ("graft.steps=2024-99-99", "not valid YAML"),
        ("graft={steps: 1, steps: 2}", "duplicate key 'steps'"),
        ("graft.steps=\udc80", "not valid YAML"),
        ("graft.steps=" + "[" * 5000, "nested too deeply"),
        ("graft.stpes=5", "graft.stpes: unknown key. Did you mean 'steps'?"),
        ("seed.x=5", "seed: "),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, part: str):
    assert part in refused(tmp_path, "name: x\n", override)


def test_missing_components_are_plugin_errors(tmp_path: Path):
    for section in ("segmenter", "fusion", "data", "backbone"):
        loaded = load_recipe(write(tmp_path, f"name: x\n{section}: {{name: nowhere}}\n"))
        with pytest.raises(PluginError, match="is called 'nowhere'"):
            loaded.check_components()


def test_a_resolved_recipe_reads_back_the_same(tmp_path: Path):
    loaded = load_recipe("paper/sllm-125m-h1", ["seed=3"])
    again = load_recipe(write(tmp_path, loaded.dump()))
    assert again == loaded
    assert again.digest() == loaded.digest() != load_recipe("paper/sllm-125m-h1").digest()


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name: str):
    loaded = load_recipe(name)
    loaded.check_components()
    assert loaded.description, "'sentcompress recipes' shows the description"
    assert "\n" not in loaded.description


def test_all_the_papers_configurations_ship():
    names = {n.removeprefix("paper/") for n in shipped_recipes() if n.startswith("paper/")}
    blocks = ("h1", "h2", "h4")
    vaes = {f"vae-{width}-{b}" for width in (768, 1024, 2048) for b in blocks}
    sllms = {f"sllm-{size}-{b}" for size in ("125m", "350m", "1.3b") for b in blocks} - {"sllm-1.3b-h4"}
    assert names == vaes | sllms


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if n.startswith("paper/")])
def test_paper_recipes_hold_the_published_set_up(name: str):
    loaded = load_recipe(name)
    blocks = int(name[-1])
    assert (loaded.vae.encoder_layers, loaded.vae.decoder_layers) == (blocks, blocks)
    assert (loaded.vae.feedforward_multiple, loaded.vae.dropout) == (2.0, 0.1)
    assert (loaded.vae.conditioning, loaded.fusion.name) == ("cross-attention", "sum-norm")
    first = loaded.train_vae
    assert (first.steps, first.warmup_steps, first.sentences_per_batch) == (300_000, 5_000, 128)
    assert first.learning_rate == pytest.approx(1e-7 * 128)
    assert (first.loss, first.focal_gamma, first.weight_decay, first.max_grad_norm) == (
        "focal",
        2.0,
        0.01,
        1.0,
    )
    assert loaded.data.options["heldout_documents"] == 1000
    assert loaded.segmenter.options["max_tokens"] == 64
    if "sllm" in name:
        second = loaded.graft
        assert (second.steps, second.warmup_steps, second.passages_per_batch) == (1_600_000, 5_000, 1)
        assert (second.learning_rate, second.max_sentences, second.tune) == (1e-6, 64, "full")


def test_defaults_are_described():
    def undescribed(model, path=""):
        for name, info in model.model_fields.items():
            if not info.description:
                yield path + name
            if hasattr(info.annotation, "model_fields"):
                yield from undescribed(info.annotation, f"{path}{name}.")

    assert list(undescribed(Recipe)) == []


def test_recipes_are_found_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The wheel holds the recipes, and they are found in it."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    monkeypatch.setattr(recipe_module, "files", lambda package: site / package)
    packaged = shipped_recipes()
    repository = {
        p.relative_to(ROOT / "recipes").with_suffix("").as_posix() for p in ROOT.glob("recipes/**/*.yaml")
    }
    assert set(packaged) == repository
    assert all(site in path.parents for path in packaged.values())
    assert yaml.safe_load(packaged["paper/vae-768-h1"].read_text())["name"] == "paper-vae-768-h1"


def test_the_old_name_of_on_anomaly_still_works_and_is_pointed_out():
    raw = {"name": "x", "graft": {"on_trouble": "skip"}}
    with pytest.warns(FutureWarning, match="'on_trouble' is now called 'on_anomaly'"):
        old = build_recipe(raw, [], "test")
    new = build_recipe({"name": "x", "graft": {"on_anomaly": "skip"}}, [], "test")
    assert old == new
    assert "on_anomaly: skip" in new.dump()
    # Digests and results.json keep the old name, so that older results still match.
    assert new.values()["graft"]["on_trouble"] == "skip"
    assert "on_anomaly" not in new.values()["graft"]
    with pytest.warns(FutureWarning):
        assert build_recipe(raw, ["graft.on_anomaly=stop"], "test").graft.on_anomaly == "stop"
    with pytest.warns(FutureWarning):
        changed = build_recipe(
            {"name": "x", "graft": {"on_anomaly": "stop"}}, ["graft.on_trouble=skip"], "test"
        )
    assert changed.graft.on_anomaly == "skip"


@pytest.mark.parametrize(
    ("option", "value"), [("decoder_context", 8), ("unpack_size", 8), ("embedding_multiplier", 2.0)]
)
def test_the_llms_blocks_refuse_what_they_cannot_do(option, value):
    raw = {"name": "x", "vae": {"init": "backbone", "conditioning": "prefix"}}
    build_recipe(raw, [], "test")
    with pytest.raises(RecipeError, match=f"{option} does not work with the LLM's blocks"):
        build_recipe(raw, [f"vae.{option}={value}"], "test")


def test_the_digest_of_the_default_recipe_is_that_of_earlier_versions():
    assert Recipe(name="defaults").digest() == "c531c1721b4a"
    changed = build_recipe({"name": "defaults", "vae": {"init_std": 0.02}}, [], "test")
    assert changed.digest() != "c531c1721b4a"
