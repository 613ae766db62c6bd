"""Through HTTP: every server up, all but one stopped where they stand, the same requests to each in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import aiohttp

from engine.tokenizer import Tokenizer
from load_tests.figures import spread, turns
from load_tests.local import ServerError
from load_tests.peers.contenders import Settings
from load_tests.peers.http_client import RequestFailed, Stream, figures_of, send_all
from load_tests.peers.memory import memory_mib
from load_tests.peers.servers import Running, ServerMissing, running_server
from load_tests.peers.workloads import Prompts, poisson_arrivals

STREAMS = 16
PROMPT_TOKENS = 512
OUTPUT_TOKENS = 128
SETTLE_S = 1.0

Say = Callable[[str], None]


def run_http(
    names: Sequence[str],
    *,
    settings: Settings,
    repeats: int,
    rate_per_s: float,
    prompts: Prompts,
    tokenizer: Tokenizer,
    seed: int,
    say: Say,
) -> dict[str, Any]:
    """`http` of the report: figures by load, then by figure, then by server; `missing` servers with the reason.

    Loads: `burst`, 16 streams at once; `poisson`, as many at moments drawn from `rate_per_s`, if that is not 0.
    """
    loads = {"burst": [0.0] * STREAMS}
    if rate_per_s:
        loads["poisson"] = poisson_arrivals(STREAMS, rate_per_s, seed)
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        servers = _start(names, settings, tokenizer, missing, stack, say)
        rounds: dict[str, dict[str, list[dict[str, float]]]] = {load: {name: [] for name in servers} for load in loads}

        # By turn and load, the same for every server; turn -1 is the warm-up.
        drawn = {
            (turn, load): [prompts.draw(PROMPT_TOKENS) for _ in arrivals_s]
            for turn in range(-1, repeats)
            for load, arrivals_s in loads.items()
        }

        def run_round(name: str, turn: int, load: str) -> list[Stream] | None:
            if name in missing:
                return None
            try:
                return _round(servers[name], drawn[turn, load], loads[load], tokenizer)
            except (RequestFailed, aiohttp.ClientError, TimeoutError) as error:
                missing[name] = f"{load}: {error or type(error).__name__}"
                say(f"{name} is out: {missing[name]}")
                return None

        for name in servers:  # a server's first full batch takes up to three times as long as all later ones
            say(f"warm-up: {name}")
            run_round(name, -1, "burst")
        for repeat, name in turns(list(servers), repeats):
            for load in loads:
                say(f"{load} {repeat + 1} of {repeats}: {name}")
                streams = run_round(name, repeat, load)
                if streams is not None:
                    rounds[load][name].append(figures_of(streams))
        memory = {name: memory_mib(server.pid) for name, server in servers.items()}
    report: dict[str, Any] = {load: _by_figure(by_name, repeats) for load, by_name in rounds.items()}
    return report | {"server_memory": memory, "missing": missing, "arrivals_per_s": rate_per_s}


def _start(
    names: Sequence[str],
    settings: Settings,
    tokenizer: Tokenizer,
    missing: dict[str, str],
    stack: ExitStack,
    say: Say,
) -> dict[str, Running]:
    """One after the other; each is stopped as soon as it answers."""
    servers: dict[str, Running] = {}
    for name in names:
        say(f"starting the server of {name}")
        try:
            server = stack.enter_context(running_server(name, settings, tokenizer.eos_token_ids))
        except (ServerMissing, ServerError) as error:
            missing[name] = str(error)
            say(f"{name} is out: {error}")
            continue
        stack.callback(server.thaw)  # a stopped process cannot end in order
        server.freeze()
        servers[name] = server
    return servers


def _round(
    server: Running, drawn: Sequence[list[int]], arrivals_s: Sequence[float], tokenizer: Tokenizer
) -> list[Stream]:
    """All streams of one load against one server, on prompts that it has not seen.

    Raises:
        RequestFailed: A request failed, or gave another number of tokens than was asked for.
    """
    bodies = [server.endpoint.body(prompt, tokenizer.decode(prompt), OUTPUT_TOKENS) for prompt in drawn]
    server.thaw()
    try:
        time.sleep(SETTLE_S)
        streams = send_all(server.endpoint, bodies, arrivals_s)
    finally:
        server.freeze()
    if server.endpoint.takes_ids and any(stream.num_tokens != OUTPUT_TOKENS for stream in streams):
        raise RequestFailed(f"answers of {[stream.num_tokens for stream in streams]} tokens, not {OUTPUT_TOKENS}")
    return streams


def _by_figure(by_name: Mapping[str, Sequence[Mapping[str, float]]], repeats: int) -> dict[str, dict[str, Any]]:
    """Spreads by figure and server, of servers that lasted all rounds."""
    lasted = {name: rounds for name, rounds in by_name.items() if len(rounds) == repeats}
    figures = next(iter(lasted.values()), [{}])[0]
    return {
        figure: {name: spread(each[figure] for each in rounds) for name, rounds in lasted.items()} for figure in figures
    }
