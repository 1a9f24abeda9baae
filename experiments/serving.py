"""How many tokens a second does `tinylm serve` give to many clients, and how soon the first?

question   32 clients ask for streams over and over for a minute, on the cores that the server has:
           errors, tokens a second beside the plain decoding loop at that batch, time to the first
command    python experiments/serving.py RUN --results experiments/results
cost       about 2 minutes on two cores
expected   60% of the loop's tokens a second or more, no error
result     68% (12,330 tokens a second), no error of 6,690 requests, 95% have the first token within
           .086 s (results/serving.json)
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from lr_by_width import arguments, guarded

from tinylm import bench, files, machine
from tinylm.config import BadInput, to_json
from tinylm.look import progress
from tinylm.verbs import models

PARTS = 6
"""of the time, between which the loop is timed"""


@dataclass
class Args:
    """Serve a run to many clients and time it."""

    run: Annotated[Path, tyro.conf.Positional]
    """a finished run, base or tuned"""
    clients: int = 32
    """that ask at once"""
    seconds: float = 60.0
    """for which they go on asking"""
    tokens: int = 120
    """at most, of an answer"""
    prompt: str = "Once upon a time"
    """what all continue, with seeds of their own"""
    results: Path | None = None
    """folder for the summary"""


class Heard(NamedTuple):
    """One answered request."""

    first: float  # seconds to the first token
    tokens: int
    status: int


def main(args: Args) -> int:
    """Time the loop and the server in turn, the server idle while the loop runs."""
    config = models.opened(args.run, None)[0]
    loop = bench.decoder(config, args.clients, devices=1)  # as many as the server decodes on
    loop()
    alone, heard, wall = [], [], 0.0
    with served(args.run) as port:
        asyncio.run(clients(args, port, 5.0))  # compiles
        for _ in range(PARTS):
            alone += [loop() for _ in range(8)]
            began = time.monotonic()
            heard += asyncio.run(clients(args, port, args.seconds / PARTS))
            wall += time.monotonic() - began
    alone += [loop() for _ in range(8)]
    first = np.array([h.first for h in heard])
    found = {
        "clients": args.clients, "requests": len(heard), "seconds": wall,
        "errors": sum(h.status != 200 or h.tokens == 0 for h in heard),
        "tokens_per_second": sum(h.tokens for h in heard) / wall,
        "loop_tokens_per_second": float(np.median(alone)),
        "first_token_seconds": {f"p{q}": float(np.percentile(first, q)) for q in (50, 95, 99)}}
    found["share_of_loop"] = found["tokens_per_second"] / found["loop_tokens_per_second"]
    progress.say(f"{found['requests']} requests, {found['errors']} errors: "
                 f"{found['tokens_per_second']:.0f} tokens a second, {found['share_of_loop']:.0%} "
                 f"of the loop's; first token after {found['first_token_seconds']['p50']:.3f} s "
                 f"(median), {found['first_token_seconds']['p95']:.3f} s (95%)")
    if args.results:
        files.write_json(args.results / "serving.json", {
            **found, "model": to_json(config), "versions": machine.versions(),
            "environment": machine.environment()})
    return 0 if not found["errors"] else 1


@contextmanager
def served(run: Path):
    """Start a server on a free port; yield the port when it answers."""
    command = [sys.executable, "-m", "tinylm", "serve", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if found := re.match(r"http://127\.0\.0\.1:(\d+)/", line):
                    yield int(found[1])
                    return
            raise BadInput(f"the server of {run} did not start; try: {' '.join(command)}")
        finally:
            process.terminate()


async def clients(args: Args, port: int, seconds: float) -> list[Heard]:
    """Let every client ask over one connection, as client libraries do, until the time is over."""
    until, heard = time.monotonic() + seconds, []

    async def client(number: int) -> None:
        asked, wire = 0, await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < until:
            heard.append(await request(args, wire, number + asked * args.clients))
            asked += 1
        wire[1].close()

    await asyncio.gather(*(client(n) for n in range(args.clients)))
    return heard


async def request(args: Args, wire: tuple[asyncio.StreamReader, asyncio.StreamWriter],
                  seed: int) -> Heard:
    """Ask once by a bare socket: a client library would take a core for itself."""
    body = json.dumps({
        "model": args.run.name, "prompt": args.prompt, "max_tokens": args.tokens, "seed": seed,
        "temperature": 1.0, "stream": True, "stream_options": {"include_usage": True}}).encode()
    began, first, data = time.monotonic(), 0.0, b""
    reader, writer = wire
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                 b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    while not data.endswith(b"\r\n0\r\n\r\n") and (part := await reader.read(65536)):
        data += part
        if not first and b'"text"' in data:
            first = time.monotonic() - began
    usage = data.rpartition(b'"completion_tokens":')[2].partition(b",")[0].strip()
    return Heard(first, int(usage) if usage.isdigit() else 0, int(data[9:12] or 0))


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))
