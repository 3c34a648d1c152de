"""The model class for lm-evaluation-harness, under the real harness; and what is said where it is missing."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sentcompress.benchmark.heldout_text import HeldoutDocument, heldout_documents
from sentcompress.benchmark.scoring import score_document
from sentcompress.cli import main
from sentcompress.errors import CausalityError, InputError
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
