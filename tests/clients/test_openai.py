"""The official client, blocking, streamed and asynchronous."""

import asyncio
import json

import openai
import pytest

HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_models(client, model):
    assert model in [one.id for one in client.models.list()]
    assert client.models.retrieve(model).id == model


def test_streamed_is_blocking(client, model):
    ask = dict(model=model, messages=HELLO, temperature=0, max_tokens=24)
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_seed_repeats(client, model):
    ask = dict(model=model, messages=HELLO, temperature=1.5, max_tokens=24)
    one, two, other = [
        client.chat.completions.create(**ask, seed=seed).choices[0].message.content for seed in [1, 1, 2]
    ]
    assert one == two != other


def test_n_and_logprobs(client, model):
    answer = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=8, n=2, seed=3, logprobs=True, top_logprobs=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert tokens and all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in tokens)


def test_json_schema(client, model, weather):
    schema = {"name": "weather", "schema": weather, "strict": True}
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Weather in Paris?"}], temperature=1.5, max_tokens=200,
        response_format={"type": "json_schema", "json_schema": schema},
    )
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"city", "unit"} and value["unit"] in ("celsius", "fahrenheit")


def test_forced_tool(client, model, weather):
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": weather}}]
    for choice in ["required", {"type": "function", "function": {"name": "get_weather"}}]:
        ask = dict(model=model, messages=HELLO, tools=tools, tool_choice=choice, max_tokens=200, temperature=0)
        whole = client.chat.completions.create(**ask).choices[0].message.tool_calls
        assert whole and all(call.function.name == "get_weather" for call in whole)
        assert all(set(json.loads(call.function.arguments)) == {"city", "unit"} for call in whole)
        streamed = {}
        for chunk in client.chat.completions.create(**ask, stream=True):
            for part in chunk.choices[0].delta.tool_calls or []:
                name, arguments = streamed.get(part.index, ("", ""))
                streamed[part.index] = (name + (part.function.name or ""), arguments + (part.function.arguments or ""))
        calls = [(call.function.name, call.function.arguments) for call in whole]
        assert [streamed[index] for index in range(len(streamed))] == calls


def test_one_call(client, model, weather):
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": weather}}]
    answer = client.chat.completions.create(
        model=model, messages=HELLO, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )
    assert len(answer.choices[0].message.tool_calls) == 1


def test_completions(client, model):
    answer = client.completions.create(model=model, prompt="One, two, three,", max_tokens=8, temperature=0, echo=True)
    assert answer.choices[0].text.startswith("One, two, three,")
    answer = client.completions.create(model=model, prompt=["a", "b"], max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_responses(client, model):
    first = client.responses.create(model=model, input="Say hello.", max_output_tokens=24, temperature=0)
    assert first.output_text and first.status in ("completed", "incomplete")
    second = client.responses.create(
        model=model, input="Again.", previous_response_id=first.id, max_output_tokens=24, temperature=0
    )
    assert second.usage.input_tokens > first.usage.input_tokens
    with client.responses.stream(model=model, input="Say hello.", max_output_tokens=24, temperature=0) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == f"response.{first.status}"
    assert text == events[-1].response.output_text == first.output_text
    assert client.responses.retrieve(first.id).id == first.id
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_errors_are_typed(client, model):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=HELLO, extra_body={"temprature": 1})
    assert caught.value.param == "temprature"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=HELLO, temperature=9)


def test_many_at_once(url, model):
    async def all_of_them():
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=3)
        ask = dict(model=model, messages=HELLO, temperature=0, max_tokens=8)
        answers = await asyncio.gather(*(client.chat.completions.create(**ask) for _ in range(8)))
        return {answer.choices[0].message.content for answer in answers}

    assert len(asyncio.run(all_of_them())) == 1
