"""Broken shards, in ten thousand ways: nothing crashes, and kept + skipped = read."""

import io
import json
import struct
import tarfile
from collections import Counter
from random import Random
from typing import Any

import pytest

from lightning_echat.contracts import SampleRejected
from lightning_echat.data import tar_samples
from lightning_echat.data.decoding import parse_dialogue, with_audio
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.tar_samples import MAX_MEMBER_BYTES, samples_in
from tests.lightning_echat.data.data_helpers import SIDECAR, members, wav

PER_SHARD = 10
TONE = wav(0.06)
AUDIO = [
    TONE,
    wav(0.06, rate=8000),
    wav(0.05, rate=44100),
    wav(0.06, rate=7919),
    wav(0.06, channels=2),
    wav(0.0),
    wav(0.01),
    wav(0.06, value=float("nan"), subtype="FLOAT"),
    wav(0.06, value=1.0),
    b"",
    b"RIFF",
]
NAMES = [
    "../{}.json",
    "/etc/{}.json",
    "{}",
    "{}.",
    ".{}",
    "a/../{}.0.wav",
    "{}\n.json",
    "{}\x1b[2J.json",
    "{}.0.wav.exe",
    "x" * 90,
]
VALUES = [None, -1, 1e308, "x", [], {}, True, [[1]], {"a": None}, float("nan"), 10**30, "../../etc/passwd", ["a"] * 3]
SIZES = [0o77777777777, MAX_MEMBER_BYTES + 1, 2**62, 1, 0]


def mutate_sidecar(random: Random, sidecar: dict) -> None:
    """Put a wrong value somewhere into the tree."""
    place = sidecar
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = random.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and random.random() < 0.7:
            place = place[key]
            continue
        if random.random() < 0.2:
            del place[key]
        else:
            place[key] = random.choice(VALUES)
        return


def mutated_members(random: Random, key: str) -> list[tuple[str, bytes]]:
    """A sample as members, sound in one case of six."""
    sidecar = json.loads(json.dumps(SIDECAR))
    sidecar["turns"][0]["seconds"] = 0.06
    audio = TONE
    kind = random.randrange(6)
    if kind == 1:
        mutate_sidecar(random, sidecar)
    if kind == 2:
        audio = bytearray(random.choice(AUDIO))
        for _ in range(random.randint(0, 6)):
            if audio:
                audio[random.randrange(min(len(audio), 60))] = random.randrange(256)
        audio = bytes(audio[: random.randrange(1, len(audio) + 2)])
    text = json.dumps(sidecar).encode()
    if kind == 3:
        at = random.randrange(len(text))
        text = text[:at] + bytes([random.randrange(256)]) + text[at + random.randrange(3) :]
    content = list(members(key, sidecar=text, audio=audio).items())
    if kind == 4:
        change = random.randrange(4)
        if change == 0:
            content.pop(random.randrange(2))
        elif change == 1:
            content.append((f"{key}.{random.choice(['1.wav', 'txt', 'json', '0.wav'])}", b"more"))
        elif change == 2:
            content.insert(random.randrange(3), (random.choice(NAMES).replace("{}", key), b"{}"))
        else:
            content.reverse()
    return content


def mutated_tar(random: Random, number: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=random.choice([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
    ) as tar:
        for place in range(PER_SHARD):
            for name, data in mutated_members(random, f"k{number}-{place}"):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if random.random() < 0.01:
                    info.type = random.choice([tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, b"Z"])
                    info.linkname = "/etc/passwd"
                tar.addfile(info, io.BytesIO(data))
    return mutate_tar(random, buffer.getvalue())


def mutate_tar(random: Random, data: bytes) -> bytes:
    """Leave most tars as they are; cut some, and write nonsense into the headers of others."""
    kind = random.randrange(10)
    if kind == 0:
        return data[: random.randrange(len(data))]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(random.randint(1, 20)):
            flipped[random.randrange(len(flipped))] = random.randrange(256)
        return bytes(flipped)
    if kind == 2:
        return claim_size(data, random.choice(SIZES), header=random.randrange(4))
    return data


def claim_size(data: bytes, size: int, *, header: int) -> bytes:
    """Write another size into a header, and make its checksum right."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = tar.getmembers()
        start = found[min(header, len(found) - 1)].offset
    block = bytearray(data[start : start + 512])
    octal = size <= 0o77777777777
    block[124:136] = b"%011o\0" % size if octal else b"\x80" + struct.pack(">Q", size).rjust(11, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:start] + bytes(block) + data[start + 512 :]


def read_all(count: int, seed: int) -> tuple[Counter, SkipCounter]:
    random = Random(seed)
    counter = SkipCounter()
    seen = Counter()
    for number in range(count // PER_SHARD):
        file = io.BufferedReader(io.BytesIO(mutated_tar(random, number)))  # pyright: ignore[reportArgumentType]
        for stored in samples_in(file, shard=f"{number}.tar", counter=counter):
            seen["found"] += 1
            try:
                parsed = parse_dialogue(stored)
                sample = with_audio(parsed, turns=range(len(parsed.sample.turns)), max_seconds=30.0, counter=counter)
                assert all(turn.audio is None or len(turn.audio) >= 400 for turn in sample.turns)
                counter.keep()
            except SampleRejected as error:
                counter.reject(error, shard=stored.shard, key=stored.key)
    return seen, counter


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_samples_are_kept_or_skipped_and_none_is_lost(count):
    seen, counter = read_all(count, seed=0)
    counts, skipped = counter.counts, counter.skipped
    assert counts["read"] == counts["kept"] + sum(skipped.values()) == seen["found"]
    assert counts["read"] > 0.8 * count and counts["kept"] > 0.3 * count, "most shards are read to their end"
    # Otherwise the mutations would not reach what they are for.
    assert {"broken JSON", "missing member", "unreadable audio", "broken sidecar", "no sidecar"} <= set(skipped)
    assert {"damaged shard", "duplicate member", "unusable member"} <= set(counter.noticed)


def test_the_same_seed_breaks_the_same_samples():
    assert read_all(200, seed=3)[1].counts == read_all(200, seed=3)[1].counts


@pytest.mark.parametrize("size", [MAX_MEMBER_BYTES + 1, 2**40, 2**62, 2**64 - 1])
def test_a_member_that_claims_to_be_huge_costs_nothing_and_is_counted(size):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (members("a") | members("b")).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    counter = SkipCounter()
    file = io.BytesIO(claim_size(buffer.getvalue(), size, header=2))
    assert [sample.key for sample in samples_in(file, shard="a.tar", counter=counter)] == ["a"]
    assert counter.noticed["unusable member"] == counter.noticed["damaged shard"] == 1


def test_a_header_read_the_quick_way_is_what_tarfile_reads():
    random = Random(2)
    plain = 0
    for _ in range(3000):
        info = tarfile.TarInfo(random.choice(["a.json", "é.0.wav", "x" * 100, "p" * 50 + "/" + "y" * 80, "d/"]))
        form: Any = random.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
        info.size = random.choice([0, 5, 0o77777777777, *([2**40] if form == tarfile.GNU_FORMAT else [])])
        block = bytearray(info.tobuf(form)[-512:])
        for _ in range(random.choice([0, 0, 1, 2])):
            block[random.choice([random.randrange(512), 124, 134, 148, 156, 345])] = random.randrange(256)
        found = tar_samples._plain_header(bytes(block))
        if found is not None:
            plain += 1
            expected = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
            assert found == (expected.name, expected.type, expected.size)
    assert plain > 500
