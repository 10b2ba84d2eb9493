"""Small data in the three formats, written here, and the public implementation's own samples where they are at hand."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_echat.contracts import SAMPLE_RATE, PackedBatch, SampleRejected, UserError
from lightning_echat.corpus.pack import pack
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.decoding import decode_dialogue
from lightning_echat.data.dialogue_stream import DialogueReader, ReadingConfig
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.reference_data import files_of_unit
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard
from lightning_echat.data.training_stream import TrainingStream
from lightning_echat.data.verify import verify
from lightning_echat.tokens.tasks import task_from_name
from tests.lightning_echat.data.data_helpers import wav, write_tar

FAKE_DATA = Path(__file__).parents[4] / "shared" / "reference" / "fake_data"
THINK = "<S2TCHAT> <TEXT2TOKEN> <THINK>"
EXTRA = {"age": "<OLD>", "think_str": "an old man asks", "question": "where", "speech_token": [1, 2]}


def row(key="a", **changes):
    return {"key": key, "txt": "<开心>here", "wav": f"wav/{key}.wav", "task": THINK, "extra": EXTRA, **changes}


def members(key="a", *, task=THINK, **more):
    texts = {"txt": "<开心>here", "task": task, "extra": json.dumps(EXTRA), "lang": "none", **more}
    return {f"{key}.{name}": value.encode() for name, value in texts.items()} | {f"{key}.wav": wav()}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def describe(folder, **content):
    path = folder / "our.reference.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return str(path)


def raw(folder, rows, *, recordings=("a", "b"), **content):
    for name in recordings:
        (folder / "wav").mkdir(exist_ok=True)
        (folder / "wav" / f"{name}.wav").write_bytes(wav())
    write_lines(folder / "data.list", rows)
    return describe(folder, format="raw", data="data.list", **content)


def combine(folder, rows, tar, **content):
    write_tar(folder / "tars" / "part.tar", tar)
    write_lines(folder / "lists" / "part.list", rows)
    (folder / "lists" / "combines_list.txt").write_text("old/lists/part.list\n")
    (folder / "lists" / "combines_tar_root.txt").write_text("old/tars\n")
    return describe(folder, format="combine", data="lists/combines_list.txt", strip="old", **content)


def stored(description, counter=None):
    units = expand_shards([description])
    return [item for unit in units for item in read_shard(ShardPart(path=unit), counter=counter or SkipCounter())]


def read(description, counter=None):
    return [decode_dialogue(item) for item in stored(description, counter)]


def reasons(description):
    """Key -> reason of each row that cannot be used."""
    found = {}
    for item in stored(description):
        try:
            decode_dialogue(item)
        except SampleRejected as error:
            found[item.key] = error.reason
    return found


def three_formats(folder):
    """The same two dialogues in each format."""
    (folder / "raw").mkdir()
    (folder / "combine").mkdir()
    yield raw(folder / "raw", [row(), row("b")])
    write_tar(folder / "shard" / "part.tar", members() | members("b"))
    (folder / "shard" / "list.txt").write_text("-|part.tar\n\n")
    yield describe(folder / "shard", format="shard", data=["list.txt"])
    yield combine(folder / "combine", [row(), row("b")], members(txt="another text") | members("b", extra="{}"))


def test_the_three_formats_hold_the_same_dialogues(tmp_path):
    for description in three_formats(tmp_path):
        first, second = read(description)
        assert (first.key, second.key) == ("a", "b")
        for sample in (first, second):
            query, reply = sample.turns
            assert (query.text, reply.text, reply.thinking) == ("where", "here", "an old man asks")
            assert (query.labels, reply.labels) == ({"age": "old"}, {"emotion": "happy"})
            assert query.audio is not None and query.audio.numel() == SAMPLE_RATE // 2
            assert reply.speech_codes is not None and reply.speech_codes.tolist() == [1, 2]


def test_the_three_formats_are_packed_verified_and_trained_on(tmp_path, tokens, capsys):
    reading = ReadingConfig(tokens=tokens, batching=BatchingConfig(max_rows=2, pool=2, shuffle=1))
    tasks = [TaskConfig(kind="speech_to_speech", thinking="natural")]
    for number, description in enumerate(three_formats(tmp_path)):
        out = tmp_path / f"packed{number}"
        pack(Path(description), out)
        assert f"2 rows of {THINK} serve the task speech_to_speech" in capsys.readouterr().out
        for shards in ([str(out)], [description]):
            verify(shards)
            assert "2 samples, 2 usable" in capsys.readouterr().out
            stream = TrainingStream(reading, sources=[SourceConfig(shards=shards, tasks=tasks)])
            batch = next(iter(stream))
            assert isinstance(batch, PackedBatch)
            assert {reference.reply for reference in batch.references} == {"here"}


def test_both_forms_of_thinking_are_made_from_a_row(tmp_path, tokens):
    reader = DialogueReader(ReadingConfig(tokens=tokens))
    part = ShardPart(path=expand_shards([raw(tmp_path, [row()])])[0])
    (placed,) = reader.parse(part, source="")
    written = {}
    for form in ("natural", "label"):
        dialogue = reader.tokenize(placed.parsed, task_from_name(f"speech_to_speech.{form}_thinking"))
        assert dialogue is not None
        size = reader.tokenizer.vocabulary.text_size
        written[form] = reader.tokenizer.decode([i for i in dialogue.labels.tolist() if 0 <= i < size])
    assert "an old man asks" in written["natural"]
    assert "<old>" in written["label"] and "<happy>" in written["label"]


def test_earlier_turns_are_read_from_tars_lists_and_both(tmp_path):
    """The public implementation reads them from tars only, and then drops every such sample."""
    for name in ("raw", "shard", "combine"):
        (tmp_path / name).mkdir()
    extra = EXTRA | {"speech_token_1": [7]}
    tar = members(txt_1="<抱歉>first", extra=json.dumps(extra)) | {"a.wav_1": wav(0.25)}
    write_tar(tmp_path / "shard" / "part.tar", tar)
    for description in (
        raw(tmp_path / "raw", [row(extra=extra, wav_1="wav/b.wav", txt_1="<抱歉>first")]),
        describe(tmp_path / "shard", format="shard", data="part.tar"),
        combine(tmp_path / "combine", [row(extra=extra)], tar),
    ):
        (sample,) = read(description)
        assert [turn.text for turn in sample.turns] == ["", "first", "where", "here"]
        assert sample.turns[0].audio is not None
        assert sample.turns[1].speech_codes.tolist() == [7]  # pyright: ignore[reportOptionalMemberAccess]


def test_bad_rows_are_rejected_one_by_one_and_all_others_read(tmp_path):
    rows = {
        "a": row(),
        "line-2": "{broken",
        "line-3": "[1]",
        "c": row("c"),
        "d": row("d", task="<SING>", wav="wav/a.wav"),
        "e": row("e", wav="../outside.wav"),
        "f": row("f", wav="/etc/hostname"),
        "g": row("g", extra="{"),
        "h": row("h", wav="wav/" + 300 * "h"),
        "i": row("i", wav="wav/\0"),
        "b": row("b"),
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "outside.wav").write_bytes(wav())
    assert reasons(raw(tmp_path / "data", list(rows.values()))) == {
        "line-2": "broken JSON",
        "line-3": "broken row",
        "c": "missing audio",
        "d": "unknown task <SING>",
        "e": "path outside root",
        "f": "path outside root",
        "g": "broken JSON",
        "h": "missing audio",
        "i": "missing audio",
    }


def test_a_row_of_a_tar_without_audio_is_rejected_and_never_noise(tmp_path):
    tar = members()
    del tar["a.wav"]
    write_tar(tmp_path / "part.tar", tar | members("b"))
    assert reasons(describe(tmp_path, format="shard", data="part.tar")) == {"a": "missing audio"}


def test_rows_and_tars_are_joined_by_key_in_any_order(tmp_path):
    counter = SkipCounter()
    description = combine(
        tmp_path,
        [row("c"), "{broken", row("b", txt="of b"), row("gone"), row("b", txt="twice"), row("a", txt="of a")],
        members() | members("b") | members("c") | members("extra"),
    )
    items = stored(description, counter)
    assert [item.ordinal for item in items] == list(range(len(items)))
    texts = {}
    for item in items:
        try:
            texts[item.key] = decode_dialogue(item).turns[1].text
        except SampleRejected as error:
            texts.setdefault(f"{item.key}!", error.reason)
    assert texts == {
        "a": "of a",
        "b": "of b",
        "c": "here",
        "b!": "duplicate key",
        "gone!": "missing audio",
        "line-2!": "broken JSON",
    }
    assert counter.noticed == {"audio without a row": 1}


def test_combine_rows_without_a_task_say_what_to_pass(tmp_path):
    rows = [{name: value for name, value in row(key).items() if name != "task"} for key in ("a", "b")]
    tar = members() | members("b")
    with pytest.raises(UserError, match=f'2 no task.* add task: "{THINK}".* to our.reference.yaml'):
        pack(Path(combine(tmp_path, rows, tar)), tmp_path / "out")
    with pytest.raises(UserError, match="2 no task"):
        verify([combine(tmp_path, rows, tar)])
    assert len(read(combine(tmp_path, rows, tar, task=THINK))) == 2


def test_unknown_labels_are_counted_by_name_and_own_spellings_known(tmp_path):
    rows = [row("a", extra=EXTRA | {"caption": "Church Bells"}), row("b", txt="<Whatever>yes")]
    counter = SkipCounter()
    first, second = read(raw(tmp_path, rows), counter)
    assert counter.noticed == {"unknown event <church_bells>": 1, "unknown reply_emotion <whatever>": 1}
    assert (first.turns[0].labels, second.turns[1].labels, second.turns[1].text) == ({"age": "old"}, {}, "yes")
    counter = SkipCounter()
    spellings = {"event": {"church_bells": "other"}, "reply_emotion": {"whatever": "calm"}}
    first, second = read(raw(tmp_path, rows, spellings=spellings), counter)
    assert (first.turns[0].labels["event"], second.turns[1].labels["emotion"]) == ("other", "calm")
    assert not counter.noticed


def test_data_that_was_moved_is_found_below_root_and_a_hint_says_how(tmp_path):
    rows = [row(wav="/disk/them/data/wav/a.wav"), row("b", wav="./common/wav/b.wav")]
    first, second = stored(raw(tmp_path, rows))
    with pytest.raises(SampleRejected, match=r"outside root.*wav/a.wav exists there: add strip: /disk/them/data to"):
        decode_dialogue(first)
    with pytest.raises(SampleRejected, match=r"missing audio.*wav/b.wav exists there: add strip: common to"):
        decode_dialogue(second)
    assert reasons(raw(tmp_path, rows, strip="/disk/them/data/")) == {"b": "missing audio"}
    assert reasons(raw(tmp_path, rows, strip="./common")) == {"a": "path outside root"}


def test_only_rows_of_the_tasks_asked_for_are_read(tmp_path):
    rows = [row(), row("b", task="<transcribe>", txt="hello")]
    (sample,) = read(raw(tmp_path, rows, only=["<TRANSCRIBE>"]))
    assert [turn.text for turn in sample.turns] == ["hello"]


def test_a_part_of_a_recording_is_cut_out(tmp_path):
    (sample,) = read(raw(tmp_path, [row(start=0.1, end=0.35)]))
    assert sample.turns[0].audio is not None
    assert sample.turns[0].audio.numel() == SAMPLE_RATE // 4
    assert reasons(raw(tmp_path, [row(start=2, end=1)])) == {"a": "broken row"}
    assert reasons(raw(tmp_path, [row(start=8, end=9)])) == {"a": "empty audio"}


def test_keys_with_dots_and_slashes_stay_apart_and_fit_the_shards(tmp_path):
    keys = ["x.1/a", "x-1-a", "早.a"]
    rows = [row(key, wav="wav/a.wav") for key in keys]
    pack(Path(raw(tmp_path, rows)), tmp_path / "out")
    packed = stored(str(tmp_path / "out"))
    assert [item.key for item in packed] == ["x%2E1%2Fa", "x-1-a", "早%2Ea"]
    write_tar(tmp_path / "part.tar", members("x.1/a") | members("b"))
    assert [item.key for item in stored(describe(tmp_path, format="shard", data="part.tar"))] == ["x%2E1%2Fa", "b"]


def test_rows_that_a_reader_does_not_want_cost_no_audio(tmp_path):
    """Two readers of one list share its lines; each opens only its own recordings."""
    (unit,) = expand_shards([raw(tmp_path, [row(), row("b")])])
    (tmp_path / "wav" / "b.wav").unlink()
    (mine,) = read_shard(ShardPart(path=unit, part=0, parts=2), counter=SkipCounter())
    assert decode_dialogue(mine).key == "a"
    assert [path.name for path in files_of_unit(unit)] == ["our.reference.yaml", "data.list"]


def test_a_damaged_tar_is_noticed_and_its_rows_are_not_lost_in_silence(tmp_path):
    description = combine(tmp_path, [row(), row("b")], members() | members("b"))
    tar = tmp_path / "tars" / "part.tar"
    tar.write_bytes(tar.read_bytes()[: 6 * 1024])
    counter = SkipCounter()
    stored(description, counter)
    assert counter.noticed == {"damaged shard": 1}
    assert set(reasons(description).values()) == {"missing audio"}
    assert len(reasons(description)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": "raw"}, "data is missing"),
        ({"format": "rae", "data": "data.list"}, "unknown format 'rae'; did you mean 'raw'"),
        ({"format": "raw", "data": "data.list", "rooot": "."}, "unknown key 'rooot'; did you mean 'root'"),
        ({"format": "raw", "data": "data.list", "root": "none"}, "root .*none is no folder"),
        ({"format": "raw", "data": "none.list"}, "'none.list' .*does not exist"),
        ({"format": "raw", "data": "."}, "is a folder"),
        ({"format": "raw", "data": 3}, "data is 3"),
        ({"format": "raw", "data": "data.list", "task": "<SING>"}, "unknown task <SING>"),
        ({"format": "raw", "data": "data.list", "only": "<SING>"}, "unknown task <SING>"),
        ({"format": "raw", "data": "data.list", "reply_emotion": "hapy"}, "did you mean 'happy'"),
        ({"format": "raw", "data": "data.list", "spellings": {"event": {"x": "y"}}}, "unknown event 'y'"),
        ({"format": "raw", "data": "data.list", "spellings": ["x"]}, "label set -> spelling -> label"),
        ({"format": "raw", "data": "tars.txt"}, "does not begin with a JSON row"),
        ({"format": "shard", "data": "data.list"}, "holds rows"),
        ({"format": "shard", "data": "tars.txt"}, "lists gone.tar: .*gone.tar does not exist"),
        ({"format": "shard", "data": "outside.txt"}, "lists ../x.tar: ../x.tar leaves"),
        ({"format": "combine", "data": "data.list"}, "add tars: FOLDER"),
        ({"format": "combine", "data": "data.list", "tars": "."}, "has no tar .*data.tar"),
        ("text", "is no description"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_description_is_explained_in_one_line(tmp_path, content, message):
    raw(tmp_path, [row()])
    (tmp_path / "tars.txt").write_text("-|gone.tar\n")
    (tmp_path / "outside.txt").write_text("../x.tar\n")
    if isinstance(content, str):
        (tmp_path / "our.reference.yaml").write_text(content)
    else:
        describe(tmp_path, **content)
    with pytest.raises(UserError, match=message) as error:
        expand_shards([str(tmp_path / "our.reference.yaml")])
    assert "\n" not in str(error.value)
    assert "our.reference.yaml" in str(error.value)


SAMPLES = {
    "raw": {"data": "raw/data.list"},
    "shard": {"data": "shard/*.tar"},
    "combine": {"data": "combine/combines_list.txt", "task": THINK},
}


@pytest.mark.skipif(not FAKE_DATA.is_dir(), reason=f"the public implementation's samples are not at {FAKE_DATA}")
@pytest.mark.parametrize("format_", SAMPLES)
def test_the_public_samples_give_ten_dialogues_in_each_format(tmp_path, format_):
    content = SAMPLES[format_] | {"data": str(FAKE_DATA / SAMPLES[format_]["data"])}
    description = describe(tmp_path, format=format_, root=str(FAKE_DATA), strip="common_utils/fake_data", **content)
    samples = read(description)
    assert [sample.key for sample in samples] == [f"1023390_bed51684_{number}" for number in range(1, 11)]
    for sample in samples:
        query, reply = sample.turns
        assert query.labels == {"age": "adult", "gender": "female"}
        assert query.audio is not None and abs(query.audio.numel() / SAMPLE_RATE - 10.96) < 0.01
        assert query.text and reply.text and reply.thinking
        assert reply.speech_codes is not None and len(reply.speech_codes) == 421
    pack(Path(description), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "index.json").read_text())["samples"] == 10
