"""Two servers behind SGLang's model gateway (`sglang-router`), which finds, checks and routes to them; one is killed.

Starts everything on free ports and prints 'N passed, N failed'; exits with 1 if a test failed. BCG_GATEWAY_REQUESTS says
how many requests are sent while a server is killed and started again.
"""
import contextlib
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import server
from server import MODEL

NUM_REQUESTS = int(os.environ.get("BCG_GATEWAY_REQUESTS", "200"))
NUM_THREADS = 12
NUM_QUESTIONS = 8
KEY = "secret"
START_SECONDS_MAX = 60
# A request of the load takes a fraction of it, on a machine that does other things too.
REQUEST_SECONDS_MAX = 1
# What docs/DEPLOYMENT.md tells operators to say: a dead worker is found within two seconds, and retries last longer.
FLAGS = ["--disable-circuit-breaker", "--health-check-interval-secs", "1", "--health-check-timeout-secs", "2"]
FLAGS += ["--health-failure-threshold", "1", "--health-success-threshold", "1", "--retry-max-retries", "10"]
FLAGS += ["--retry-initial-backoff-ms", "100", "--retry-max-backoff-ms", "1000"]

QUESTION = "Max has {} shells, finds {} more and then gives away {}. How many shells does Max have now?"
GREEDY = {"temperature": 0, "max_new_tokens": 16}


def call(base, path, body=None, key=KEY):
    """Returns the status and the body of an answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(base + path, data, headers), timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ask(base, path, body=None):
    status, text = call(base, path, body)
    if status != 200:
        raise RuntimeError(f"{path}: {status}: {text}")
    return json.loads(text)


def counters(worker):
    """Returns the metrics of a worker that have no labels."""
    lines = [line.split() for line in call(worker.base, "/metrics")[1].splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines if "{" not in name}


class Worker:
    """A server that can be killed and started again on its port."""

    def __init__(self):
        self.port = server.free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        self.process = server.spawn(self.port, "--max-running-requests", "8", "--api-key", KEY)

    def kill(self):
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def gateway(*flags):
    """Starts a gateway on a free port and yields its address."""
    port = server.free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(server.free_port()), "--api-key", KEY]
    command += ["--worker-startup-check-interval", "1", "--log-level", "error", *FLAGS, *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            base = f"http://127.0.0.1:{port}"
            until("two healthy workers", lambda: len(healthy(base)) == 2)
            yield base
        except Exception:
            log.seek(0)
            print(f"the gateway's log ends with\n{log.read()[-4000:]}", flush=True)
            raise
        finally:
            process.kill()
            process.wait()


def healthy(base):
    with contextlib.suppress(OSError):
        status, text = call(base, "/workers")
        if status == 200:
            return [worker for worker in json.loads(text)["workers"] if worker["is_healthy"]]
    return []


def until(what, is_true, seconds_max=START_SECONDS_MAX):
    deadline = time.monotonic() + seconds_max
    while not is_true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not after {seconds_max} s")
        time.sleep(0.1)


def question(index):
    return QUESTION.format(60 + index % NUM_QUESTIONS, 20, 10)


# How a question is put, each way through another route or as a stream.


def by_chat(base, text):
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16}
    return ask(base, "/v1/chat/completions", body)["choices"][0]["message"]["content"]


def by_completion(base, text):
    body = {"model": MODEL, "prompt": text, "temperature": 0, "max_tokens": 16}
    return ask(base, "/v1/completions", body)["choices"][0]["text"]


def by_generate(base, text):
    return ask(base, "/generate", {"text": text, "sampling_params": GREEDY})["text"]


class BrokenOff(Exception):
    """A stream without its end."""


def frames(base, path, body):
    """Returns the frames of a stream; one that breaks off is never taken for a whole one."""
    try:
        status, text = call(base, path, {**body, "stream": True})
    except http.client.IncompleteRead as error:
        raise BrokenOff from error
    if status != 200:
        raise RuntimeError(f"{path}: {status}: {text}")
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    if lines[-1:] != ["[DONE]"]:
        raise BrokenOff
    return [json.loads(line) for line in lines[:-1]]


def by_chat_stream(base, text):
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16}
    choices = [frame["choices"][0] for frame in frames(base, "/v1/chat/completions", body)]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def by_generate_stream(base, text):
    return frames(base, "/generate", {"text": text, "sampling_params": GREEDY})[-1]["text"]


WAYS = [by_chat, by_completion, by_generate, by_chat_stream, by_generate_stream]


def test_discovery(base, workers):
    found = json.loads(call(base, "/workers")[1])["workers"]
    assert sorted(worker["url"] for worker in found) == sorted(worker.base for worker in workers), found
    for worker in found:
        assert (worker["model_id"], worker["is_healthy"]) == (MODEL, True), worker
        assert worker["metadata"]["model_type"] == "qwen3", worker
    assert [model["id"] for model in ask(base, "/v1/models")["data"]] == [MODEL]
    assert ask(base, "/get_model_info")["served_model_name"] == MODEL
    assert [load["load"] for load in ask(base, "/get_loads")["workers"]] == [0, 0]
    for path in ("/health", "/health_generate", "/readiness", "/liveness"):
        assert call(base, path)[0] == 200, path
    assert json.loads(call(base, "/flush_cache", {})[1])["workers_flushed"] == 2
    metrics = call(base, "/engine_metrics")[1]
    assert all(f'bcg_running_requests{{worker_addr="{worker.base}"}} 0' in metrics for worker in workers), metrics


def test_every_route_answers_as_a_worker_does(base, workers):
    for way in WAYS:
        answer = way(base, question(0))
        assert answer and answer == way(workers[0].base, question(0)), (way.__name__, answer)


def test_a_refusal_comes_through(base, workers):
    status, text = call(base, "/v1/completions", {"model": MODEL, "prompt": "a", "suffix": "b"})
    assert status == 400 and json.loads(text)["error"]["param"] == "suffix", text
    for door in (base, workers[0].base):
        assert call(door, "/v1/completions", {"model": MODEL, "prompt": "a"}, key="wrong")[0] == 401, door


def hit_share(policy, workers):
    """Returns which part of all prompt tokens the workers' prefix caches held, and how many requests each worker got."""
    shared = random.Random(1)
    words = "shells books pens boxes apples friends".split()
    prefixes = [f"{index} " + " ".join(shared.choices(words, k=40)) for index in range(10)]
    prompts = [f"{prefix} {number}" for prefix in prefixes for number in range(4)]
    shared.shuffle(prompts)
    with gateway("--policy", policy, "--worker-urls", *(worker.base for worker in workers)) as base:
        ask_all = [call(worker.base, "/flush_cache", {})[0] for worker in workers]
        assert ask_all == [200, 200]
        before = [counters(worker) for worker in workers]
        for prompt in prompts:
            ask(base, "/v1/completions", {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 1})
        after = [counters(worker) for worker in workers]
    total = {name: sum(new[name] - old[name] for new, old in zip(after, before)) for name in before[0]}
    return total["bcg_cached_prompt_tokens_total"] / total["bcg_prompt_tokens_total"]


