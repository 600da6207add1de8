"""Starts `bespoke serve`, waits until it is ready, and stops it again."""

import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

START_SECONDS_MAX = 120
STOP_SECONDS_MAX = 60
ADDRESS = re.compile(r"http://([0-9.]+:[0-9]+)")


class Server:
    """A server process on a free port of 127.0.0.1; its standard error is kept."""

    def __init__(self, binary, model, *arguments):
        self.is_draining = False
        self.log = tempfile.TemporaryFile(mode="w+b")
        command = [binary, "serve", "--model", str(model), "--port", "0", *arguments]
        # NOTE: nothing reads standard output, so it must not fill a pipe.
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.log
        )
        try:
            self.url = self._wait_for_address()
            self._wait_until_ready()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    @property
    def base_url(self):
        """What the OpenAI client takes."""
        return self.url + "/v1"

    def log_text(self):
        """What the server has written to standard error."""
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, 0).decode("utf-8", "replace")

    def get(self, path, headers=None):
        """Status and text of a GET."""
        request = urllib.request.Request(self.url + path, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name):
        """The sum of a metric's samples, whatever their labels; None where there is none."""
        _, text = self.get("/metrics")
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if re.match(re.escape(name) + r"[ {]", line)
        ]
        return sum(values) if values else None

    def drain(self):
        """Tells the server to end, once: a second signal would interrupt it."""
        if not self.is_draining and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.is_draining = True

    def stop(self):
        """Drains the server; its exit status."""
        self.drain()
        try:
            return self.process.wait(timeout=STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def _wait_for_address(self):
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            found = ADDRESS.search(self.log_text())
            if found:
                return "http://" + found.group(1)
            self._check_alive()
            time.sleep(0.02)
        raise RuntimeError("the server named no address; it wrote: " + self.log_text())

    def _wait_until_ready(self):
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            self._check_alive()
            try:
                if self.get("/ready")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.02)
        raise RuntimeError("the server did not get ready; it wrote: " + self.log_text())

    def _check_alive(self):
        status = self.process.poll()
        if status is not None:
            raise RuntimeError(f"the server ended with {status}; it wrote: " + self.log_text())
