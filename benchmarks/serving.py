"""`lora-fsdp serve` under load: requests a second, latencies, overload, memory.

    python -m benchmarks.serving                          # SmolLM2-135M, an adapter made here
    python -m benchmarks.serving --adapter runs/mine --requests 5000

The clients are threads of this process on the same machine, a connection each, one tweet a request.
Three parts, a server for each: more and more clients; more clients than may wait, where
every request must be answered 200, 429 or 503; and a long run in which the memory of the server is
read as it goes. Results go to `benchmarks/results/serving.json`, and `--page` writes them into
`docs/serve.md`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.throughput import RESULTS, environment
from lora_fsdp.data.tables import read_table
from tests.support.served import Server, serving

PAGE = Path(__file__).resolve().parents[1] / "docs" / "serve.md"
_MARK, _END = "<!-- measured -->", "<!-- end -->"
DEFAULT = Path(".cache/default")
TABLE = DEFAULT / "airline_tweets.csv"
CLIENTS = (1, 4, 16, 64)
MEBIBYTE = 2**20


def make_adapter(folder: Path) -> Path:
    """A finished run of SmolLM2-135M on a few tweets; only how fast it answers matters."""
    words = ["--task", "sentiment", "--data_file", TABLE, "--max_rows", 96, "--eval_size", 16]
    words += ["--model_name_or_path", DEFAULT / "smollm2-135m-instruct", "--max_steps", 2]
    words += ["--output_dir", folder, "--save_strategy", "no", "--probe_rows", 0]
    command = [sys.executable, "-m", "lora_fsdp", "train", "--accelerate_config", "single"]
    subprocess.run([*command, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return folder


class Client(threading.Thread):
    """Sends requests one after the other over one connection, until `texts` are used up."""

    def __init__(self, port: int, texts: Sequence[str], *, rows: int) -> None:
        super().__init__()
        self.port, self.texts, self.rows = port, texts, rows
        self.seconds: list[float] = []
        self.statuses: Counter[str] = Counter()

    def run(self) -> None:
        """Note status and seconds of each."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        for start in range(0, len(self.texts), self.rows):
            body = json.dumps({"texts": self.texts[start : start + self.rows]}).encode()
            began = time.perf_counter()
            try:
                connection.request("POST", "/predict", body)
                reply = connection.getresponse()
                contents = json.loads(reply.read())
                status = str(reply.status)
                if reply.status == 200 and len(contents["answers"]) != len(
                    self.texts[start : start + self.rows]
                ):
                    status = "lost rows"
                if reply.status in (429, 503) and not reply.headers.get("Retry-After"):
                    status += " without Retry-After"
            except (OSError, http.client.HTTPException, ValueError) as error:
                status = type(error).__name__
                connection.close()
            self.seconds.append(time.perf_counter() - began)
            self.statuses[status] += 1
        connection.close()


