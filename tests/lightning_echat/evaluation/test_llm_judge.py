"""The judge against a server that speaks the protocol, and one that speaks it badly."""

import json
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.evaluation.judging import JudgedReply
from lightning_echat.evaluation.llm_judge import REQUESTS, LLMJudge
from tests.lightning_echat.evaluation.chat_server import (
    ChatServer,
    breaks_json,
    completion,
    is_slow,
    refuses,
    says,
    send,
    truncates,
)

GOOD = json.dumps({"reason": "fits", "scores": {"content": 5, "attention": 3, "empathy": 4, "naturalness": 1}})


def replies(count: int) -> list[JudgedReply]:
    return [
        JudgedReply(
            key=f"set/{number}",
            transcript=f"where is key {number}",
            labels={"emotion": "sad", "age": "old"},
            categories=["emotion"],
            reply=f"I am sorry, madam. Key {number} is here.",
        )
        for number in range(count)
    ]


def judge(server: ChatServer, **arguments) -> LLMJudge:
    return LLMJudge(server.base_url, "judge-model", **{"back_off": 0.01, "timeout": 5.0, **arguments})


def lines(folder: Path) -> list[dict]:
    (path,) = folder.rglob(REQUESTS)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_the_means_of_the_dimensions_on_the_scale_of_the_rubric(tmp_path):
    with ChatServer(then=says(f"Here it is:\n```json\n{GOOD}\n```")) as server:
        (score,) = judge(server).score_all(replies(1), folder=tmp_path)
    assert score is not None
    assert score.per_dimension == {"content": 100.0, "attention": 50.0, "empathy": 75.0, "naturalness": 0.0}
    assert score.total == 56.25
    assert score.by_category == {"emotion": 56.25}


def test_the_prompt_shows_words_labels_and_reply_and_says_nothing_of_a_voice_that_nobody_heard(tmp_path):
    with ChatServer(then=says(GOOD)) as server:
        judge(server).score_all(replies(1), folder=tmp_path)
    prompt = server.bodies[0]["messages"][1]["content"]
    assert '"where is key 0"' in prompt and '{"emotion": "sad", "age": "old"}' in prompt
    assert "Key 0 is here." in prompt
    assert "heard in the reply" not in prompt and '"voice"' not in prompt
    assert "- attention:" in prompt and '"required": ["content", "attention", "empathy", "naturalness"]' in prompt


def test_a_rerun_asks_nothing_and_gives_the_same_scores(tmp_path):
    with ChatServer(then=says(GOOD)) as server:
        first = judge(server).score_all(replies(3), folder=tmp_path)
        asked = len(server.bodies)
    # The server is gone, and its next address is another.
    second = LLMJudge("http://127.0.0.1:9/v1", "judge-model", retries=0).score_all(replies(3), folder=tmp_path)
    assert asked == 3
    assert second == first


def test_everything_that_decides_an_answer_is_recorded_and_the_key_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-4711")
    with ChatServer([refuses(500, "oh sk-secret-4711")], then=says(GOOD)) as server:
        judge(server, api_key_env="JUDGE_KEY", temperature=0.5, n=2).score_all(replies(1), folder=tmp_path)
    assert set(server.authorizations) == {"Bearer sk-secret-4711"}
    rows = lines(tmp_path)
    assert {row["sample"] for row in rows} == {0, 1}
    for row in rows:
        assert (row["model"], row["temperature"], row["n"]) == ("judge-model", 0.5, 2)
        assert len(row["prompt_sha256"]) == 64 and row["raw"]["choices"] and row["body"]["messages"]
    assert sorted(row["attempts"] for row in rows) == [1, 2]
    assert not any("sk-secret" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "content",
    [
        "I would say four.",
        "",
        None,
        '{"scores": {"content": 5}}',
        GOOD.replace("5", "6"),
        GOOD.replace("5", "true"),
        GOOD.replace("5", '"5"'),
        GOOD.replace("content", "contents"),
        GOOD[:-3],
    ],
)
def test_an_answer_that_cannot_be_read_counts_as_no_score_and_is_not_guessed(tmp_path, content, capsys):
    with ChatServer([says(content)], then=says(GOOD)) as server:
        scores = judge(server, concurrency=1).score_all(replies(2), folder=tmp_path)
    assert scores[0] is None
    assert scores[1] is not None
    assert "1 of 2 answers could not be read" in " ".join(capsys.readouterr().out.split())
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (refuses(429, "slow down"), "HTTP 429"),
        (refuses(503), "HTTP 503"),
        (breaks_json, "broken answer"),
        (truncates, "truncated answer"),
        (is_slow(1.0), "timeout"),
    ],
)
def test_what_may_pass_is_tried_again(tmp_path, trouble, reason):
    with ChatServer([trouble, trouble], then=says(GOOD)) as server:
        (score,) = judge(server, timeout=0.3).score_all(replies(1), folder=tmp_path)
    assert score is not None and score.total == 56.25
    assert lines(tmp_path)[0]["errors"] == [reason, reason]


