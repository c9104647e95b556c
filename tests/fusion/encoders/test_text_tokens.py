"""The rule of truncation, what it counts, and text that no tokenizer likes."""

from __future__ import annotations

import re

import pytest

from data.errors import InputError
from data.lab_text import Result, read_lab_text, write_lab_text
from fusion.encoders.text_base import find_base
from fusion.encoders.text_tokens import REMEMBERED, Tally, Tokenizer

LABS = write_lab_text([Result(f"Test {number}", f"{number}.5", "mg/dL") for number in range(6)])
NOTE = "Chief Complaint: chest pain\nPast Medical History: renal failure, edema"


@pytest.fixture
def tokenizer(bases):
    def make(max_length, family="llama", **options):
        return Tokenizer(find_base(str(bases[family])), max_length, **options)

    return make


def decoded(tokenizer, tokens):
    return tokenizer._tokenizer.decode(list(tokens.ids), skip_special_tokens=False)


def test_a_text_that_fits_is_bos_note_line_break_results(tokenizer):
    made = tokenizer(256)
    tokens = made.encode(NOTE, LABS)
    assert decoded(made, tokens) == f"<bos>{NOTE}\n{LABS}"
    assert (tokens.note_cut, tokens.labs_cut, tokens.empty) == (0, 0, False)


def test_bert_has_cls_and_sep(tokenizer):
    made = tokenizer(64, "bert")
    tokens = made.encode("chest pain", "")
    assert tokens.ids[0] == 2
    assert tokens.ids[-1] == 3
    cut = made.encode("chest pain " * 100, "")
    assert len(cut.ids) == 64
    assert cut.ids[-1] == 3, "what ends a text is never cut"


def test_the_note_is_cut_before_the_results_and_keeps_its_head(tokenizer):
    made = tokenizer(256)
    long = NOTE + " edema" * 400
    tokens = made.encode(long, LABS)
    text = decoded(made, tokens)
    assert len(tokens.ids) == 256
    assert text.startswith(f"<bos>{NOTE}")
    assert text.endswith(f"\n{LABS}"), "results are whole"
    assert tokens.labs_cut == 0
    whole = len(made._tokenizer(long)["input_ids"])
    labs = len(made._tokenizer("\n" + LABS, add_special_tokens=False)["input_ids"])
    assert tokens.note_cut == whole + labs - 256


@pytest.mark.parametrize("length", [40, 64, 96, 120])
def test_results_that_do_not_fit_are_cut_by_whole_entries(tokenizer, length):
    """Sanity check 33: truncation keeps at least one result."""
    made = tokenizer(length)
    tokens = made.encode(NOTE * 20, LABS * 4 if length > 100 else LABS)
    text = decoded(made, tokens)
    note, labs = text.split("\n" + LABS[:10])
    kept = read_lab_text(LABS[:10] + labs)
    assert len(tokens.ids) <= length
    assert kept
    assert kept == read_lab_text(LABS * 4)[: len(kept)]
    assert labs.endswith(";"), "a value is never cut in two"
    assert tokens.labs_cut > 0
    assert note.removeprefix("<bos>").startswith("Chief")


def test_results_alone_may_fill_the_whole_length(tokenizer):
    made = tokenizer(64)
    alone, beside = made.encode("", LABS), made.encode(NOTE * 9, LABS)
    assert len(read_lab_text(decoded(made, alone))) > len(read_lab_text(decoded(made, beside)))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_empty_text_is_the_special_tokens_alone(tokenizer, family):
    made = tokenizer(64, family)
    for note in ("", "  \n\t", "\0\0"):
        tokens = made.encode(note, "")
        assert tokens.empty
        assert tokens.ids == ((0,) if family == "llama" else (2, 3))


def test_null_bytes_other_scripts_and_long_texts_are_read(tokenizer):
    made = tokenizer(256)
    assert made.encode("chest\0pain", "").ids == made.encode("chest pain", "").ids
    for text in ("胸痛 発熱", "боль в груди", "ألم", "🫀\u202e", "\ud7ff"):
        assert text in decoded(made, made.encode(text, ""))
    huge = made.encode("dyspnea " * 1_250_000, LABS)
    assert len(huge.ids) == 256
    assert huge.note_cut > 10_000


def test_a_word_that_looks_like_a_special_token_is_text(tokenizer):
    made = tokenizer(128)
    tokens = made.encode("before <eos> after <bos>", "")
    assert list(tokens.ids).count(0) == 1
    assert 1 not in tokens.ids
    assert "<eos>" in decoded(made, tokens)


def test_padding_is_the_tokenizers_own_or_its_end_of_text(tokenizer, bases):
    assert tokenizer(64).pad_token == "<eos>"
    assert tokenizer(64, "bert").pad_token == "[PAD]"
    assert tokenizer(64, pad_token="!").pad_token == "!"


def test_without_any_token_to_pad_with_one_must_be_named(bases, tmp_path):
    import shutil

    folder = shutil.copytree(bases["llama"], tmp_path / "base")
    config = folder / "tokenizer_config.json"
    config.write_text(re.sub(r'"eos_token": "<eos>",?', "", config.read_text()))
    with pytest.raises(InputError, match=r"model\.pad_token: .*neither a padding nor an end-of-te"):
        Tokenizer(find_base(str(folder)), 64)
    assert Tokenizer(find_base(str(folder)), 64, "<eos>").pad_id == 1


def test_what_was_cut_is_counted_and_counted_anew(tokenizer):
    made, tally = tokenizer(64), Tally()
    read = [made.encode(*pair) for pair in ((NOTE, ""), (NOTE * 9, LABS), ("", ""))]
    tally.add([read[0], read[1], None])
    counts = {name.removeprefix("text_"): count for name, count in tally.take().items()}
    assert [counts[name] for name in ("texts", "notes_cut", "labs_cut", "empty")] == [2, 1, 1, 1]
    assert counts["tokens"] == len(read[0].ids) + len(read[1].ids)
    assert counts["tokens_cut"] == read[1].note_cut + read[1].labs_cut > 0
    assert set(tally.take().values()) == {0}


def test_only_so_many_texts_are_remembered(tokenizer):
    made = tokenizer(64)
    first = made.encode("note 0", "")
    assert made.encode("note 0", "") is first
    for number in range(1, REMEMBERED + 1):
        made.encode(f"note {number}", "")
    assert made.encode("note 0", "") is not first
    assert made.encode("note 0", "") == first
