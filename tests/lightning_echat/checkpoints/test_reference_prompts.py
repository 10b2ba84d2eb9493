"""Prompts come out of a clone without any of its code being run."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_echat.checkpoints.reference_prompts import (
    OUTPUT_TYPES,
    ReferencePrompts,
    read_clone,
    reference_prompt_set,
)
from lightning_echat.contracts import DialogueSample, Turn, UserError
from lightning_echat.tokens.dialogue_template import DialogueTokenizer
from lightning_echat.tokens.prompts import load_prompt_set
from lightning_echat.tokens.tasks import ALL_TASK_NAMES, DialogueTask
from lightning_echat.tokens.thinking import parse_thinking, write_label_thinking

MODEL = """
import os, not_installed
os.mkdir("executed")

class Model:
    def history(self):
        assistant_start = "<e><a>"
        user_end = "<e>"
        assistant_end = "<z>"

    def forward(self, batch):
        output_type = batch["output_type"]
        old = "SYS old"
        listening = "SYS ’listen"
        spoken = "SYS spoken"
        thinking = "SYS thinking"
        # a remark
        if output_type == "text":
            system_prompt = listening
        elif output_type == "speech2text_token" or output_type == "speech2text_token_history":
            system_prompt = spoken
        elif output_type == "s2t_chat" or output_type == "text2text":
            system_prompt = old
        elif output_type == "s2t_chat_think":
            system_prompt = thinking
        elif output_type == "speech2text_token_think":
            system_prompt = thinking
        elif output_type == "speech2text_token_streaming":
            system_prompt = spoken
        elif output_type in ("nothing",):
            system_prompt = old
        elif output_type == "text2token" or output_type == "text2token_streaming":
            system_prompt = old
        else:
            system_prompt = old
        system_prompt = system_prompt + "<u>"
        if output_type == "text":
            wavs = batch["feats"]
"""
LABEL_THINKING = """
import os
os.mkdir("executed")

def process(q_txt, age_tag, gender_tag, q_emotion_tag, caption_tag, emotion_tag, txt):
    told = f"no thinking {q_txt}"
    think = f"<hm>words={q_txt};who={age_tag};sex={gender_tag};mood={q_emotion_tag};" \\
        f"noise={caption_tag};tone={emotion_tag};so I answer<hm end>"
    return f"{think}{txt}"
