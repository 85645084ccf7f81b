"""langchain-openai under LangChain's own integration suite."""

import os
from functools import reduce
from operator import add

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class OneCall(ChatOpenAI):
    """One call at a time: a small model that has to call goes on calling."""

    def bind_tools(self, tools, **options):
        return super().bind_tools(tools, **{"parallel_tool_calls": False, **options})


class Forced(OneCall):
    """Calls a tool whenever it has any, as a small model does not by itself."""

    def bind_tools(self, tools, **options):
        return super().bind_tools(tools, **{"tool_choice": "any", **options})


class TestMesh(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return OneCall

    @property
    def chat_model_params(self):
        return {
            "base_url": os.environ["MESH_URL"] + "/v1",
            "api_key": "none",
            "model": os.environ["MESH_MODEL"],
            "temperature": 0,
            "max_tokens": 256,
            "max_retries": 0,
            # A small model that always takes the likeliest token says the same thing without end.
            "frequency_penalty": 0.5,
            # Off by default where the address is not OpenAI's.
            "stream_usage": True,
            "timeout": 600,
        }

    @property
    def has_tool_choice(self):
        return True

    @property
    def has_structured_output(self):
        return True

    @property
    def structured_output_kwargs(self):
        # Without it, schemas allow for properties that they do not name, and a small model thinks of many.
        return {"strict": True}

    @property
    def supports_json_mode(self):
        return True

    @property
    def model_override_value(self):
        return os.environ["MESH_OTHER_MODEL"]

    @property
    def supports_anthropic_inputs(self):
        return True

    @property
    def supported_usage_metadata_details(self):
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream=False):
        model = ChatOpenAI(**self.chat_model_params)
        for _ in range(2):
            parts = model.stream("Say hello.") if stream else [model.invoke("Say hello.")]
            answer = reduce(add, parts)
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
        return answer

    @property
    def enable_vcr_tests(self):
        return False


def test_agent_loop_with_forced_calls():
    suite = TestMesh()
    suite.test_agent_loop(Forced(**suite.chat_model_params))
