#!/usr/bin/env python3
"""Starts mesh-llm on a tiny model and fuzzes what its /openapi.json describes. Fails on any finding."""

import argparse
import collections
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from program import Server, get  # noqa: E402

ROOT = HERE.parents[1]
WORK = ROOT / "target" / "schemathesis"
SEEN = WORK / "seen.jsonl"
GOLDEN = ROOT.parent / "shared" / "golden" / "qwen3" / "model.safetensors"
INSTALL_MAX_S = 600
READY_MAX_S = 60
FUZZ_MAX_S = 120
# What may pass beyond that until schemathesis has come to its end: the requests under way, and its report.
GRACE_S = 50
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
    config = WORK / "config.toml"
    config.write_text('[backends.mlx]\ndevice = "cpu"\n')
    flags = ["--config", config, "--mlx-file", arguments.mlx_file.resolve(), "--ctx", "256", "--max-parallel", "2"]
    server, wrong = Server(arguments.binary.resolve(), flags, WORK / "server.log"), []
    try:
        model = server.ready(READY_MAX_S)
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
