"""An uncased WordPiece tokenizer trained on texts."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stages.sentiment.config import WordPieceSettings


def train_wordpiece(texts: Sequence[str], settings: WordPieceSettings, max_length: int) -> PreTrainedTokenizerBase:
    """An uncased WordPiece tokenizer that removes HTML tags. Equal texts give equal tokenizers."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Part of the tokenizer instead of the stage, because users of the exported model pass raw reviews.
    tags = normalizers.Replace(Regex("<[^<>]{1,40}>"), " ")
    normalizer = normalizers.Sequence([tags, normalizers.BertNormalizer(lowercase=True)])
    # The trainer numbers word pieces in the order of a hash table. This order differs between runs, and decides between equally frequent
    # merges. With all characters as special tokens, the trainer has nothing left to order. The tokenizer is then built from the vocabulary.
    letters = sorted(set("".join(normalizer.normalize_str(text) for text in texts)) - set(" \t\n\r"))
    alphabet = [*letters, *(f"##{letter}" for letter in letters)]

    def blank(vocabulary: dict[str, int] | None = None) -> Tokenizer:
        made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=settings.max_chars))
        made.normalizer, made.pre_tokenizer, made.decoder = normalizer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        return made

    trained = blank()
    trainer = trainers.WordPieceTrainer(vocab_size=settings.vocab_size, special_tokens=[*special, *alphabet], show_progress=False)
    trained.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer = blank(trained.get_vocab())
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)