def load(
    server: Server, texts: Sequence[str], *, clients: int, requests: int, rows: int = 1
) -> dict[str, Any]:
    """So many requests by so many clients at once."""
    share = -(-requests // clients) * rows
    several = [
        Client(server.port, [texts[(n * share + i) % len(texts)] for i in range(share)], rows=rows)
        for n in range(clients)
    ]
    began = time.perf_counter()
    for one in several:
        one.start()
    for one in several:
        one.join()
    wall = time.perf_counter() - began
    seconds = np.array([second for one in several for second in one.seconds])
    statuses: Counter[str] = sum((one.statuses for one in several), Counter())
    return {
        "clients": clients,
        "requests": len(seconds),
        "rows_a_request": rows,
        "requests_per_second": round(len(seconds) / wall, 1),
        "answered_per_second": round(statuses["200"] / wall, 1),
        "p50_ms": round(1e3 * float(np.quantile(seconds, 0.5)), 1),
        "p99_ms": round(1e3 * float(np.quantile(seconds, 0.99)), 1),
        "statuses": dict(sorted(statuses.items())),
    }


def overload(adapter: Path, texts: Sequence[str], *, requests: int) -> dict[str, Any]:
    """Far more than may wait, by 96 clients that do not heed Retry-After."""
    limits = ("--max_waiting_rows", 64, "--max_rows", 8, "--max_requests", 48)
    with serving("--adapter", adapter, *limits, OMP_NUM_THREADS="") as server:
        found = load(server, texts, clients=96, requests=requests, rows=8)
        code, _ = server.stop()
    known = {"200", "429", "503"}
    lost = sum(count for status, count in found["statuses"].items() if status not in known)
    return {**found, "limits": list(map(str, limits)), "lost": lost, "exit_code": code}


def long_run(adapter: Path, texts: Sequence[str], *, requests: int) -> dict[str, Any]:
    """Resident memory of the server, in MiB, at ten times of a long run; its growth at the end."""
    readings = []
    with serving("--adapter", adapter, OMP_NUM_THREADS="") as server:
        process = psutil.Process(server.process.pid)
        for _ in range(10):
            found = load(server, texts, clients=16, requests=requests // 10)
            assert set(found["statuses"]) == {"200"}, found
            readings.append(round(process.memory_info().rss / MEBIBYTE, 1))
        server.stop()
    later = readings[4:]
    slope = float(np.polyfit(range(len(later)), later, 1)[0]) / (requests / 10) * 1000
    return {"requests": requests, "resident_mib": readings, "mib_a_thousand": round(slope, 2)}


def page_text(facts: dict[str, Any]) -> str:
    """The results as the page has them."""
    versions = facts["environment"]
    lines = [
        f"`{facts['command']}`: SmolLM2-135M in float32, a tweet a request, {facts['cores']} cores "
        f"that clients and server share with other work, torch {versions['torch']}:",
        "",
        "| clients at once | requests/s | p50 | p99 |",
        "| --- | --- | --- | --- |",
    ]
    for one in facts["loads"]:
        cells = (
            one["clients"],
            one["requests_per_second"],
            f"{one['p50_ms']:,.0f} ms",
            f"{one['p99_ms']:,.0f} ms",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    over, long = facts["overload"], facts["long_run"]
    answered = over["statuses"].get("200", 0)
    memory = long["resident_mib"]
    lines += [
        "",
        f"Overload: {over['clients']} clients with {over['rows_a_request']} rows a request, "
        f"`{' '.join(over['limits'])}`. Of {over['requests']} requests {answered} were answered, "
        f"the others refused with 429 or 503 and `Retry-After`, and {over['lost']} lost.",
        "",
        f"Memory over {long['requests']:,} requests: {memory[0]:,.0f} MiB after the first tenth, "
        f"{memory[-1]:,.0f} at the end; {long['mib_a_thousand']:+.1f} MiB a thousand requests over "
        "the last six tenths.",
    ]
    return "\n" + "\n".join(lines) + "\n"


def write_page(facts: dict[str, Any]) -> None:
    """Put the results into the page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(_MARK)
    _, after = rest.split(_END)
    PAGE.write_text(f"{before}{_MARK}\n{page_text(facts)}\n{_END}{after}", encoding="utf-8")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapter", type=Path, help="a finished run; made when not given")
    parser.add_argument("--requests", type=int, default=5000, help="of the long run")
    parser.add_argument("--each", type=int, default=400, help="requests for each load")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.json")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write what was measured before")
    asked = parser.parse_args()
    if asked.page:
        write_page(json.loads(asked.page.read_text()))
        return
    texts = read_table(TABLE)["text"].astype(str).tolist()[:2000]
    with tempfile.TemporaryDirectory() as scratch:
        adapter = asked.adapter or make_adapter(Path(scratch) / "run")
        sizes = f"--each {asked.each} --requests {asked.requests}"
        facts: dict[str, Any] = {"command": f"python -m benchmarks.serving {sizes}"}
        facts |= {"environment": environment(), "cores": psutil.cpu_count(), "loads": []}
        with serving("--adapter", adapter, OMP_NUM_THREADS="") as server:
            load(server, texts, clients=4, requests=20)  # warm
            for clients in CLIENTS:
                found = load(server, texts, clients=clients, requests=asked.each)
                facts["loads"].append(found)
                print(json.dumps(found), flush=True)
            server.stop()
        facts["overload"] = overload(adapter, texts, requests=asked.each)
        print(json.dumps(facts["overload"]), flush=True)
        facts["long_run"] = long_run(adapter, texts, requests=asked.requests)
        print(json.dumps(facts["long_run"]), flush=True)
    asked.output.parent.mkdir(exist_ok=True)
    asked.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
