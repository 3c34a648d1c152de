"""The model class for lm-evaluation-harness, under the real harness; and what is said where it is missing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import threading
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from sentcompress.benchmark.harness_options import ModelArguments, available_device, model_folder
from sentcompress.benchmark.heldout_text import HeldoutDocument, heldout_documents
from sentcompress.benchmark.scoring import score_document
from sentcompress.cli import main
from sentcompress.cli.harness import check_options
from sentcompress.errors import CausalityError, InputError, ModelFolderError, SentCompressError
from sentcompress.modeling.saved_models import load_sentence_lm
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import BenchSettings

ROOT = Path(__file__).resolve().parents[2]
ITEMS = ROOT / "sentcompress" / "benchmark" / "lm_eval_tasks" / "sotu_choice.jsonl"
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install -c constraints.txt -e '.[dev,eval]'; .ci/run does",
)


# ---- without the harness


def test_help_does_not_import_the_harness():
    code = (
        "import sys\nfrom sentcompress.cli import main\ntry:\n    main(['lm-eval', '--help'])\n"
        "except SystemExit:\n    print([m for m in ('lm_eval', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.rstrip().endswith("[]")


def test_without_the_extra_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "sentcompress.benchmark.lm_eval", raising=False)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as exit:
        main(["lm-eval", "--model", "sentcompress", "--tasks", "sentcompress_sotu_choice"])
    assert exit.value.code == 2
    assert "pip install 'sentcompress[eval]'" in capsys.readouterr().err


def test_the_items_are_well_formed_and_their_answers_evenly_placed():
    items = [json.loads(line) for line in ITEMS.read_text(encoding="utf-8").splitlines()]
    assert len(items) == 60
    assert len({item["context"] for item in items}) == 60
    for item in items:
        assert set(item) == {"context", "choices", "answer"}
        assert len(set(item["choices"])) == 4
        assert all(text == text.strip() for text in (item["context"], *item["choices"]))
    answers = [item["answer"] for item in items]
    assert [answers.count(place) for place in range(4)] == [15, 15, 15, 15]


def test_a_missing_device_is_replaced_and_an_unknown_one_refused(caplog):
    best = available_device(None)
    assert available_device("auto") == best
    assert available_device("cpu") == torch.device("cpu")
    for wanted in ("cuda:99", "99", "xpu:99", "meta"):
        caplog.clear()
        assert available_device(wanted) == best
        assert f"using '{best}'" in caplog.text
    with pytest.raises(InputError, match="--device gpu"):
        available_device("gpu")


@pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="needs a CPU alone"
)
@pytest.mark.parametrize("wanted", ["cuda:0", "cuda", "mps", "mps:0", "0"])
def test_without_a_gpu_the_cpu_is_used(wanted):
    assert available_device(wanted) == torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, r"model_args\.pretrained: required"),
        ({"pretrained": ""}, r"model_args\.pretrained"),
        (
            {"pretrained": "x", "dtyp": "float32"},
            r"dtyp: unknown key\. Did you mean 'dtype'\? Known keys: .*device",
        ),
        ({"pretrained": "x", "dtype": "int8"}, r"model_args\.dtype"),
        ({"pretrained": "x", "batch_size": "lots"}, r"batch_size: must be a positive number, auto or auto:N"),
        ({"pretrained": "x", "batch_size": 0}, r"model_args\.batch_size"),
        ({"pretrained": "x", "max_batch_size": 0}, r"model_args\.max_batch_size"),
        ({"pretrained": "x", "context_sentences": 1}, r"model_args\.context_sentences"),
        ({"pretrained": "x", "context_sentences": "all"}, r"model_args\.context_sentences"),
    ],
)
def test_a_wrong_model_argument_is_named(given, said):
    with pytest.raises(InputError, match=said):
        ModelArguments.checked(given)


def test_arguments_as_the_harness_passes_them():
    for size in (1, "8", "auto", "auto:4"):
        ModelArguments.checked({"pretrained": "x", "batch_size": size, "max_batch_size": 4})
    assert ModelArguments.checked({"pretrained": 7, "device": 1}).device == "1"


def test_a_folder_without_a_sentence_model_says_what_to_do(run_folder, tmp_path):
    assert model_folder(str(run_folder / "graft")) == run_folder / "graft"
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    for pretrained, said in (
        (run_folder, f"give pretrained={run_folder}/graft"),
        (run_folder / "vae", "the graft made with it"),
        (run_folder / "baseline", "--model hf"),
        ("gpt2", "a token-level model of the hub is evaluated with --model hf"),
        ("some/model", "a token-level model of the hub is evaluated with --model hf"),
        (tmp_path, "damaged"),
        (tmp_path / "nothing", "no folder"),
    ):
        with pytest.raises(ModelFolderError) as error:
            model_folder(str(pretrained))
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limit": 0.0}, "--limit 0"),
        ({"limit": -1.0}, "--limit -1"),
        ({"limit": math.nan}, "--limit nan"),
        ({"num_fewshot": -1}, "--num_fewshot -1"),
        ({"output_path": "FILE/results"}, "--output_path"),
        ({"output_path": "FILE/results.json"}, "--output_path"),
        ({"use_cache": "FILE/cache"}, "--use_cache"),
        ({"model": None, "model_args": {"pretrained": "GRAFT"}}, "--model sentcompress"),
    ],
)
def test_options_that_the_harness_finds_wrong_too_late(changes, said, tmp_path, run_folder):
    (tmp_path / "file").write_text("", encoding="utf-8")
    given = json.loads(
        json.dumps(changes).replace("FILE", f"{tmp_path}/file").replace("GRAFT", f"{run_folder}/graft")
    )
    with pytest.raises(SentCompressError, match=said):
        check_options(argparse.Namespace(**{"model": "sentcompress", "limit": None, **given}))


def test_the_folder_of_the_task_files_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["lm-eval", "--task-folder"])
    folder = Path(capsys.readouterr().out.strip())
    assert {"sentcompress.yaml", "sentcompress_heldout.yaml"} <= {path.name for path in folder.iterdir()}


# ---- with it


@pytest.fixture(scope="module")
def harness():
    from sentcompress.benchmark import lm_eval

    return lm_eval


@pytest.fixture(scope="module")
def lm(harness, run_folder):
    return harness.SentenceHarnessLM(str(run_folder / "graft"), device="cpu")


def ask(method, *arguments):
    """One request through the harness's own class for it."""
    from lm_eval.api.instance import Instance

    request = Instance(request_type=method.__name__, doc={}, arguments=arguments, idx=0)
    return method([request], disable_tqdm=True)[0]


