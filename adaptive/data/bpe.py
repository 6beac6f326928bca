"""Training a byte-level BPE vocabulary on documents."""

from collections.abc import Iterable

from adaptive.data.documents import Document
from adaptive.data.tokenizer_files import END_OF_TEXT, MOST_IDS
from adaptive.errors import DataError

PAD = "<|pad|>"
_SPECIAL = [END_OF_TEXT, PAD]


def train_bpe(documents: Iterable[Document], vocab_size: int) -> str:
    """The JSON of a `tokenizer.json` with `vocab_size` ids learnt from the text of `documents`.

    Byte-level BPE with GPT-2's splitting pattern, every digit a token of its own, and two specials: id 0 ends a
    document, id 1 pads. Any text can be encoded, since every byte has a token. Raises DataError when `vocab_size`
    cannot hold the bytes and specials, when the text has too few different words to fill it, or without the package.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise DataError("training a tokenizer needs a package: pip install 'adaptive-lm[bpe]'") from None
    if vocab_size > MOST_IDS:
        raise DataError(f"--vocab_size {vocab_size}: at most {MOST_IDS:,}")
    smallest = 256 + len(_SPECIAL)
    if vocab_size < smallest:
        raise DataError(f"--vocab_size {vocab_size}: the 256 bytes and {len(_SPECIAL)} specials need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for text in documents if isinstance(text, str)), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"the text gives only {tokenizer.get_vocab_size()} tokens, --vocab_size asks for {vocab_size}: "
            "use more text or a smaller vocabulary"
        )
    return tokenizer.to_str(pretty=False)
