"""Text as token ids: the published tokenizer of a weight folder, words or bytes; the prompt of images and instruction.

Special ids (images, turns, the end) never come out of text: a caption that spells `<|image_pad|>` is encoded letter by
letter. No JAX.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from wallwm_jax.console import UserError

TOKENIZER_FILE = "tokenizer.json"
# Of OCBench's instructions and captions, and of what surrounds them in a prompt; the order is that of the ids.
_WORDS = (
    "a above action air all and are arm assistant away back block blocks blue both bring build button buttons by "
    "camera carry centre close closed colour column come disk done down draw drawer for from front get go grab grasp "
    "green grey grip gripper hand handle has hit hold how in into is it its leave left let lift lock locked long "
    "lower make match middle move moving next nothing now of off on one onto open out over peg pick press pressing "
    "pull push put raise reach red release remaining rest retract right row s same set settled slide stack still "
    "store subtask sure table take takes task the them then through to towards tower try unlock until up user wait "
    "white window yellow"
)
WORDS = tuple(_WORDS.split())
_PIECE = re.compile(r" ?[a-z]+|[^a-z]")


class Tokenizer(Protocol):
    """What all tokenizers have.

    Attributes:
      vocabulary: number of ids.
      pad_id: fills up short rows. end_id: ends a turn and the answer (`<|im_end|>`). start_id: starts a turn.
      vision_start_id, image_id, vision_end_id: before, for each token of, and after an image.
      no_thinking: text that opens an answer without a reasoning trace.
    """

    vocabulary: int
    pad_id: int
    end_id: int
    start_id: int
    vision_start_id: int
    image_id: int
    vision_end_id: int
    no_thinking: str

    def encode(self, text: str) -> list[int]:
        """Ids of a text; none of them is special."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ones are left out."""


class BytesTokenizer:
    """UTF-8 bytes as ids 0 to 255, then the special ids; needs no files."""

    start_id, end_id, pad_id, vision_start_id, image_id, vision_end_id = range(256, 262)
    vocabulary = 262
    no_thinking = ""

    def encode(self, text: str) -> list[int]:
        """One id per byte."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """The text; a character of which bytes are missing is left out."""
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="ignore")


class WordsTokenizer(BytesTokenizer):
    """Bytes, and an id for each of `WORDS`, bare and after a space; needs no files.

    OCBench's captions have a quarter of the tokens that they have in bytes, and each names something.
    """

    def __init__(self) -> None:
        first = BytesTokenizer.vocabulary
        forms = [form for word in WORDS for form in (word, f" {word}")]
        self._ids = {form: first + number for number, form in enumerate(forms)}
        self._pieces = {number: piece.encode() for piece, number in self._ids.items()}
        self.vocabulary = first + len(self._ids)

    def encode(self, text: str) -> list[int]:
        """Ids of a text: of known words one each, of all else the bytes."""
        pieces = _PIECE.findall(text)
        return [token for piece in pieces for token in ([self._ids[piece]] if piece in self._ids else piece.encode())]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; a character of which bytes are missing is left out."""
        parts = (bytes([token]) if token < 256 else self._pieces.get(token, b"") for token in ids)
        return b"".join(parts).decode("utf-8", errors="ignore")


class FolderTokenizer:
    """The `tokenizer.json` that is published with the weights."""

    def __init__(self, directory: str | Path):
        """Reads `directory/tokenizer.json`.

        Raises:
          UserError: the file is missing, damaged or another model's, or the package `tokenizers` is not installed.
        """
        file = Path(directory).expanduser() / TOKENIZER_FILE
        if not file.is_file():
            raise UserError(f"no tokenizer {str(file)!r}; copy {TOKENIZER_FILE} from the published weights there")
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                "the tokenizer of Qwen3.5 needs the package tokenizers: pip install 'wallwm_jax[vlm]'"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"tokenizer {str(file)!r} cannot be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # text never yields a special id
        self.vocabulary = self._tokenizer.get_vocab_size(with_added_tokens=True)
        names = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
        ids = {name: number for name in names if (number := self._tokenizer.token_to_id(name)) is not None}
        if missing := [name for name in names if name not in ids]:
            raise UserError(f"tokenizer {str(file)!r} has no {missing[0]}; is it Qwen3.5's?")
        self.pad_id, self.end_id, self.start_id, self.vision_start_id, self.image_id, self.vision_end_id = ids.values()
        thinks = self._tokenizer.token_to_id("<think>") is not None
        self.no_thinking = "<think>\n\n</think>\n\n" if thinks else ""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any at its start or end."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ones are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def get_tokenizer(name: str) -> Tokenizer:
    """ "bytes", "words", or the folder of a `FolderTokenizer`."""
    own = {"bytes": BytesTokenizer, "words": WordsTokenizer}
    return own[name]() if name in own else FolderTokenizer(name)


def prompt(tokenizer: Tokenizer, instruction: str, images: int, image_tokens: int) -> list[int]:
    """Ids of one turn of the user, the images first, and the opening of the answer, as the published chat template.

    Args:
      tokenizer: of the model.
      instruction: what the user says.
      images: how many images.
      image_tokens: placeholders for each, `VLMConfig.image_tokens`.
    """
    image = [tokenizer.vision_start_id, *[tokenizer.image_id] * image_tokens, tokenizer.vision_end_id]
    turn, instruction = "user\n", instruction.strip()
    seen = [*tokenizer.encode(turn), *image * images, *tokenizer.encode(instruction)]
    return [
        tokenizer.start_id,
        *(seen if images else tokenizer.encode(turn + instruction)),
        tokenizer.end_id,
        *tokenizer.encode("\n"),
        tokenizer.start_id,
        *tokenizer.encode("assistant\n" + tokenizer.no_thinking),
    ]


def pad(tokenizer: Tokenizer, rows: Sequence[Sequence[int]], length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as (`ids [B, S]` int32, `mask [B, S]` bool), padded on the right to the longest, or to `length`.

    Raises:
      UserError: a row is longer than `length`.
    """
    longest = max(map(len, rows))
    if length and longest > length:
        raise UserError(f"a text of {longest} tokens is longer than the {length} there is room for")
    ids = np.full((len(rows), length or longest), tokenizer.pad_id, np.int32)
    for target, row in zip(ids, rows):
        target[: len(row)] = row
    return ids, np.arange(ids.shape[1]) < np.array([len(row) for row in rows])[:, None]
