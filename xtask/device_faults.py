#!/usr/bin/env python3
"""What a server does whose GPU is broken by a request: a kernel that traps, and one that runs for 30 seconds.

    device_faults.py GPU_BINARY MODEL_FOLDER CACHE_FOLDER FIGURES.json [--device host] [--replicas [GPU,GPU]]

GPU_BINARY is the bundle's `bin/gpu`, whose `serve` breaks its device for prompts that begin with known tokens. Each fault is
met with `--supervise`, which must replace the worker, and without, where the process must end with an error. At the end a
fresh process must still be able to use the device. With `--replicas` the same faults meet one of two replicas instead: the
other one must go on, and the process end only with the last. Exits with 1 if something was not as it must be.
"""

import argparse
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

PORT = 30021
WATCHDOG_SECONDS = 5
# From the trap to the next answer; for the long kernel the watchdog's time comes before.
REPLACED_SECONDS = 5
PATIENCE_SECONDS = 90
# From a trap until /health names the replica.
TOLD_SECONDS = 2
TRAP, SPIN, GOOD = [7, 7, 7, 7], [8, 8, 8, 8], [1, 2, 3, 4]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["binary", "model", "cache", "figures"]:
        parser.add_argument(name)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--replicas", nargs="?", const="", help="the GPUs of two replicas, separated by a comma")
    return parser.parse_args()


ARGS = arguments()


def call(path, body=None, seconds=2.0):
    """Returns status and text; the status is 0 where there was no answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def complete(prompt, seconds):
    return call("/v1/completions", {"prompt": prompt, "max_tokens": 4, "ignore_eos": True}, seconds)


def wait_until(what, condition):
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_SECONDS:
        if condition():
            return time.monotonic() - begun
        time.sleep(0.02)
    raise RuntimeError(f"never within {PATIENCE_SECONDS} s: {what}")


class Server:
    def __init__(self, flags):
        self.log = tempfile.TemporaryFile("w+")
        command = [ARGS.binary, "serve", "--model", ARGS.model, "--load-format", "dummy", "--skip-tokenizer-init"]
        command += ["--device", ARGS.device, "--port", str(PORT), "--enable-breakable-cuda-graph", "--context-length", "2048"]
        command += ["--watchdog-timeout", str(WATCHDOG_SECONDS), "--shutdown-deadline", "2", *flags]
        begun = time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log, env={**os.environ, "BCG_CACHE_DIR": ARGS.cache})
        wait_until("the server is ready", lambda: call("/health")[0] == 200 or self.process.poll() is not None)
        self.ready = time.monotonic() - begun

    def text(self):
        self.log.seek(0)
        return self.log.read()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return None


def replaced(fault, prompt):
    """With a supervisor: seconds until /health told, until the next answer; the server's text."""
    server = Server(["--supervise"])
    try:
        status, text = complete(GOOD, 30)
        assert status == 200, f"before the fault: {status} {text}"
        begun = time.monotonic()
        sender = subprocess.Popen(
            ["curl", "-s", "-m", "60", f"http://127.0.0.1:{PORT}/v1/completions", "-d",
             json.dumps({"prompt": prompt, "max_tokens": 4})], stdout=subprocess.DEVNULL)
        wait_until("/health says 503", lambda: call("/health")[0] in (0, 503))
        told = time.monotonic() - begun
        wait_until("an answer again", lambda: complete(GOOD, 2)[0] == 200)
        answered = time.monotonic() - begun
        sender.kill()
        code = server.stop()
        assert code == 0, f"the supervisor ended with {code}"
        return server.ready, told, answered, server.text()
    except BaseException:
        # Of a lost context every release is a line of its own.
        lines = [line for line in server.text().splitlines() if "a release failed" not in line]
        print("\n".join(lines)[-6000:], f"\n/health: {call('/health')}, status: {server.process.poll()}", file=sys.stderr)
        server.process.kill()
        raise