def test_cache_aware_routing_finds_prefixes(base, workers):
    shares = {policy: hit_share(policy, workers) for policy in ("cache_aware", "round_robin")}
    print(", ".join(f"{policy}: {share:.1%} of prompt tokens cached" for policy, share in shares.items()), flush=True)
    assert shares["cache_aware"] > shares["round_robin"] + 0.1, shares


def test_prefill_and_decode_workers_must_have_roles(base, workers):
    prefill, decode = (worker.base for worker in workers)
    with gateway("--pd-disaggregation", "--prefill", prefill, "8998", "--decode", decode) as disaggregated:
        for path, body in [
            ("/generate", {"text": "a", "sampling_params": GREEDY}),
            ("/v1/completions", {"model": MODEL, "prompt": ["a", "b"]}),
            ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}),
        ]:
            status, text = call(disaggregated, path, body)
            assert status == 400 and "bootstrap_room" in text and "--worker-urls" in text, (status, text)


class Load:
    """Requests through the gateway from several threads, each of which is answered, rightly and once."""

    def __init__(self, base, answers):
        self.base, self.answers = base, answers
        self.lock = threading.Lock()
        self.answered, self.broken_off, self.failures = 0, 0, []

    def ask(self, index):
        way, text = WAYS[index % len(WAYS)], question(index)
        try:
            answer = self.whole(way, text)
            if answer != self.answers["chat" in way.__name__, text]:
                raise RuntimeError(f"the answer is {answer!r}")
            with self.lock:
                self.answered += 1
        except Exception as error:
            with self.lock:
                self.failures.append(f"{index} {way.__name__}: {error!r}")

    def whole(self, way, text):
        """Asks until an answer is whole: what the gateway has passed on in part it cannot ask for again."""
        while True:
            try:
                return way(self.base, text)
            except BrokenOff:
                with self.lock:
                    self.broken_off += 1


def under_load(base, workers, what, end):
    """Ends a worker while requests come and starts it again; returns how the load went."""
    victim, other = workers
    questions = [question(index) for index in range(NUM_QUESTIONS)]
    answers = {(way is by_chat, text): way(other.base, text) for way in (by_chat, by_completion) for text in questions}
    load, began = Load(base, answers), time.monotonic()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        asked = [pool.submit(load.ask, index) for index in range(NUM_REQUESTS)]
        third = NUM_REQUESTS // 3
        until("a third is answered", lambda: load.answered + len(load.failures) >= third, third * REQUEST_SECONDS_MAX)
        ended = load.answered
        end(victim)
        victim.start()
        server.wait_until_ready(victim.process, victim.base)
        restarted = load.answered
        for one in asked:
            one.result()
    print(
        f"{load.answered} of {NUM_REQUESTS} answered in {time.monotonic() - began:.0f} s: {what} after {ended}, back after "
        f"{restarted}; {load.broken_off} streams broke off and were asked again; {len(load.failures)} lost",
        flush=True,
    )
    assert not load.failures and load.answered == NUM_REQUESTS, load.failures[:5]
    until("the worker that was started again is found", lambda: len(healthy(base)) == 2)
    for text in questions:
        by_completion(base, text)
    assert counters(victim)["bcg_prompt_tokens_total"] > 0, "the worker got nothing after its restart"
    return load


def test_a_killed_worker_loses_no_answer(base, workers):
    under_load(base, workers, "killed", Worker.kill)


def test_a_worker_that_drains_loses_no_answer_and_breaks_no_stream(base, workers):
    load = under_load(base, workers, "drained", lambda worker: server.stop(worker.process))
    assert load.broken_off == 0, load.broken_off


def main():
    passed, failed = 0, []
    workers = [Worker(), Worker()]
    try:
        for worker in workers:
            server.wait_until_ready(worker.process, worker.base)
        with gateway("--policy", "round_robin", "--worker-urls", *(worker.base for worker in workers)) as base:
            for name, test in list(globals().items()):
                if not name.startswith("test_"):
                    continue
                began = time.monotonic()
                try:
                    test(base, workers)
                    passed += 1
                    print(f"ok     {name} ({time.monotonic() - began:.1f} s)", flush=True)
                except Exception:
                    failed.append(name)
                    print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
        for worker in workers:
            server.stop(worker.process)
    finally:
        for worker in workers:
            worker.kill()
    print(f"{passed} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