def evaluate(tasks, **settings):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from sentcompress.benchmark.lm_eval import TASKS

    metadata = settings.pop("metadata", None)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return lm_eval.simple_evaluate(
        tasks=tasks, task_manager=manager, log_samples=False, bootstrap_iters=0, **settings
    )["results"]


@needs_harness
def test_likelihoods_of_a_split_text_add_up(lm):
    a, b, c = "The people have seen", " a year of peace. Congress", " met here. Few men read the law"
    first, rest = ask(lm.loglikelihood, a, b), ask(lm.loglikelihood, a + b, c)
    both = ask(lm.loglikelihood, a, b + c)
    assert first[0] + rest[0] == pytest.approx(both[0], rel=1e-5)
    assert ask(lm.loglikelihood, f"{a} ", b.lstrip()) == ask(lm.loglikelihood, a, b)
    assert ask(lm.loglikelihood, "", a)[0] < 0


@needs_harness
def test_a_document_costs_what_bench_quality_says(lm, bench_models):
    """The same documents, tokens and windows: the difference is the first sentence."""
    for document in heldout_documents(bench_models.corpus, BenchSettings(max_documents=2)):
        bench = score_document(bench_models.sentence_lm, document, lm.window)
        nats = -ask(lm.loglikelihood_rolling, "".join(document.texts))
        alone = HeldoutDocument(
            0, "", document.sentences[:1], document.texts[:1], whole=False, first_scored=0
        )
        first = score_document(lm.model, alone, lm.window)
        assert nats == pytest.approx(bench.nats.sum() + first.nats.sum(), abs=1e-3)
    assert ask(lm.loglikelihood_rolling, "") == 0


