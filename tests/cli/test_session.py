"""A conversation drops its oldest messages when it grows past the model's length, and keeps what was said."""

from unittest import mock

import pytest

from transformer.cli import session
from transformer.cli.session import Conversation
from transformer.runs.saved import Loaded
from transformer.types import UserError

LIMIT = 40
SYSTEM = [{"role": "system", "content": "be kind"}]


def count_words(tokenizer, messages, *, reply):
    assert tokenizer == "words" and reply
    return [word for message in messages for word in message["content"].split()]


@pytest.fixture
def talk(monkeypatch):
    """A conversation with a model that replies with five words; `seen` has the messages of each call."""
    monkeypatch.setattr(session, "chat_ids", count_words)
    seen, notes = [], []

    def reply(run, messages, max_new_tokens, sampling, seed, note, **options):
        if len(count_words("words", messages, reply=True)) > LIMIT:
            raise UserError("too long")
        seen.append(([message["content"] for message in messages], seed))
        yield from ("one ", "two ", "three ", "four ", "five")

    run = mock.create_autospec(Loaded, instance=True)
    run.tokenizer, run.config = "words", mock.Mock()
    run.config.model.max_length = LIMIT
    run.config.objective.reply = reply
    return Conversation(run, SYSTEM, (8, None), 7, {}, notes.append), seen, notes


def text(name, words):
    return " ".join([name] * words)


def test_the_oldest_messages_are_dropped_but_not_the_system_message(talk):
    conversation, seen, notes = talk
    for turn in range(3):
        assert "".join(conversation.answer(text(f"m{turn}", 10), turn)) == "one two three four five"
    # 2 + 10 + 5 + 10 words and 8 of the reply fit in 40; another 5 + 10 do not.
    assert [len(messages) for messages, _ in seen] == [2, 4, 4]
    assert [messages[0] for messages, _ in seen] == ["be kind"] * 3
    assert seen[2][0][1:] == [text("m1", 10), "one two three four five", text("m2", 10)]
    assert [seed for _, seed in seen] == [7, 8, 9]
    assert notes == ["the conversation is longer than the model's 40 tokens: its 2 oldest messages are dropped."]


def test_several_are_dropped_at_once_and_the_last_message_stays(talk):
    conversation, seen, notes = talk
    for turn in range(3):
        list(conversation.answer(text(f"m{turn}", 2), turn))
    list(conversation.answer(text("long", 30), 3))
    assert seen[3][0] == ["be kind", text("long", 30)]
    assert "its 6 oldest messages are dropped" in notes[0]
    list(conversation.answer(text("longer", 37), 4))  # 39 words of 40: a short reply fits
    assert seen[4][0] == ["be kind", text("longer", 37)] and len(notes) == 2


def test_a_message_that_cannot_fit_is_refused_and_leaves_the_conversation_as_it_was(talk):
    conversation, seen, notes = talk
    list(conversation.answer("hello", 0))
    with pytest.raises(UserError, match="too long"):
        list(conversation.answer(text("long", 50), 1))
    list(conversation.answer("again", 2))
    assert seen[-1][0] == ["be kind", "hello", "one two three four five", "again"] and not notes


def test_a_stopped_reply_stays_in_the_conversation(talk):
    conversation, seen, _ = talk
    pieces = conversation.answer("hello", 0)
    assert next(pieces) == "one "
    pieces.close()
    list(conversation.answer("again", 1))
    assert seen[1][0] == ["be kind", "hello", "one ", "again"]
