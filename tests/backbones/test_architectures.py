"""Every causal LM type of transformers ends as accepted or as refused with a reason, as the record says."""

from __future__ import annotations

import importlib.util
import json
import traceback
from pathlib import Path

import pytest
import transformers
import yaml
from transformers import AutoConfig

from sentcompress.contracts import proof
from sentcompress.errors import InputError, ModelFolderError, is_out_of_memory
from sentcompress.modeling.grafting import wrap_backbone
from sentcompress.modeling.llm_loading import load_backbone_config, load_causal_lm
from sentcompress.recipe import BackboneSpec, Recipe
from sentcompress.registry import get_registry
from sentcompress.testing import tiny_opt, tiny_tokenizer
from sentcompress.training.inputs import backbone_shape
from sentcompress.training.jobs.sentence_vae import VAEJob

TOOL = Path(__file__).resolve().parents[2] / "tools" / "docs" / "architectures.py"
spec = importlib.util.spec_from_file_location("architectures", TOOL)
assert spec is not None
assert spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

RECORD = yaml.safe_load(tool.RECORD.read_text(encoding="utf-8"))
VERDICTS = {**dict.fromkeys(RECORD["accepted"], "accepted"), **RECORD["refused"]}
QUICK = ("bart", "fuyu", "hrm_text", "trocr", "xlnet", "mixtral", "gpt_neo", "modernbert-decoder", "xlstm")
same_version = pytest.mark.skipif(
    transformers.__version__ != RECORD["transformers"],
    reason=f"the record is of transformers {RECORD['transformers']}",
)


@pytest.fixture(scope="module")
def small_tokenizer():
    return tiny_tokenizer(tool.VOCABULARY)


@same_version
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VERDICTS],
)
def test_it_ends_as_recorded(model_type, small_tokenizer):
    assert tool.verdict(tool.build_tiny(model_type), small_tokenizer) == VERDICTS[model_type]


@same_version
def test_the_record_names_every_type():
    assert sorted([*VERDICTS, *RECORD["not built"]]) == tool.TYPES
    assert set(QUICK) <= set(VERDICTS)
    assert len(RECORD["accepted"]) >= 82


# ---- what a user is shown


def folder_of(path: Path, **config) -> BackboneSpec:
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return BackboneSpec(model=str(path))


def test_code_in_a_models_folder_is_never_run(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "configuration_x.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass C: pass\n", encoding="utf-8"
    )
    llm = folder_of(tmp_path, model_type="baichuan", auto_map={"AutoConfig": "configuration_x.C"})
    with pytest.raises(
        ModelFolderError, match=r"auto_map in config.json.*never run\n.*a type that transformers"
    ):
        load_backbone_config(llm)
    assert not ran.exists()


def test_a_type_of_a_newer_transformers(tmp_path):
    llm = folder_of(tmp_path, model_type="gpt99", architectures=["GPT99ForCausalLM"])
    with pytest.raises(ModelFolderError, match=r"gpt99.*\n.*install a newer transformers"):
        load_backbone_config(llm)


def test_a_configuration_that_no_model_can_be_built_from(tmp_path):
    config = AutoConfig.for_model("granite", hidden_size=32, num_attention_heads=4, vocab_size=500)
    llm = folder_of(tmp_path, **{**config.to_dict(), "hidden_act": "no-such-function"})
    for build in (load_causal_lm, lambda s: backbone_shape(Recipe(name="x", backbone=s))):
        with pytest.raises(InputError, match=r"type 'granite'.*cannot be built.*no-such-function"):
            build(llm.model_copy(update={"init": "random"}))


class TestWhatTheProofMakesOfExceptions:
    """Of any kind: they become a refusal, which keeps the traceback for ``--debug``."""

    def refusal(self, monkeypatch, error: Exception) -> BaseException:
        lm, llama = tiny_opt(), get_registry().get("backbone", "opt")
        monkeypatch.setattr(llama, "forward", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(BaseException) as caught:
            wrap_backbone(BackboneSpec(name="opt", model="tiny"), lm)
        return caught.value

    def test_a_forward_that_fails(self, monkeypatch):
        found = self.refusal(monkeypatch, ZeroDivisionError("in the third block"))
        assert isinstance(found, InputError)
        assert "type 'opt'" in found.message
        assert "ZeroDivisionError: in the third block" in found.message
        assert "ZeroDivisionError: in the third block\n" in "".join(
            traceback.format_exception(found.__cause__)
        )

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")])
    def test_too_little_memory_is_not_the_models_fault(self, monkeypatch, error):
        found = self.refusal(monkeypatch, error)
        assert found is error
        assert is_out_of_memory(found)

    def test_parts_that_cannot_be_found(self, monkeypatch):
        opt = get_registry().get("backbone", "opt")
        monkeypatch.setattr(opt, "blocks", property(lambda _: [][0]))
        with pytest.raises(InputError, match="its modules are not laid out as in other LLMs: IndexError"):
            wrap_backbone(BackboneSpec(name="opt", model="tiny"), tiny_opt())

    def test_the_models_own_forward(self):
        lm = tiny_opt()
        lm.model.decoder.layers[0].fc1 = None
        with pytest.raises(ValueError, match=r"its own forward failed: TypeError"):
            proof.reference_of(lm)


def test_a_limit_below_zero_is_none():
    config = AutoConfig.for_model("xlnet")
    assert config.max_position_embeddings == -1
    assert proof.position_limit(config) > 1000


def test_what_cannot_be_grafted_is_refused_before_the_sentence_vae_is_trained(
    tmp_path, text_files, small_tokenizer
):
    tool.build_tiny("bert").save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    data = {"name": "text", "options": {"paths": [str(text_files)], "heldout_documents": 1}}
    recipe = Recipe(name="x", backbone=BackboneSpec(model=str(tmp_path)), data=data)
    with pytest.raises(InputError, match=r"type 'bert'[^\n]*\n.*the LLM itself is not causal"):
        VAEJob(recipe)