@needs_harness
def test_generation_stops_where_it_is_told_and_greedy_agrees(harness, run_folder, teach):
    lm = harness.SentenceHarnessLM(str(run_folder / "graft"), device="cpu")
    text = "The people have seen a year of peace. Congress met here."
    teach(lm.model, [ids for _, ids in lm._sentences(text)])
    context, rest = text[:15], text[15:]
    assert ask(lm.generate_until, context, {"until": ["no such text"]}) == rest
    assert ask(lm.loglikelihood, context, rest)[1]
    assert not ask(lm.loglikelihood, context, " seen a year of order.")[1]
    assert ask(lm.generate_until, context, {"until": [" met", "of peace"]}) == " seen a year "
    assert ask(lm.generate_until, context, {"until": " peace", "max_gen_toks": 2}) == " seen a"
    long = "The law was read. " * 40
    assert isinstance(ask(lm.generate_until, long, {"max_gen_toks": 3}), str)


@needs_harness
def test_draws_follow_the_harness_seed_and_unknown_settings_are_refused(lm):
    asked = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 12, "stop_threshold": 1}
    torch.manual_seed(0)
    one, two = (ask(lm.generate_until, "The people", asked) for _ in range(2))
    torch.manual_seed(0)
    assert ask(lm.generate_until, "The people", asked) == one != two
    with pytest.raises(InputError, match=r"gen_kwargs\.beams"):
        ask(lm.generate_until, "The people", {"beams": 4})


@needs_harness
def test_a_model_that_sees_the_future_is_refused(harness, run_folder, monkeypatch):
    def forward(self, latents, valid, passage_ids, position_ids, **rest):
        flipped = latents + latents.flip(1)
        return plain(self, flipped, valid, passage_ids, position_ids, **rest)

    plain = SentenceLM.backbone_states
    monkeypatch.setattr(SentenceLM, "backbone_states", forward)
    with pytest.raises(CausalityError):
        harness.SentenceHarnessLM(str(run_folder / "graft"), device="cpu")


@needs_harness
def test_multiple_choice_and_perplexity_under_the_real_harness(run_folder):
    tasks = ["sentcompress_sotu_choice", "sentcompress_heldout"]
    metadata = {"pretrained": str(run_folder / "graft")}
    found = evaluate(tasks, model="sentcompress", model_args=metadata, metadata=metadata, device="cpu")
    assert 0 <= found["sentcompress_sotu_choice"]["acc,none"] <= 1
    assert found["sentcompress_heldout"]["bits_per_byte,none"] > 1


@needs_harness
def test_a_uniform_model_has_the_bits_it_must_have(harness, run_folder, tmp_path, tokenizer):
    model = load_sentence_lm(run_folder / "graft")
    torch.nn.init.zeros_(model.vae.lm_head.weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = harness.SentenceHarnessLM(str(tmp_path), device="cpu")
    rows = harness.heldout(str(run_folder / "graft"))["test"]["text"]
    targets = decisions = 0
    for text in rows:
        sentences = lm._sentences(text)
        targets += sum(len(ids) + 1 for _, ids in sentences)
        decisions += len(sentences) + 1  # begin, go on, stop
    found = evaluate(["sentcompress_heldout"], model=lm, metadata={"run": str(run_folder)})
    bits = targets * math.log2(len(tokenizer)) + decisions
    size = sum(len(text.encode()) for text in rows)
    assert found["sentcompress_heldout"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-6)


@needs_harness
def test_an_empty_context_does_not_end_the_evaluation(lm, monkeypatch, caplog):
    asked = {"until": ["\n\n"], "max_gen_toks": 6, "stop_threshold": 1}
    from lm_eval.api.instance import Instance

    contexts = ["The people", "", " \n", "Congress met."]
    requests = [Instance("generate_until", {}, (context, asked), 0) for context in contexts]
    first, empty, blank, last = lm.generate_until(requests, disable_tqdm=True)
    assert first
    assert last
    assert empty == blank != ""
    monkeypatch.setattr(lm.model.config, "start_latent", False)
    assert lm.generate_until(requests, disable_tqdm=True)[1:3] == ["", ""]
    assert "empty context" in caplog.text


@needs_harness
def test_texts_at_the_edge(lm):
    assert ask(lm.loglikelihood, "The people", "") == (0.0, True)
    assert ask(lm.loglikelihood, "", "") == (0.0, True)
    assert ask(lm.loglikelihood_rolling, "") == 0
    for context, continuation in (
        (" ", "The law"),
        ("\n\n", "The law"),
        ("The law", " "),
        ("Gut –", " ü 中 😀."),
    ):
        nats, _ = ask(lm.loglikelihood, context, continuation)
        assert math.isfinite(nats)
        assert nats < 0
    assert ask(lm.loglikelihood_rolling, " \n") < 0
    assert isinstance(ask(lm.generate_until, "中文😀", {"max_gen_toks": 4}), str)


@needs_harness
def test_stop_strings_across_tokens_and_sentences(harness, run_folder, teach):
    lm = harness.SentenceHarnessLM(str(run_folder / "graft"), device="cpu")
    text = "The people have seen a year of peace. Congress met here."
    teach(lm.model, [ids for _, ids in lm._sentences(text)])
    for until, rest in (
        ("peace. Congress", " seen a year of "),
        (["ce. C"], " seen a year of pea"),
        ({"stop": ["a year"]}, " seen "),
    ):
        asked = until if isinstance(until, dict) else {"until": until}
        assert ask(lm.generate_until, text[:15], asked) == rest


@needs_harness
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"beams": 4}, r"gen_kwargs\.beams: unknown key"),
        ({"num_beams": 4}, r"gen_kwargs\.num_beams"),
        ({"max_gen_toks": 0}, r"gen_kwargs\.max_gen_toks: must be at least 1"),
        ({"max_new_tokens": "lots"}, r"gen_kwargs\.max_new_tokens: must be a number, not 'lots'"),
        ({"do_sample": "perhaps"}, r"gen_kwargs\.do_sample"),
        ({"do_sample": True, "temperature": "hot"}, r"gen_kwargs\.temperature: must be a number"),
        ({"do_sample": True, "temperature": -1}, r"gen_kwargs\.temperature"),
        ({"until": [1]}, r"gen_kwargs\.until"),
    ],
)
def test_wrong_generation_settings_are_named_before_anything_is_written(lm, asked, said, monkeypatch):
    from lm_eval.api.instance import Instance

    monkeypatch.setattr(lm, "_pieces", lambda *_: pytest.fail("a text was generated"))
    requests = [Instance("generate_until", {}, ("The law", kwargs), 0) for kwargs in ({}, asked)]
    with pytest.raises(InputError, match=said):
        lm.generate_until(requests, disable_tqdm=True)


