"""What is measured: the models of a run folder or of a single model's folder, and the text."""

from __future__ import annotations

import copy
import gc
import json
import math
import shutil
import tempfile
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sentcompress.benchmark.results import Curve, finished_stages, is_measured
from sentcompress.distributed import process_count
from sentcompress.errors import InputError, ModelFolderError, SentCompressError
from sentcompress.files import expand_home, read_json, storage_errors
from sentcompress.modeling.configuration import SentenceLMConfig, SentenceVAEConfig
from sentcompress.modeling.device_map import DeviceName, blocks_of, dispatch_blocks, memory_per_model
from sentcompress.modeling.int8 import quantize
from sentcompress.modeling.llm_loading import SAFE, load_backbone_tokenizer, load_causal_lm
from sentcompress.modeling.saved_models import (
    load_saved_tokenizer,
    load_sentence_lm,
    load_split,
    load_vae,
    read_config,
)
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.split import SPLIT
from sentcompress.modeling.vae import SentenceVAE
from sentcompress.modeling.weight_checks import load_weights
from sentcompress.recipe import OpponentSettings, Recipe, load_recipe
from sentcompress.registry import get_registry
from sentcompress.sentence_memory.arguments import SETTINGS
from sentcompress.text.corpus import Corpus, build_corpus
from sentcompress.training.run_folder import GRAFT, MEMORY, OPPONENT

CURVES = ("loss", "nats_per_token")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of ``bench.dtype``."""
Placed = TypeVar("Placed", SentenceLM, PreTrainedModel)


class Missing(Exception):
    """Something that was asked for is missing; the message says why. Results note it, and the benchmark goes on."""


class ModelFolder:
    """A run folder (``OUT`` with ``vae``, ``graft``, ``memory``, ``baseline`` in it) or the folder of one model.

    Attributes:
        single: the stage that the one model is from; None for a run.

    Raises:
        ModelFolderError: it holds neither.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ModelFolderError(f"no folder '{path}'", fix="give the folder of a run or of a model")
        # OUT/graft was given: its baseline is in the folder beside it.
        if (
            is_measured(path.name)
            and (path.parent / "recipe.yaml").is_file()
            and (path / "config.json").is_file()
        ):
            path = path.parent
        self.path = path
        self.single: str | None = None
        if (path / "config.json").is_file():
            if (path / SETTINGS).is_file():
                self.single = MEMORY.name
            elif (path / SPLIT).is_file():
                self.single = GRAFT.name
            else:
                self.single = {"sentence-lm": "graft", "sentence-vae": "vae"}[read_config(path)["model_type"]]
        elif not finished_stages(path):
            raise ModelFolderError(
                f"'{path}' holds no finished stage (such as graft or memory) and no model",
                fix="give the folder of a finished run, such as out/quickstart, or of a model",
            )

    def stage(self, name: str) -> Path:
        """Folder of a finished stage. Raises Missing."""
        if self.single == name:
            return self.path
        folder = self.path / name
        if self.single is None and (folder / "config.json").is_file():
            return folder
        raise Missing(
            f"'{folder}' does not exist or is not finished"
            if self.single is None
            else f"'{self.path}' is the folder of a single model, without a '{name}' beside it"
        )

    def stages(self) -> list[Path]:
        """Folders of the finished stages."""
        return [self.path] if self.single else finished_stages(self.path)

    def recipe(self, overrides: list[str] | None = None) -> Recipe:
        """The recipe saved with the run.

        Raises:
            InputError: there is none.
        """
        # An opponent may have been trained with a recipe that names no other one.
        stages = [folder for folder in self.stages() if not folder.name.startswith(OPPONENT)]
        for folder in (*reversed(stages), self.path):
            if (folder / "recipe.yaml").is_file():
                return load_recipe(str(folder / "recipe.yaml"), overrides)
        raise InputError(f"no recipe.yaml in '{self.path}'", fix="name a recipe with --recipe")

    def training_tokens(self, *stages: str) -> int | None:
        """Tokens the stages were trained on, by their ``run.json``; None when one is not known."""
        total = 0
        for name in stages:
            try:
                about = read_json(self.stage(name) / "run.json")
            except Missing:
                return None
            if not isinstance(about, dict) or not isinstance(about.get("tokens"), int):
                return None
            total += about["tokens"]
        return total


