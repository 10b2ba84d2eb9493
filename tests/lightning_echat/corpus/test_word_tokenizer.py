import json
import re

import pytest
from transformers import AutoTokenizer

from lightning_echat.contracts import UserError
from lightning_echat.corpus.dialogues import Split
from lightning_echat.corpus.synthesize import write_texts
from lightning_echat.corpus.word_tokenizer import MAX_VOCABULARY, fit_tokenizer, label_tokens


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.jsonl"
    write_texts(path, [Split(name="train", number=0, dialogues=3000, speakers=300)], seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    size = fit_tokenizer(texts, out)
    loaded = AutoTokenizer.from_pretrained(out)
    assert len(loaded) == size <= MAX_VOCABULARY
    return loaded


def test_every_word_of_the_corpus_is_one_token(tokenizer, texts):
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    for row in rows:
        pieces = re.findall(r" ?[A-Za-z]+|'s| ?[^\sA-Za-z]|\s", row)
        assert len(tokenizer.encode(row, add_special_tokens=False)) <= len(pieces), row


@pytest.mark.parametrize(
    "text",
    [
        "could you find the quiet cafe",
        "  two  spaces\n\n\tand a tab \r\n",
        "naïve café, 漢字 😀 e\u0301 \u200b \u00a0 \x00",
        "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>",
        "<think>words: a ; age: <old> ; reply: <comforting><think end>i am sorry.",
        " <happy> <think end> <Happy><unknown>",
        "",
        " ,.?' do n't can't we 're",
    ],
)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_labels_and_markers_are_one_token_each_and_are_not_stripped_on_decoding(tokenizer):
    for token in label_tokens():
        ids = tokenizer.encode(f"a{token}b", add_special_tokens=False)
        assert len(ids) == 3, token
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"a{token}b"


def test_turn_markers_are_special_and_stripped_on_request(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer.encode("<|im_start|>yes<|im_end|>", add_special_tokens=False)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "yes"


def test_nothing_is_added_to_a_text_by_itself(tokenizer):
    assert tokenizer.encode("yes") == tokenizer.encode("yes", add_special_tokens=False)


def test_fitting_without_texts_is_the_user_s_mistake(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        fit_tokenizer(tmp_path / "none.jsonl", tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        fit_tokenizer(tmp_path / "empty.jsonl", tmp_path)
