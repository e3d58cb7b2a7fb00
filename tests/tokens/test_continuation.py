"""A text and its continuation, for every kind of tokenizer: the first part keeps its tokens, and all tokens decode to the full text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from stages.corpora.templates import encode_pair, encode_plain_pair, encode_prompt, render_prompt, set_template
from stages.models.loading import load_tokenizer
from stages.tokens.continuation import beginning_ids, continuation_text, continued, plain_ids, segment_ids

KINDS = ("byte_bpe", "sentencepiece", "metaspace", "unigram", "wordpiece")
PAIRS = [
    ("once upon a time", " there was a cat"),
    ("once upon a time ", "there was a cat"),
    ("once upon a time\n", "there was a cat"),
    ("once upon a time", "\n\nthere was a cat"),
    ("once upon a time\n", "\nthere was a cat"),
    ("once upon a ti", "me there was a cat"),
    ("the answer is:", " 22"),
    ("hello<|im_start|>", "there was a cat"),
    ("hello[/INST]", " there was a cat"),
    ("hello<|end|>", "\nhow are you?"),
    ("", "there was a cat"),
    ("hello", ""),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "addition"), PAIRS)
def test_tokens_of_the_parts_decode_to_the_full_text(tokenizer_of, kind, text, addition) -> None:
    tokenizer = tokenizer_of(kind)
    first, second = segment_ids(tokenizer, [text, addition])
    assert first == plain_ids(tokenizer, text)
    assert tokenizer.decode(first + second) == tokenizer.decode(plain_ids(tokenizer, text + addition))


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
@pytest.mark.parametrize(
    ("text", "addition", "expected"),
    [
        ("time", " there", ["▁there"]),
        ("time ", "there", ["t", "he", "re"]),
        ("time\n", "there", ["t", "he", "re"]),
        ("time", "\nthere", ["\n", "t", "he", "re"]),
    ],
)
def test_no_space_is_added_before_a_completion(tokenizer_of, kind, text, addition, expected) -> None:
    tokenizer = tokenizer_of(kind)
    ids = continued(tokenizer, text, plain_ids(tokenizer, text), addition)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "".join(expected)
    assert tokenizer.convert_ids_to_tokens(ids)[0] == expected[0]


def test_real_stories_are_encoded_as_one_text(shared_data) -> None:
    tokenizer = load_tokenizer(str(shared_data / "stories260K" / "hf"))
    ids, length = encode_pair(tokenizer, "Once upon a time", "there was a cat", eos=False)
    assert ids == tokenizer("Once upon a time there was a cat")["input_ids"]
    assert ids[:length] == tokenizer("Once upon a time")["input_ids"] == encode_prompt(tokenizer, "Once upon a time")
    after_line, _ = encode_pair(tokenizer, "Once upon a time\n", "there", eos=False)
    assert tokenizer.convert_ids_to_tokens(after_line)[-3:] == ["t", "he", "re"]
    context, choice = encode_plain_pair(tokenizer, "Once upon a time", "there was a cat")
    assert context + choice == ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_merge_over_the_boundary_does_not_change_the_prompt(tokenizer_of, kind) -> None:
    """'there was' is split inside a word. The first part has the same tokens as without the continuation."""
    tokenizer = tokenizer_of(kind)
    first, second = segment_ids(tokenizer, ["the weather is wa", "rm today"])
    assert first == plain_ids(tokenizer, "the weather is wa")
    assert tokenizer.decode(first + second).replace(" ", "") == "theweatheriswarmtoday"


@pytest.mark.parametrize("kind", KINDS)
def test_continuation_is_decoded_after_its_prompt(tokenizer_of, kind) -> None:
    tokenizer = tokenizer_of(kind)
    for text, addition in (("how are you?", " i am fine"), ("the weather is wa", "rm today"), ("once upon\n", "a time")):
        before, ids = segment_ids(tokenizer, [text, addition])
        expected = addition
        if kind == "unigram" and text.endswith("\n"):
            expected = "a time"
        assert continuation_text(tokenizer, before, ids).strip() == expected.strip()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [None, "question", "tldr", "Q: {prompt}\nA:"])
def test_a_plain_text_begins_as_the_tokenizer_begins_texts(tokenizer_of, kind, template) -> None:
    tokenizer = tokenizer_of(kind)
    if template is not None:
        set_template(tokenizer, template)
    text = {None: "hi", "question": "Question: hi\nAnswer:", "tldr": "hi\n\nTL;DR:", "Q: {prompt}\nA:": "Q: hi\nA:"}[template]
    assert encode_prompt(tokenizer, "hi") == tokenizer(text)["input_ids"]
    assert beginning_ids(tokenizer) == ([] if kind == "byte_bpe" else [tokenizer.bos_token_id])
    ids, length = encode_pair(tokenizer, "hi", "the cat")
    assert ids[:length] == encode_prompt(tokenizer, "hi") and ids[-1] == tokenizer.eos_token_id
    assert ids[:-1] == tokenizer(f"{text} the cat")["input_ids"]
    if template is not None:  # other programs get the same text from the template
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat"}]
        begins = "" if kind == "byte_bpe" else "<s>"
        assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{begins}{text} the cat</s>"


FIRST_FORM = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}{{ message['content'] }}{{ eos_token }}{%- else -%}"
    '{{ "Q \\"{\\": " }}{{ message[\'content\'] }}{{ "\\nA:" }}{%- endif -%}{%- endfor -%}'
)


def test_models_of_earlier_versions_keep_their_encoding(tokenizer_of) -> None:
    """Their plain templates have no beginning token and no space. The space was added before the completion."""
    tokenizer = tokenizer_of("sentencepiece")
    tokenizer.chat_template = FIRST_FORM
    assert render_prompt(tokenizer, "hi") == 'Q "{": hi\nA:'
    ids, length = encode_pair(tokenizer, "hi", "the cat")
    assert ids == [*plain_ids(tokenizer, 'Q "{": hi\nA: the cat'), tokenizer.eos_token_id]


def test_a_tokenizer_without_an_end_token_appends_none(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    tokenizer.eos_token = None
    assert tokenizer.decode(encode_pair(tokenizer, "hi", "the cat")[0]) == "hi the cat"


def test_the_beginning_is_known_for_a_vocabulary_of_few_characters() -> None:
    made = Tokenizer(models.BPE({character: token for token, character in enumerate(["<s>", "</s>", *"0123456789+="])}, []))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    assert encode_prompt(tokenizer, "1+2") == tokenizer("1+2")["input_ids"] == [0, 3, 12, 4]


def test_a_word_that_follows_without_a_space_keeps_its_token() -> None:
    """The tokenizer reads ``filmjoy`` as one unknown word."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "film": 1, "joy": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    assert segment_ids(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"), ["film", "joy"]) == [[1], [2]]


def test_a_decoder_that_fails_at_unknown_ids_skips_them() -> None:
    """An embedding may have more rows than the tokenizer has tokens, and sampling may choose them."""
    tokenizer = ByT5Tokenizer()
    ids = plain_ids(tokenizer, "ab")
    assert continuation_text(tokenizer, ids, [ids[0], len(tokenizer), ids[1]]) == "ab"
