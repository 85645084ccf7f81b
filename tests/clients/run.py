#!/usr/bin/env python3
"""Starts mesh-llm with each backend and runs other people's clients against it. See README.md."""

import argparse
import json
import os
import subprocess
import sys
import tomllib
import xml.etree.ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from program import Server  # noqa: E402

WORK = HERE.parents[1] / "target" / "clients"
READY_MAX_S = 1800  # llama-server may have to be compiled first
SUITE_MAX_S = 3600
OTHER_MODEL = "another"


def environment():
    """The Python of a virtual environment that holds the clients."""
    python = WORK / "venv" / "bin" / "python"
    stamp = WORK / "venv" / "requirements"
    wanted = (HERE / "requirements.txt").read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", WORK / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / "requirements.txt"], check=True)
        stamp.write_text(wanted)
    return python


def node():
    """Where Node's packages are; None without Node."""
    try:
        subprocess.run(["npm", "--version"], check=True, stdout=subprocess.DEVNULL)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    folder = WORK / "node"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ["package.json", "openai.test.mjs"]:
        (folder / name).write_text((HERE / name).read_text())
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True)
    return folder


def configuration(backend, model):
    """For clients that change over to another model: the same one, under another path or name."""
    if model:
        folder = WORK / "another"
        folder.unlink(missing_ok=True)
        folder.symlink_to(Path(model).resolve().parent)
        other = str(folder / Path(model).name)
    else:
        other = "SmolLM2-135M-Instruct-Q4_1"
    table = {"model": other, "name": OTHER_MODEL, "backend": backend}
    config = WORK / "config.toml"
    config.write_text("[[models]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    return config


def suite(python, packages, server, model, report):
    """Runs all clients; answers the names of the tests that failed, and how many there were."""
    variables = {
        **os.environ,
        "MESH_URL": server.url,
        "MESH_MODEL": model,
        "MESH_OTHER_MODEL": OTHER_MODEL,
        "OPENAI_API_KEY": "none",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
    }
    subprocess.run(
        [
            python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto",
            # langchain-openai keeps its connections, which belong to the loop that they were made in.
            "-o", "asyncio_default_fixture_loop_scope=session", "-o", "asyncio_default_test_loop_scope=session",
            f"--junitxml={report}", HERE,
        ],
        env=variables, timeout=SUITE_MAX_S,
    )
    failed, count = set(), 0
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        count += 1
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(f"{case.get('classname').rsplit('.', 1)[-1]}::{case.get('name')}")
    if packages:
        tests = subprocess.run(
            ["node", "--test", "--test-reporter", "tap", "openai.test.mjs"],
            cwd=packages, env=variables, timeout=SUITE_MAX_S, capture_output=True, text=True,
        )
        print(tests.stdout)
        for line in tests.stdout.splitlines():
            if line.startswith(("ok ", "not ok ")):
                count += 1
                if line.startswith("not ok "):
                    failed.add("node::" + line.split(" - ", 1)[1])
    return failed, count


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", default="target/release/mesh-llm")
    parser.add_argument("--gguf-file")
    parser.add_argument("--mlx-file")
    parser.add_argument("--backend", choices=["llama-server", "mlx"], help="only this one")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    python, packages = environment(), node()
    runs = {}
    if arguments.gguf_file:
        runs["llama-server"] = (arguments.gguf_file, ["--gguf-file", arguments.gguf_file])
    if arguments.mlx_file:
        runs["mlx"] = (arguments.mlx_file, ["--mlx-file", arguments.mlx_file])
    default = ["--model", "SmolLM2-135M-Instruct"]
    runs = runs or {"llama-server": (None, [*default, "--gguf"]), "mlx": (None, [*default, "--mlx"])}
    if arguments.backend:
        runs = {arguments.backend: runs[arguments.backend]}
    known = tomllib.loads((HERE / "known.toml").read_text())
    bad = False
    for backend, (model, flags) in runs.items():
        flags = ["--config", configuration(backend, model), *flags, "--ctx", "4096", "--max-parallel", "2"]
        server = Server(Path(arguments.binary).resolve(), flags, WORK / "server.log")
        try:
            served = server.ready(READY_MAX_S, but=OTHER_MODEL)
            failed, count = suite(python, packages, server, served, WORK / f"{backend}.xml")
        finally:
            server.stop()
        by_model = known.get(served, {})
        sections = [known["both"], known[backend], by_model, by_model.get(backend, {})]
        reasons = {test: why for section in sections for test, why in section.items() if isinstance(why, str)}
        for name in sorted(failed & reasons.keys()):
            print(f"{backend}: {name} fails, as known: {reasons[name]}")
        for name in sorted(failed - reasons.keys()):
            print(f"{backend}: {name} FAILS")
        for name in sorted(reasons.keys() - failed):
            print(f"{backend}: {name} is listed as failing and does not")
        print(f"{backend}: {count - len(failed)} passed, {len(failed)} failed")
        bad |= failed != reasons.keys()
    sys.exit(bad)


if __name__ == "__main__":
    main()
