"""Tokenizers of every make: what they encode is the text to the byte, or they are refused before a training begins."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sentcompress.cli import main
from sentcompress.contracts import Segmenter, SegmenterOptions
from sentcompress.errors import CoverageError, DataError
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.modeling.saved_models import load_sentence_lm
from sentcompress.registry import get_registry
from sentcompress.testing.texts import ordinary
from sentcompress.text.lossless_tokenizer import LosslessTokenizer, lossless
from sentcompress.text.segmentation import sentences_to_ids

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TRAINED_ON = [ordinary(12_000), "".join(map(chr, range(32, 127))) * 3, "a\nb\n\nc\td  e"]


def byte_level(*steps: Any, prefix: bool = False, **more: Any) -> Tokenizer:
    core = Tokenizer(models.BPE(**more))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not steps)]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(TRAINED_ON, trainer(trainers.BpeTrainer, initial_alphabet=ALPHABET))
    return core


def trainer(kind: Any, **more: Any) -> Any:
    return kind(vocab_size=700, special_tokens=SPECIAL, show_progress=False, **more)


def marked(decoder_strips: bool = True) -> Any:
    """The decoder of Llama 2."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if decoder_strips else [])])


def with_bytes(core: Tokenizer, **changes: Any) -> Tokenizer:
    """The same vocabulary with byte fallback: its tokens stand behind the special ones, as SentencePiece has them."""
    settings = json.loads(core.to_str())
    model = settings["model"]
    if model["type"] == "Unigram":
        model["vocab"] = model["vocab"][:4] + [[name, 0.0] for name in BYTES] + model["vocab"][4:]
        model["unk_id"] = 3
    else:
        names = [*SPECIAL, *BYTES, *(name for name in model["vocab"] if name not in SPECIAL)]
        model["vocab"] = {name: token for token, name in enumerate(names)}
        model |= {"unk_token": "<unk>", "fuse_unk": True}
    model["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(settings | changes))


def sentencepiece(step: Any, normalizer: Any = None, decoder: Any = None, fallback: bool = True) -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # no token spans two words
    core.train_from_iterator(TRAINED_ON, trainer(trainers.BpeTrainer))
    core.normalizer, core.pre_tokenizer, core.decoder = normalizer, step, decoder or marked()
    return with_bytes(core) if fallback else core


def metaspace(scheme: str, split: bool = False) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def unigram(normalizer: Any = None, step: Any = None, fallback: bool = True) -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.normalizer, core.pre_tokenizer = normalizer, step or metaspace("always")
    core.train_from_iterator(TRAINED_ON, trainer(trainers.UnigramTrainer, unk_token="<unk>"))
    core.decoder = marked()
    return with_bytes(core) if fallback else core


def llama() -> Tokenizer:
    return sentencepiece(None, LLAMA)


def with_added(*tokens: Any, core: Callable[[], Tokenizer] = byte_level) -> Tokenizer:
    made = core()
    made.add_tokens([token for token in tokens if not token.special])
    made.add_special_tokens([token for token in tokens if token.special])
    return made


def holes() -> Tokenizer:
    """The last tokens have larger ids than there are tokens."""
    settings = json.loads(byte_level().to_str())
    vocab = settings["model"]["vocab"]
    last = max(vocab.values())
    settings["model"]["vocab"] = {n: i + 40 if i > last - 20 else i for n, i in vocab.items()}
    return Tokenizer.from_str(json.dumps(settings))


def word_piece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    core.train_from_iterator(TRAINED_ON, trainer(trainers.WordPieceTrainer))
    return core


def words() -> Tokenizer:
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(TRAINED_ON, trainer(trainers.WordLevelTrainer))
    return core


def end_of_word() -> Tokenizer:
    """The first GPT's: words end in a mark, spaces are dropped."""
    core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder("</w>")
    core.train_from_iterator(TRAINED_ON, trainer(trainers.BpeTrainer, end_of_word_suffix="</w>"))
    return core


def characters() -> Tokenizer:
    """One token for each character of a small alphabet, and no decoder."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.train_from_iterator(
        ["".join(TRAINED_ON)], trainer(trainers.BpeTrainer, limit_alphabet=200, max_token_length=1)
    )
    return core


def lowercase_words() -> Tokenizer:
    return sentencepiece(metaspace("first"), normalizers.Lowercase())


def normalized(normalizer: Any) -> Tokenizer:
    core = byte_level()
    core.normalizer = normalizer
    return core


SPLIT = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
NMT_NFKC = normalizers.Sequence(
    [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
)
LOSSLESS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "byte-level BPE with a space before the text": lambda: byte_level(prefix=True),
    "byte-level BPE split by a pattern": lambda: byte_level(SPLIT),
    "byte-level BPE under NFC": lambda: normalized(normalizers.NFC()),
    "byte-level BPE that takes whole words": lambda: byte_level(ignore_merges=True),
    "SentencePiece BPE, space before the text, older make": llama,
    "SentencePiece BPE, mark first": lambda: sentencepiece(metaspace("first")),
    "SentencePiece BPE, mark always": lambda: sentencepiece(metaspace("always")),
    "SentencePiece BPE, mark never": lambda: sentencepiece(metaspace("never")),
    "SentencePiece BPE, mark first, words apart": lambda: sentencepiece(metaspace("first", split=True)),
    "SentencePiece BPE, spaces replaced": lambda: sentencepiece(
        None, normalizers.Replace(" ", "▁"), marked(decoder_strips=False)
    ),
    "SentencePiece BPE under NFKC, with bytes": lambda: sentencepiece(metaspace("first"), normalizers.NFKC()),
    "Unigram with bytes": unigram,
    "Unigram with bytes, mark never": lambda: unigram(step=metaspace("never")),
    "Unigram with bytes, mark first": lambda: unigram(step=metaspace("first")),
    "added tokens": lambda: with_added(
        AddedToken("<tool>", normalized=False), AddedToken("    ", normalized=True), AddedToken("Zebra")
    ),
    "added tokens that swallow spaces": lambda: with_added(
        AddedToken("<mask>", lstrip=True, special=True), AddedToken("peace", lstrip=True, rstrip=True)
    ),
    "added tokens in SentencePiece": lambda: with_added(
        AddedToken("<tool>", normalized=False), AddedToken("Zebra"), core=llama
    ),
    "holes": holes,
}
REFUSED: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "lower case": (lambda: normalized(normalizers.Lowercase()), "'A' comes back as 'a'"),
    "lower case with byte fallback": (lowercase_words, "'A' comes back as 'a'"),
    "WordPiece": (word_piece, "' a' comes back as 'a'"),
    "words": (words, "' a' comes back as 'a'"),
    "end-of-word marks": (end_of_word, "comes back as '!</w>'"),
    "Unigram under NFKC": (lambda: unigram(NMT_NFKC, fallback=False), "comes back as"),
    "accents stripped": (
        lambda: unigram(
            normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), fallback=False
        ),
        "comes back as",
    ),
    "white space collapsed": (
        lambda: normalized(normalizers.Replace(Regex(r"\s+"), " ")),
        r"'\\na' comes back as ' a'",
    ),
}
TEXTS = [
    "The owl sings.",
    " The owl sings.",
    "\nThe owl.\n\n  We hear  it. ",
    "Café e\u0301 \u1e9b\u0323 ﬁ Ａ ① \u00a0\u3000x",
    "日本語。ไทย 😀👨‍👩‍👧 \u2028y\u0085z",
    "▁a ▁▁ Ġ <0x0A> <s> </s> <unk><pad> <mask> <tool> Zebra  peace  .",
    "\t\r\n\x0b\x0c\x00\x7f",
    "    four  ",
    " ",
    "",
]


@cache
def made(name: str) -> PreTrainedTokenizerFast:
    core = (LOSSLESS | {name: make for name, (make, _) in REFUSED.items()})[name]()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


class Chunks(Segmenter):
    """Cuts anywhere: what a sentence begins with must not matter."""

    def split(self, text: str) -> list[str]:
        return [text[at : at + 7] for at in range(0, len(text), 7)]


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_text_comes_back(name: str) -> None:
    exact = lossless(made(name))
    exact.check()
    for text in TEXTS:
        for begins in (True, False):
            ids = exact.encode(text, begins=begins)
            assert exact.decode(ids, begins=begins) == text
            assert not {0, 1, 2, 3} & set(ids), "special tokens are no text"
            sizes = exact.byte_sizes(ids, text)
            assert sum(sizes) == len(text.encode())
            assert min(sizes, default=0) >= 0
            assert max(ids, default=0) < exact.vocab_size
    with pytest.raises(CoverageError, match="do not spell"):
        exact.byte_sizes(exact.encode("The owl."), "The owl")


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(name: str, text: str) -> None:
    exact = lossless(made(name))
    assert exact.decode(exact.encode(text), begins=True) == text
    assert exact.decode(exact.encode(text, begins=False)) == text


@pytest.mark.parametrize("name", LOSSLESS)
def test_sentences_one_by_one_are_the_text(name: str) -> None:
    exact = lossless(made(name))
    for text in TEXTS:
        sentences = sentences_to_ids(text, Chunks(SegmenterOptions(max_tokens=16)), made(name))
        assert "".join(sentence for sentence, _ in sentences) == text
        tokens = [token for _, ids in sentences for token in ids]
        assert exact.decode(tokens, begins=True) == text
        for number, (sentence, ids) in enumerate(sentences):
            assert exact.decode(ids, begins=number == 0) == sentence


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_stream_gives_the_text_whatever_comes_together(name: str) -> None:
    exact = lossless(made(name))
    for text in TEXTS:
        ids = exact.encode(text)
        for step in (1, 2, 5):
            stream = exact.streamed(begins=True)
            pieces = [stream.add(ids[at : at + step]) for at in range(0, len(ids), step)]
            assert "".join(pieces) + stream.add([], ends=True) == text
            assert "\ufffd" not in "".join(pieces)


def test_an_incomplete_character_is_held_back_and_shown_at_the_end() -> None:
    exact = lossless(made("byte-level BPE"))
    ids = exact.encode("a 😀")[:-1]
    stream = exact.streamed()
    assert stream.add(ids) == "a "
    assert stream.add([], ends=True) == "\ufffd"


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_changes_text_is_refused_at_once(name: str) -> None:
    tokenizer = made(name)
    began = time.perf_counter()
    with pytest.raises(DataError, match=REFUSED[name][1]) as caught:
        lossless(tokenizer).check()
    assert time.perf_counter() - began < 5
    assert "byte fallback" in caught.value.fix


@pytest.mark.parametrize("core", [lambda: unigram(fallback=False), characters])
def test_a_character_without_a_token_is_named(core: Callable[[], Tokenizer]) -> None:
    exact = LosslessTokenizer(core().to_str())
    exact.check()
    assert exact.decode(exact.encode("The owl sings."), begins=True) == "The owl sings."
    with pytest.raises(DataError, match=r"no token for '☃' \(U\+2603\)"):
        exact.encode("snow ☃")


def test_bytes_of_each_token() -> None:
    """As in Llama 2: spaces are written as marks, and characters out of vocabulary as one token a byte."""
    vocab = {
        token: i for i, token in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abn", "▁a"])
    }
    core = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    exact = lossless(PreTrainedTokenizerFast(tokenizer_object=core))
    text = "ab an 中b"
    ids = exact.encode(text)
    assert [core.id_to_token(i) for i in ids] == ["a", "b", "▁a", "n", "▁", "<0xE4>", "<0xB8>", "<0xAD>", "b"]
    expected = [1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert exact.byte_sizes(ids, text) == expected
    # Cut where the tokenizer would not: " a" in two.
    other = [*ids[:2], vocab["▁"], vocab["a"], *ids[3:]]
    assert exact.byte_sizes(other, text) == [1, 1, 1, 1, *expected[3:]]
    with pytest.raises(CoverageError):
        exact.byte_sizes(ids[:-1], text)


def test_usual_tokens_stay_what_they_are() -> None:
    """Only where the tokenizer would change the text does its encoding differ from transformers'."""
    for name in LOSSLESS.keys() - {"added tokens that swallow spaces"}:
        tokenizer = made(name)
        for text in ("The people of this nation.", "a year of peace,\nand order"):
            assert (
                lossless(tokenizer).encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
            ), name


def test_the_beginning_of_a_text_is_tokenized_as_the_model_knows_it() -> None:
    exact = lossless(made("SentencePiece BPE, space before the text, older make"))
    names = exact.backend.id_to_token
    assert exact.prefix == " "
    assert names(exact.encode("The")[0]).startswith("▁")
    assert not names(exact.encode("The", begins=False)[0]).startswith("▁")


def test_a_pad_token_that_is_ordinary_text_stays_text() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>", pad_token="!")
    exact = lossless(tokenizer)
    exact.check()
    assert exact.decode(exact.encode("Oh!"), begins=True) == "Oh!"


def test_it_can_be_sent_to_another_process() -> None:
    exact = lossless(made("SentencePiece BPE, mark first"))
    again = pickle.loads(pickle.dumps(exact))
    text = TEXTS[5]
    assert again.encode(text) == exact.encode(text)
    assert again.backend.encode_special_tokens


def test_segmenters_that_use_the_tokenizer_cut_text_of_any_make() -> None:
    for name in LOSSLESS:
        segmenter = get_registry().create("segmenter", "fixed", {"tokens": 3, "max_tokens": 12})
        segmenter.prepare(made(name))
        for text in TEXTS[:-1]:
            assert "".join(s for s, _ in sentences_to_ids(text, segmenter, made(name))) == text


# ---- from the tokenizer to the written text

TOY = [
    "The sun is up.",
    " The bird sings.",
    " We are glad.",
    " The night comes.\n",
    "The moon is up.\n",
    "An owl calls.\n",
]


@pytest.fixture
def toy_backbone(tmp_path: Path) -> Callable[[str], str]:
    """An untrained Llama with a tokenizer of some make, in a folder."""

    def save(name: str) -> str:
        tokenizer = made(name)
        shape = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        config = LlamaConfig(vocab_size=lossless(tokenizer).vocab_size, **shape, **ids)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "backbone")
        tokenizer.save_pretrained(tmp_path / "backbone")
        return str(tmp_path / "backbone")

    return save


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.mark.parametrize("command", ["train-vae", "baseline"])
def test_the_command_line_refuses_a_tokenizer_before_training(
    command: str, toy_backbone: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = toy_backbone("lower case")
    assert call(command, "quickstart", "--backbone", backbone, "--out", tmp_path / "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"backbone.model: '{backbone}': the tokenizer changes text: 'A' comes back as 'a'" in said
    assert "fix: use a model whose tokenizer keeps every character" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["SentencePiece BPE, space before the text, older make", "SentencePiece BPE, mark first", "holes"]
)
def test_a_model_that_knows_a_text_by_heart_writes_it_to_the_byte(
    name: str, toy_backbone: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENTCOMPRESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for number in range(18):
        document = "".join((TOY * 5)[number % 6 : number % 6 + 13 + number // 6]).lstrip()
        (tmp_path / "text" / f"{number}.txt").write_text(document, encoding="utf-8")
    quick = {
        "loss": "cross-entropy",
        "learning_rate": 3e-3,
        "eval_batches": 1,
        "save_every": None,
        "precision": "fp32",
    }
    recipe = {
        "name": "toy",
        "backbone": {"model": toy_backbone(name)},
        "segmenter": {"name": "regex", "options": {"preset": "sentence", "max_tokens": 32}},
        "fusion": {"name": "attention", "options": {"latents": 2}},
        "vae": {"conditioning": "prefix", "dropout": 0.0},
        "data": {"name": "text", "options": {"paths": [str(tmp_path / "text")], "heldout_documents": 1}},
        "train_vae": {**quick, "steps": 150, "sentences_per_batch": 12, "eval_every": 150},
        "graft": {**quick, "steps": 200, "passages_per_batch": 5, "max_sentences": 16, "eval_every": 200},
        "baseline": {"learning_rate": 1e-3},
    }
    (tmp_path / "toy.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    for stage in ("train-vae", "graft", "baseline"):
        assert call(stage, tmp_path / "toy.yaml", "--out", tmp_path / "out") == 0
    generator = SentenceGenerator(load_sentence_lm(tmp_path / "out/graft").eval(), made(name))
    text = "".join(TOY * 3)
    wanted = GenerationSettings(max_new_tokens=30, stop_threshold=1)
    # In sentences, between them, with and without the space or line end that follows.
    ends = [
        text.index(part, 40) + len(part)
        for part in ("The bird", " glad.", " glad. ", "comes.", "comes.\n", "moon is")
    ]
    prompts = [text[:end] for end in ends]
    for prompt, result in zip(prompts, generator.generate(prompts, wanted), strict=True):
        assert len(result.text) > 30
        assert text[len(prompt) :].startswith(result.text), prompt
        assert "".join(generator.stream(prompt, wanted)) == result.text
    assert call("bench", "quality", tmp_path / "out") == 0
    quality = json.loads((tmp_path / "out/bench/results.json").read_text(encoding="utf-8"))["quality"]
    for score in quality:
        assert all(row["bytes"] == row["covered_bytes"] > 0 for row in score["documents"])
    assert quality[0]["bits_per_byte"] < 0.3
