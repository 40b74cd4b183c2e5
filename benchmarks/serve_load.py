"""The service under load: many streaming clients, some of whom hang up in the middle, for some minutes.

    python benchmarks/serve_load.py [--clients 200] [--seconds 120] [--cancel 0.2] [--model FOLDER]
    python benchmarks/serve_load.py --kill        # kill -9 in mid-stream: every client must get an error, none may hang

The service is a process of its own on loopback; the clients share this one, so both compete for the machine's cores.
Afterwards no page, slot or waiting request may be left, and no client may have met an error: the exit code says so.
Memory of the service is read at the start, at quarters of the time, and at the end, to show whether it still grows.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import tyro
from rich.console import Console

_PATIENCE = 60  # seconds that a client waits for the next line
console = Console(stderr=True, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Args:
    """The load."""

    model: pathlib.Path = pathlib.Path("configs/quickstart_coldstart")
    """Model folder."""
    clients: int = 200
    """Clients, each with one request at a time, one after the other."""
    seconds: float = 120
    """How long they go on."""
    cancel: float = 0.2
    """Share of the requests whose client hangs up, at a random event."""
    prompt: int = 48
    """Most characters of a prompt."""
    new: int = 192
    """Most tokens of a completion; each request asks for a random number up to it."""
    slots: int = 64
    decode_block: int = 4
    kill: bool = False
    """Kill the service after a quarter of the time."""
    seed: int = 0


@dataclasses.dataclass
class Tally:
    """What the clients met."""

    num_tokens: int = 0
    num_whole: int = 0
    num_cancelled: int = 0
    first_token: list[float] = dataclasses.field(default_factory=list)
    between_events: list[float] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    in_stream: int = 0  # clients that are reading one at this moment


class Service:
    """The command in a process of its own."""

    def __init__(self, args: Args, token_file: pathlib.Path) -> None:
        self._token = token_file.read_text()
        settings = {
            "policy.path": args.model,
            "generation.num_slots": args.slots,
            "generation.max_prompt_tokens": args.prompt + 1,
            "generation.max_new_tokens": args.new,
            "generation.decode_block": args.decode_block,
            "serve.port": 0,
            "serve.model_name": "model",
            "serve.max_pending": args.clients,
            "serve.admin_token_file": token_file,
        }
        words = [sys.executable, "-c", "from magistral_jax.main import main; main()", "serve"]
        words += [f"--{name}={value}" for name, value in settings.items()]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            console.print(line.rstrip(), highlight=False)
            if found := re.search(r"at http://([\d.]+):(\d+)/v1:", line):
                self.host, self.port = found[1], int(found[2])
                return
        raise SystemExit("the service did not start")

    def stats(self) -> dict[str, Any]:
        """Its own counts."""
        headers = {"Authorization": f"Bearer {self._token}"}
        return httpx.get(f"http://{self.host}:{self.port}/admin/stats", headers=headers, timeout=30).json()

    def memory(self) -> float:
        """Resident MiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


@contextlib.contextmanager
def start(args: Args) -> Iterator[Service]:
    """The service, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        token_file = pathlib.Path(folder) / "token"
        token_file.write_text(secrets.token_hex())
        service = Service(args, token_file)
        try:
            yield service
        finally:
            service.process.kill()
            service.process.wait()


async def client(args: Args, service: Service, index: int, end: float, tally: Tally) -> None:
    """One request after the other until the time is over, or until the service is gone."""
    rng = random.Random(args.seed * 1_000_003 + index)
    while time.monotonic() < end:
        body = {
            "model": "model",
            "prompt": "".join(rng.choices("0123456789+-", k=rng.randint(1, args.prompt))),
            "max_tokens": rng.randint(1, args.new),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        hang_up_at = rng.randint(1, 1 + args.new // args.decode_block) if rng.random() < args.cancel else None
        try:
            await one_request(service, body, hang_up_at, tally)
        except (OSError, RuntimeError, TimeoutError) as error:
            tally.errors.append(f"{type(error).__name__}: {error}")
            if args.kill:
                return


async def one_request(service: Service, body: dict[str, Any], hang_up_at: int | None, tally: Tally) -> None:
    """Read a stream to its end, or hang up at some event."""
    began = last = time.monotonic()
    count = 0
    async with contextlib.aclosing(events(service, json.dumps(body).encode(), tally)) as stream:
        async for event in stream:
            now = time.monotonic()
            (tally.between_events if count else tally.first_token).append(now - last if count else now - began)
            last, count = now, count + 1
            if usage := event.get("usage"):
                tally.num_tokens += usage["completion_tokens"]
                tally.num_whole += 1
                return
            if count == hang_up_at:
                tally.num_cancelled += 1
                return
    raise RuntimeError("the stream ended without its last event")


async def events(service: Service, body: bytes, tally: Tally) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a stream, over a connection of its own.

    By hand, since the usual clients need more of a core for 200 streams than the service does.
    """
    reader, writer = await asyncio.open_connection(service.host, service.port)
    tally.in_stream += 1
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {service.host}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        async with asyncio.timeout(_PATIENCE):
            status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"answered {status.decode().strip()!r}")
        while line := await asyncio.wait_for(reader.readline(), _PATIENCE):
            if line.startswith(b"data: {"):  # what lies between are headers and sizes of chunks
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                yield event
    finally:
        tally.in_stream -= 1
        writer.close()


