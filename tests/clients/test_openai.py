"""The server, seen by the official `openai` client.

Starts the server on a free port and prints 'N passed, N failed'; exits with 1 if a test failed.
"""
import json
import subprocess
import sys
import traceback
import urllib.request

import openai

import server
from server import MODEL

QUESTION = "Max has 62 shells, finds 70 more and then gives away 49. How many shells does Max have now?"
ANSWER = "62+70=132 132-49=83 #### 83"
MESSAGES = [{"role": "user", "content": QUESTION}]
SHOT = "Question: Ivy shares 24 pens among 12 friends. How many pens does each friend get?\nAnswer: 24/12=2 #### 2\n\n"
PROMPT = f"{SHOT}Question: {QUESTION}\nAnswer: "
PARAMETERS = {
    "type": "object",
    "properties": {"shells": {"type": "integer", "minimum": 0, "maximum": 999}, "by": {"enum": ["Max", "Ivy"]}},
    "required": ["shells", "by"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": PARAMETERS}}
    for name in ("count_shells", "count_pens")
]


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
    refused(bad, "n", lambda: chat(model=MODEL, messages=MESSAGES, n=129))
    refused(bad, "logit_bias", lambda: chat(model=MODEL, messages=MESSAGES, logit_bias={"100000": 1}))
    refused(bad, "presence_penalty", lambda: chat(model=MODEL, messages=MESSAGES, presence_penalty=3))
    refused(bad, "tools", lambda: chat(model=MODEL, messages=MESSAGES, tools=[{"type": "function", "function": {}}]))
    refused(bad, "tool_choice", lambda: chat(model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="always"))
    refused(bad, "modalities", lambda: chat(model=MODEL, messages=MESSAGES, modalities=["text", "audio"]))
    broken = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}}
    refused(bad, None, lambda: chat(model=MODEL, messages=MESSAGES, response_format=broken))
    refused(bad, "best_of", lambda: text(model=MODEL, prompt="a", best_of=2))
    refused(bad, "suffix", lambda: text(model=MODEL, prompt="a", suffix="b"))
    refused(bad, "stop", lambda: chat(model=MODEL, messages=MESSAGES, stop=list("abcde")))
    refused(bad, "top_logprobs", lambda: chat(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=21))
    refused(bad, "echo", lambda: text(model=MODEL, prompt="a", echo=True, logprobs=1))
    refused(bad, "logprobs", lambda: text(model=MODEL, prompt="a", logprobs=6))
    refused(bad, None, lambda: client.embeddings.create(model=MODEL, input="a"))
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


def test_n_choices(client):
    options = dict(model=MODEL, messages=MESSAGES, n=3, max_tokens=64)
    answer = client.chat.completions.create(**options, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {ANSWER}
    one = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=64, temperature=0)
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    assert answer.usage.completion_tokens == 3 * one.usage.completion_tokens
    texts = {}
    for chunk in client.chat.completions.create(**options, temperature=0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == {0: ANSWER, 1: ANSWER, 2: ANSWER}, texts
    hot = dict(model=MODEL, prompt="Question: ", temperature=1.5, max_tokens=24, n=4, seed=5)
    first, second = ([c.text for c in client.completions.create(**hot).choices] for _ in range(2))
    assert first == second and len(set(first)) > 1, first


def test_several_prompts(client):
    other = PROMPT.replace("62", "63")
    one = [client.completions.create(model=MODEL, prompt=p, temperature=0, max_tokens=32, stop="\n") for p in (PROMPT, other)]
    both = client.completions.create(model=MODEL, prompt=[PROMPT, other], temperature=0, max_tokens=32, stop="\n", n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices] == [one[place].choices[0].text for place in (0, 0, 1, 1)]
    assert both.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in one)


def test_echo(client):
    options = dict(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=64, stop="\n", echo=True)
    assert client.completions.create(**options).choices[0].text == PROMPT + ANSWER
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)) == PROMPT + ANSWER


def test_cached_tokens(client):
    for _ in range(2):
        answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=1)
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < answer.usage.prompt_tokens, answer.usage


