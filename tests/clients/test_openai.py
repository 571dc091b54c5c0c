"""The server, seen by the official `openai` client.

Needs BCG_SERVER_BIN, the path of a built `bcg-server`. Starts it on a free port with the tiny checkpoint on the host
device and prints 'N passed, N failed'; exits with 1 if a test failed.
"""
import os
import pathlib
import socket
import subprocess
import sys
import time
import traceback
import urllib.request

import openai

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = "tiny-qwen3"
QUESTION = "Max has 62 shells, finds 70 more and then gives away 49. How many shells does Max have now?"
ANSWER = "62+70=132 132-49=83 #### 83"
MESSAGES = [{"role": "user", "content": QUESTION}]
SHOT = "Question: Ivy shares 24 pens among 12 friends. How many pens does each friend get?\nAnswer: 24/12=2 #### 2\n\n"
PROMPT = f"{SHOT}Question: {QUESTION}\nAnswer: "
START_SECONDS_MAX = 120


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=64)
    choice = answer.choices[0]
    assert choice.message.content == ANSWER, choice
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_with_content_parts(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    answer = client.chat.completions.create(model=MODEL, messages=parts, temperature=0, max_tokens=64)
    assert answer.choices[0].message.content == ANSWER


def test_chat_stream(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=64, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER, text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert len(chunks) > 10, "the answer comes in pieces"


def test_completion(client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=64, stop="\n")
    assert answer.choices[0].text == ANSWER, answer
    assert answer.choices[0].finish_reason == "stop"


def test_completion_stream(client):
    stream = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=64, stop=["\n"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == ANSWER


def test_completion_of_token_ids(client):
    answer = client.completions.create(model=MODEL, prompt=[40, 41, 42], temperature=0, max_tokens=4)
    assert answer.usage.prompt_tokens == 3
    assert 1 <= answer.usage.completion_tokens <= 4


def test_length(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3
    assert ANSWER.startswith(answer.choices[0].message.content)


def test_stop_strings_are_never_shown(client):
    for stop in (" ####", ["=132 ", " ####"], ["nothing like it"]):
        options = dict(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=64, stop=stop)
        whole = client.chat.completions.create(**options).choices[0].message.content
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**options, stream=True)
            if chunk.choices
        ]
        stops = [stop] if isinstance(stop, str) else stop
        first = min((ANSWER.index(one) for one in stops if one in ANSWER), default=len(ANSWER))
        assert whole == "".join(pieces) == ANSWER[:first], (stop, whole, pieces)


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=64, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == ANSWER
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token, "greedy takes the most likely token"
        assert bytes(token.bytes).decode() == token.token


def test_completion_logprobs(client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    assert logprobs.text_offset[0] == 0
    assert all(token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs))


def test_seed(client):
    def sample(seed):
        options = dict(model=MODEL, prompt="Question: ", temperature=1.5, top_p=0.99, max_tokens=24, seed=seed)
        return client.completions.create(**options).choices[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_extensions(client):
    extra = {"top_k": 1, "min_p": 0.1}
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=1, max_tokens=64, extra_body=extra
    )
    assert answer.choices[0].message.content == ANSWER


def refused(kind, param, call):
    try:
        call()
    except kind as error:
        assert error.param == param, error
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def test_errors(client):
    bad, chat, text = openai.BadRequestError, client.chat.completions.create, client.completions.create
    refused(bad, "temperature", lambda: chat(model=MODEL, messages=MESSAGES, temperature=5))
    refused(bad, "messages", lambda: chat(model=MODEL, messages=[]))
    refused(bad, "n", lambda: chat(model=MODEL, messages=MESSAGES, n=2))
    refused(bad, "stop", lambda: chat(model=MODEL, messages=MESSAGES, stop=list("abcde")))
    refused(bad, "top_logprobs", lambda: chat(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=21))
    refused(bad, "echo", lambda: text(model=MODEL, prompt="a", echo=True))
    refused(bad, "logprobs", lambda: text(model=MODEL, prompt="a", logprobs=6))
    unknown = refused(openai.NotFoundError, "model", lambda: chat(model="gpt-7", messages=MESSAGES))
    assert unknown.code == "model_not_found"


def test_context_overflow(client):
    try:
        client.completions.create(model=MODEL, prompt="a", max_tokens=100_000)
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded" and "100001" in str(error), error
    else:
        raise AssertionError("BadRequestError was not raised")


def test_many_at_once(client):
    from concurrent.futures import ThreadPoolExecutor

    def ask(_):
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=64)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(16))) == {ANSWER}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_ready(server, base):
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server ended with {server.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=START_SECONDS_MAX) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"the server was not ready after {START_SECONDS_MAX} s")


def main():
    port = free_port()
    command = [os.environ["BCG_SERVER_BIN"], "--model", str(ROOT / "models" / MODEL), "--device", "host"]
    command += ["--port", str(port), "--max-running-requests", "8", "--context-length", "1024"]
    command += ["--enable-breakable-cuda-graph", "--cuda-graph-max-tokens", "64"]
    server = subprocess.Popen(command)
    passed, failed = 0, []
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until_ready(server, base)
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=60)
        for name, test in list(globals().items()):
            if not name.startswith("test_"):
                continue
            try:
                test(client)
                passed += 1
                print(f"ok     {name}", flush=True)
            except Exception:
                failed.append(name)
                print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
        server.terminate()
        if server.wait(timeout=30) != 0:
            failed.append(f"the server ended with {server.returncode} after SIGTERM")
            print(f"FAILED {failed[-1]}")
    finally:
        if server.poll() is None:
            server.kill()
    print(f"{passed} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
