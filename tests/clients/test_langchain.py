"""langchain-openai under LangChain's own integration suite."""

import os

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestMesh(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "base_url": os.environ["MESH_URL"] + "/v1",
            "api_key": "none",
            "model": os.environ["MESH_MODEL"],
            "temperature": 0,
            "max_tokens": 256,
            "max_retries": 0,
            "timeout": 600,
        }

    @property
    def has_tool_choice(self):
        return True

    @property
    def has_structured_output(self):
        return True

    @property
    def supports_json_mode(self):
        return True

    @property
    def enable_vcr_tests(self):
        return False
