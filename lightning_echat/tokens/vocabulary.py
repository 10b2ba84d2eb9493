"""Who owns which id. The only file that writes a token number.

Text ids are the rows of the language model's embedding and keep their pretrained meaning; the ids of speech follow:

    [0, T)            text
    T + [0, S - 1)    speech codes, S - 1 = codebook size
    T + S - 1         begin and end of output speech: embedded and predicted
    T + S, T + S + 1  begin and end of input speech: embedded only
    T + S + 2         audio placeholder: filled by the adapter, owns no embedding row
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lightning_echat.contracts import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The id space of one model.

    Attributes:
        text_size: T, the rows of the language model's embedding (may exceed the tokenizer's length).
        codebook_size: S - 1, the number of speech codes.
        end_of_text: The text id that ends a written turn.
    """

    text_size: int
    codebook_size: int
    end_of_text: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, text_size: int, codebook_size: int) -> Vocabulary:
        """Read the end of text from a tokenizer; `UserError` when the sizes cannot hold it."""
        end_of_text = tokenizer.eos_token_id
        if not isinstance(end_of_text, int):
            raise UserError(f"tokenizer {tokenizer.name_or_path!r} names no eos_token; give one that ends a chat turn")
        if len(tokenizer) > text_size:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} ids but text_vocabulary_size is "
                f"{text_size}; set text_vocabulary_size to the rows of the language model's embedding"
            )
        return cls(text_size=text_size, codebook_size=codebook_size, end_of_text=end_of_text)

    @property
    def speech_size(self) -> int:
        """S: the classes that the speech head predicts, codes and the boundary."""
        return self.codebook_size + 1

    @property
    def speech_rows(self) -> int:
        """Rows of the speech embedding table: S and the two marks of input speech."""
        return self.speech_size + 2

    @property
    def first_code(self) -> int:
        """Id of speech code 0."""
        return self.text_size

    @property
    def speech_boundary(self) -> int:
        """Begin and end of output speech."""
        return self.text_size + self.speech_size - 1

    @property
    def input_speech_begin(self) -> int:
        """Stands before the embeddings of an input clip."""
        return self.text_size + self.speech_size

    @property
    def input_speech_end(self) -> int:
        """Stands after the embeddings of an input clip."""
        return self.text_size + self.speech_size + 1

    @property
    def audio_placeholder(self) -> int:
        """One for each adapter output of an input clip."""
        return self.text_size + self.speech_size + 2

    @property
    def size(self) -> int:
        """One past the largest id."""
        return self.audio_placeholder + 1

    @property
    def padding(self) -> int:
        """Fills the end of rows. It is an ordinary id that nothing attends to and no loss counts."""
        return self.end_of_text