@pytest.mark.parametrize("asked", ["0.6", "date"])
def test_the_server_says_how_long_to_wait_and_all_requests_do(tmp_path, asked):
    started = time.monotonic()
    after = asked if asked != "date" else formatdate(time.time() + 2, usegmt=True)
    with ChatServer([refuses(429, Retry_After=after)], then=says(GOOD)) as server:
        judge(server, concurrency=1).score_all(replies(2), folder=tmp_path)
    assert server.times[1] - started >= 0.6
    assert len(server.times) == 3


def test_a_refusal_ends_the_run_in_one_line_that_names_the_server_and_the_key(tmp_path):
    with ChatServer(then=refuses(401, "bad key")) as server, pytest.raises(UserError) as raised:
        judge(server, concurrency=2).score_all(replies(20), folder=tmp_path)
    assert "bad key" in str(raised.value) and "OPENAI_API_KEY" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(server.bodies) <= 4


def test_a_server_that_is_gone_is_given_up_and_what_it_answered_is_kept(tmp_path):
    with ChatServer([says(GOOD)] * 5, then=refuses(500)) as server:
        with pytest.raises(UserError, match=r"does not answer .*5 of 40 answers came.*run again") as raised:
            judge(server, concurrency=2, retries=1).score_all(replies(40), folder=tmp_path)
        assert "HTTP 500" in str(raised.value)
        # Not every one of the 40 is tried: after four in a row that fail, two attempts each, it is clear.
        assert len(server.bodies) < 5 + 16
        server.then = says(GOOD)
        before = len(server.bodies)
        scores = judge(server, concurrency=2).score_all(replies(40), folder=tmp_path)
    assert len(server.bodies) - before == 35
    assert all(score is not None for score in scores)


def test_the_budget_holds_and_the_next_run_goes_on(tmp_path):
    with ChatServer(then=says(GOOD, tokens=100)) as server:
        with pytest.raises(UserError, match=r"budget is spent.*6 of 10"):
            judge(server, max_requests=6).score_all(replies(10), folder=tmp_path)
        assert len(server.bodies) == 6
        assert all(judge(server, max_requests=6).score_all(replies(10), folder=tmp_path))
        assert len(server.bodies) == 10
        with pytest.raises(UserError, match="budget is spent"):
            judge(server, max_tokens=250, concurrency=1).score_all(replies(30)[10:], folder=tmp_path)
        assert len(server.bodies) == 13


def test_a_line_torn_by_a_kill_is_asked_again(tmp_path):
    with ChatServer(then=says(GOOD)) as server:
        judge(server, concurrency=1).score_all(replies(3), folder=tmp_path)
        (path,) = tmp_path.rglob(REQUESTS)
        path.write_text(path.read_text()[:-40])
        judge(server).score_all(replies(3), folder=tmp_path)
        assert len(server.bodies) == 4
        judge(server).score_all(replies(3), folder=tmp_path)
        assert len(server.bodies) == 4


def test_requests_run_beside_each_other_up_to_the_limit(tmp_path):
    with ChatServer(then=is_slow(0.15)) as server:
        judge(server, concurrency=4).score_all(replies(8), folder=tmp_path)
    assert server.most_at_once == 4


def test_several_answers_are_averaged_and_an_unreadable_one_counts_for_nothing(tmp_path):
    other = GOOD.replace('"content": 5', '"content": 1')
    with ChatServer([says(GOOD), says("no"), says(other)], then=says("")) as server:
        (score,) = judge(server, n=3, concurrency=1).score_all(replies(1), folder=tmp_path)
    assert score is not None and score.per_dimension["content"] == 50.0
    assert len(server.bodies) == 3


