"""mesh-llm as a process of its own, for the scripts beside this file."""

import json
import subprocess
import threading
import time
import urllib.request

ANSWER_MAX_S = 5
STOP_MAX_S = 60


def get(url, timeout=ANSWER_MAX_S):
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return json.load(answer)


class Server:
    """A server on a free port of the loopback interface; its log goes to a file."""

    def __init__(self, binary, arguments, log, environment=None):
        self.log, self.url = log, None
        command = [binary, "--port", "0", *arguments]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment)

    def ready(self, most_s, but=None):
        """The name of its model, once that is ready; of several, of the first that is not called `but`."""
        for line in self.process.stdout:
            if line.startswith("listening on "):
                self.url = line.split()[-1]
                break
        else:
            raise RuntimeError(f"the server never listened: {self.last_words()}")
        # Whatever else it prints must not fill the pipe.
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        deadline = time.monotonic() + most_s
        while time.monotonic() < deadline:
            model = next(model for model in get(f"{self.url}/v1/models")["data"] if model["id"] != but)
            if model["status"] == "ready":
                return model["id"]
            if model["status"] == "failed":
                raise RuntimeError(f"{model['id']} cannot be loaded: {self.last_words()}")
            time.sleep(0.2)
        raise RuntimeError(f"the model is not ready after {most_s} s")

    def last_words(self):
        lines = self.log.read_text(errors="replace").splitlines()
        return " / ".join(lines[-3:])

    def stop(self):
        """Ends it; its exit status, None where it had to be killed."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=STOP_MAX_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None