def alone(prompt):
    """Without a supervisor: seconds until the process has ended, and its status."""
    server = Server([])
    # The first step of a size may take ten times as long.
    complete(GOOD, 30)
    begun = time.monotonic()
    complete(prompt, 40)
    try:
        code = server.process.wait(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise RuntimeError(f"the process lives on: {server.text()[-2000:]}") from None
    return time.monotonic() - begun, code


def one_replica(prompt):
    """Breaks one of two replicas under load, then the other one: seconds until /health told, how many of the eight answers
    that ran were whole, how many of eight later ones, seconds until the process had ended, and its status."""
    server = Server(["--dp", "2", *(["--devices", ARGS.replicas] if ARGS.replicas else [])])
    try:
        long_answer = {"prompt": GOOD, "max_tokens": 1024, "ignore_eos": True}
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            ask = lambda body: pool.submit(call, "/v1/completions", body, PATIENCE_SECONDS)
            # The first step of a size may take ten times as long; one by one, the replicas take turns.
            assert all(complete(GOOD, 30)[0] == 200 for _ in range(4))
            assert all(asked.result()[0] == 200 for asked in [ask({**long_answer, "max_tokens": 64}) for _ in range(8)])
            # The long kernel comes first, in a step of a size that is known.
            running = [] if prompt is SPIN else [ask(long_answer) for _ in range(8)]
            time.sleep(0.5)
            begun = time.monotonic()
            ask({"prompt": prompt, "max_tokens": 4})
            time.sleep(0.1)
            running = running or [ask(long_answer) for _ in range(8)]
            is_degraded = lambda: '"degraded"' in call("/health")[1]
            wait_until("/health names a replica", is_degraded)
            told = time.monotonic() - begun
            whole = sum(asked.result()[0] == 200 for asked in running)
            later = sum(asked.result()[0] == 200 for asked in [ask({**long_answer, "max_tokens": 8}) for _ in range(8)])
            assert is_degraded() and server.process.poll() is None, "the process goes on"
            begun = time.monotonic()
            ask({"prompt": prompt, "max_tokens": 4})
            code = server.process.wait(timeout=PATIENCE_SECONDS)
        return told, whole, later, time.monotonic() - begun, code
    except BaseException:
        # Of a lost context every release is a line of its own.
        lines = [line for line in server.text().splitlines() if "a release failed" not in line]
        print("\n".join(lines)[-6000:], f"\n/health: {call('/health')}, status: {server.process.poll()}", file=sys.stderr)
        server.process.kill()
        raise


def replicas():
    figures, problems = {}, []
    for fault, prompt, most in [("trap", TRAP, TOLD_SECONDS), ("long kernel", SPIN, WATCHDOG_SECONDS + TOLD_SECONDS)]:
        told, whole, later, ended, code = one_replica(prompt)
        figures[fault] = {"told_s": told, "whole": whole, "later": later, "ended_s": ended, "status": code}
        if told > most:
            problems.append(f"{fault}: /health named the replica after {told:.1f} s, at most {most} s are right")
        if whole < 4 or later != 8:
            problems.append(f"{fault}: {whole} of 8 answers were whole, 4 must be; {later} of 8 later ones")
        if code in (0, None):
            problems.append(f"{fault}: the process ended with status {code}")
    return figures, problems


def faults():
    figures, problems = {}, []
    for fault, prompt, most in [("trap", TRAP, REPLACED_SECONDS), ("long kernel", SPIN, WATCHDOG_SECONDS + REPLACED_SECONDS)]:
        ready, told, answered, text = replaced(fault, prompt)
        ended, code = alone(prompt)
        figures[fault] = {"ready_s": ready, "told_s": told, "answered_s": answered, "ended_alone_s": ended, "status_alone": code}
        if answered > most:
            problems.append(f"{fault}: the next answer came after {answered:.1f} s, at most {most} s are right")
        if code in (0, None):
            problems.append(f"{fault}: the process ended with status {code}")
        if "the worker was lost" not in text:
            problems.append(f"{fault}: the log does not say that the worker was lost")
    server = Server([])
    status, text = complete(GOOD, 30)
    figures["afterwards"] = {"ready_s": server.ready, "status": status}
    if status != 200 or server.stop() != 0:
        problems.append(f"afterwards: {status} {text}")
    return figures, problems


def main():
    figures, problems = faults() if ARGS.replicas is None else replicas()
    with open(ARGS.figures, "w") as file:
        json.dump(figures, file, indent=1)
    for fault, row in figures.items():
        print(f"{fault:12}", "  ".join(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))
    print("\n".join(problems) or "device faults: as they must be")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