@needs_harness
def test_generation_settings_as_tasks_have_them(lm):
    greedy = ask(lm.generate_until, "The people", {"max_gen_toks": 5, "stop_threshold": 1})
    for same in (
        {"do_sample": "false", "temperature": 0.7},
        {"do_sample": True, "temperature": 0},
        {"do_sample": 0, "temperature": 0.0, "until": None, "num_beams": 1, "top_p": 1.0},
    ):
        asked = {"max_tokens": 5, "stop_threshold": 1, **same}
        assert ask(lm.generate_until, "The people", asked) == greedy


@needs_harness
def test_arguments_of_the_model_override_options_of_the_harness(harness, run_folder):
    options = {"device": "cuda:0", "batch_size": 1, "max_batch_size": None}
    words = (
        f"pretrained={run_folder}/graft,device=cpu,dtype=bfloat16,context_sentences=4,trust_remote_code=True"
    )
    lm = harness.SentenceHarnessLM.create_from_arg_string(words, options)
    assert (lm.device, lm.window, next(lm.model.parameters()).dtype) == (
        torch.device("cpu"),
        4,
        torch.bfloat16,
    )
    assert ask(lm.loglikelihood, "The people", " have seen a year. Congress met.")[0] < 0
    assert isinstance(ask(lm.generate_until, "The people", {"max_gen_toks": 3}), str)


@needs_harness
def test_chat_templates(harness, run_folder):
    lm = harness.SentenceHarnessLM(str(run_folder / "graft"), device="cpu")
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who met?"}]
    for call in (lambda: lm.chat_template(True), lambda: lm.apply_chat_template(history)):
        with pytest.raises(InputError, match=r"no chat template\n.*plain text"):
            call()
    assert lm.chat_template(False) is None
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    lm.tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant:{% endif %}"
    assert lm.chat_template(True) == lm.tokenizer.chat_template
    assert lm.apply_chat_template(history) == "system: Be brief.\nuser: Who met?\nassistant:"
    lm = harness.SentenceHarnessLM(str(run_folder / "graft"), device="cpu")
    lm.tokenizer.chat_template = {"short": "{{ messages[-1].content }}"}
    lm.chat_template("short")
    assert lm.apply_chat_template(history) == "Who met?"
    with pytest.raises(InputError, match="no chat template 'long'"):
        lm.chat_template("long")
    assert lm.tokenizer_name


