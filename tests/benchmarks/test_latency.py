"""The latency benchmark runs, and what it stores is what it measured."""

import json

import pytest

from benchmarks.latency import main
from lightning_echat.nn.token2wav.kmeans import fit_kmeans, log_mel_blocks
from lightning_echat.testing import CODEBOOK_SIZE, dummy_audio, save_tiny_checkpoint, tiny_model, tiny_tokens_config

QUICK = ["--answers", "1", "--requests", "1", "2", "--batch", "4", "--repeats", "1"]


@pytest.mark.slow
def test_a_random_network_answers_by_the_script(tmp_path, capsys):
    out = tmp_path / "new" / "latency.json"
    main([*QUICK, "--out", str(out)])
    report = json.loads(out.read_text())
    assert [(s["layout"], s["thinking"], s["requests"]) for s in report["streams"]] == [
        (layout, thinking, requests)
        for layout in ("sequential", "interleaved")
        for thinking in ("none", "label")
        for requests in (1, 2)
    ]
    for stream in report["streams"]:
        median = stream["median"]
        assert median["thinking_ids"] == (40 if stream["thinking"] == "label" else 0)
        assert median["codes"] == 50 and median["audio"] == pytest.approx(2.0)
        assert median["first_text"] < median["first_audio"] < median["total"]
    assert report["batch"]["ids_per_second"] > report["batch"]["ids_per_second_one_by_one"] > 0
    assert "batch of 4" in capsys.readouterr().out


def test_a_checkpoint_is_measured_as_it_answers(tmp_path):
    tokens = tiny_tokens_config(tmp_path / "tokenizer")
    blocks = log_mel_blocks(dummy_audio(4.0))
    fit_kmeans(blocks, codebook_size=CODEBOOK_SIZE).save(tmp_path / "voice")
    checkpoint = save_tiny_checkpoint(tmp_path / "last.ckpt", tiny_model(tokens), tokens)
    out = tmp_path / "latency.json"
    options = ["--checkpoint", str(checkpoint), "--speech_tokenizer", str(tmp_path / "voice"), "--out", str(out)]
    main(["--answers", "1", "--requests", "1", "--batch", "2", "--repeats", "1", *options])
    report = json.loads(out.read_text())
    assert report["subject"] == str(checkpoint)
    # An untrained model goes on until a limit; nothing is scripted.
    assert report["streams"][0]["median"]["codes"] != 50