class Models:
    """Everything the measurements share, loaded when first asked for.

    Args:
        recipe: of the run.
        folder: None if there is no trained model (``bench speed --init random``).
        out: where results go, and blocks of a model that do not fit into memory; None: the system's temporary folder.
    """

    def __init__(self, recipe: Recipe, folder: ModelFolder | None, out: Path | None = None) -> None:
        """Raises InputError if this machine lacks the recipe's ``bench.device``."""
        self.recipe = recipe
        self.folder = folder
        self.out = out
        wanted, gpu = recipe.bench.device, torch.cuda.is_available()
        if wanted == "cuda" and not gpu:
            raise InputError(
                "bench.device: this machine has no CUDA device that torch can use",
                fix="use auto or cpu, or install a build of torch for your GPU",
            )
        self.device = torch.device("cuda" if gpu and wanted != "cpu" else "cpu")
        self.is_sharded = recipe.bench.device_map != "none"
        if self.is_sharded and recipe.bench.quantize:
            raise InputError(
                "bench.device_map: a model with 8-bit weights cannot be sharded over devices",
                fix="leave out bench.quantize or bench.device_map",
            )
        if self.is_sharded and process_count() > 1:
            raise InputError(
                "bench.device_map: with several processes, each has its own device",
                fix="leave out bench.device_map, or measure in one process",
            )
        self._memory: dict[DeviceName, float] | None = None
        self._devices: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

    @cached_property
    def _on_disk(self) -> tempfile.TemporaryDirectory[str]:
        """Folder for blocks that fit into no memory; made for the first model that is sharded."""
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="blocks-", dir=self.out)

    def describe(self, model: nn.Module) -> tuple[str, str]:
        """Dtype of a model's weights, and the devices of its blocks; empty where all are on one device."""
        return str(next(model.parameters()).dtype).removeprefix("torch."), self._devices.get(model, "")

    def _make_room(self) -> None:
        """Drop earlier token-level models if sharded: memory then holds the sentence model and one other."""
        if self.is_sharded:
            for name in ("backbone", "baseline"):
                self.__dict__.pop(name, None)  # loaded again when it is asked for
            gc.collect()  # Accelerate's hooks hold a model in a reference cycle

    def place(self, model: Placed, dtype: torch.dtype = torch.float32) -> Placed:
        """Move a model to its device or devices, in eval mode.

        Args:
            dtype: of its weights; a model that is sharded over devices always has ``bench.dtype``.

        Raises:
            InputError: ``bench.max_memory`` is too small.
            StorageError: blocks cannot be written to disk.
        """
        model = model.eval()
        if not self.is_sharded:
            return model.to(self.device, dtype)
        model = model.to(DTYPES[self.recipe.bench.dtype])
        if self._memory is None:
            self._memory = memory_per_model(self.device, self.recipe.bench.max_memory, model)
        blocks = model.backbone.blocks if isinstance(model, SentenceLM) else blocks_of(model)
        with storage_errors(self.out or Path(tempfile.gettempdir())):
            folder = Path(tempfile.mkdtemp(dir=self._on_disk.name))
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        found = dispatch_blocks(model, blocks, self._memory, folder)
        counts = (f"{device} {found.count(device)}" for device in dict.fromkeys(found))
        self._devices[model] = f"blocks by device: {', '.join(counts)}"
        return model

    def _stage(self, name: str) -> Path:
        if self.folder is None:
            raise Missing("no trained model was given")
        return self.folder.stage(name)

    @cached_property
    def tokenizer(self) -> Any:
        if self.folder is not None:
            for folder in self.folder.stages():
                return load_saved_tokenizer(folder)
        try:
            return load_backbone_tokenizer(self.recipe.backbone)
        except SentCompressError:
            if self.recipe.backbone.init != "random":
                raise
            # Random weights only need sentence lengths, so any tokenizer will do.
            return load_backbone_tokenizer(self.recipe.backbone.model_copy(update={"model": "opt-tiny"}))

    @cached_property
    def corpus(self) -> Corpus:
        registry, recipe = get_registry(), self.recipe
        dataset = registry.create("dataset", recipe.data.name, recipe.data.options)
        segmenter = registry.create("segmenter", recipe.segmenter.name, recipe.segmenter.options)
        return build_corpus(dataset, segmenter, self.tokenizer)

    @cached_property
    def sentence_lm(self) -> SentenceLM:
        folder = self._stage(GRAFT.name)
        if (folder / SPLIT).is_file():
            raise Missing("split LLMs cannot be measured here yet")
        return quantize(self.place(load_sentence_lm(folder)), self.recipe.bench.quantize)

    @cached_property
    def grafted(self) -> SentenceLM | PreTrainedModel:
        """What the graft made: a SentenceLM or a split LLM."""
        folder = self._stage(GRAFT.name)
        if not (folder / SPLIT).is_file():
            return self.sentence_lm
        if self.is_sharded or self.recipe.bench.quantize:
            raise InputError("bench.quantize and bench.device_map are not for a split LLM", fix="remove them")
        return self.place(load_split(folder)[0])

    @cached_property
    def vae(self) -> tuple[str, SentenceVAE]:
        """The trained SentenceVAE and its name, or else the one inside the grafted model."""
        try:
            return "SentenceVAE", load_vae(self._stage("vae")).to(self.device)
        except Missing:
            return "encoder and decoder of the grafted model", self.sentence_lm.vae

    @cached_property
    def backbone(self) -> PreTrainedModel:
        """The LLM, with random weights if the recipe says so."""
        self._make_room()
        try:
            model = load_causal_lm(self.recipe.backbone)
        except InputError as error:
            raise Missing(f"the backbone {self.recipe.backbone.model}: {error.message}") from error
        return self.place(model)

    @property
    def as_it_came(self) -> PreTrainedModel:
        """The pretrained LLM, as it was before this run."""
        if self.recipe.backbone.init == "random":
            raise Missing("its weights are random: there is no pretrained backbone")
        return self.backbone

    @cached_property
    def baseline(self) -> PreTrainedModel:
        """The LLM fine-tuned on the same data, token by token."""
        if not self.recipe.baseline.enabled:
            raise Missing("the recipe has baseline.enabled: false")
        return self._token_level("baseline")

    @property
    def opponents(self) -> list[str]:
        """Names of the opponents of equal cost: those of the recipe, and others that were trained."""
        trained = self.folder.stages() if self.folder else []
        others = [path.name.removeprefix(OPPONENT) for path in trained if path.name.startswith(OPPONENT)]
        return list(dict.fromkeys([*self.recipe.opponents, *others]))

    def opponent(self, name: str) -> PreTrainedModel:
        """An opponent, by its name in the recipe."""
        self.opponent_settings(name)  # reported with its figures: fail before it is loaded and scored
        return self._token_level(OPPONENT + name)

    def opponent_settings(self, name: str) -> OpponentSettings:
        """What it was trained with."""
        saved = load_recipe(str(self._stage(OPPONENT + name) / "recipe.yaml")).opponents
        if name not in saved:
            raise Missing(
                f"'{OPPONENT}{name}' has another name in its recipe.yaml: {', '.join(saved) or 'none'}"
            )
        return saved[name]

    @cached_property
    def memory_llm(self) -> PreTrainedModel:
        """The LLM fine-tuned with a sentence memory in effect."""
        return self._token_level(MEMORY.name)

    def _token_level(self, stage: str) -> PreTrainedModel:
        """The LLM of a stage whose model is an ordinary causal LM."""
        folder = self._stage(stage)
        self._make_room()
        try:
            model = load_weights(
                AutoModelForCausalLM.from_pretrained,
                folder,
                what=f"'{folder}'",
                use_safetensors=True,
                dtype=torch.float32,
                **SAFE,
            )
        except (OSError, ValueError, json.JSONDecodeError) as error:
            text = " ".join(str(error).split())[:200]
            raise ModelFolderError(f"'{folder}' cannot be loaded: {text}", fix="train it again") from error
        return self.place(model)

    def untrained(self) -> SentenceLM:
        """A SentenceLM of the same shape with weights drawn from the recipe's seed."""
        self._make_room()
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            return self.place(SentenceLM(copy.deepcopy(self.sentence_lm.config)))

    @property
    def bos_token_id(self) -> int:
        """The token that starts a document for a token-level model."""
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def is_llm(name: str) -> bool:
    """Whether a name is that of an LLM rather than the folder of a run or of a sentcompress model."""
    path = Path(expand_home(name))
    if not path.is_dir():
        return True
    about = read_json(path / "config.json")
    if not isinstance(about, dict) or (path / SETTINGS).is_file() or (path / SPLIT).is_file():
        return False
    return about.get("model_type") not in (SentenceVAEConfig.model_type, SentenceLMConfig.model_type)


def read_curves(folder: ModelFolder) -> list[Curve]:
    """Loss and held-out curves from the stages' ``metrics.jsonl``."""
    curves = []
    for stage in folder.stages():
        try:
            lines = (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        points: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            try:
                entry = json.loads(line)
                step = int(entry["step"])
            except (ValueError, KeyError, TypeError):
                continue  # a last line cut short by a kill
            values = {name: entry[name] for name in CURVES if name in entry}
            values |= {f"held-out {name}": value for name, value in (entry.get("eval") or {}).items()}
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    points.setdefault(name, []).append((step, float(value)))
        curves += [
            Curve(stage=folder.single or stage.name, name=name, points=series)
            for name, series in points.items()
        ]
    return curves
