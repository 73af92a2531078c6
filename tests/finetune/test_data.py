from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from amoeba_export.errors import AmoebaError, BadRecord, EmptyData, InputError, NotFound, NotText, UnsupportedError
from amoeba_export.finetune.data import Example, read_examples
from tests.finetune.models import char_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def plain(tmp_path: Path) -> PreTrainedTokenizerFast:
    return char_tokenizer(tmp_path / "plain")


@pytest.fixture
def chat(tmp_path: Path) -> PreTrainedTokenizerFast:
    return char_tokenizer(tmp_path / "chat", chat_template=CHAT)


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[str, str]:
    """What is not trained on, and what is."""
    tokens, trained = example.tokens_T, example.trained_T
    return tokenizer.decode(tokens[~trained]), tokenizer.decode(tokens[trained])


def test_an_instruction_becomes_a_turn_of_chat_whose_answer_is_trained(
    tmp_path: Path, chat: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "d.jsonl", {"instruction": "Add.", "input": "1 2", "output": "3"})
    (example,) = read_examples(path, chat, max_length=200)
    assert texts(chat, example) == ("<bos><user>Add.\n\n1 2<end><assistant>", "3<end>")


def test_without_a_chat_template_an_instruction_has_the_words_of_alpaca(
    tmp_path: Path, plain: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "d.jsonl", {"instruction": "Add.", "output": "3"})
    (example,) = read_examples(path, plain, max_length=300)
    assert texts(plain, example) == (
        "<bos>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Response:\n",
        "3<eos>",
    )


def test_every_turn_of_the_assistant_is_trained(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao")]
    path = write(tmp_path / "d.jsonl", {"messages": [{"role": role, "content": text} for role, text in turns]})
    (example,) = read_examples(path, chat, max_length=300)
    assert texts(chat, example) == (
        "<bos><system>Be kind.<end><user>Hi<end><assistant><user>Bye<end><assistant>",
        "Hello<end>Ciao<end>",
    )


def test_text_is_trained_on_whole_but_for_its_first_token(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    (example,) = read_examples(write(tmp_path / "d.jsonl", {"text": "abc"}), plain, max_length=300)
    assert texts(plain, example) == ("<bos>", "abc<eos>")
    path = tmp_path / "d.txt"
    path.write_text("One\nparagraph.\n \nAnother.\n")
    assert [texts(plain, example)[1] for example in read_examples(path, plain, max_length=300)] == [
        "One\nparagraph.<eos>",
        "Another.<eos>",
    ]


def test_long_examples_lose_their_end_and_those_without_an_answer_left_are_dropped(
    tmp_path: Path, plain: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "d.jsonl", {"instruction": "x" * 300, "output": "3"}, {"text": "abcdefgh" * 20})
    heard: list[str] = []

    class Ear:
        warn = staticmethod(heard.append)

    (example,) = read_examples(path, plain, max_length=100, progress=Ear())
    assert len(example.tokens_T) == 100
    assert heard == [
        "2 of 2 examples are longer than 100 tokens and lose their end.",
        "1 of 2 examples have no answer within 100 tokens and are left out.",
    ]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", EmptyData, "The training data is empty."),
        (b"\x80PNG", NotText, "The training data is not UTF-8 text: byte 0 cannot be read."),
        (
            b'{"text": "a"}\n\n{"text": \n',
            BadRecord,
            "Line 3 of the training data is not JSON (Expecting value: line 1 column 10 (char 9)).",
        ),
        (b"[1]\n", BadRecord, "Line 1 of the training data is not a JSON object."),
        (
            b'{"prompt": "a"}\n',
            BadRecord,
            "Line 1 of the training data has none of 'instruction', 'messages' and 'text'; it has 'prompt'.",
        ),
        (
            b'{"instruction": "a", "response": "b"}\n',
            BadRecord,
            "Line 1 of the training data has no field 'output'; it has 'instruction', 'response'.",
        ),
        (b'{"text": 3}\n', BadRecord, "Line 1 of the training data has a field 'text' that is not text."),
        (
            b'{"messages": []}\n',
            BadRecord,
            "Line 1 of the training data has a field 'messages' that is not a list of messages.",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}\n',
            BadRecord,
            "Line 1 of the training data has the role 'bot' in message 2; it can be 'system', 'user', 'assistant', "
            "'tool'.",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}\n',
            BadRecord,
            "Line 1 of the training data has no message of the assistant, so there is nothing to learn from it.",
        ),
        (
            b'{"messages": [{"role": "user"}]}\n',
            BadRecord,
            "Line 1 of the training data has no text as the content of message 1.",
        ),
    ],
)
def test_bad_data_is_named_by_its_line(
    tmp_path: Path, chat: PreTrainedTokenizerFast, content: bytes, error: type[AmoebaError], message: str
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        read_examples(path, chat, max_length=100)
    assert caught.value.what == message
    if error is BadRecord:
        assert caught.value.where is not None
        assert caught.value.where.startswith(f"{path}:")
        assert caught.value.exit_code == 3


def test_data_that_a_tokenizer_cannot_take_is_refused(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    messages = write(tmp_path / "m.jsonl", {"messages": [{"role": "assistant", "content": "a"}]})
    with pytest.raises(UnsupportedError) as caught:
        read_examples(messages, plain, max_length=9)
    assert caught.value.what == "The training data has chat messages, and the model's tokenizer has no chat template."
    with pytest.raises(UnsupportedError) as caught:
        read_examples(write(tmp_path / "i.jsonl", {"text": "a"}), plain, max_length=9, prompt="chat")
    assert caught.value.what == "The prompt cannot be 'chat': the model's tokenizer has no chat template."
    with pytest.raises(InputError) as nothing:
        read_examples(write(tmp_path / "l.jsonl", {"instruction": "a", "output": "b"}), plain, max_length=9)
    assert nothing.value.what == "The training data has no example with an answer within 9 tokens."
    with pytest.raises(NotFound):
        read_examples(tmp_path / "absent.jsonl", plain, max_length=9)


def test_a_template_that_rewrites_history_is_refused(tmp_path: Path) -> None:
    """As templates do that drop the thoughts of earlier turns: the answer's tokens cannot be told apart."""
    tokenizer = char_tokenizer(tmp_path / "t", chat_template="{{ messages | length }}{{ messages[-1].content }}")
    path = write(
        tmp_path / "m.jsonl", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    with pytest.raises(UnsupportedError, match="rewrites earlier turns"):
        read_examples(path, tokenizer, max_length=99)