def token_of(base, text):
    body = json.dumps({"prompt": text}).encode()
    request = urllib.request.Request(f"{base}/tokenize", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        [token] = json.load(response)["tokens"]
    return str(token)


def test_logit_bias(client):
    base = str(client.base_url).removesuffix("/v1/")
    options = dict(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=8)
    banned = client.chat.completions.create(**options, logit_bias={token_of(base, "6"): -100})
    assert "6" not in banned.choices[0].message.content, banned
    wanted = client.chat.completions.create(**options, logit_bias={token_of(base, "9"): 100})
    assert wanted.choices[0].message.content == "9" * 8, wanted


def test_penalties(client):
    base = str(client.base_url).removesuffix("/v1/")
    # Strongly biased to one token, so that only the penalty can bring another one.
    options = dict(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=48, logit_bias={token_of(base, "9"): 20})
    plain = client.chat.completions.create(**options).choices[0].message.content
    often = client.chat.completions.create(**options, frequency_penalty=2).choices[0].message.content
    assert plain.count("9") > 40 and often.count("9") < 20, (plain, often)
    greedy = dict(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=64)
    assert client.chat.completions.create(**greedy, presence_penalty=0.0).choices[0].message.content == ANSWER


def check_arguments(text):
    value = json.loads(text)
    assert set(value) == {"shells", "by"} and 0 <= value["shells"] <= 999 and value["by"] in ("Max", "Ivy"), text


def test_json_schema(client):
    named = {"type": "json_schema", "json_schema": {"name": "count", "strict": True, "schema": PARAMETERS}}
    for temperature in (0, 1.5):
        options = dict(model=MODEL, messages=MESSAGES, temperature=temperature, max_tokens=200, response_format=named)
        answer = client.chat.completions.create(**options)
        assert answer.choices[0].finish_reason == "stop", answer
        check_arguments(answer.choices[0].message.content)
        chunks = client.chat.completions.create(**options, stream=True)
        check_arguments("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def test_parse(client):
    import pydantic

    class Count(pydantic.BaseModel):
        shells: int = pydantic.Field(ge=0, le=999)
        is_known: bool

    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=200, response_format=Count
    )
    assert isinstance(answer.choices[0].message.parsed, Count), answer


def test_json_object_and_regex(client):
    options = dict(model=MODEL, messages=MESSAGES, temperature=0)
    some = client.chat.completions.create(**options, max_tokens=12, response_format={"type": "json_object"})
    assert some.choices[0].message.content.startswith("{"), some
    dated = client.chat.completions.create(**options, max_tokens=40, extra_body={"regex": "20[0-9]{2}-(0[1-9]|1[0-2])"})
    year, month = dated.choices[0].message.content.split("-")
    assert 2000 <= int(year) <= 2099 and 1 <= int(month) <= 12, dated


def test_stop_token_ids(client):
    base = str(client.base_url).removesuffix("/v1/")
    stop = {"stop_token_ids": [int(token_of(base, "="))]}
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=64, extra_body=stop)
    assert answer.choices[0].message.content == ANSWER.split("=")[0], answer
    assert answer.choices[0].finish_reason == "stop"


def test_tools_round_trip(client):
    named = {"type": "function", "function": {"name": "count_shells"}}
    for choice in ("required", named):
        options = dict(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=300, tools=TOOLS, tool_choice=choice)
        answer = client.chat.completions.create(**options, parallel_tool_calls=False)
        [call] = answer.choices[0].message.tool_calls
        assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", None), answer
        assert call.function.name in ("count_shells", "count_pens") and call.id, call
        check_arguments(call.function.arguments)
    assert call.function.name == "count_shells"
    result = {"role": "tool", "tool_call_id": call.id, "content": "83"}
    messages = [*MESSAGES, answer.choices[0].message.model_dump(exclude_none=True), result]
    # This checkpoint's template wants text in every message.
    messages[1]["content"] = ""
    last = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=16, tools=TOOLS)
    assert last.choices[0].finish_reason in ("stop", "length"), last
    free = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=64, tools=TOOLS)
    assert free.choices[0].message.content == ANSWER and free.choices[0].message.tool_calls is None, free


def test_tools_stream(client):
    options = dict(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=300, tools=TOOLS, tool_choice="required")
    chunks = [c.choices[0] for c in client.chat.completions.create(**options, parallel_tool_calls=False, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert calls[0].id and calls[0].function.name in ("count_shells", "count_pens")
    check_arguments("".join(call.function.arguments for call in calls))
    assert chunks[-1].finish_reason == "tool_calls"


def test_the_example_without_a_package(client):
    example = server.ROOT / "examples" / "openai_client.py"
    command = [sys.executable, str(example), QUESTION, "--base-url", str(client.base_url)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert printed[0].startswith("whole (") and printed[0].endswith(f" tokens): {ANSWER}"), printed
    assert printed[1] == f"streamed: {ANSWER}", printed


def main():
    passed, failed = 0, []
    with server.running("--max-running-requests", "8") as base:
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
    print(f"{passed} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