"""
INSTRUCTIONS = {
    "<TRANSCRIBE>": ["write"],
    "<TRANSCRIBE> <EMOTION>": ["write and feel"],
    "<AGE> <GENDER>": ["who"],
    "<TRANSCRIBE> <PUNCTUATION>": ["no task of ours"],
}


@pytest.fixture
def clone(tmp_path) -> Path:
    root = tmp_path / "clone" / "OSUM-EChat"
    (root / "wenet/osum_echat").mkdir(parents=True)
    (root / "conf").mkdir()
    (root / "wenet/osum_echat/llmasr_model_instruct_version.py").write_text(MODEL, encoding="utf-8")
    (root / "wenet/dataset/process").mkdir(parents=True)
    (root / "wenet/dataset/process/processor_tag_think.py").write_text(LABEL_THINKING, encoding="utf-8")
    (root / "conf/prompt_config.yaml").write_text(yaml.safe_dump(INSTRUCTIONS), encoding="utf-8")
    return tmp_path / "clone"


def test_prompts_are_read_and_nothing_is_executed(clone, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    prompts = read_clone(clone)
    assert not Path("executed").exists()
    assert prompts.system["text"] == "SYS ’listen"
    assert prompts.system["speech2text_token_history"] == prompts.system["speech2text_token"] == "SYS spoken"
    assert set(OUTPUT_TYPES.values()) <= set(prompts.system)
    assert (prompts.user, prompts.assistant) == ("<u>", "<e><a>")
    assert (prompts.earlier_user_end, prompts.earlier_reply_end) == ("<e>", "<z>")
    assert read_clone(clone / "OSUM-EChat") == prompts


def test_a_prompt_set_of_a_clone_is_an_ordinary_one(clone, tmp_path):
    path = tmp_path / "set.yaml"
    path.write_text(yaml.safe_dump(reference_prompt_set(read_clone(clone)), allow_unicode=True), encoding="utf-8")
    prompt_set = load_prompt_set(str(path))
    assert set(prompt_set.system) == set(ALL_TASK_NAMES)
    assert prompt_set.instruction(DialogueTask(kind="transcribe"), 0) == "write"
    assert prompt_set.instruction(DialogueTask(kind="transcribe_and_label", labels=("emotion",)), 5) == "write and feel"
    assert prompt_set.instruction(DialogueTask(kind="label", labels=("age", "gender")), 0) == "who"
    assert prompt_set.instruction(DialogueTask(kind="label", labels=("gender",)), 0) == ""


def test_label_thinking_is_written_and_read_in_the_words_of_the_clone(clone, tmp_path):
    """Also as released weights spell labels: in capitals, and those of the reply in Chinese."""
    path = tmp_path / "set.yaml"
    words = reference_prompt_set(read_clone(clone))
    path.write_text(yaml.safe_dump(words, allow_unicode=True, sort_keys=False), encoding="utf-8")
    fmt = load_prompt_set(str(path)).thinking
    labels = {"age": "adult", "gender": "male", "emotion": "angry", "event": "throat_clearing"}
    written = write_label_thinking("go; away", labels, "neutral", fmt)
    start, end = "<hm>words=go; away;who=", ";so I answer<hm end>"
    ours = "<adult>;sex=<male>;mood=<angry>;noise=<throat_clearing>;tone=<neutral>"
    assert written == f"{start}{ours}{end}"
    theirs = f"{start}<YOUTH>;sex=<MALE>;mood=<anger>;noise=<THROAT CLEARING>;tone=<中立>{end}"
    for text in (written, theirs):
        parsed = parse_thinking(text + "sorry", fmt)
        assert (parsed.transcript, parsed.labels, parsed.reply_emotion) == ("go; away", labels, "neutral")
        assert parsed.well_formed and parsed.reply == "sorry"
    assert not parse_thinking(theirs.replace("中立", "?"), fmt).well_formed
    (clone / "OSUM-EChat/wenet/dataset/process/processor_tag_think.py").unlink()
    assert "thinking" not in reference_prompt_set(read_clone(clone))


def test_earlier_turns_stand_as_the_reference_has_them(clone, tmp_path, compact):
    """Without the marks of speech, with the end of the query twice, and with the reply's speech."""
    path = tmp_path / "set.yaml"
    path.write_text(yaml.safe_dump(reference_prompt_set(read_clone(clone)), allow_unicode=True), encoding="utf-8")
    tokenizer = DialogueTokenizer(
        compact.tokenizer,
        vocabulary=compact.vocabulary,
        prompt_set=load_prompt_set(str(path)),
        audio_strides=(2, 2, 2),
    )
    turns = []
    for text in ("one", "two"):
        turns.append(Turn(role="user", log_mel=torch.zeros(9, 80)))
        turns.append(Turn(role="assistant", text=text, speech_codes=torch.tensor([5, 6])))
    vocabulary = tokenizer.vocabulary
    audio, edge = [vocabulary.audio_placeholder] * 2, vocabulary.speech_boundary
    codes = [edge, vocabulary.first_code + 5, vocabulary.first_code + 6, edge]
    spoken = [*tokenizer.encode("SYS spoken<u>"), *audio, *tokenizer.encode("<e><e><a>one"), *codes]
    made = tokenizer.prompt(DialogueSample(turns=turns, key="k"), DialogueTask(kind="speech_to_speech"))
    marked = [vocabulary.input_speech_begin, *audio, vocabulary.input_speech_end]
    assert made.input_ids.tolist() == [*spoken, *tokenizer.encode("<z><u>"), *marked, *tokenizer.encode("<e><a>")]
    assert [clip.start for clip in made.clips] == [len(tokenizer.encode("SYS spoken<u>")), len(spoken) + 7]
    # A task that does not speak has no codes to read either.
    silent = tokenizer.prompt(DialogueSample(turns=turns, key="k"), DialogueTask(kind="speech_to_text"))
    assert edge not in silent.input_ids.tolist()


def test_the_fake_chat_task_is_another_system_text(reference_prompts):
    """`s2t_chat_fake` of the reference answers in text under the words of thinking aloud: data, not a template."""
    words = reference_prompt_set(reference_prompts)
    words["tasks"]["speech_to_text"]["system"] = reference_prompts.system["s2t_chat_fake"]
    assert words["tasks"]["speech_to_text"] == words["tasks"]["speech_to_speech.natural_thinking"]


def test_a_clone_without_prompts_is_refused(clone, tmp_path):
    file = clone / "OSUM-EChat/wenet/osum_echat/llmasr_model_instruct_version.py"
    file.write_text("x = 1")
    with pytest.raises(UserError, match="no prompts found"):
        read_clone(clone)
    file.write_text("def broken(:")
    with pytest.raises(UserError, match="cannot be parsed"):
        read_clone(clone)
    with pytest.raises(UserError, match="has no wenet"):
        read_clone(tmp_path / "nothing")
    with pytest.raises(UserError, match="no system prompt for s2t_chat, "):
        reference_prompt_set(ReferencePrompts(system={"text": "a"}, user="", assistant=""))
    file.write_text(MODEL)
    (clone / "OSUM-EChat/conf/prompt_config.yaml").write_text("- a list")
    with pytest.raises(UserError, match="does not map tasks"):
        read_clone(clone)
