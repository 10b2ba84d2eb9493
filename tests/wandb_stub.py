"""A stand-in for W&B's server on this machine, enough for the real client to run online.

It takes runs, history, files, artifacts and alerts, answers the questions behind resume and `use_artifact`, and runs
sweeps: `wandb sweep`, `wandb agent`. It proves what the client sends, not what the cloud accepts. The protocol is
private to wandb: an operation that this file does not know is answered with an error and noted in `unknown`, and tests
assert that there is none, so a new wandb that speaks differently is noticed.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.local_server import LocalServer, QuietHandler
from tests.wandb_stub_artifacts import ENTITY, LONG_AGO, ArtifactStore
from tests.wandb_stub_state import Run, Sweep


class WandbStub(ArtifactStore):
    """The server's memory, and its answers to the client's operations: one method each."""

    def __init__(self) -> None:
        super().__init__()
        self.sweeps: dict[str, Sweep] = {}
        self.alerts: list[dict[str, Any]] = []
        self.stop: set[str] = set()
        self.unknown: list[str] = []
        self.lock = threading.RLock()

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables that send a client here, and keep what it writes in a folder."""
        places = {f"WANDB_{name}_DIR": str(folder / f"wandb-{name.lower()}") for name in ("DATA", "CACHE", "CONFIG")}
        return {
            **places,
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_ENTITY": ENTITY,
            "WANDB_MODE": "online",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
        }

    def answer(self, document: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The reply to one GraphQL operation."""
        operation = re.search(r"(?:query|mutation)\s+(\w+)", document)
        name = operation[1] if operation else document[:80]
        reply = getattr(self, f"_on_{name}", None)
        with self.lock:
            try:
                if reply is not None:
                    return {"data": reply(variables)}
                reason = "unknown"
            except Exception as error:  # a client that is told nothing tries for hours
                reason = repr(error)
            self.unknown.append(f"{name} {json.dumps(variables)[:300]}: {reason}")
        return {"errors": [{"message": f"the stub cannot answer {name}: {reason}"}]}

    # Runs

    def _on_Viewer(self, _: Any) -> Any:
        viewer = {"id": "u1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def _on_ServerFeaturesQuery(self, _: Any) -> Any:
        return {"serverInfo": {"features": []}}

    def _on_OrgFeatureFlags(self, _: Any) -> Any:
        return {"organization": {"featureFlags": []}}

    def _on_OrganizationCoreWeaveOrganizationID(self, _: Any) -> Any:
        return {"entity": {"organization": None}}

    def _on_UpsertBucket(self, given: Any) -> Any:
        name = given["name"] or given["id"].partition(":")[2]
        new = name not in self.runs
        run = self.runs.setdefault(name, Run(name=name, project=given.get("project") or "uncategorized"))
        run.given |= {key: value for key, value in given.items() if value is not None}
        run.config |= {key: item["value"] for key, item in json.loads(given.get("config") or "{}").items()}
        run.starts += bool(given.get("name"))
        project = {"id": "p1", "name": run.project, "entity": {"id": "e1", "name": ENTITY}}
        bucket = {
            "id": f"run:{name}",
            "name": name,
            "displayName": run.given.get("displayName") or name,
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "sweepName": run.given.get("sweep"),
            "project": project,
            "historyLineCount": len(run.streams["wandb-history.jsonl"]),
        }
        return {"upsertBucket": {"bucket": {"description": None, **bucket}, "inserted": new}}

    def _on_RunResumeStatus(self, given: Any) -> Any:
        run = self.runs.get(given["name"])
        bucket = None
        if run is not None:
            history, events = run.streams["wandb-history.jsonl"], run.streams["wandb-events.jsonl"]
            bucket = {
                "id": f"run:{run.name}",
                "name": run.name,
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.name,
                "logLineCount": len(run.streams["output.log"]),
                "historyLineCount": len(history),
                "eventsLineCount": len(events),
                "historyTail": json.dumps([history[max(history)]] if history else []),
                "eventsTail": json.dumps([events[max(events)]] if events else []),
                "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
                "tags": [],
                "notes": "",
                "wandbConfig": json.dumps({"t": {}}),
            }
        return {
            "model": {"id": "p1", "name": given["project"], "entity": {"id": "e1", "name": ENTITY}, "bucket": bucket}
        }

    def _on_Run(self, given: Any) -> Any:
        """As `wandb.Api` asks; it wants every field that it names."""
        run = self.runs.get(given["name"])
        if run is None:
            return {"project": {"run": None}}
        empty = ("commit", "description", "notes", "systemMetrics", "historyKeys", "heartbeatAt")
        config = json.dumps({key: {"value": value} for key, value in run.config.items()})
        about = {"id": f"run:{run.name}", "projectId": "1", "name": run.name, "displayName": run.name, "tags": []}
        about |= {"sweepName": run.given.get("sweep"), "group": run.group, "jobType": run.job_type, "readOnly": False}
        about |= {"state": "finished", "createdAt": LONG_AGO, "user": {"name": ENTITY, "username": ENTITY}}
        about |= {"historyLineCount": len(run.history), "config": config, "summaryMetrics": json.dumps(run.summary)}
        return {"project": {"run": {**dict.fromkeys(empty), **about}}}

    def stream(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        """Lines of a run's streams, each from an offset on."""
        with self.lock:
            known = self.runs[run]
            for name, chunk in (body.get("files") or {}).items():
                for number, line in enumerate(chunk["content"], start=chunk.get("offset") or 0):
                    known.streams[name][number] = line
            if body.get("complete"):
                known.exit_code = body.get("exitcode")
            return {"stopped": run in self.stop}

    def _on_CreateRunFiles(self, given: Any) -> Any:
        urls = [{"name": f, "uploadUrl": f"{self.url}/files-of/{given['run']}/{f}"} for f in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": urls}}

    def _on_NotifyScriptableRunAlert(self, given: Any) -> Any:
        self.alerts.append(given)
        return {"notifyScriptableRunAlert": {"success": True}}

    # Sweeps

    def _on_UpsertSweep(self, given: Any) -> Any:
        name = given.get("id") or f"sweep{len(self.sweeps) + 1}"
        if given.get("config"):
            self.sweeps[name] = Sweep(name=name, project=given["projectName"], text=given["config"])
        project = {"id": "p1", "name": self.sweeps[name].project, "entity": {"id": "e1", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}

    def _on_SweepWithRuns(self, given: Any) -> Any:
        sweep = self.sweeps[given["sweep"]]
        about = {"id": sweep.name, "name": sweep.name, "state": "RUNNING", "config": sweep.text}
        return {"project": {"sweep": {**about, "runs": {"edges": []}}}}

    def _on_CreateAgent(self, given: Any) -> Any:
        return {"createAgent": {"agent": {"id": given["sweep"]}}}

    def _on_Heartbeat(self, given: Any) -> Any:
        """One trial at a time, until `run_cap`; a trial in `stop` is told to end."""
        sweep = self.sweeps[given["id"]]
        running = set(json.loads(given["runState"]))
        commands: list[dict[str, Any]] = [{"type": "stop", "run_id": run} for run in sorted(running & self.stop)]
        if not running:
            number = len(sweep.trials)
            if number >= sweep.config.get("run_cap", 1):
                commands = [{"type": "exit"}]
            else:
                trial, proposed = f"{sweep.name}-{number}", _propose(sweep.config["parameters"], number)
                sweep.trials[trial] = proposed
                args = {key: {"value": value} for key, value in proposed.items()}
                program = sweep.config.get("program")
                commands = [{"type": "run", "run_id": trial, "program": program, "args": args}]
        return {"agentHeartbeat": {"agent": {"id": sweep.name}, "commands": json.dumps(commands)}}


def _propose(parameters: dict[str, Any], number: int) -> dict[str, Any]:
    """The n-th of the listed values, or a place in a range that moves up with n."""
    proposed = {}
    for key, spec in parameters.items():
        if "values" in spec or "value" in spec:
            choices = spec.get("values", [spec.get("value")])
            proposed[key] = choices[number % len(choices)]
        else:
            proposed[key] = spec["min"] + (spec["max"] - spec["min"]) * (number + 1) / (number + 2)
            if spec.get("distribution") == "int_uniform":
                proposed[key] = int(proposed[key])
    return proposed


class _Handler(QuietHandler):
    server: _Server

    def do_GET(self) -> None:
        blob = self.server.stub.blobs.get(unquote(self.path).removeprefix("/blobs/"))
        self.answer(404 if blob is None else 200, blob or b"")

    def do_PUT(self) -> None:
        path, stub = unquote(self.path), self.server.stub
        if path.startswith("/files-of/"):
            _, _, run, name = path.split("/", 3)
            stub.runs[run].files[name] = self.body()
        else:
            stub.blobs[path.removeprefix("/blobs/")] = self.body()
        self.answer(200)

    def do_POST(self) -> None:
        body = json.loads(self.body() or b"{}")
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            content = self.server.stub.stream(match[1], body)
        else:
            content = self.server.stub.answer(body["query"], body.get("variables") or {})
        self.answer(200, json.dumps(content).encode())


class _Server(LocalServer):
    def __init__(self, stub: WandbStub) -> None:
        super().__init__(_Handler)
        self.stub = stub


@contextmanager
def running_stub() -> Iterator[WandbStub]:
    """A server on a free port of this machine."""
    stub = WandbStub()
    with _Server(stub) as server:
        stub.url = server.url
        yield stub
