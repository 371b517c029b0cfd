"""Prints what W&B and MLflow stored of runs, as a list of {store: {metric: {step: value}}}."""

import json
import struct
import sys
from pathlib import Path

from mlflow import MlflowClient
from wandb.proto.wandb_internal_pb2 import Record


def records(data):
    """The protobuf records of a .wandb file, a LevelDB log in 32 KiB blocks after 7 bytes."""
    position, record = 7, b""
    while position + 7 <= len(data):
        if (left := -position % 32768) and left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(record)
            record = b""


def wandb_run(path):
    found = {}
    for record in records(path.read_bytes()):
        line = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in line.items():
            found.setdefault(name, {})[line.get("train/global_step")] = value
    return found


def mlflow_run(client, run):
    histories = {
        name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics
    }
    return {
        name: {metric.step: metric.value for metric in history}
        for name, history in histories.items()
    }


client = MlflowClient(sys.argv[1])
of_mlflow = client.search_runs(
    [one.experiment_id for one in client.search_experiments()], order_by=["start_time"]
)
of_wandb = [next(Path(folder).rglob("*.wandb")) for folder in sys.argv[2:]]
pairs = zip(of_wandb, of_mlflow, strict=True)
print(
    json.dumps(
        [{"wandb": wandb_run(path), "mlflow": mlflow_run(client, run)} for path, run in pairs]
    )
)
