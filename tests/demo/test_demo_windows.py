"""Training windows and their targets, checked against Whisper's protocol and against the model they once made."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import whisper
from safetensors.torch import load_file

from pipeline.demo import model_path
from pipeline.demo.train.data import Corpus, WindowMaker, log_mel, make_batch
from pipeline.demo.train.loss import compute_losses, to_device
from pipeline.demo.train.net import Net, NetConfig
from pipeline.demo.train.sounds import SoundBank
from pipeline.demo.train.synth import SAMPLE_RATE, Word, write_corpus
from pipeline.demo.train.targets import IGNORED, Placed, Style, write_targets
from pipeline.demo.train.vocabulary import NO_SPEECH, demo_vocabulary, whisper_tokenizer

# openai-whisper leaves its file of token ranks to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

TIMED = Style(
    n_positions=200, first_position=0, language="en", task="transcribe", timestamps=True, speech=True, names_task=True
)
UNTIMED = Style(
    n_positions=200, first_position=0, language="de", task="translate", timestamps=False, speech=True, names_task=True
)
HELLO = Placed(0.5, 1.5, (Word("Hello", 0.5, 1.0), Word("Anna.", 1.0, 1.5)), "Good day, Anna.")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, {"en": 40, "de": 40, "es": 40}, seed=3, held_out=True)
    return Corpus([folder])


def written(style: Style, *placed: Placed, prompt: tuple[int, ...] = ()) -> str:
    return str(whisper_tokenizer().decode_with_timestamps(write_targets(style, placed, prompt).tokens))


def test_timestamps_enclose_a_sentence() -> None:
    assert written(TIMED, HELLO) == "<|startoftranscript|><|en|><|transcribe|><|0.50|> Hello Anna.<|1.50|><|endoftext|>"


def test_translation_without_timestamps() -> None:
    expected = "<|startoftranscript|><|de|><|translate|><|notimestamps|> Good day, Anna.<|endoftext|>"
    assert written(UNTIMED, HELLO) == expected


def test_a_sentence_that_the_window_cuts_is_only_opened() -> None:
    cut = Placed(3.0, 4.0, (Word("Hello", 3.0, 3.9),), "", cut_off=True)
    assert written(TIMED, HELLO, cut).endswith(" Hello Anna.<|1.50|><|3.00|><|endoftext|>")


def test_silence_is_no_speech() -> None:
    targets = write_targets(TIMED, [])
    assert targets.labels[1] == NO_SPEECH
    assert written(TIMED) == "<|startoftranscript|><|en|><|transcribe|><|0.00|><|endoftext|>"


def test_what_is_given_is_not_learnt() -> None:
    targets = write_targets(UNTIMED, [HELLO], prompt=[50_361, 100, 200])
    assert targets.labels[:4] == [IGNORED] * 4  # the prompt and startoftranscript
    assert targets.labels[5] == IGNORED  # the translate task: the user decides
    assert all(label == token for label, token in zip(targets.labels[7:], targets.tokens[7:], strict=True))


def test_words_are_heard_where_they_are_spoken() -> None:
    targets = write_targets(TIMED, [HELLO])
    hello = targets.tokens.index(whisper_tokenizer().encode(" Hello")[0])
    first, last = targets.spans[hello]
    assert first <= 25
    assert 50 <= last < 55


def test_a_seed_fixes_the_windows(corpus: Corpus) -> None:
    one, two = (make_batch(WindowMaker(corpus, seed=4), demo_vocabulary(), 2, 200) for _ in range(2))
    np.testing.assert_array_equal(one.mels, two.mels)
    np.testing.assert_array_equal(one.tokens, two.tokens)


def test_sounds_are_drawn_by_lot() -> None:
    """Another one every time, the same ones for a seed; all as loud as they can be, and never silent throughout."""
    one, two = SoundBank(1), SoundBank(1)
    random, again = Random(7), Random(7)
    drawn = [one.draw(random, n) for n in (400, 16_000, 480_000) * 4]
    for sound in drawn:
        np.testing.assert_array_equal(sound, two.draw(again, len(sound)))
        assert sound.dtype == np.float32
        assert np.abs(sound).max() == pytest.approx(1.0)
    assert len({float(sound.std()) for sound in drawn}) == len(drawn)


def test_hard_windows(corpus: Corpus) -> None:
    """Of 60 windows some have long pauses, some sounds where nobody speaks, some end early, and what is said is heard
    in all of them."""
    maker = WindowMaker(corpus, seed=2)
    windows = [maker.draw(1_500) for _ in range(60)]
    pauses = [
        b.start - a.end for one in windows for a, b in zip(one.placed, one.placed[1:], strict=False) if not b.cut_off
    ]
    assert max(pauses) > 8
    assert any(not one.placed and np.abs(one.samples).max() > 0.05 for one in windows)
    assert any(one.placed and not one.samples[-SAMPLE_RATE:].any() for one in windows)
    for one in windows:
        assert np.isfinite(one.samples).all()
        assert np.abs(one.samples).max() < 2
        for sentence in one.placed:
            heard = one.samples[round(sentence.start * SAMPLE_RATE) : round(sentence.end * SAMPLE_RATE)]
            assert np.abs(heard).max() > 0.005


def test_log_mel_is_openai_whispers(corpus: Corpus) -> None:
    samples = WindowMaker(corpus, seed=5).draw(500).samples
    torch.testing.assert_close(log_mel(torch.from_numpy(samples)[None])[0], whisper.log_mel_spectrogram(samples))


@pytest.mark.parametrize("n_positions", [200, 1500])
def test_the_bundled_model_says_what_the_targets_say(corpus: Corpus, n_positions: int) -> None:
    """Teacher-forced on held-out windows: targets, network and losses are those that made the model."""
    batch = make_batch(WindowMaker(corpus, seed=1), demo_vocabulary(), 6, n_positions)
    with torch.inference_mode():
        losses = compute_losses(bundled_net(), to_device(batch, torch.device("cpu")))
    assert losses.text_accuracy > 0.85
    assert losses.timestamp_accuracy > 0.6
    assert losses.guide < 1  # its alignment heads look at the words: without training about 4.7


def bundled_net() -> Net:
    """The bundled weights in the network of training, whose own heads stay untrained."""
    vocabulary = demo_vocabulary()
    net = Net(NetConfig(vocabulary.n_rows, vocabulary.n_unused)).eval()
    tensors = load_file(model_path() / "model.safetensors")
    state = {name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()}
    table = "decoder.embed_tokens.weight"
    unused = int(np.flatnonzero(vocabulary.row_of == vocabulary.dummy_row)[0])
    state[table] = state[table][[*vocabulary.ids, unused]]
    assert not net.load_state_dict(state, strict=False).unexpected_keys
    return net


def test_an_incomplete_corpus_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"en": 1, "de": 1, "es": 0}, seed=1)
    with pytest.raises(ValueError, match="es"):
        Corpus([tmp_path])