async def load(args: Args, service: Service, tally: Tally) -> dict[str, Any]:
    """All clients at once; returns what was seen of the service meanwhile."""
    end = time.monotonic() + args.seconds
    clients = [asyncio.create_task(client(args, service, i, end, tally)) for i in range(args.clients)]
    return await watch(args, service, clients, tally)


async def watch(args: Args, service: Service, clients: list[asyncio.Task[None]], tally: Tally) -> dict[str, Any]:
    """The service's memory while the clients are at work, and that all of them come to an end."""
    seen: dict[str, Any] = {"memory_mib": [round(service.memory())]}
    for quarter in range(4):
        await asyncio.sleep(args.seconds / 4)
        if args.kill and quarter == 0:
            seen["in_stream_when_killed"] = tally.in_stream
            service.process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            await asyncio.wait(clients, timeout=60)
            seen["seconds_until_all_knew"] = round(time.monotonic() - killed, 2)
            break
        seen["memory_mib"].append(round(service.memory()))
    done, hanging = await asyncio.wait(clients, timeout=120)
    for task in done:
        task.result()
    return seen | {"hanging_clients": len(hanging)}


def summarize(args: Args, tally: Tally, seconds: float) -> dict[str, Any]:
    """Throughput and latencies; a stalled tail shows in the 99th percentile."""
    percentiles = lambda values: {
        f"p{q}_ms": round(1000 * statistics.quantiles(values, n=100)[q - 1], 1) for q in (50, 95, 99)
    }
    return {
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "requests": tally.num_whole,
        "cancelled": tally.num_cancelled,
        "tokens_per_s_of_whole_answers": round(tally.num_tokens / seconds, 1),
        "time_to_first_token": percentiles(tally.first_token),
        "between_events": percentiles(tally.between_events),
        "errors": len(tally.errors),
        "error_examples": sorted(set(tally.errors))[:3],
    }


def main(args: Args) -> None:
    """Measure, print, and fail where something leaked."""
    tally = Tally()
    with start(args) as service:
        before = service.stats()
        began = time.monotonic()
        seen = asyncio.run(load(args, service, tally))
        result = summarize(args, tally, time.monotonic() - began) | seen
        if args.kill:
            is_good = not seen["hanging_clients"] and len(tally.errors) == args.clients
        else:
            time.sleep(1)
            after = service.stats()
            kept = ("free_pages", "num_running", "num_waiting", "num_scoring")
            result |= {"before": {name: before[name] for name in kept}, "after": {name: after[name] for name in kept}}
            result["memory_mib"].append(round(service.memory()))
            result["sampled_tokens_per_s"] = round(after["sampled_tokens"] / result["seconds"], 1)
            result["preempted"] = after["num_preempted"]
            service.process.send_signal(signal.SIGINT)
            result["exit_code"] = service.process.wait(60)
            is_good = result["before"] == result["after"] and not tally.errors and result["exit_code"] == 0
            is_good = is_good and not seen["hanging_clients"]
    print(json.dumps(result), flush=True)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main(tyro.cli(Args))
