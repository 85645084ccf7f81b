"""Anthropic's client."""

import anthropic
import pytest

HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def client(url):
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def test_streamed_is_blocking(client, model):
    ask = dict(model=model, max_tokens=24, messages=HELLO, extra_body={"temperature": 0})
    whole = client.messages.create(**ask)
    assert whole.content[0].type == "text" and whole.stop_reason in ("end_turn", "max_tokens")
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_forced_tool(client, model, weather):
    tools = [{"name": "get_weather", "description": "Weather of a city", "input_schema": weather}]
    answer = client.messages.create(
        model=model, max_tokens=200, messages=HELLO, tools=tools, tool_choice={"type": "tool", "name": "get_weather"}
    )
    block = next(block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use" and set(block.input) == {"city", "unit"}
    history = [
        *HELLO,
        {"role": "assistant", "content": [block.model_dump()]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "Sunny"}]},
    ]
    assert client.messages.create(model=model, max_tokens=8, messages=history, tools=tools).role == "assistant"


def test_counting(client, model):
    count = client.messages.count_tokens(model=model, messages=HELLO, system="Be brief.")
    answer = client.messages.create(model=model, max_tokens=1, messages=HELLO, system="Be brief.")
    usage = answer.usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_stop_sequences(client, model):
    answer = client.messages.create(
        model=model, max_tokens=64, messages=[{"role": "user", "content": "Count: 1 2 3"}], stop_sequences=["e", "a"],
    )
    assert answer.stop_reason in ("stop_sequence", "end_turn", "max_tokens")


def test_errors_are_typed(client, model):
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nobody", max_tokens=1, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=model, max_tokens=1, messages=[])
