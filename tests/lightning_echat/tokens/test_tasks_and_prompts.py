import pytest
import torch
import yaml

from lightning_echat.contracts import IGNORE_INDEX, UserError
from lightning_echat.tokens import prompts
from lightning_echat.tokens.characters import CTC_ALPHABET, spell
from lightning_echat.tokens.paralinguistics import LABEL_SETS, check_label, class_indices, parse_label_tags
from lightning_echat.tokens.prompts import load_prompt_set
from lightning_echat.tokens.tasks import ALL_TASK_NAMES, DialogueTask, task_from_name, traits_of

SHIPPED = sorted(path.stem for path in prompts._FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", ALL_TASK_NAMES)
def test_a_task_name_is_read_back(name):
    task = task_from_name(name, labels=("age",))
    assert task.name == name
    assert traits_of(name) is task.traits
    assert task.labels == (("age",) if task.traits.labels else ())


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'transcribe'"):
        task_from_name("transcript")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "label"}, "needs labels"),
        ({"kind": "transcribe", "labels": ("age",)}, "takes no labels"),
        ({"kind": "label", "labels": ("mood",)}, "unknown label set 'mood'"),
        ({"kind": "text_to_text", "thinking": "label"}, "thinking goes with"),
        ({"kind": "speech_to_text", "layout": "interleaved"}, "spoken targets only"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DialogueTask(**options)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_prompt_set_knows_every_task(name):
    prompt_set = load_prompt_set(name)
    assert prompt_set.name == name
    assert set(prompt_set.system) == set(ALL_TASK_NAMES)
    for task_name in ("label", "transcribe_and_label"):
        task = task_from_name(task_name, labels=("age", "event"))
        assert "age, event" in prompt_set.instruction(task, 0)
    # Two tasks that a model could not tell apart would be one task.
    assert len({(prompt_set.system[n], tuple(prompt_set.instructions[n])) for n in ALL_TASK_NAMES}) >= 13


def test_an_unknown_prompt_set_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'english'"):
        load_prompt_set("englisch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["tasks"].pop("label"), "tasks.label is missing"),
        (lambda content: content["tasks"].update(sing={"system": ""}), "tasks.sing is no task"),
        (lambda content: content.update(thinking={"fields": {"mood": "mood: "}}), "thinking.fields.mood"),
        (lambda content: content.pop("user"), "user"),
        (lambda content: content.update(tasks=None), "NoneType"),
    ],
)
def test_a_broken_prompt_file_says_what_is_wrong(tmp_path, change, message):
    content = yaml.safe_load((prompts._FOLDER / "compact.yaml").read_text())
    change(content)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message):
        load_prompt_set(str(path))


def test_label_tags_are_read_in_the_order_asked():
    assert parse_label_tags("hi there<sad><other>", ("emotion", "event")) == (
        "hi there",
        {"emotion": "sad", "event": "other"},
    )


def test_a_tag_of_another_set_counts_as_no_label():
    assert parse_label_tags("<old><sad>", ("emotion", "age")) == ("", {})


def test_labels_become_class_indices():
    assert class_indices({"gender": "male", "event": "none"}).tolist() == [
        IGNORE_INDEX,
        1,
        IGNORE_INDEX,
        0,
        IGNORE_INDEX,
    ]
    assert len(class_indices({})) == len(LABEL_SETS)


def test_an_unknown_label_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'angry'"):
        check_label("emotion", "anger")
    with pytest.raises(ValueError, match="unknown label set"):
        check_label("mood", "sad")


def test_ctc_spells_letters_and_leaves_the_blank_free():
    assert spell("Ab z!").tolist() == [2, 3, 1, 27]
    assert spell("你好").tolist() == []
    assert int(spell(CTC_ALPHABET).min()) == 1
    assert spell("x").dtype == torch.long


def changed_set(tmp_path, **changes) -> str:
    content = {**yaml.safe_load((prompts._FOLDER / "compact.yaml").read_text()), **changes}
    path = tmp_path / "set.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_earlier_turns_are_written_like_the_last_unless_a_prompt_set_says_otherwise(tmp_path):
    """A set made before `history` existed must not change what a model is trained on."""
    for name in SHIPPED:
        prompt_set = load_prompt_set(name)
        plain = prompts.HistoryFormat(assistant=prompt_set.assistant, turn_end=prompt_set.history.turn_end)
        assert prompt_set.history == plain
    said = load_prompt_set(changed_set(tmp_path, history={"speech_codes": True, "assistant": "x"})).history
    assert (said.assistant, said.speech_codes, said.speech_marks, said.end_of_text) == ("x", True, True, True)
    with pytest.raises(UserError, match="speech_code"):
        load_prompt_set(changed_set(tmp_path, history={"speech_code": True}))


def test_instructions_may_belong_to_certain_labels(tmp_path):
    tasks = yaml.safe_load((prompts._FOLDER / "compact.yaml").read_text())["tasks"]
    tasks["label"]["instructions_for"] = {"age, gender": ["who", "whom"]}
    prompt_set = load_prompt_set(changed_set(tmp_path, tasks=tasks))
    assert prompt_set.instruction(DialogueTask(kind="label", labels=("age", "gender")), 3) == "whom"
    # Another order is another answer.
    assert prompt_set.instruction(DialogueTask(kind="label", labels=("gender", "age")), 3) == "gender, age"
    tasks["label"]["instructions_for"] = {"age, mood": ["who"]}
    with pytest.raises(UserError, match=r"instructions_for\.mood is no label set"):
        load_prompt_set(changed_set(tmp_path, tasks=tasks))
