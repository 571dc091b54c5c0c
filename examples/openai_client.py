"""Asks a running `bcg-server`, once for the whole answer and once for a stream, with Python's standard library alone.

    cargo run --release -- --model models/tiny-qwen3 --enable-breakable-cuda-graph
    python3 examples/openai_client.py "Raj has 10 boxes with 12 books in each. How many books is that?"

The server speaks OpenAI's API, so the official `openai` package works as well, with this `base_url`:
http://127.0.0.1:30000/v1.
"""
import argparse
import json
import os
import urllib.error
import urllib.request


def post(url, body):
    headers = {"content-type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60)


def whole(url, body):
    with post(url, body) as response:
        answer = json.load(response)
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def streamed(url, body):
    """Yields the answer's text part by part: server-sent events, one JSON object in each, `[DONE]` at the end."""
    with post(url, {**body, "stream": True}) as response:
        for line in response:
            event = line.decode().strip().removeprefix("data:").strip()
            if event == "[DONE]":
                return
            if event:
                part = json.loads(event)
                if "error" in part:
                    raise RuntimeError(part["error"]["message"])
                yield from (choice["delta"].get("content") or "" for choice in part["choices"])


def main():
    parser = argparse.ArgumentParser(description="Asks a running bcg-server.")
    parser.add_argument("question", nargs="?", default="Eva has 145 apples and loses 17. How many apples are left?")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    args = parser.parse_args()
    url = f"{args.base_url.rstrip('/')}/chat/completions"
    body = {"messages": [{"role": "user", "content": args.question}], "temperature": 0, "max_tokens": 64}
    try:
        text, num_tokens = whole(url, body)
        print(f"whole ({num_tokens} tokens): {text}")
        print("streamed: ", end="")
        for part in streamed(url, body):
            print(part, end="", flush=True)
        print()
    except urllib.error.HTTPError as error:
        raise SystemExit(f"the server refused: {error.code} {error.read().decode()}")
    except urllib.error.URLError as error:
        raise SystemExit(f"no server answers at {args.base_url}: {error.reason}")


if __name__ == "__main__":
    main()
