#!/usr/bin/env python3
"""Starts mesh-llm on a tiny model and fuzzes what its /openapi.json describes. Fails on any finding."""

import argparse
import collections
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "target" / "schemathesis"
SEEN = WORK / "seen.jsonl"
GOLDEN = ROOT.parent / "shared" / "golden" / "qwen3" / "model.safetensors"
INSTALL_MAX_S = 600
READY_MAX_S = 60
FUZZ_MAX_S = 120
# What may pass beyond that until schemathesis has come to its end: the requests under way, and its report.
GRACE_S = 50
ANSWER_MAX_S = 5
STOP_MAX_S = 30
# Operations that are never answered with 200 here: nothing runs any more by the time that it is cancelled, and
# schemathesis leaves out where the document itself came from.
NEVER = {"POST /v1/requests/{id}/cancel", "POST /v1/responses/{response_id}/cancel", "GET /openapi.json"}


def environment():
    """The folder of programs of a virtual environment that holds schemathesis."""
    folder, stamp = WORK / "venv" / "bin", WORK / "venv" / "requirements"
    wanted = (HERE / "requirements.txt").read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", WORK / "venv"], check=True, timeout=INSTALL_MAX_S)
        pip = [folder / "python", "-m", "pip", "install", "-q", "-r", HERE / "requirements.txt"]
        subprocess.run(pip, check=True, timeout=INSTALL_MAX_S)
        stamp.write_text(wanted)
    return folder


def get(url):
    with urllib.request.urlopen(url, timeout=ANSWER_MAX_S) as answer:
        return json.load(answer)


class Server:
    def __init__(self, binary, model):
        config = WORK / "config.toml"
        config.write_text('[backends.mlx]\ndevice = "cpu"\n')
        self.log = WORK / "server.log"
        command = [binary, "--port", "0", "--config", config, "--mlx-file", model, "--ctx", "256", "--max-parallel", "2"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.url = None

    def ready(self):
        """The name of its model, once that is ready."""
        for line in self.process.stdout:
            if line.startswith("listening on "):
                self.url = line.split()[-1]
                break
        else:
            raise RuntimeError("the server never listened")
        # Whatever else it prints must not fill the pipe.
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        deadline = time.monotonic() + READY_MAX_S
        while time.monotonic() < deadline:
            model = get(f"{self.url}/v1/models")["data"][0]
            if model["status"] == "ready":
                return model["id"]
            if model["status"] == "failed":
                raise RuntimeError("the model cannot be loaded")
            time.sleep(0.2)
        raise RuntimeError(f"the model is not ready after {READY_MAX_S} s")

    def stop(self):
        """Ends it; its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=STOP_MAX_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None


class Pulse(threading.Thread):
    """Asks for /health all the time, and counts the answers that did not come."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url, self.answers, self.missed, self.over = f"{url}/health", 0, [], threading.Event()

    def run(self):
        while not self.over.wait(0.5):
            try:
                assert get(self.url)["status"] == "ok"
                self.answers += 1
            except Exception as error:
                self.missed.append(repr(error))


def fuzz(programs, url, model):
    """Whether schemathesis has found nothing, within its time."""
    command = [
        programs / "schemathesis", "--config-file", HERE / "schemathesis.toml", "--no-color",
        "run", f"{url}/openapi.json", "--checks", "all", "--max-time", str(FUZZ_MAX_S),
        "--report", "ndjson", "--report-dir", WORK / "report",
    ]  # fmt: skip
    SEEN.unlink(missing_ok=True)
    variables = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "SCHEMATHESIS_HOOKS": "hooks",
        "MESH_URL": url,
        "MESH_MODEL": model,
        "MESH_SEEN": str(SEEN),
    }
    try:
        return subprocess.run(command, cwd=WORK, env=variables, timeout=FUZZ_MAX_S + GRACE_S).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"schemathesis has not come to an end within {FUZZ_MAX_S + GRACE_S} s")
        return False


def unreached(url):
    """What the document describes as an answer and no request got: then nothing was tried but refusals."""
    counts = collections.Counter(tuple(json.loads(line)) for line in SEEN.read_text().splitlines())
    for (label, status, kind), count in sorted(counts.items()):
        print(f"{count:6} {status} {kind:18} {label}")
    for path, methods in get(f"{url}/openapi.json")["paths"].items():
        for method, operation in methods.items():
            label = f"{method.upper()} {path}"
            for kind in operation["responses"]["200"]["content"]:
                if label not in NEVER and not counts[label, 200, kind]:
                    yield f"{label} was never answered with {kind}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", type=Path, default=ROOT / "target" / "debug" / "mesh-llm")
    parser.add_argument("--mlx-file", type=Path, default=GOLDEN)
    arguments = parser.parse_args()
    if not arguments.mlx_file.exists():
        print(f"skipped: schemathesis needs {arguments.mlx_file.name} of the golden qwen3")
        sys.exit("CI" in os.environ)
    WORK.mkdir(parents=True, exist_ok=True)
    programs = environment()
    server, wrong = Server(arguments.binary.resolve(), arguments.mlx_file.resolve()), []
    try:
        model = server.ready()
        pulse = Pulse(server.url)
        pulse.start()
        if not fuzz(programs, server.url, model):
            wrong.append("schemathesis failed")
        wrong += unreached(server.url)
        pulse.over.set()
        pulse.join()
        wrong += [f"/health did not answer: {error}" for error in pulse.missed]
        print(f"/health answered {pulse.answers} times, and {len(pulse.missed)} times it did not")
        if get(pulse.url)["status"] != "ok":
            wrong.append("/health is not ok at the end")
    finally:
        status = server.stop()
        if status != 0:
            wrong.append(f"the server ended with {status}; see {server.log.relative_to(ROOT)}")
    for what in wrong:
        print(f"FAILED: {what}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
