"""The whole way from sentences to a model that three runtimes load, with a net far too small to hear anything."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from whisper.decoding import DecodingOptions, DecodingResult, decode

from pipeline.demo.train.checkpoint import from_folder, load_checkpoint
from pipeline.demo.train.convert import to_openai
from pipeline.demo.train.export import export
from pipeline.demo.train.net import Net, NetConfig
from pipeline.demo.train.synth import write_corpus
from pipeline.demo.train.train import Settings, grown, train, train_heads
from pipeline.demo.train.vocabulary import START, demo_vocabulary

# openai-whisper leaves its file of token ranks to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_corpus(folder / "corpus", {"en": 8, "de": 8, "es": 8}, seed=1)
    torch.manual_seed(0)
    vocabulary = demo_vocabulary()
    config = NetConfig(
        n_rows=vocabulary.n_rows,
        n_unused=vocabulary.n_unused,
        d_model=64,
        heads=1,
        encoder_layers=1,
        decoder_layers=3,
    )
    settings = Settings(corpora=(folder / "corpus",), steps=3, producers=1, held_out=folder / "corpus")
    lines: list[str] = []
    short_only = ((1.0, (1.0, 0.0, 0.0)),)
    state = train(
        Net(config), vocabulary, settings, schedule=short_only, checkpoint=folder / "net", report=lines.append
    )
    assert state["step"] == 3
    assert lines
    return folder / "net"


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "exported"
    export(*load_checkpoint(checkpoint), folder)
    return folder


def test_no_pickle_anywhere(exported: Path) -> None:
    suffixes = {path.suffix for path in exported.parent.rglob("*") if path.is_file()}
    assert suffixes == {".npy", ".jsonl", ".json", ".safetensors"}


def test_transformers_generates(exported: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    tokens = model.generate(torch.zeros(1, 80, 3000), language="de", task="transcribe", max_new_tokens=4)
    assert isinstance(WhisperProcessor.from_pretrained(exported).decode(tokens[0]), str)


def test_openai_whisper_decodes(exported: Path) -> None:
    options = DecodingOptions(language="en", fp16=False, sample_len=4)
    result = decode(to_openai(exported), torch.zeros(80, 3000), options)
    assert isinstance(result, DecodingResult)


def test_transformers_and_openai_agree(exported: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    theirs = WhisperForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    openai = to_openai(exported)
    mels = torch.randn(2, 80, 3000, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[START, 50_261, 50_359, 50_363, 1_000], [START, 50_259, 50_359, 50_364, 700]])
    with torch.inference_mode():
        expected = theirs(mels, decoder_input_ids=tokens).logits
        found = openai(mels, tokens)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_the_full_table_says_what_the_reduced_one_does(checkpoint: Path, exported: Path) -> None:
    """Export changes nothing but the number of rows: the same probabilities, up to fp16."""
    net, vocabulary = load_checkpoint(checkpoint)
    mels = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[START, 50_261, 50_359]])
    rows = torch.from_numpy(vocabulary.row_of)[tokens]
    with torch.inference_mode():
        memory = net.encode(mels, torch.zeros(1, dtype=torch.long))
        reduced = net.decode(rows, torch.arange(3)[None], memory).logits.softmax(-1)
        full = to_openai(exported)(mels, tokens).softmax(-1)
    kept = torch.from_numpy(vocabulary.ids)
    torch.testing.assert_close(full[..., kept], reduced[..., :-1], atol=1e-3, rtol=0)
    unused = 1 - full[..., kept].sum(-1)
    torch.testing.assert_close(unused, reduced[..., -1], atol=1e-2, rtol=0)


def test_new_layers_change_nothing_at_first(checkpoint: Path) -> None:
    small, _ = load_checkpoint(checkpoint)
    large, _ = grown(checkpoint, decoder_layers=5)
    tokens, slots = torch.tensor([[1, 2, 3]]), torch.arange(3)[None]
    with torch.inference_mode():
        memory = small.encode(torch.zeros(1, 80, 400), torch.tensor([7]))
        torch.testing.assert_close(
            large.decode(tokens, slots, memory).logits, small.decode(tokens, slots, memory).logits
        )


def test_an_exported_folder_comes_back(checkpoint: Path, exported: Path) -> None:
    """The same logits, all bits of them, as the checkpoint's once its weights are fp16."""
    net, vocabulary = load_checkpoint(checkpoint)
    again, its_vocabulary = from_folder(exported)
    assert again.config == net.config
    assert its_vocabulary.text_ids == vocabulary.text_ids
    net.half().float()
    mels = torch.randn(1, 80, 400, generator=torch.Generator().manual_seed(0))
    tokens, slots, first = torch.tensor([[1, 2, 3, 2_000]]), torch.arange(4)[None], torch.tensor([7])
    with torch.inference_mode():
        expected = net.decode(tokens, slots, net.encode(mels, first)).logits
        found = again.decode(tokens, slots, again.encode(mels, first)).logits
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_folder_that_speaks_other_words_is_refused(exported: Path, tmp_path: Path) -> None:
    _, vocabulary = from_folder(exported)
    tensors = load_file(exported / "model.safetensors")
    unused = (vocabulary.row_of == vocabulary.dummy_row).nonzero()[0]
    tensors["model.decoder.embed_tokens.weight"][unused[-1]] += 1
    shutil.copy(exported / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unused tokens differ"):
        from_folder(tmp_path)


def test_a_folder_with_other_tensors_is_refused(exported: Path, tmp_path: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    del tensors["model.decoder.layer_norm.bias"]
    shutil.copy(exported / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layer_norm"):
        from_folder(tmp_path)


def test_heads_learn_alone_at_first(checkpoint: Path, exported: Path) -> None:
    net, vocabulary = grown(exported, decoder_layers=3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    settings = Settings(corpora=(checkpoint.parent / "corpus",), minutes=9, producers=0)
    train_heads(net, vocabulary, settings, 1, report=lambda line: None)
    changed = {name.split(".")[0] for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"character_head", "heard_order_head", "written_order_head"}
    assert [name for name, parameter in net.named_parameters() if parameter.requires_grad] == trained


def test_a_run_needs_an_end() -> None:
    with pytest.raises(ValueError, match="minutes, steps"):
        Settings(corpora=())
