"""A stage's weights leave as a Hugging Face folder and come back bit for bit, by our reading and by theirs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import soundfile
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from lightning_echat import cli
from lightning_echat.checkpoints.hugging_face import from_hf, to_hf
from lightning_echat.checkpoints.model_card import CardFields
from lightning_echat.checkpoints.pretrained import EChatPretrainedModel
from lightning_echat.contracts import UserError
from lightning_echat.data.log_mel import LogMel
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.nn.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from lightning_echat.nn.speech_language_model import LoRAConfig
from lightning_echat.nn.token2wav.kmeans import FitReport, KMeansSpeechTokenizer
from lightning_echat.nn.weights import load_from, load_trained
from lightning_echat.testing import (
    CODEBOOK_SIZE,
    dummy_audio,
    dummy_batch,
    save_tiny_checkpoint,
    tiny_model,
    tiny_network_config,
    write_dummy_shards,
)
from lightning_echat.tokens.tasks import DialogueTask

SPEAK = DialogueTask(kind="speech_to_speech")


@pytest.fixture(scope="module")
def voice(tmp_path_factory) -> Path:
    folder = Path(tmp_path_factory.mktemp("voice"))
    report = FitReport(blocks=1, perplexity=1.0, dead=0, seed=0)
    KMeansSpeechTokenizer(torch.randn(CODEBOOK_SIZE, 320) - 6, report=report).save(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokens, voice) -> Path:
    """A run folder of a model with auxiliary heads, depth-wise convolutions and a speech tokenizer."""
    folder = Path(tmp_path_factory.mktemp("run"))
    network = tiny_network_config(auxiliary_labels=["emotion"], depthwise_kernel=3)
    tokens = replace(tokens, speech_tokenizer=str(voice))
    save_tiny_checkpoint(folder / "checkpoints/last.ckpt", tiny_model(tokens, network=network), tokens, network=network)
    report = {
        "understanding": {"set": "held-out voices", "wer": 0.25, "accuracy": {"emotion": 0.5}},
        "empathy": {"judge": "rubric/1", "items": 3, "emotion": [61.5, 50, 70], "event": None},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    out = Path(tmp_path_factory.mktemp("out")) / "model"
    to_hf(run, out, card=CardFields(license="apache-2.0", datasets=["mine"], base_model=["a/b"], language=["en"]))
    return out


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    mine, wanted = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == wanted.keys() and len(wanted) > 20
    assert [name for name in wanted if not torch.equal(mine[name], wanted[name])] == []


def test_a_folder_holds_what_hugging_face_expects(folder, tokens):
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "prompt_set.yaml",
        "speech_tokenizer",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("echat", ["EChatPretrainedModel"])
    # What lies in it is named without a path, so that it can be moved.
    assert str(folder.parent) not in (folder / "config.json").read_text()
    text = "hello <|im_end|>"
    theirs = AutoTokenizer.from_pretrained(tokens.tokenizer).encode(text)
    assert AutoTokenizer.from_pretrained(folder).encode(text) == theirs
    assert GenerationConfig.from_pretrained(folder).eos_token_id == config["eos_token_id"] == theirs[-1]
    # Tied weights are stored once.
    names = load_file(folder / "model.safetensors")
    assert "model.lm.llm.model.embed_tokens.weight" in names and "model.lm.llm.lm_head.weight" not in names


def test_the_processor_gives_the_features_that_the_model_was_trained_on(folder):
    extract = WhisperFeatureExtractor.from_pretrained(folder)
    audio = dummy_audio(1.0)
    options: Any = {"sampling_rate": 16_000, "padding": False, "return_tensors": "pt"}
    theirs = extract(audio.numpy(), **options)["input_features"][0].T
    torch.testing.assert_close(LogMel()(audio), theirs, atol=1e-4, rtol=0)


def test_the_card_says_what_was_measured_and_under_which_terms(folder, run, tmp_path):
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(head)
    assert (fields["license"], fields["datasets"], fields["base_model"]) == ("apache-2.0", ["mine"], ["a/b"])
    assert fields["metrics"] == ["accuracy", "empathy", "wer"]
    (entry,) = fields["model-index"]
    values = {m["name"]: m["value"] for result in entry["results"] for m in result["metrics"]}
    assert values == {"WER": 0.25, "accuracy of emotion": 0.5, "empathy, emotion (0 to 100, rubric/1)": 61.5}
    assert "| WER | held-out voices | 0.250 |" in text
    to_hf(run / "checkpoints/last.ckpt", tmp_path / "unmeasured")
    unmeasured = (tmp_path / "unmeasured/README.md").read_text()
    assert "Nothing was measured" in unmeasured
    fields = yaml.safe_load(unmeasured.split("---\n")[1])
    assert (fields["license"], fields["datasets"], fields["metrics"]) == ("unknown", [], [])


def test_from_pretrained_reads_it_back_bit_for_bit(folder, run, tokenizer):
    trained = load_trained(run)
    model = EChatPretrainedModel.from_pretrained(folder)
    assert_same(model.model, trained.model)
    # Buffers that no file holds are computed again.
    assert torch.equal(model.model.encoder.positions, trained.model.encoder.positions)
    assert model.model.lm.text_head.weight is model.model.lm.causal_lm.get_input_embeddings().weight
    batch = dummy_batch(tokenizer, [SPEAK, SPEAK])
    with torch.no_grad():
        assert torch.equal(model(batch).hidden_states, trained.model(batch).hidden_states)


def test_what_their_classes_save_they_and_we_read(folder, run, tmp_path):
    EChatPretrainedModel.from_pretrained(folder).save_pretrained(tmp_path)
    assert_same(EChatPretrainedModel.from_pretrained(tmp_path).model, load_trained(run).model)
    load_from(load_trained(run).model, tmp_path, new_parts=())


@pytest.mark.parametrize("size", ["5GB", "60KB"])
def test_our_own_reading_is_bit_for_bit_from_one_file_or_many(run, tmp_path, size):
    to_hf(run, tmp_path / "model", max_shard_size=size)
    files = list((tmp_path / "model").glob("model*.safetensors"))
    assert (len(files) > 3) == (size == "60KB")
    # Moved: nothing in it points to where it was written.
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    trained = load_trained(moved)
    assert_same(trained.model, load_trained(run).model)
    assert_same(EChatPretrainedModel.from_pretrained(moved).model, trained.model)
    assert trained.step == 7
    assert trained.tokenizer.prompt_set.name == "compact"
    assert trained.tokens.speech_tokenizer == str(moved / "speech_tokenizer")


def test_a_stage_takes_a_folder_as_the_one_before(folder, tokens):
    model = tiny_model(tokens, network=tiny_network_config(auxiliary_labels=["emotion"], depthwise_kernel=3), seed=1)
    report = load_from(model, folder, new_parts=()).report
    assert_same(model, load_trained(folder).model)
    assert "new in this stage: nothing" in report


def test_lora_is_merged(tmp_path, tokens, tokenizer):
    network = tiny_network_config(lora=LoRAConfig(rank=4, alpha=8))
    adapted = tiny_model(tokens, network=network)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    to_hf(save_tiny_checkpoint(tmp_path / "a.ckpt", adapted, tokens, network=network), tmp_path / "model")
    merged = load_trained(tmp_path / "model").model
    assert not any("lora" in name for name in merged.state_dict())
    batch = dummy_batch(tokenizer, [SPEAK])
    with torch.no_grad():
        found, wanted = merged(batch).hidden_states, adapted(batch).hidden_states
        with cast(PeftModel, adapted.lm.llm).disable_adapter():
            assert not torch.allclose(adapted(batch).hidden_states, wanted, atol=1e-2)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_plain_transformers_loads_the_language_model_alone(run, tmp_path):
    to_hf(run, tmp_path / "llm", part="llm")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    ours = load_trained(run).model.lm.causal_lm
    assert_same(theirs, ours)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)
    card = yaml.safe_load((tmp_path / "llm/README.md").read_text().split("---\n")[1])
    assert (card["pipeline_tag"], card["library_name"], card["metrics"]) == ("text-generation", "transformers", [])
    assert AutoTokenizer.from_pretrained(tmp_path / "llm").eos_token_id == theirs.generation_config.eos_token_id
    # It is a language model, and no place to start a stage from.
    with pytest.raises(UserError, match="type 'qwen2', not one of this project"):
        load_trained(tmp_path / "llm")


def test_commands_run_from_a_folder(folder, tmp_path, capsys, monkeypatch):
    """What a user does with it: ask it, score it, train on."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("q.wav", dummy_audio(1.0).numpy(), 16_000)
    limits = ["--decoding.max_text_ids", "8", "--decoding.max_speech_ids", "10"]
    cli.main(["chat", "--checkpoint", str(folder), "--audio", "q.wav", "--json", *limits, "--thinking", "none"])
    (answer,) = json.loads(capsys.readouterr().out)["turns"]
    assert answer["audio"] is None and "token2wav" not in answer["timings"]
    speak = ["--out", "a.wav", "--audio", "q.wav", "--json", *limits, "--thinking", "none"]
    cli.main(["chat", "--checkpoint", str(folder), *speak])
    assert json.loads(capsys.readouterr().out)["turns"][0]["query"] == "q.wav"


