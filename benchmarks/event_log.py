"""What the event log of a run costs: its share of the run's time, and its bytes per 1,000 sampled tokens.

    python benchmarks/event_log.py RUN [RUN …]

Every record of the run is made again as the loop makes it (each completion with the checksum over as many tokens) and
written to a log of its own, with all flushes and the syncs of its checkpoints left to the end. The driver's thread does
this in a run, so its time is compared with the wall time of the run's steps.
"""

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np

from magistral_jax.metrics import METRICS_FILE, read_json_lines
from magistral_jax.records import Rollout
from magistral_jax.schedule.event_log import LOG_FILE, EventLog, Generated, describe_rollout, read_log


def played_rollout(record: Generated) -> Rollout:
    """A completion of the same size."""
    tokens = np.zeros(record.num_tokens, np.int32)
    logprobs = np.zeros(record.num_tokens, np.float32)
    return Rollout(record.request_id, tokens[:1], tokens, logprobs, tokens, False, record.engine, record.engine_step)


def measure(folder: pathlib.Path) -> dict[str, float]:
    records = [record for _, record in read_log(folder / LOG_FILE)]
    completions = [record for record in records if isinstance(record, Generated)]
    rollouts = {id(record): played_rollout(record) for record in completions}
    with tempfile.TemporaryDirectory() as target:
        log = EventLog(pathlib.Path(target) / LOG_FILE)
        began = time.process_time()
        for record in records:
            rollout = rollouts.get(id(record))
            log.write(record if rollout is None else describe_rollout(rollout))
        log.close()
        seconds = time.process_time() - began
        size = (pathlib.Path(target) / LOG_FILE).stat().st_size
    num_tokens = sum(record.num_tokens for record in completions)
    wall = sum(line["step_seconds"] for line in read_json_lines(folder / METRICS_FILE))
    return {
        "records": len(records),
        "completions": len(completions),
        "tokens": num_tokens,
        "microseconds_per_record": 1e6 * seconds / len(records),
        "bytes_per_record": size / len(records),
        "bytes_per_1000_tokens": 1000 * size / num_tokens,
        "seconds": seconds,
        "run_seconds": wall,
        "share_of_run": seconds / wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path, nargs="+", help="folders of runs")
    for folder in parser.parse_args().runs:
        print(json.dumps({"run": str(folder), **measure(folder)}))


if __name__ == "__main__":
    main()
