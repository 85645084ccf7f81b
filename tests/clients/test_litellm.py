"""litellm as people use it: the OpenAI and the Anthropic provider with a base address."""

import litellm


def test_openai_provider(url, model):
    ask = dict(model=f"openai/{model}", api_base=f"{url}/v1", api_key="none", max_tokens=16, temperature=0,
               messages=[{"role": "user", "content": "Say hello."}])
    whole = litellm.completion(**ask).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
    assert whole and "".join(parts) == whole


def test_anthropic_provider(url, model):
    answer = litellm.completion(model=f"anthropic/{model}", api_base=url, api_key="none", max_tokens=16,
                                messages=[{"role": "user", "content": "Say hello."}])
    assert answer.choices[0].message.content
