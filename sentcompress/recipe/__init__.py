"""A recipe describes one experiment: its components and stages. Its fields, and how it is read and checked."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from sentcompress.errors import RecipeError, did_you_mean
from sentcompress.files import expand_home
from sentcompress.recipe.reading import describe_yaml_error, read_yaml
from sentcompress.recipe.sections import BackboneSpec, BenchSettings, ComponentSpec, Section, VAESpec
from sentcompress.recipe.training_sections import (
    BaselineSettings,
    GraftSettings,
    LoraSettings,
    MemorySettings,
    OpponentSettings,
    PassageSettings,
    PretrainSettings,
    SplitSettings,
    TrainingSettings,
    TrainVAESettings,
    TuneSettings,
)
from sentcompress.registry import describe_validation_error, get_registry

__all__ = [
    "BackboneSpec",
    "BaselineSettings",
    "BenchSettings",
    "ComponentSpec",
    "GraftSettings",
    "LoraSettings",
    "MemorySettings",
    "OpponentSettings",
    "PassageSettings",
    "PretrainSettings",
    "Recipe",
    "Section",
    "SplitSettings",
    "TrainVAESettings",
    "TrainingSettings",
    "TuneSettings",
    "VAESpec",
    "build_recipe",
    "by_dotted_name",
    "find_recipe",
    "load_recipe",
    "recipes_folder",
    "shipped_recipes",
]


LATER = {
    "backbone": ("embed_init_std",),
    "bench": ("memories", "text_lengths", "recall_tasks"),
    "graft": ("split", "backbone_learning_rate"),
    "vae": ("init_std", "embed_init_std", "embedding_multiplier"),
}
"""Fields of each section that older results do not have."""


class Recipe(Section):
    """One experiment."""

    name: str
    """Name shown in reports."""
    description: str = ""
    """One line, shown by ``sentcompress recipes``."""
    seed: int = Field(default=0, ge=0)
    """Random seed of weights, batches and sampling."""
    backbone: BackboneSpec = BackboneSpec()
    """The decoder LLM."""
    segmenter: ComponentSpec = ComponentSpec(name="regex")
    """How text is split into sentences."""
    fusion: ComponentSpec = ComponentSpec(name="sum-norm")
    """How a sentence's hidden states become its latents."""
    vae: VAESpec = VAESpec()
    """Shape of the sentence encoder and decoder."""
    data: ComponentSpec = ComponentSpec(name="python-package")
    """The corpus."""
    pretrain: PretrainSettings | None = None
    """Trains a backbone from scratch instead of the other stages."""
    memory: MemorySettings | None = None
    """Fine-tunes the backbone for a sentence memory instead of grafting it."""
    train_vae: TrainVAESettings = TrainVAESettings()
    """First stage."""
    graft: GraftSettings = GraftSettings()
    """Second stage."""
    baseline: BaselineSettings = BaselineSettings()
    """The token-level model the graft is compared with: the same LLM, fine-tuned on the same data."""
    opponents: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$", max_length=40)], OpponentSettings] = {}
    """Smaller token-level models of equal cost that the graft is compared with, by name. Each has a stage of its own,
    and its folder is named ``opponent-NAME``. A recipe that trains no graft has none."""
    bench: BenchSettings = BenchSettings()
    """Measurements."""

    @model_validator(mode="before")
    @classmethod
    def _options_alone_keep_the_default_component(cls, raw: Any) -> Any:
        # So that --set segmenter.options.max_tokens=32 works on a recipe without a segmenter section.
        if not isinstance(raw, dict):
            return raw
        filled = dict(raw)
        for section in ("segmenter", "fusion", "data"):
            if isinstance(filled.get(section), dict):
                filled[section] = {"name": cls.model_fields[section].default.name} | filled[section]
        return filled

    @field_validator("name")
    @classmethod
    def _name_is_printable(cls, value: str) -> str:
        if not value or not value.isprintable():
            raise ValueError("must be a non-empty printable name")
        return value

    def check_components(self) -> None:
        """Check names and options of every component against the registry.

        Raises:
            PluginError: a component is missing or broken.
            RecipeError: an option is wrong.
        """
        registry = get_registry()
        for kind, spec in (
            ("segmenter", self.segmenter),
            ("dataset", self.data),
            ("fusion", self.fusion),
            ("backbone", self.backbone),
        ):
            where = "data.options" if kind == "dataset" else f"{kind}.options"
            if spec.name is None:
                continue  # chosen when the model is loaded, which may need the hub
            if not spec.options and kind in ("fusion", "backbone"):
                registry.owner(kind, spec.name)  # defaults are valid; loading the class would import torch
            else:
                registry.options(kind, spec.name, spec.options, where)
        for part in self.memory.name.split("+") if self.memory else ():
            registry.owner("memory", part.strip())  # options are checked when the stage begins
        for i, spec in enumerate(self.bench.extra_metrics):
            registry.options("metric", spec.name, spec.options, f"bench.extra_metrics.{i}.options")
        if self.graft.teacher == "backbone" and self.backbone.init == "random":
            raise RecipeError(
                "graft.teacher: the backbone has random weights, so there is nothing to learn from it",
                fix="set graft.teacher=baseline",
            )
        if self.graft.split and (self.memory or self.pretrain):
            raise RecipeError(
                "graft.split: a recipe with a section 'memory' or 'pretrain' grafts nothing",
                fix="remove graft.split or that section",
            )
        section, passages = "memory" if self.memory else "graft", self.passages
        if passages.overlap_sentences >= passages.max_sentences:
            raise RecipeError(
                f"{section}.overlap_sentences: {passages.overlap_sentences} must be below {section}.max_sentences "
                f"({passages.max_sentences})",
                fix="lower the first or raise the second",
            )

    @property
    def trains_vae(self) -> bool:
        """Whether the graft needs a SentenceVAE of this recipe's own."""
        return self.graft.vae is None and self.graft.split is None

    @property
    def passages(self) -> PassageSettings:
        """Settings of the stage whose passages the baseline reads."""
        return self.memory or self.graft

    def values(self) -> dict[str, Any]:
        """All fields as JSON values, under the names that results and run folders record them by.

        A renamed field keeps its old name there. What came later is left out: a section where there is none, fields
        with their defaults. So older results and runs still match.
        """
        left_out: dict[str, Any] = {name: True for name in ("memory", "opponents") if not getattr(self, name)}
        for name, later in LATER.items():
            section = getattr(self, name)
            defaults = type(section)()
            left_out[name] = {field for field in later if getattr(section, field) == getattr(defaults, field)}
        return self.model_dump(mode="json", by_alias=True, exclude=left_out)

    def dump(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """Twelve hex digits that change with any field; shown in every result."""
        text = json.dumps(self.values(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def by_dotted_name(values: Any, name: str = "") -> dict[str, Any]:
    """Nested values as one dictionary with names such as ``graft.steps``; an empty dictionary is a value."""
    if not isinstance(values, dict) or not values:
        return {name: values}
    flat: dict[str, Any] = {}
    for key, inner in values.items():
        flat |= by_dotted_name(inner, f"{name}.{key}" if name else str(key))
    return flat


def recipes_folder() -> Path:
    """The folder of the shipped recipes: in the wheel, or in the repository of an editable install."""
    packaged = Path(str(files("sentcompress"))) / "_recipes"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Names as used on the command line (``quickstart``, ``paper/sllm-125m-h1``) and their files."""
    folder = recipes_folder()
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path or as a shipped name."""
    if name.strip() and (path := Path(expand_home(name))).is_file():
        return path
    shipped = shipped_recipes()
    key = name.removeprefix("recipes/").removesuffix(".yaml")
    if key in shipped:
        return shipped[key]
    raise RecipeError(
        f"no recipe file '{name}', and no shipped recipe of that name.{did_you_mean(key, shipped)}",
        fix="give the path of a YAML file, or a name that 'sentcompress recipes' lists",
    )


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read, override (``a.b=value``) and check a recipe.

    Raises:
        RecipeError: naming the file, the field and the fix.
    """
    path = find_recipe(name)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 (byte {error.start})", fix="save the recipe as UTF-8") from None
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be read: {error.strerror}", fix="check the path and the file's permissions"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(
            f"{path}{place}: broken YAML: {describe_yaml_error(error)}", fix="correct that line"
        ) from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply for a recipe") from None
    except ValueError as error:  # such as the date 2024-99-99
        raise RecipeError(f"{path}: broken YAML: {error}", fix="quote that value") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe must be a mapping of sections, not {type(raw).__name__}")
    return build_recipe(raw, overrides or [], source=str(path))


def build_recipe(raw: dict[str, Any], overrides: list[str], source: str) -> Recipe:
    """Apply overrides to plain values and check them as a recipe."""
    for override in overrides:
        _apply_override(raw, override)
    try:
        return Recipe(**{str(key): value for key, value in raw.items()})
    except ValidationError as error:
        text = describe_validation_error(error, Recipe, "")
        raise RecipeError("\n".join(f"{source}: {line}" for line in text.splitlines())) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: write it as field=value, such as --set graft.steps=100")
    node: Any = raw
    for key in keys[:-1]:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    try:
        node[keys[-1]] = read_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"--set {override}: the value is not valid YAML: {describe_yaml_error(error)}",
            fix="correct it, or quote it",
        ) from None
