"""Which sampling steps a program contains: all that its requests need, and little more.

The state of a session has arrays for every request that it may get. Its rounds run one of a few
programs over this state, chosen anew before each look of the host by the requests that run. A
request that needs more than the running ones is therefore admitted among them at any time.
"""

from collections.abc import Sequence

from beagle_jax.decoding.requests import MOST_ENDS, MOST_LOGPROBS, Request
from beagle_jax.decoding.sampling import Filters, filters_of
from beagle_jax.model.cache import round_up

ENDS_BUCKET = 8  # end tokens of a request are padded to a multiple of this


def filters_for(requests: Sequence[Request], eos_ids: tuple[int, ...]) -> Filters:
    """Returns what a state and its programs need for these requests."""
    filters = filters_of([request.sampling for request in requests])
    own = [
        len(request.end_tokens(eos_ids))
        for request in requests
        if request.ignore_eos or request.stop_token_ids or request.min_new_tokens
    ]
    # Few sizes, each is compiled.
    ends = round_up(max(1, *own, len(eos_ids)), ENDS_BUCKET) if own else 0
    tops = [request.logprobs for request in requests if request.logprobs is not None]
    logprobs = (MOST_LOGPROBS if max(tops) else 0) if tops else None
    undrafted = not all(request.draft for request in requests)
    return filters._replace(ends=ends, logprobs=logprobs, undrafted=undrafted)


def filters_for_all(eos_ids: tuple[int, ...], nodes: int) -> tuple[Filters, ...]:
    """Returns the rounds that answer any request, each covered by the next.

    They contain no sampling; temperature and filters; everything. nodes: of the trees that they
    report.
    """
    greedy = Filters(drafted=nodes)
    drawing = greedy._replace(drawn=True, top_k=True, top_p=True, min_p=True)
    everything = drawing._replace(
        penalties=True,
        bias=True,
        ends=round_up(len(eos_ids) + MOST_ENDS, ENDS_BUCKET),
        logprobs=MOST_LOGPROBS,
        undrafted=True,
    )
    return greedy, drawing, everything


def smallest(programs: Sequence[Filters], requests: Sequence[Request]) -> Filters:
    """Returns the first program whose rounds have all steps for these requests.

    The state holds which tokens end an answer and which rows go without drafts, so these two need
    no step of their own.
    """
    needs = filters_for(requests, ())._replace(undrafted=False)
    if not any(request.min_new_tokens for request in requests):
        needs = needs._replace(ends=0)
    return next(each for each in programs if covers(each, needs))


def covers(program: Filters, needs: Filters) -> bool:
    """Whether a program has all steps of another one."""
    return all(_size(has) >= _size(need) for has, need in zip(program, needs, strict=True))


def _size(value: bool | int | None) -> int:
    return -1 if value is None else int(value)
