"""Messages, tools and tool calls in rendered conversations, and the limits of a template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iwsft.datasets.text.chat import ChatEncoder
from iwsft.datasets.text.rows import to_row
from iwsft.datasets.text.tokens import tokenize
from tests.datasets.text.chat_tokenizers import (
    CHATML,
    MARKED,
    PHI,
    SPECIAL,
    assistant,
    byte_level,
    system,
    user,
)
from tests.datasets.text.test_chat import read_back, trained

# Writes tools in front, and tool calls behind the text.
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + MARKED.replace(
    "{% generation %}{{ m.content + '",
    "{% generation %}{{ m.content }}{% for c in m.tool_calls %}{{ '<call>' + "
    "{'name': c.function.name, 'arguments': c.function.arguments} | tojson }}{% endfor %}{{ '",
)


def call(name: str = "look_up", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, Any], content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": [*calls], **more}


def encode(template: str, *messages: dict[str, Any], **columns: Any) -> str:
    tokenizer = byte_level(template)
    row = to_row({"messages": messages, **columns}, "f:1")
    encoded = ChatEncoder(tokenizer).encode(row.messages or (), row.where, row.template_kwargs)
    return trained(tokenizer, encoded)


OSLO = call(city="Oslo", days=[1, 2.5], quiet=True, note='a "quoted"\nline')
WEATHER = [user("Weather?"), calling(OSLO), {"role": "tool", "content": "sun"}, assistant("Sunny.")]


def test_tool_calls_are_trained_where_the_template_writes_them():
    text = encode(TOOLS, *WEATHER)
    assert text.startswith(
        '<call>{"name": "look_up", "arguments": {"city": "Oslo", "days": [1, 2.5]'
    )
    assert text.endswith("<|im_end|>\nSunny.<|im_end|>\n")
    two = encode(TOOLS, user("q"), calling(call(a="x"), call(a="x"), content="Let me see."))
    assert two.startswith("Let me see.<call>") and two.count('"look_up"') == 2


@pytest.mark.parametrize(
    ("template", "messages", "error"),
    [
        (MARKED, WEATHER, "message 1: the chat template drops .* of a tool call"),
        # The text of the message has the words of the call.
        (
            MARKED,
            [user("q"), calling(call(city="Oslo"), content="I look_up city Oslo.")],
            "message 1: the chat template drops 'look_up' of a tool call",
        ),
        (
            TOOLS.replace("c.function.arguments}", "{}}"),
            [user("q"), calling(call(city="Oslo"))],
            "message 1: the chat template drops '(city|Oslo)' of a tool call",
        ),
        # One call of two alike.
        (
            TOOLS.replace("in m.tool_calls", "in m.tool_calls[:1]"),
            [user("q"), calling(call(city="Oslo"), call(city="Oslo"))],
            "drops 'look_up' of a tool call",
        ),
        # JSON inside JSON is another call.
        (
            TOOLS,
            [user("q"), calling({"function": {"name": "f", "arguments": '{"a": 1}'}})],
            "of a tool call",
        ),
        (
            TOOLS,
            [*WEATHER[:1], calling(OSLO, reasoning_content="hm"), *WEATHER[2:]],
            "drops 'reasoning_content'",
        ),
        (TOOLS.replace("== 'assistant'", "!= 'x'"), WEATHER, "not the assistant's"),
        (
            TOOLS.replace("<|im_end|>\n' }}{% endgen", "' }}{% endgen").replace(
                "{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>\n' }}"
            ),
            WEATHER[:2],
            "message 1: .*leave out a part of its end-of-turn token",
        ),
        (
            CHATML.replace("messages %}", "messages if m.role != 'tool' %}"),
            None,
            "this tool message",
        ),
        (CHATML.replace("messages %}", "messages if m.role != 'developer' %}"), None, "developer"),
        (
            CHATML.replace("messages %}", "messages if m.role != 'system' %}"),
            None,
            "message 3: the chat template drops this system message",
        ),
    ],
)
def test_what_a_template_drops_is_named(template, messages, error):
    everybody = [
        {"role": "developer", "content": "In French."},
        assistant("Oui."),
        {"role": "tool", "content": "sun"},
        system("Be brief."),
        assistant("Soleil."),
    ]
    with pytest.raises(ValueError, match=f"f:1.*{error}"):
        encode(template, *(messages or everybody))


def test_a_user_who_writes_what_the_template_looks_for():
    template = CHATML.replace("m.content +", "(m.content | replace('/quiet', '')) +")
    assert encode(template, user("/quiet"), assistant("a")) == "a<|im_end|>"
    ends = CHATML.replace(
        "m.content +", "('' if m.role == 'user' and not m.content.endswith('>') else m.content) +"
    )
    assert encode(ends, user("<r>sun</r>"), assistant("a")) == "a<|im_end|>"


def test_tools_and_template_variables_of_a_row():
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    messages = [user("hi"), assistant("hello")]
    tokenizer = byte_level(TOOLS)
    for given in (
        tools,
        '[{"type": "function", "function": {"name": "look_up", "parameters": {}}}]',
    ):
        row = to_row({"messages": messages, "tools": given}, "f:1")
        encoded = ChatEncoder(tokenizer).encode(messages, "f:1", row.template_kwargs)
        expected = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)
        assert encoded.ids == expected["input_ids"]
    with pytest.raises(ValueError, match="f:1: the chat template drops the tool 'look_up'"):
        encode(CHATML, *messages, tools=tools)
    with pytest.raises(ValueError, match="f:1: the chat template drops the tool 'look_up'"):
        encode(CHATML, user("Can you look_up this?"), assistant("hello"), tools=tools)
    mood = CHATML + "{{ mood }}"
    row = to_row({"messages": messages, "chat_template_kwargs": {"mood": "sad"}}, "f:1")
    chat = ChatEncoder(tokenizer, template=mood, template_kwargs={"mood": "glad"})
    assert tokenizer.decode(chat.encode(messages, "f", row.template_kwargs).ids).endswith("sad")
    assert tokenizer.decode(chat.encode(messages).ids).endswith("glad")


def test_documents_are_passed_to_templates_that_read_them():
    documents = [{"title": "Sky", "text": "It is blue."}]
    messages = [user("hi"), assistant("hello")]
    template = "{% for d in documents %}{{ d.title + ': ' + d.text }}{% endfor %}" + CHATML
    row = to_row({"messages": messages, "documents": documents}, "f:1")
    tokenizer = byte_level(template)
    encoded = ChatEncoder(tokenizer).encode(messages, "f:1", row.template_kwargs)
    expected = tokenizer.apply_chat_template(messages, documents=documents, return_dict=True)
    assert encoded.ids == expected["input_ids"]
    with pytest.raises(ValueError, match="f:1: the chat template drops the documents"):
        encode(CHATML, *messages, documents=documents)


def test_columns_and_keys_that_a_template_reads_or_drops():
    talk = [user("hi"), assistant("hello")]
    mood = to_row({"messages": talk, "mood": "sad", "source": "x"}, "f:1")
    assert len(tokenize([mood], byte_level()).trajectories["collector", "traj_ids"].unique()) == 1
    reads = byte_level("{% if mood is defined %}{{ mood }}{% endif %}" + CHATML)
    with pytest.raises(ValueError, match="f:1: the chat template reads 'mood', .* rename it"):
        tokenize([mood], reads)
    named = to_row({"messages": talk, "chat_template_kwargs": {"mood": "sad"}}, "f:1")
    assert not tokenize([named], reads, template_kwargs={"tone": "", "tools": None}).notes
    with pytest.warns(UserWarning, match="does not read brief, mood of the template_kwargs"):
        tokenize([named], byte_level(), template_kwargs={"brief": True})
    tools = [system("Use tools.") | {"tools": [{"name": "look_up"}]}, *talk]
    with pytest.raises(ValueError, match="f:1: message 0: the chat template drops 'tools'"):
        encode(CHATML, *tools)
    with pytest.raises(ValueError, match="f:1: message 1: the chat template drops 'tool_plan'"):
        encode(CHATML, user("hi"), assistant("hello") | {"tool_plan": "I greet."})
    written = CHATML.replace("m.content +", "m.content + (m.tools | tojson if m.tools else '') +")
    assert encode(written, *tools) == "hello<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_turn_of_weight_0_is_read_and_not_trained(template):
    bad, good = assistant("BAD") | {"weight": 0}, assistant("GOOD") | {"weight": 1}
    assert encode(template, user("q"), bad, user("no"), good).strip() == "GOOD<|im_end|>"


def test_a_turn_that_ends_in_two_special_tokens_trains_the_eos():
    two = CHATML.replace("<|im_end|>\n", "<|end|><|im_end|>\n")
    talk = [user("q"), assistant("a"), user("r"), assistant("b")]
    assert read_back(two, talk) == "a<|end|><|im_end|>b<|end|><|im_end|>"
    tokenizer = byte_level(PHI, eos="<|endoftext|>")
    assert read_back(PHI, talk, tokenizer) == "a<|end|>b<|end|>\n<|endoftext|>"
    # The tokenizer's EOS begins the next turn of a template that separates turns with it.
    assert read_back(PHI, talk) == "a<|end|>b<|end|>"


def test_generation_markers_may_enclose_the_assistants_header():
    header = MARKED.replace(
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}",
        "{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}",
    ).replace("{% else %}", "{% else %}{{ '<|im_start|>user\n' }}")
    text = read_back(header, [user("q"), assistant("a"), user("r"), assistant("b")])
    assert text == "<|im_start|>assistant\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    # Marks that touch are one stretch, which has one weight.
    with pytest.raises(ValueError, match="message 2: .* enclose the weights of two turns"):
        encode(header, user("q"), assistant("a"), assistant("b") | {"weight": 0})


def test_contents_in_parts():
    parts = CHATML.replace("m.content", "m.content[0].text")
    assert encode(parts, user("q"), assistant("a")) == "a<|im_end|>"


def test_the_marked_templates_of_trl_train_a_plain_conversation():
    trl = pytest.importorskip("trl")
    tokenizer = byte_level()
    ends = "<|END_RESPONSE|> <|END_OF_TURN_TOKEN|> <｜end▁of▁sentence｜> <|return|> <turn|> <|eot|>"
    more = [*ends.split(), "<end_of_utterance>", *SPECIAL]
    tokenizer.add_special_tokens({"additional_special_tokens": more})
    tokenizer.bos_token = "<s>"
    talk = [user("two?"), assistant("FOUR"), user("and?"), assistant("SIX")]
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"))
    assert files
    for file in files:
        encoded = ChatEncoder(tokenizer, template=file.read_text()).encode(talk, file.name)
        text = trained(tokenizer, encoded)
        assert "FOUR" in text and "SIX" in text and "?" not in text, file.name


def test_a_long_conversation_is_rendered_a_fixed_number_of_times(monkeypatch):
    chat = ChatEncoder(byte_level())
    renderings = []
    render = ChatEncoder._render
    monkeypatch.setattr(
        ChatEncoder, "_render", lambda *a, **k: renderings.append(1) or render(*a, **k)
    )

    def count(turns: int) -> int:
        renderings.clear()
        chat.encode([user("q"), assistant("a")] * turns)
        return len(renderings)

    count(2)
    assert count(2) == count(40) < 8


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails_names_its_error(program, error):
    with pytest.raises(ValueError, match=f"the chat template .*{error}"):
        encode(CHATML + program, user("q"), assistant("a"))
