"""What schemathesis cannot know of the server: its model's name, ids that name something, and when 503 is right."""

import json
import os
import urllib.request
from pathlib import Path

import schemathesis

URL = os.environ["MESH_URL"]
MODEL = os.environ["MESH_MODEL"]
SEEN = Path(os.environ["MESH_SEEN"])
TOKENS_MAX = 8
POST_MAX_S = 30

# What is said with 503 where that is right: the server has no place for the moment.
BUSY = {"busy", "model_loading", "no_room", "out_of_memory", "overloaded_error"}


def stored():
    """The id of a response that the server keeps."""
    body = {"model": MODEL, "input": "Hello", "max_output_tokens": 1}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{URL}/v1/responses", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=POST_MAX_S) as answer:
        return json.load(answer)["id"]


@schemathesis.hook
def before_call(context, case, kwargs):
    """Names the model that there is, asks for few tokens, and in every second call names a response that there is:
    otherwise all requests would stop at an unknown name. What breaks the schema stays as it is."""
    body = case.body
    if isinstance(body, dict):
        if body.get("model") and isinstance(body["model"], str):
            body["model"] = MODEL
        for name in ["max_tokens", "max_completion_tokens", "max_output_tokens"]:
            tokens = body.get(name)
            if type(tokens) is int and TOKENS_MAX < tokens < 1 << 32:
                body[name] = TOKENS_MAX
    response = (case.path_parameters or {}).get("response_id")
    if isinstance(response, str) and len(response) % 2:
        case.path_parameters["response_id"] = stored()


@schemathesis.check
def unavailable_is_said(context, response, case):
    """503 means that the server is busy, and says when to come back. Beside that, notes what was answered."""
    kind = response.headers.get("content-type", [""])[0].split(";")[0]
    with SEEN.open("a") as seen:
        print(json.dumps([case.operation.label, response.status_code, kind]), file=seen)
    if response.status_code != 503:
        return
    error = response.json().get("error", {})
    assert BUSY & {error.get("code"), error.get("type")}, f"503 for no good reason: {error}"
    assert int(response.headers["retry-after"][0]) >= 1, "503 does not say when to come back"
