"""A pruned server beside an unpruned one, under load: time to the first token, and throughput.

    python examples/server.py --pruner divprune --num-keep 16 --port 8000
    python examples/server.py --pruner none --port 8001
    python -m benchmarks.serve --pruned http://127.0.0.1:8000 --unpruned http://127.0.0.1:8001

Any two servers that speak OpenAI's `/v1/chat/completions`, of one model on one machine. In every
round each concurrency asks one server and then the other the same questions about the same drawn
images, none of which was asked before; which comes first changes from round to round. Answers are
streamed and have `--new-tokens` tokens. Only a loopback address is asked, and a run is bounded: in
requests by its flags, in time by `--minutes`. With `--pids` (Linux) the processor time that each
server takes of a request is counted too: other programs on the machine are not in it.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import ipaddress
import json
import os
import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from benchmarks.timing import environment, write
from ocvtp.bench import statistics
from ocvtp.data.questions import ask
from ocvtp.data.scenes import draw_scene
from ocvtp.images import encoded
from ocvtp.reporting.figure_files import save_figure
from ocvtp.reporting.plain_text import better
from ocvtp.reporting.plot_style import COLOURS, MARKERS, Name, canvas, label, name_ends

DEFAULT_OUTPUT = Path(__file__).parent / "results" / "serve-cpu.json"
SIDES = ("unpruned", "pruned")
MOST = {"concurrency": 64, "rounds": 100, "requests": 256}
LEAST_REQUESTS = 8
METRICS = ("ttft_ms", "requests_per_second", "tokens_per_second", "cpu_ms_per_request")


@dataclass(frozen=True)
class Server:
    """Where a server is, and the name of its model."""

    host: str
    port: int
    model: str


@dataclass(frozen=True)
class Answer:
    """What one request took.

    Args:
        ttft: seconds to the first text. seconds: to the end.
        prompt_tokens, new_tokens: as the server counts them.
    """

    ttft: float
    seconds: float
    prompt_tokens: int
    new_tokens: int


def address(url: str) -> tuple[str, int]:
    """Host and port of a server on this machine.

    Raises:
        ValueError: for any other.
    """
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
    try:
        is_here = ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        is_here = False
    if parts.scheme != "http" or not is_here:
        raise ValueError(
            f"{url!r} is not on this machine; load is put on a loopback address alone, e.g."
            " http://127.0.0.1:8000."
        )
    assert host is not None
    return host, parts.port or 80


def find(url: str, timeout: float) -> Server:
    """A server that answers.

    Raises:
        ValueError: if it is not on this machine, and if nothing answers.
    """
    host, port = address(url)
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request("GET", "/v1/models")
    except OSError as error:
        raise ValueError(f"nothing answers at {url} ({error}); start the server first.") from error
    found = json.loads(connection.getresponse().read())
    connection.close()
    return Server(host, port, found["data"][0]["id"])


def body_of(server: Server, number: int, new_tokens: int, extra: Mapping[str, Any]) -> bytes:
    """A request about drawn scene `number`."""
    scene = draw_scene(seed=7, index=number)
    (question,) = ask(scene.objects, 1, np.random.default_rng(number))
    data = base64.b64encode(encoded(Image.fromarray(scene.image), "PNG")).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": question.text},
    ]
    chat = {
        "model": server.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": new_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(chat | dict(extra)).encode()


def send(server: Server, body: bytes, timeout: float) -> Answer:
    """Ask, and read the stream to its end.

    Raises:
        RuntimeError: for an error in place of an answer.
    """
    connection = http.client.HTTPConnection(server.host, server.port, timeout=timeout)
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{server.host}:{server.port}: {response.status} {response.read()!r}")
    first, usage = None, None
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise RuntimeError(f"{server.host}:{server.port}: {event['error']}")
        if first is None and any(one["delta"].get("content") for one in event["choices"]):
            first = time.perf_counter()
        usage = event.get("usage") or usage
    end = time.perf_counter()
    connection.close()
    if first is None or usage is None:
        raise RuntimeError(f"{server.host}:{server.port} sent no text, or no usage")
    return Answer(first - start, end - start, usage["prompt_tokens"], usage["completion_tokens"])


def load(
    server: Server, bodies: Sequence[bytes], concurrency: int, timeout: float
) -> tuple[list[Answer], float]:
    """All answers, so many requests at a time, and the seconds of all together."""
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    for body in bodies:
        waiting.put(body)

    def client(_: int) -> list[Answer]:
        answers = []
        while True:
            try:
                body = waiting.get_nowait()
            except queue.Empty:
                return answers
            answers.append(send(server, body, timeout))

    with ThreadPoolExecutor(concurrency) as pool:
        start = time.perf_counter()
        found = [answer for some in pool.map(client, range(concurrency)) for answer in some]
        return found, time.perf_counter() - start


def processor_seconds(pid: int) -> float:
    """Of a process and all that it began, from when they began.

    Raises:
        ValueError: if there is no such process.
    """
    spent, parents = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
        own = int(file.parent.name)
        parents[own], spent[own] = int(fields[1]), sum(map(int, fields[11:13]))
    if pid not in spent:
        raise ValueError(f"--pids: there is no process {pid}; pass those of the two servers.")
    wanted, size = {pid}, 0
    while len(wanted) > size:
        size = len(wanted)
        wanted |= {one for one, parent in parents.items() if parent in wanted}
    return sum(spent[one] for one in wanted) / os.sysconf("SC_CLK_TCK")


def measure(arguments: argparse.Namespace, servers: Mapping[str, Server]) -> dict[str, Any]:
    """Rounds as long as there is time: concurrency -> side -> metric -> a value a round."""
    samples: dict[int, dict[str, dict[str, list[float]]]] = {
        c: {side: {metric: [] for metric in METRICS} for side in SIDES}
        for c in arguments.concurrency
    }
    prompts: dict[str, set[int]] = {side: set() for side in SIDES}
    extra = {"pruned": arguments.pruned_body, "unpruned": arguments.unpruned_body}
    pids = dict(zip(SIDES[::-1], arguments.pids or (), strict=False))

    def spent(side: str) -> float:
        return processor_seconds(pids[side]) if pids else 0.0

    end, number, rounds = time.monotonic() + 60 * arguments.minutes, 0, 0
    longest = 0.0
    while rounds < arguments.warmup + arguments.rounds:
        begin = time.monotonic()
        if rounds > arguments.warmup and begin + longest > end:
            break
        for concurrency in arguments.concurrency:
            count = max(LEAST_REQUESTS, arguments.requests_per_client * concurrency)
            for side in SIDES if rounds % 2 else SIDES[::-1]:
                server = servers[side]
                bodies = [
                    body_of(server, number + n, arguments.new_tokens, extra[side])
                    for n in range(count)
                ]
                before = spent(side)
                answers, seconds = load(server, bodies, concurrency, arguments.timeout)
                taken = spent(side) - before
                prompts[side] |= {one.prompt_tokens for one in answers}
                if rounds >= arguments.warmup:
                    found = samples[concurrency][side]
                    found["ttft_ms"].append(1e3 * float(np.median([a.ttft for a in answers])))
                    found["requests_per_second"].append(count / seconds)
                    new = sum(one.new_tokens for one in answers)
                    found["tokens_per_second"].append(new / seconds)
                    found["cpu_ms_per_request"].append(1e3 * taken / count)
            number += count
        longest, rounds = max(longest, time.monotonic() - begin), rounds + 1
        print(f"round {rounds}: {time.monotonic() - begin:.1f} s", flush=True)
    lengths = {side: [min(some), max(some)] for side, some in prompts.items()}
    return {"rounds": rounds - arguments.warmup, "prompt_tokens": lengths, "samples": samples}


def figures(samples: Mapping[int, Any]) -> list[dict[str, Any]]:
    """Of every concurrency the medians over rounds and their ratios, with 95% intervals."""
    rows = []
    for concurrency, sides in samples.items():
        row: dict[str, Any] = {"concurrency": concurrency}
        for metric in METRICS:
            bare, own = (sides[side][metric] for side in SIDES)
            if min(*bare, *own) <= 0:  # was not counted
                continue
            block = statistics.block_length([bare, own])
            row[metric] = {
                "unpruned": rounded(statistics.median(bare, block)),
                "pruned": rounded(statistics.median(own, block)),
                "ratio": rounded(statistics.ratio(own, bare, block)),
            }
        rows.append(row)
    return rows


def rounded(interval: statistics.Interval) -> dict[str, float]:
    """To the digits that mean something."""
    return {name: float(f"{value:.4g}") for name, value in asdict(interval).items()}


def plot(results: Mapping[str, Any]) -> Any:
    """TTFT and throughput against the concurrency, with intervals."""
    panels_of = {"ttft_ms": "TTFT, ms", "requests_per_second": "requests a second"}
    drawing, panels = canvas([2.4] * len(panels_of))
    rows = results["figures"]
    places = np.arange(len(rows))
    for panel, (metric, text) in zip(panels, panels_of.items(), strict=True):
        names = []
        for number, side in enumerate(SIDES):
            found = [row[metric][side] for row in rows]
            values = np.array([one["value"] for one in found])
            errors = [
                [one["value"] - one["low"] for one in found],
                [one["high"] - one["value"] for one in found],
            ]
            style = {"color": COLOURS[number], "marker": MARKERS[number], "ms": 5, "lw": 1.2}
            drawn = panel.errorbar(
                places + 0.06 * (number - 0.5), values, yerr=errors, capsize=2, **style
            )
            names.append(Name(side, places[-1], float(values[-1]), COLOURS[number], drawn=drawn))
        panel.set_xticks(places, [str(row["concurrency"]) for row in rows])
        panel.set_ylim(bottom=0)
        y = better(text, lower=True) if metric == "ttft_ms" else text
        label(panel, f"{results['engine']}: {text}", "requests at a time", y)
        name_ends(panel, names, 2.4)
    return drawing


def table(results: Mapping[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{'at a time':>9} {'metric':<20} {'unpruned':>9} {'pruned':>9}  pruned / unpruned"]
    for row in results["figures"]:
        for metric in [metric for metric in METRICS if metric in row]:
            one = row[metric]
            ratio = one["ratio"]
            lines.append(
                f"{row['concurrency']:>9} {metric:<20} {one['unpruned']['value']:>9.4g}"
                f" {one['pruned']['value']:>9.4g}  {ratio['value']:.2f}"
                f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write and show."""
    arguments = parse(words)
    urls = {"pruned": arguments.pruned, "unpruned": arguments.unpruned}
    servers = {side: find(url, arguments.timeout) for side, url in urls.items()}
    found = measure(arguments, servers)
    samples, lengths = found.pop("samples"), found["prompt_tokens"]
    if lengths["pruned"][1] >= lengths["unpruned"][0]:
        raise ValueError(
            f"the prompts of --pruned have {lengths['pruned']} tokens, and those of --unpruned"
            f" {lengths['unpruned']}: nothing is pruned there."
        )
    names = ("concurrency", "requests_per_client", "new_tokens", "pruned_body", "unpruned_body")
    results = {
        "engine": arguments.engine,
        "model": servers["pruned"].model,
        "settings": {name: getattr(arguments, name) for name in names},
        "client": environment(),
        **found,
        "figures": figures(samples),
        "samples": samples,
    }
    output = Path(arguments.output)
    write(output, results)
    drawing = output.with_suffix(".png") if arguments.plot is None else Path(arguments.plot)
    save_figure(plot(results), drawing, dpi=120)
    print(f"{table(results)}\nwrote {output} and {drawing}")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The flags.

    Raises:
        ValueError: for what is out of bounds.
    """
    parser = argparse.ArgumentParser(description="a pruned server beside an unpruned one")
    parser.add_argument("--pruned", default="http://127.0.0.1:8000", help="of the pruned server")
    parser.add_argument("--unpruned", default="http://127.0.0.1:8001", help="of the other")
    parser.add_argument("--pruned-body", type=json.loads, default={}, help="more of its requests")
    parser.add_argument("--unpruned-body", type=json.loads, default={})
    parser.add_argument(
        "--pids", type=int, nargs=2, metavar=("PRUNED", "UNPRUNED"), help="of the servers"
    )
    parser.add_argument("--engine", default="examples/server.py", help="what they are, for plots")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--rounds", type=int, default=12, help="at most")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--requests-per-client", type=int, default=2, help="of a round")
    parser.add_argument("--new-tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--minutes", type=float, default=20, help="no round begins after them")
    parser.add_argument("--timeout", type=float, default=120, help="seconds of a request")
    parser.add_argument("--output", default=str(DEFAULT_OUTPUT))
    parser.add_argument("--plot", help="PNG (default: beside --output)")
    arguments = parser.parse_args(words)
    asked = {
        "concurrency": max(arguments.concurrency),
        "rounds": arguments.rounds,
        "requests": arguments.requests_per_client * max(arguments.concurrency),
    }
    for name, most in MOST.items():
        if not 1 <= asked[name] <= most:
            raise ValueError(f"{name}={asked[name]}; pass 1 to {most}.")
    if arguments.rounds < statistics.MIN_BLOCKS:
        raise ValueError(f"--rounds {arguments.rounds}; pass at least {statistics.MIN_BLOCKS}.")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"benchmarks.serve: error: {error}") from None
