"""instructor: answers as objects, by schemas and by tools."""

import instructor
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field


class Person(BaseModel):
    # Its schema would allow for anything else as well, of which a small model thinks.
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_objects(url, model, mode):
    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=mode)
    person = client.chat.completions.create(
        model=model, response_model=Person, max_tokens=200, max_retries=0,
        messages=[{"role": "user", "content": "Ada is 36 years old."}],
    )
    assert isinstance(person, Person)
