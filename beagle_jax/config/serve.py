"""Section `serve`: the address, limits and keys of the server."""

from beagle_jax.config.section import Number, Section, setting


class ServeConfig(Section):
    """The address, limits and keys of the server. Answers are decoded as `decode` says."""

    host: str = setting(
        "127.0.0.1", "address to listen on; other machines reach it at 0.0.0.0, with an API key"
    )
    port: int = setting(8000, "port to listen on; 0: any free port", ge=0, le=65535)
    model: str | None = setting(
        None, "name of the model in requests; null: the last part of target.source"
    )
    api_key_file: str | None = setting(
        None,
        "file with one API key a line; null: the keys in the variable BEAGLE_JAX_API_KEY, if any",
        path="input",
    )
    rows: int = setting(8, "answers decoded at the same time", ge=1)
    context: int = setting(
        4096, "limit in tokens of a prompt and its answer, at most that of the target", ge=2
    )
    rounds_per_look: int = setting(
        1, "rounds between two pieces of a stream; more: less work for the host per token", ge=1
    )
    max_waiting: int = setting(64, "answers that may wait for a row; more are refused", ge=0)
    max_choices: int = setting(16, "answers of one request: its prompts times `n`", ge=1)
    max_body: int = setting(1_000_000, "limit in bytes of the body of a request", ge=1)
    body_seconds: Number = setting(10.0, "time in which a body must arrive", gt=0)
    queue_seconds: Number = setting(60.0, "longest time that an answer waits for a row", gt=0)
    answer_seconds: Number = setting(300.0, "longest time of an answer in its row", gt=0)
    grace_seconds: Number = setting(
        20.0, "time in which running answers may end after SIGTERM", ge=0
    )
    page: bool = setting(True, "show a chat page at /")
    log_prompts: bool = setting(False, "write prompts and answers to the log of requests")
    warm_up: bool = setting(
        True, "compile all programs before listening; false: each at its first use, and others wait"
    )