def test_a_stage_starts_from_the_yaml_of_a_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["echat"])
    write_dummy_shards(Path("data"), shards=1, samples_per_shard=2)
    from_hf(folder, Path("start.yaml"))
    tasks = [{"kind": "speech_to_text"}]
    rest = {
        "trainer": {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": "run"},
        "model": {"class_path": "lightning_echat.stages.empathy.EmpathyStage", "init_args": {}},
        "data": {
            "class_path": "datamodules.spoken_dialogue.SpokenDialogueDataModule",
            "init_args": {
                "root": ".",
                "num_workers": 0,
                "train": [{"name": "d", "shards": ["data/*.tar"], "tasks": tasks}],
                "validation": {"d": {"shards": ["data/*.tar"], "tasks": tasks}},
            },
        },
    }
    Path("rest.yaml").write_text(yaml.safe_dump(rest))
    cli.main(["validate", "--config", "rest.yaml", "--config", "start.yaml"])
    shown = capsys.readouterr().out
    assert "weights come from" in shown and "new in this stage: nothing" in shown
    assert "val/d/loss/text" in shown


def test_what_is_no_folder_of_ours_is_refused(folder, run, tmp_path):
    with pytest.raises(UserError, match="is there already"):
        to_hf(run, folder)
    with pytest.raises(UserError, match="no checkpoint at"):
        to_hf(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="is no converted folder"):
        from_hf(run, tmp_path / "start.yaml")
    with pytest.raises(UserError, match=r"give a \.yaml file"):
        from_hf(folder, tmp_path / "start")
    with pytest.raises(UserError, match="cannot read report"):
        to_hf(run, tmp_path / "out", report=tmp_path / "gone.json")
    torch.save({"state_dict": {"model.x": torch.zeros(1)}}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="does not say how to build"):
        to_hf(tmp_path / "a.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def names_and_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_whisper_medium_fits_the_default_encoder_by_name_and_shape():
    """Its sizes are public; the published weights load strictly where names and shapes agree."""
    medium = WhisperConfig(
        d_model=1024,
        encoder_layers=24,
        encoder_attention_heads=16,
        encoder_ffn_dim=4096,
        decoder_layers=1,
        decoder_attention_heads=16,
        decoder_ffn_dim=64,
        num_mel_bins=80,
    )
    with torch.device("meta"):
        theirs = names_and_shapes(WhisperModel(medium).get_encoder())
        ours = SpeechEncoder(SpeechEncoderConfig(pretrained=False), mel_bins=80)
    assert theirs.pop("embed_positions.weight") == (1500, 1024)
    assert names_and_shapes(ours) == theirs
    # The released encoder's, as the specification counts it.
    assert sum(parameter.numel() for parameter in ours.parameters()) == 305_680_384


def _values(model: EChatModel) -> dict[str, Tensor]:
    return dict(model.lm.causal_lm.state_dict())


def test_a_language_model_of_save_pretrained_loads_as_it_is(run, tmp_path, tokens):
    """Also one in bfloat16, as Qwen is published: training starts from its values, in float32."""
    source = load_trained(run).model.lm.causal_lm.bfloat16()
    source.save_pretrained(tmp_path)
    network = tiny_network_config()
    llm = replace(network.llm, weights=str(tmp_path), pretrained=True, architecture={})
    loaded = _values(tiny_model(tokens, network=replace(network, llm=llm)))
    for name, tensor in source.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.float())