@pytest.fixture
def few_tasks(monkeypatch):
    """The harness without its own tasks, of which it reads 14,000 files, and with its log on this test's stderr."""
    from lm_eval.tasks._index import TaskIndex

    build = TaskIndex.build
    few = staticmethod(lambda paths, **rest: build(list(paths)[1:], **rest))
    monkeypatch.setattr(TaskIndex, "build", few)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "handlers", [])
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", False)


MODEL = "--model sentcompress --model_args pretrained=GRAFT"
ITEMS_ONLY = "--tasks sentcompress_sotu_choice --limit 2"


@needs_harness
@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{MODEL} --tasks sentcompress_soto_choice", "Did you mean 'sentcompress_sotu_choice'?"),
        (f"{MODEL} --tasks list", "sentcompress lm-eval ls tasks"),
        (MODEL, "No tasks specified"),
        (f"{MODEL},dtyp=float32 {ITEMS_ONLY}", "Did you mean 'dtype'?"),
        (f"{MODEL} {ITEMS_ONLY} --device gpu", "--device gpu"),
        (f"{MODEL} {ITEMS_ONLY} --apply_chat_template", "no chat template"),
        (f"{MODEL} {ITEMS_ONLY} --fewshot_as_multiturn", "`apply_chat_template` must be set"),
        (f"{MODEL} {ITEMS_ONLY} --log_samples", "--output_path"),
        (f"{MODEL} {ITEMS_ONLY} --predict_only", "--output_path"),
        (f"{MODEL} {ITEMS_ONLY} --num_fewshot 100", "lower --num_fewshot"),
        (f"{MODEL} {ITEMS_ONLY} --config /nowhere.yaml", "/nowhere.yaml"),
        (f"--model sentcompress --model_args {{bad {ITEMS_ONLY}", "Invalid JSON"),
        (f"--model sentcompres {ITEMS_ONLY}", "no model for this name found"),
        (f"{MODEL} --include_path TASKS --tasks remote", "the hub cannot be reached"),
        (f"{MODEL} --include_path TASKS --tasks needy", "the package 'no_such_package' is needed"),
    ],
)
def test_what_a_user_can_get_wrong_is_said_plainly(line, said, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    task = "task: {}\n{}\noutput_type: generate_until\ntest_split: test\ndoc_to_text: q\ndoc_to_target: a\n"
    for name, data in (
        ("remote", "dataset_path: org/no-such-data"),
        ("needy", "custom_dataset: !function needs.rows"),
    ):
        (tmp_path / f"{name}.yaml").write_text(task.format(name, data), encoding="utf-8")
    (tmp_path / "needs.py").write_text("import no_such_package\nrows = None\n", encoding="utf-8")
    words = line.replace("GRAFT", f"{run_folder}/graft").replace("TASKS", str(tmp_path))
    with pytest.raises(SystemExit) as exit:
        main(["lm-eval", *shlex.split(words)])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert said in message[message.index("error: ") :]
    assert "Traceback" not in message


@needs_harness
@pytest.mark.usefixtures("few_tasks")
def test_without_a_device_and_with_what_else_people_add(run_folder, tmp_path, capsys):
    words = f"{MODEL} {ITEMS_ONLY} --batch_size auto --trust_remote_code --write_out --log_samples --num_fewshot 1"
    words += f" --system_instruction 'Be brief.' --output_path {tmp_path}/out --use_cache {tmp_path}/cache/of"
    for _ in range(2):  # the second time from the cache
        with pytest.raises(SystemExit) as exit:
            main(["lm-eval", *shlex.split(words.replace("GRAFT", f"{run_folder}/graft"))])
        assert exit.value.code == 0
        assert re.search(r"sentcompress_sotu_choice.+acc", capsys.readouterr().out)
    assert len(list((tmp_path / "out").glob("*/results_*.json"))) == 2
    with pytest.raises(SystemExit):
        main(["lm-eval", "ls", "tasks"])
    assert "sentcompress_heldout" in capsys.readouterr().out


@needs_harness
@pytest.mark.slow
def test_the_command_of_the_harness_itself(run_folder, tmp_path):
    """As the page on evaluation shows it: nobody imports sentcompress."""
    command = Path(sys.executable).with_name("lm_eval")
    folder = ITEMS.parent
    tasks = f"{folder}/sentcompress.yaml,{folder}/sentcompress_sotu_choice.yaml"
    arguments = ["--model", "sentcompress", "--model_args", f"pretrained={run_folder}/graft"]
    done = subprocess.run(
        [command, *arguments, "--tasks", tasks, "--limit", "2"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"sentcompress_sotu_choice.+acc", done.stdout)


@needs_harness
def test_the_entry_point_gives_the_harness_the_model(harness):
    """What releases after 0.4.13 do with it; 0.4.13 has a registry that takes entry points and never looks for any."""
    from lm_eval.api.registry import Registry, get_model

    (entry,) = entry_points(group="lm_eval.models", name="sentcompress")
    registry = Registry("model")
    registry.register("sentcompress", target=entry)
    assert registry.get("sentcompress") is harness.SentenceHarnessLM
    assert get_model("hf").__name__ == "HFLM"


@needs_harness
@pytest.mark.slow
def test_two_processes_find_what_one_finds(run_folder, tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import json, sys, lm_eval\n"
        "from lm_eval.tasks import TaskManager\n"
        "from sentcompress.benchmark.lm_eval import TASKS\n"
        "found = lm_eval.simple_evaluate(model='sentcompress', model_args={'pretrained': sys.argv[1]}, limit=5,\n"
        "    tasks=['sentcompress_sotu_choice'], device='cpu', bootstrap_iters=0,\n"
        "    task_manager=TaskManager(include_path=str(TASKS), include_defaults=False))\n"
        "if found:\n"
        "    rows = [sample['filtered_resps'] for sample in found['samples']['sentcompress_sotu_choice']]\n"
        "    print('FOUND', json.dumps([found['results'], sorted(map(str, rows))], sort_keys=True))\n",
        encoding="utf-8",
    )
    shared = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = [
        re.findall(
            "FOUND (.+)",
            subprocess.run(
                [sys.executable, *way, script, run_folder / "graft"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout,
        )
        for way in ([], shared)
    ]
    assert len(found[0]) == 1
    assert found[0] == found[1]


def shown() -> list[str]:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```bash\n(.+?)^```$", page, re.M | re.S)).replace("\\\n", "")
    return re.findall(r"^sentcompress lm-eval .+$", blocks, re.M)


@needs_harness
@pytest.mark.parametrize("line", shown())
def test_the_commands_of_the_page_run(line, run_folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = shlex.split(line.replace("out/quickstart", str(run_folder)))[1:]
    with pytest.raises(SystemExit) as exit:
        main([*words, "--device", "cpu", "--limit", "4"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert re.search(r"sentcompress_sotu_choice.+acc", printed)
    assert re.search(r"sentcompress_heldout.+bits_per_byte", printed)


@needs_harness
@pytest.mark.slow
def test_the_harness_asks_a_server(tmp_path):
    """The command of docs/serving.md, on another port and on few items."""
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'; the extra 'eval' has it")
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    command = re.search(r"^lm_eval .+\\\n.+$", page, re.M)[0].replace("\\\n", "")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "sentcompress", "serve", "opt-tiny", "--port", "0"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = next(found[1] for line in server.stderr if (found := re.search(r" at (http://\S+)/v1 ", line)))
        command = command.replace("http://127.0.0.1:8000", url)
        command = command.replace("lm_eval ", f"{shlex.quote(sys.executable)} -m lm_eval ", 1)
        command = command.replace("$(sentcompress", f"$({shlex.quote(sys.executable)} -m sentcompress")
        threading.Thread(target=server.stderr.read, daemon=True).start()
        done = subprocess.run(
            ["bash", "-c", f"{command} --limit 8 --output_path {tmp_path}"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        server.kill()
        server.wait()
    served = re.search(r"sentcompress_sotu_choice.+\|acc +\|. *\|([\d.]+)\|", done.stdout)
    model = "--model hf --model_args pretrained=sentcompress/pretrained/opt-tiny,dtype=float32 --device cpu"
    tasks = "--tasks sentcompress_sotu_choice --include_path sentcompress/benchmark/lm_eval_tasks --limit 8"
    direct = subprocess.run(
        [sys.executable, "-m", "lm_eval", *f"{model} {tasks}".split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert served[1] in direct.stdout, "the same accuracy as with the LLM itself"