def test_a_listening_judge_is_told_the_emotion_heard_and_scores_the_voice(tmp_path, monkeypatch):
    from lightning_echat.evaluation import reply_emotion

    class Stub:
        name = "stub"
        heard = 0

        def hear(self, path):
            Stub.heard += 1
            return path.stem

    monkeypatch.setitem(reply_emotion.RECOGNISERS, "stub", f"{__name__}.Stub")
    monkeypatch.setattr("lightning_echat.evaluation.llm_judge.make_recogniser", lambda *_: Stub())
    with_voice = GOOD.replace('"content"', '"voice": 3, "content"')
    wav = tmp_path / "comforting.wav"
    wav.write_bytes(b"sound")
    (said,) = replies(1)
    heard = JudgedReply(**{name: getattr(said, name) for name in said.__slots__} | {"reply_audio": wav})
    with ChatServer([says(with_voice)], then=says(with_voice)) as server:
        listening = judge(server, reply_emotion="stub")
        (score,) = listening.score_all([heard], folder=tmp_path)
        listening.score_all([heard], folder=tmp_path)
    assert 'emotion heard in the reply\'s voice: "comforting"' in server.bodies[0]["messages"][1]["content"]
    assert score is not None and score.per_dimension["voice"] == 50.0
    assert listening.name.endswith("hears stub")
    assert (Stub.heard, len(server.bodies)) == (1, 1)


def test_the_line_about_unread_answers_says_how_many_were_cut_and_where_they_are(tmp_path, capsys):
    cut = completion("")
    cut["choices"][0]["finish_reason"] = "length"
    with ChatServer(
        [lambda handler, _: send(handler, 200, json.dumps(cut).encode()), says("no")], then=says(GOOD)
    ) as s:
        judge(s, concurrency=1).score_all(replies(3), folder=tmp_path)
        again = judge(s, concurrency=1).score_all(replies(3), folder=tmp_path)
    assert [score is None for score in again] == [True, True, False]
    first, second = [line for line in capsys.readouterr().out.splitlines() if "could not be read" in line]
    assert first == second
    assert "2 of 3 answers could not be read, 1 of them cut at 512 tokens (max_reply_tokens)" in first
    assert first.endswith(REQUESTS)


def test_what_a_model_thinks_aloud_before_its_answer_is_no_part_of_it(tmp_path):
    with ChatServer(then=says(f'<think>\nscores like {{"content": 2}}?\n</think>\n{GOOD}')) as server:
        (score,) = judge(server).score_all(replies(1), folder=tmp_path)
    assert score is not None and score.total == 56.25


def test_keys_that_a_server_wants_are_sent_and_named_and_others_are_left_out(tmp_path):
    with ChatServer(then=says(GOOD)) as server:
        asking = judge(server, request={"max_tokens": None, "max_completion_tokens": 99})
        asking.score_all(replies(1), folder=tmp_path)
        assert asking.name != judge(server).name
    assert "max_tokens" not in server.bodies[0] and server.bodies[0]["max_completion_tokens"] == 99


@pytest.mark.parametrize(("status", "hint"), [(400, "argument request"), (403, "OPENAI_API_KEY"), (404, "up to /v1")])
def test_a_refusal_says_what_may_be_wrong(tmp_path, status, hint):
    with ChatServer(then=refuses(status, "no")) as server, pytest.raises(UserError, match=hint):
        judge(server).score_all(replies(1), folder=tmp_path)


def test_ctrl_c_says_what_is_kept(tmp_path, capsys, monkeypatch):
    """Noting the third answer is interrupted, as by a user; the two before are not asked again."""
    with ChatServer(then=says(GOOD)) as server:
        asking = judge(server, concurrency=1)
        endpoint = asking._endpoint_for(tmp_path)
        note, noted = endpoint._note, []

        def interrupted(*arguments):
            if len(noted) == 2:
                raise KeyboardInterrupt
            noted.append(arguments)
            note(*arguments)

        monkeypatch.setattr(endpoint, "_note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asking.score_all(replies(9), folder=tmp_path)
        assert "stopped; 2 of 9 answers came and are kept in" in capsys.readouterr().err
        before = len(server.bodies)
        assert all(judge(server).score_all(replies(9), folder=tmp_path))
        assert len(server.bodies) - before == 7
