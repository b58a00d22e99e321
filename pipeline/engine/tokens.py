"""Text ↔ token ids of a Whisper checkpoint: special ids by name, exact bytes, word boundaries, suppression lists.

The vocabulary's meaning follows openai/whisper's `tokenizer.py`; the file format is Hugging Face's `tokenizer.json`.
It knows nothing of audio or tensors.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as BpeTokenizer

from pipeline.errors import ConfigError, ModelError
from pipeline.types import DecodeOptions

# Written without spaces between words: split at every code point.
UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})

# Symbols that are annotation rather than speech. Single-token ones are banned with and without a space before them;
# musical notes always by their first token, since the byte-level vocabulary has no token for them.
_SYMBOLS = tuple('"#()*+/:;<=>@[\\]^_`{|}~「」『』') + tuple(
    "<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪".split()
)
_NOTES = tuple("♩♪♫♬♭♮♯")
MAX_HOTWORDS = 111  # tokens: half of the 223 that may stand before a window
_REPLACEMENT = "\ufffd"


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class Tokenizer:
    """A checkpoint's vocabulary. `n_vocab` is the model's row count; ids at `timestamp_begin` and above are times."""

    def __init__(self, bpe: BpeTokenizer, n_vocab: int) -> None:
        self._bpe = bpe
        self._bpe.encode_special_tokens = True  # "<|endoftext|>" in a user's prompt is plain text
        self.n_vocab = n_vocab
        self.eot = self._id("<|endoftext|>")
        self.sot = self._id("<|startoftranscript|>")
        self.translate = self._id("<|translate|>")
        self.transcribe = self._id("<|transcribe|>")
        self.sot_lm = self._id("<|startoflm|>")
        self.sot_prev = self._id("<|startofprev|>")
        self.no_speech = self._id("<|nospeech|>", "<|nocaptions|>")
        self.no_timestamps = self._id("<|notimestamps|>")
        self.timestamp_begin = self.no_timestamps + 1
        self.multilingual = n_vocab >= 51865
        self.languages: dict[str, int] = self._languages() if self.multilingual else {}

    @classmethod
    def load(cls, folder: Path, n_vocab: int) -> Tokenizer:
        """From `tokenizer.json`, or through transformers where a checkpoint has only the older files."""
        path = folder / "tokenizer.json"
        try:
            if path.is_file():
                return cls(BpeTokenizer.from_file(str(path)), n_vocab)
            from transformers import WhisperTokenizerFast

            return cls(WhisperTokenizerFast.from_pretrained(str(folder)).backend_tokenizer, n_vocab)
        except ModelError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"model {folder}: its tokenizer cannot be read ({error})") from None

    def _id(self, *names: str) -> int:
        for name in names:
            token = self._bpe.token_to_id(name)
            if token is not None:
                return int(token)
        raise ModelError(f"the model's tokenizer lacks {names[0]}: not a Whisper vocabulary")

    def _languages(self) -> dict[str, int]:
        """Code → id. Their count follows from the model's rows, so large-v3's Cantonese is there only with it."""
        count = self.n_vocab - 51765 - 1
        first = self.sot + 1
        codes = [str(self._bpe.id_to_token(first + i)).strip("<|>") for i in range(count)]
        return {code: first + i for i, code in enumerate(codes)}

    def sot_sequence(self, language: str | None, task: str) -> list[int]:
        """[sot, language, task]; an English-only model has just [sot]."""
        if not self.multilingual:
            return [self.sot]
        return [self.sot, self.languages[language or "en"], self.translate if task == "translate" else self.transcribe]

    def encode(self, text: str) -> list[int]:
        return [i for i in self._bpe.encode(text, add_special_tokens=False).ids if i < self.eot]

    def hotwords(self, text: str | None) -> list[int]:
        """The tokens that stand before every window's prompt."""
        return self.encode(" " + text.strip()) if text and text.strip() else []

    @cached_property
    def _bytes(self) -> list[bytes]:
        to_byte = _byte_of_char()
        vocabulary = {i: t for t, i in self._bpe.get_vocab(with_added_tokens=False).items()}
        text = (vocabulary.get(i, "") for i in range(self.eot))
        return [bytes(to_byte[c] for c in token) if all(c in to_byte for c in token) else b"" for token in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the text tokens; special tokens and times have none. Broken UTF-8 becomes U+FFFD."""
        return b"".join(self._bytes[t] for t in tokens if t < self.eot).decode("utf-8", errors="replace")

    def decode_with_names(self, tokens: Iterable[int]) -> str:
        """As `decode`, but special tokens that are no times by their names."""
        return self._decode_all(t for t in tokens if t < self.timestamp_begin)

    @cached_property
    def non_speech_tokens(self) -> tuple[int, ...]:
        banned = {self.encode(" -")[0], self.encode(" '")[0]}
        for symbol in _SYMBOLS + _NOTES:
            for ids in (self.encode(symbol), self.encode(" " + symbol)):
                if len(ids) == 1 or symbol in _NOTES:
                    banned.add(ids[0])
        return tuple(sorted(banned))

    def suppressed(self, suppress_tokens: Sequence[int]) -> list[int]:
        """The ids a request may never sample; -1 in the request stands for the non-speech symbols.

        An empty list bans nothing at all, the markers of a transcript's structure neither: the reference's quirk.
        """
        if not suppress_tokens:
            return []
        asked = {t for t in suppress_tokens if t >= 0}
        if -1 in suppress_tokens:
            asked.update(self.non_speech_tokens)
        structure = {self.transcribe, self.translate, self.sot, self.sot_prev, self.sot_lm, self.no_speech}
        return sorted(asked | structure)

    def split_words(self, tokens: Sequence[int], language: str | None) -> tuple[list[str], list[list[int]]]:
        """Words with their tokens: at spaces, or at every code point where the language has none."""
        pieces, piece_tokens = self._split_code_points(tokens)
        if language in UNSPACED_LANGUAGES:
            return pieces, piece_tokens
        words: list[str] = []
        word_tokens: list[list[int]] = []
        for piece, ids in zip(pieces, piece_tokens, strict=True):
            opens = ids[0] >= self.eot or piece.startswith(" ") or piece.strip() in string.punctuation
            if opens or not words:
                words.append(piece)
                word_tokens.append(list(ids))
            else:
                words[-1] += piece
                word_tokens[-1].extend(ids)
        return words, word_tokens

    def _split_code_points(self, tokens: Sequence[int]) -> tuple[list[str], list[list[int]]]:
        """The shortest runs of tokens that decode to whole characters.

        A U+FFFD that the full text has at the same place is the text's own and closes a run too.
        """
        full = self._decode_all(tokens)
        pieces: list[str] = []
        piece_tokens: list[list[int]] = []
        run: list[int] = []
        offset = 0
        for token in tokens:
            run.append(token)
            text = self._decode_all(run)
            broken = text.find(_REPLACEMENT)
            if broken < 0 or full[offset + broken : offset + broken + 1] == _REPLACEMENT:
                pieces.append(text)
                piece_tokens.append(run)
                run = []
                offset += len(text)
        return pieces, piece_tokens

    def _decode_all(self, tokens: Iterable[int]) -> str:
        """As `decode`, with special tokens by name: they need a width of their own in `_split_code_points`."""
        parts = (self._bytes[t] if t < self.eot else str(self._bpe.id_to_token(t) or "").encode() for t in tokens)
        return b"".join(parts).decode("utf-8", errors="replace")


def check_options(options: DecodeOptions, tokenizer: Tokenizer) -> None:
    """Refuses what the engine, or a model with this vocabulary, cannot honour. Raises `ConfigError`."""
    if options.patience is not None and options.beam_size is None:
        raise ConfigError("patience needs beam_size")
    for name in ("beam_size", "best_of", "patience"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} {value} is not above 0")
    n_hotwords = len(tokenizer.hotwords(options.hotwords))
    if n_hotwords > MAX_HOTWORDS:
        raise ConfigError(f"hotwords are {n_hotwords} tokens; at most {MAX_HOTWORDS} leave room for a prompt")
    if options.beam_size is not None and round(options.beam_size * (options.patience or 1.0)) < 1:
        raise ConfigError(f"patience {options.patience} leaves beam_size {options.beam_size} no candidate")
    languages = tokenizer.languages or {"en": 0}
    if options.language not in (None, "window") and options.language not in languages:
        raise ConfigError(f"language {options.language!r} is not one of the model's: {' '.join(sorted(languages))}")
    outside = next((t for t in options.suppress_tokens if not -1 <= t < tokenizer.n_vocab), None)
    if outside is not None:
        raise ConfigError(f"suppress_tokens: {outside} is no token of the model (0 ... {tokenizer.n_vocab - 1}, or -1)")
    if options.task == "translate" and not tokenizer.multilingual:
        raise ConfigError("task translate needs a multilingual model")
    if not 1 <= options.chunk_length_s <= 30:
        raise ConfigError(f"chunk_length_s {options.chunk_length_s} is not within 1 ... 30")
    sequential_only = options.hallucination_silence_threshold is not None or options.clip_timestamps != (0.0,)
    if sequential_only and options.algorithm != "sequential":
        raise ConfigError("hallucination_silence_threshold and clip_timestamps need algorithm sequential")
    if options.hallucination_silence_threshold is not None and not options.word_timestamps:
        raise ConfigError("hallucination_silence_threshold needs word timestamps")
