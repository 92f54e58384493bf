import functools
import hashlib
import itertools
import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_pretrain.cli import main
from titans_pretrain.data.tokenizer_command import train_model
from titans_pretrain.data.tokens import Tokenizer, cut
from titans_pretrain.errors import DataError

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "configs" / "corpus"
NAMES = ("demo", "titans-32k")

texts = st.text(st.sampled_from("ab  \n\t.é文'"), max_size=120)


@functools.cache
def load(name):
    return Tokenizer.load(ROOT / "tokenizers" / f"{name}.model")


def chapters():
    with lzma.open(CORPUS / "books.jsonl.xz", "rt", encoding="utf-8") as f:
        return [json.loads(line)["text"] for line in f]


@pytest.mark.parametrize("name", NAMES)
def test_card_fits_the_model(name):
    card = (ROOT / "tokenizers" / f"{name}.md").read_text()
    model = (ROOT / "tokenizers" / f"{name}.model").read_bytes()
    assert f"sha256 {hashlib.sha256(model).hexdigest()}" in card
    assert f"{load(name).vocab_size:,} pieces" in card
    assert re.search(r"\d\.\d{3} bytes per token", card)


@pytest.mark.parametrize("name", NAMES)
def test_the_cards_command_gives_the_cards_hash(name, tmp_path, monkeypatch):
    """Run as printed, but for the output path."""
    card = (ROOT / "tokenizers" / f"{name}.md").read_text()
    [command] = re.findall(r"^titans-pretrain (tokenizer train .*)$", card, re.M)
    out = tmp_path / "again.model"
    monkeypatch.chdir(ROOT)
    assert main(command.replace(f"tokenizers/{name}.model", str(out)).split()) == 0
    assert Tokenizer.load(out).hash == load(name).hash
    again = out.with_suffix(".md").read_text().replace(str(out), f"tokenizers/{name}.model")
    assert again.replace("# again", f"# {name}") == card


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_round_trips_without_unknowns(name):
    tokenizer = load(name)
    for text in chapters():
        ids = tokenizer.encode(text)
        assert (ids != tokenizer.unk).all()
        assert tokenizer.decode(ids) == text


def test_corpus_is_chapters():
    found = chapters()
    assert len(found) == 697 and len(set(found)) == 697
    assert min(map(len, found)) >= 390 and max(map(len, found)) < 150_000
    assert not any(re.match(r"(?i)(table of )?contents\b", text) for text in found)
    assert (CORPUS / "books.jsonl.xz").stat().st_size < 4e6


def test_demo_tokenizer_cuts_this_text_thus():
    tokenizer = load("demo")
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2, 3)
    pieces = tokenizer.processor.id_to_piece([int(i) for i in tokenizer.encode("all the\nman")])
    assert pieces == ["▁all", "▁the", "\n", "m", "an"]
    assert tokenizer.dtype == "<u2"


@given(text=texts, size=st.integers(2, 40), splits=st.lists(st.integers(0, 120), max_size=4))
def test_cutting_depends_on_the_text_alone(text, size, splits):
    bounds = [0, *sorted(min(s, len(text)) for s in splits), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(bounds)]
    for at_spaces in (True, False):
        pieces = list(cut(parts, at_spaces, size))
        assert pieces == list(cut([text], at_spaces, size))
        joined = "".join((" " if joint == "space" else "") + piece for piece, joint in pieces)
        assert joined == text
        assert all(len(piece) <= size + 1 for piece, _ in pieces)


@given(text=texts, size=st.integers(2, 40))
@pytest.mark.parametrize("name", NAMES)
def test_encoding_in_pieces_keeps_the_text(name, text, size):
    """Whatever the cuts, decoding gives back a text without unknown characters."""
    if name == "demo":
        text = text.replace("\t", "").replace("文", "")
    tokenizer = load(name)
    pieces = [i for piece in tokenizer._encode_pieces([text], size) for i in piece]
    assert tokenizer.decode(pieces) == tokenizer.decode(tokenizer.encode(text)) == text


def test_encoding_in_pieces_equals_encoding_the_whole():
    """Cut at single spaces, where pieces never reach across."""
    tokenizer = load("titans-32k")
    text = "\n\n".join(chapters()[:30])
    assert len(text) > 100_000
    whole = tokenizer.processor.encode(text)
    assert tokenizer.encode(text).tolist() == whole
    for step in (1000, 77_777):
        parts = [text[i : i + step] for i in range(0, len(text), step)]
        assert tokenizer.encode_parts(parts).tolist() == whole


def test_training_is_refused_where_the_text_is_too_small(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("a few words and no more")
    with pytest.raises(DataError, match="vocab-size 32000"):
        train_model([str(path)], 32_000)
    path.write_text("")
    with pytest.raises(DataError, match="no usable document"):
        train_model([str(path)], 300)


def test_import_checks_the_special_ids(tmp_path, capsys):
    import sentencepiece

    path = tmp_path / "foreign.model"
    with path.open("wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chapters()[0].split("\n")),
            model_writer=f,
            model_type="bpe",
            vocab_size=200,
            minloglevel=2,
        )  # the library's own default: no pad
    out = tmp_path / "imported.model"
    command = ["tokenizer", "import", str(path), "--out", str(out)]
    assert main(command) == 3
    assert "no pad id" in capsys.readouterr().err and not out.exists()
    assert main([*command, "--pad", "200"]) == 3
    assert main([*command, "--pad", "0"]) == 0
    assert out.read_bytes() == path.read_bytes()
    assert "--pad 0" in out.with_suffix(".md").read_text()
    assert main(["tokenizer", "inspect", str(path)]) == 0
    assert "pad -1" in capsys.readouterr().out


def test_not_a_model(tmp_path):
    path = tmp_path / "text.model"
    path.write_text("not a model")
    with pytest.raises(DataError, match=r"text\.model"):
        Tokenizer.load(path)
    with pytest.raises(DataError, match="No such file"):
        Tokenizer.load(tmp_path / "none.model")


def test_help_is_quick():
    """The commands' arguments come without torch, and parquet's library with parquet alone."""
    code = (
        "import sys, titans_pretrain.data.prepare_command, titans_pretrain.data.tokenizer_command,"
        " titans_pretrain.data.inspect, titans_pretrain.data.baselines,"
        " titans_pretrain.data.prepare, titans_pretrain.data.benchmark;"
        "assert not {'torch', 'webdataset', 'pyarrow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
