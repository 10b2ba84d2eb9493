import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shards import ShardPart, expand_shards, read_samples, read_shard
from tests.lightning_echat.data.data_helpers import members, write_tar


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return [str(folder / name) for name in names]


def test_patterns_of_every_form_name_the_same_shards(tmp_path):
    paths = touch(tmp_path, "a-000.tar", "a-001.tar", "a-002.tar")
    (tmp_path / "list.txt").write_text("# mine\na-000.tar\n\na-{001..002}.tar\n")
    assert expand_shards(paths) == paths
    assert expand_shards([str(tmp_path / "a-*.tar")]) == paths
    assert expand_shards([str(tmp_path / "a-{000..002}.tar")]) == paths
    assert expand_shards([str(tmp_path / "list.txt")]) == paths
    assert expand_shards([str(tmp_path)]) == paths
    assert expand_shards([paths[1], str(tmp_path)]) == [paths[1], paths[0], paths[2]]


def test_a_folder_reads_what_its_index_lists(tmp_path):
    paths = touch(tmp_path, "a.tar", "b.tar")
    (tmp_path / "index.json").write_text('{"schema": 1, "shards": [{"file": "b.tar"}]}')
    assert expand_shards([str(tmp_path)]) == paths[1:]


@pytest.mark.parametrize(
    ("make", "pattern", "message"),
    [
        (lambda f: touch(f, "train-0.tar"), "trian-0.tar", "did you mean 'train-0.tar'"),
        (lambda f: touch(f, "a.tar"), "{a,b}.tar", r"b\.tar"),
        (lambda f: None, "nowhere/a.tar", "there is no folder"),
        (lambda f: touch(f, "x/readme.md"), "x", "holds neither index.json nor tar files"),
        (lambda f: (f / "list.txt").write_text("# empty\n"), "list.txt", "is empty"),
        (lambda f: (f / "index.json").write_text('{"shards": [{"file": "gone.tar"}]}'), ".", "lists gone.tar"),
        (lambda f: (f / "index.json").write_text("{}"), ".", "is no shard index"),
        (lambda f: (f / "index.json").write_text('{"shards": []}'), ".", "lists no shards"),
    ],
)
def test_a_pattern_that_names_nothing_is_the_users_to_mend(tmp_path, make, pattern, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        expand_shards([str(tmp_path / pattern)])


def test_no_pattern_at_all_is_refused():
    with pytest.raises(UserError, match="no shards given"):
        expand_shards([])


def read(path, **part):
    counter = SkipCounter()
    return list(read_shard(ShardPart(path=str(path), **part), counter=counter)), counter


def many(count: int) -> dict[str, bytes]:
    return {name: data for number in range(count) for name, data in members(f"k{number}").items()}


def test_members_of_a_key_come_together(tmp_path):
    dialogues, counter = read(write_tar(tmp_path / "a.tar", many(3)))
    assert [dialogue.key for dialogue in dialogues] == ["k0", "k1", "k2"]
    assert [dialogue.ordinal for dialogue in dialogues] == [0, 1, 2]
    assert all(set(dialogue.members) == {"json", "0.wav"} for dialogue in dialogues)
    assert not counter.counts


def test_parts_of_a_shard_are_disjoint_and_complete(tmp_path):
    path = write_tar(tmp_path / "a.tar", many(7))
    parts = [[d.key for d in read(path, part=i, parts=3)[0]] for i in range(3)]
    assert parts == [["k0", "k3", "k6"], ["k1", "k4"], ["k2", "k5"]]


def test_a_leading_dot_slash_is_no_part_of_a_key(tmp_path):
    content = {f"./{name}": data for name, data in members("k").items()}
    assert [d.key for d in read(write_tar(tmp_path / "a.tar", content))[0]] == ["k"]


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.8])
def test_a_truncated_tar_gives_what_it_holds_and_is_counted(tmp_path, keep):
    path = write_tar(tmp_path / "a.tar", many(5))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    dialogues, counter = read(path)
    # The last may lack a member, which parsing rejects.
    assert 0 < sum(set(dialogue.members) == {"json", "0.wav"} for dialogue in dialogues) < 5
    assert counter.noticed == {"damaged shard": 1}


def test_a_tar_cut_between_two_members_is_counted_too(tmp_path):
    path = write_tar(tmp_path / "a.tar", many(2))
    one = sum(512 + -(-len(data) // 512) * 512 for data in members().values())
    path.write_bytes(path.read_bytes()[:one])
    dialogues, counter = read(path)
    assert len(dialogues) == 1
    assert counter.noticed == {"damaged shard": 1}


def test_a_bad_header_in_the_middle_is_counted(tmp_path):
    path = write_tar(tmp_path / "a.tar", many(3))
    data = bytearray(path.read_bytes())
    data[data.index(b"k1.json") + 148] ^= 0xFF  # the header's checksum
    path.write_bytes(bytes(data))
    dialogues, counter = read(path)
    assert [dialogue.key for dialogue in dialogues] == ["k0"]
    assert counter.noticed == {"damaged shard": 1}


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_tar_is_counted(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert read(path)[0] == []
    assert read(path)[1].noticed == {"damaged shard": 1}


def test_a_shard_that_vanished_is_counted(tmp_path):
    assert read(tmp_path / "gone.tar")[1].noticed == {"missing shard": 1}


def test_a_duplicate_member_is_counted_and_the_first_stays(tmp_path):
    content = [*members("k").items(), ("k.json", b"other")]
    dialogues, counter = read(write_tar(tmp_path / "a.tar", content))
    assert dialogues[0].members["json"] != b"other"
    assert counter.noticed == {"duplicate member": 1}


def test_a_member_without_a_key_is_counted(tmp_path):
    dialogues, counter = read(write_tar(tmp_path / "a.tar", {"README": b"x", **members("k")}))
    assert len(dialogues) == 1
    assert counter.noticed == {"member without key": 1}


def test_reading_begins_anywhere_and_picks_what_is_asked_for(tmp_path):
    path = write_tar(tmp_path / "a.tar", many(6))
    assert [stored.ordinal for stored in read(path, part=1, parts=2)[0]] == [1, 3, 5]
    later = read_shard(ShardPart(path=str(path), part=1, parts=2), start=2, counter=SkipCounter())
    assert [(stored.ordinal, stored.key) for stored in later] == [(3, "k3"), (5, "k5")]
    picked = read_samples(str(path), [4, 0, 9, 4], counter=SkipCounter())
    assert [(stored.ordinal, stored.key) for stored in picked] == [(0, "k0"), (4, "k4")]
