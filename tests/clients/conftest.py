import os

import pytest


@pytest.fixture(scope="session")
def url():
    return os.environ["MESH_URL"]


@pytest.fixture(scope="session")
def model():
    return os.environ["MESH_MODEL"]


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}


@pytest.fixture(scope="session")
def weather():
    return WEATHER
