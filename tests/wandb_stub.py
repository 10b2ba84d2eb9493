"""A stand-in for W&B's server on this machine, enough for the real client to run online.

It takes runs, history, files, artifacts and alerts, answers the questions behind resume and `use_artifact`, and runs
sweeps: `wandb sweep`, `wandb agent`. It proves what the client sends, not what the cloud accepts. The protocol is
private to wandb: an operation that this file does not know is answered with an error and noted in `unknown`, and tests
assert that there is none, so a new wandb that speaks differently is noticed.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.wandb_stub_state import Artifact, Run, Sweep

ENTITY = "tester"
_LONG_AGO = "2026-01-01T00:00:00Z"


class WandbStub:
    """The server's memory, and its answers to the client's operations: one method each."""

    def __init__(self) -> None:
        self.url = ""
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.blobs: dict[str, bytes] = {}
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

    def artifact(self, name: str) -> Artifact | None:
        """By NAME:ALIAS or NAME:vN; uncommitted ones are nobody's to see."""
        collection, _, alias = name.partition(":")
        found = [a for a in self.artifacts.values() if a.name == collection and a.version is not None]
        return next((a for a in found if alias in {*a.aliases, f"v{a.version}"}), None)

    def content(self, artifact: Artifact) -> dict[str, bytes]:
        """Path -> content of the files of an artifact that were uploaded."""
        return {path: self.blobs[key] for path, key in artifact.paths.items() if key in self.blobs}

    def table(self, row: dict[str, Any], key: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        """A logged table as {"columns", "data"}, and the files that its media cells name."""
        # latest: entries may be addressed by the client's id of an artifact, or the server's.
        owner, _, path = row[key]["artifact_path"].partition("://")[2].partition("/")
        artifact = next(a for a in self.artifacts.values() if owner in (a.client_id, a.id, _hex(a.id)))
        files = self.content(artifact)
        return json.loads(files[path]), files

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
        about |= {"state": "finished", "createdAt": _LONG_AGO, "user": {"name": ENTITY, "username": ENTITY}}
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

    # Artifacts

    def _on_CreateArtifact(self, variables: Any) -> Any:
        given = variables["input"]
        name = (given.get("artifactCollectionNames") or [given.get("artifactCollectionName")])[0]
        artifact = Artifact(
            id=_identifier("Artifact", len(self.artifacts) + 1),
            name=name,
            kind=given["artifactTypeName"],
            project=given["projectName"],
            run=given.get("runName") or "",
            client_id=given.get("clientID") or "",
            sequence_id=given.get("sequenceClientID") or "",
            digest=given["digest"],
            metadata=json.loads(given.get("metadata") or "{}"),
            aliases={alias["alias"] for alias in given.get("aliases") or []},
        )
        latest = next((a for a in reversed(self.artifacts.values()) if a.name == name and a.version is not None), None)
        self.artifacts[artifact.id] = artifact
        sequence = {"latestArtifact": {"id": latest.id} if latest else None}
        return {"createArtifact": {"artifact": {"id": artifact.id, "state": "PENDING", "artifactSequence": sequence}}}

    def _on_CreateArtifactManifest(self, given: Any) -> Any:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(given["artifactID"], given["name"])}}

    def _on_UpdateArtifactManifest(self, given: Any) -> Any:
        artifact, _, name = given["artifactManifestID"].partition("/")
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(artifact, name)}}

    def _manifest(self, artifact: str, name: str) -> Any:
        key = f"{artifact}/{name}"
        if artifact in self.artifacts and name == "wandb_manifest.json":
            self.artifacts[artifact].manifest_file = key
        return {"id": key, "file": {"id": key, "uploadUrl": f"{self.url}/blobs/{key}", "uploadHeaders": []}}

    def _on_CreateArtifactFiles(self, variables: Any) -> Any:
        nodes = []
        for spec in variables["input"]["artifactFiles"]:
            artifact = self.artifacts[spec["artifactID"]]
            key = f"{artifact.id}/files/{spec['name']}"
            artifact.paths[spec["name"]] = key
            node = {"storagePath": key, "uploadUrl": f"{self.url}/blobs/{key}", "uploadHeaders": []}
            nodes.append({"node": {**node, "uploadMultipartUrls": None, "artifact": {"id": artifact.id}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _on_ArtifactType(self, given: Any) -> Any:
        artifact = self.artifact(given["name"])
        return {"project": {"artifact": {"artifactType": {"name": artifact.kind}} if artifact else None}}

    def _on_CommitArtifact(self, given: Any) -> Any:
        artifact = self.artifacts[given["artifactID"]]
        versions = [a for a in self.artifacts.values() if a.name == artifact.name and a.version is not None]
        for other in versions:
            other.aliases -= {*artifact.aliases, "latest"}
        artifact.aliases.add("latest")
        artifact.version = len(versions)
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _on_ClientIDMapping(self, given: Any) -> Any:
        found = next((a for a in self.artifacts.values() if a.client_id == given["clientID"]), None)
        return {"clientIDMapping": {"serverID": found.id} if found else None}

    def _on_ArtifactMembershipByName(self, given: Any) -> Any:
        artifact = self.artifact(given["name"])
        membership = None
        if artifact is not None:
            place = _place(artifact)
            aliases = [{"__typename": "ArtifactAlias", "id": f"a-{a}", "alias": a} for a in sorted(artifact.aliases)]
            membership = {
                "__typename": "ArtifactCollectionMembership",
                "id": f"m-{artifact.id}",
                "versionIndex": artifact.version,
                "createdAt": _LONG_AGO,
                "aliases": aliases,
                "artifactCollection": {"__typename": "ArtifactSequence", **place},
                "artifact": _described(artifact),
            }
        return {"project": {"artifactCollectionMembership": membership}}

    def _on_ArtifactByID(self, given: Any) -> Any:
        return {"artifact": {**_described(self.artifacts[given["id"]]), "aliases": []}}

    def _on_UseArtifact(self, given: Any) -> Any:
        given = given.get("input", given)
        self.runs[given["runName"]].used.append(given["artifactID"])
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    def _on_FetchArtifactManifest(self, given: Any) -> Any:
        url = f"{self.url}/blobs/{self.artifacts[given['id']].manifest_file}"
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    _on_ArtifactManifest = _on_FetchArtifactManifest

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


def _place(artifact: Artifact) -> dict[str, Any]:
    project = {"id": "p1", "internalId": "p1", "name": artifact.project, "entity": {"name": ENTITY}}
    return {"name": artifact.name, "project": project}


def _described(artifact: Artifact) -> dict[str, Any]:
    return {
        "__typename": "Artifact",
        "id": artifact.id,
        "artifactSequence": {"__typename": "ArtifactSequence", **_place(artifact)},
        "versionIndex": artifact.version,
        "artifactType": {"name": artifact.kind},
        "description": None,
        "metadata": json.dumps(artifact.metadata),
        "ttlDurationSeconds": -2,
        "ttlIsInherited": True,
        "tags": [],
        "historyStep": None,
        "state": "COMMITTED",
        "size": 0,
        "digest": artifact.digest,
        "commitHash": None,
        "fileCount": len(artifact.paths),
        "createdAt": _LONG_AGO,
        "updatedAt": None,
    }


def _identifier(kind: str, number: int) -> str:
    """W&B's ids are base64 of KIND:NUMBER, and the client looks inside."""
    return base64.b64encode(f"{kind}:{number}".encode()).decode()


def _hex(identifier: str) -> str:
    return base64.b64decode(identifier).hex()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: WandbStub

    def do_GET(self) -> None:
        blob = self.stub.blobs.get(unquote(self.path).removeprefix("/blobs/"))
        self._reply(b"" if blob is None else blob, code=404 if blob is None else 200)

    def do_PUT(self) -> None:
        path, body = unquote(self.path), self._body()
        if path.startswith("/files-of/"):
            _, _, run, name = path.split("/", 3)
            self.stub.runs[run].files[name] = body
        else:
            self.stub.blobs[path.removeprefix("/blobs/")] = body
        self._reply(b"")

    def do_POST(self) -> None:
        body = json.loads(self._body() or b"{}")
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            content = self.stub.stream(match[1], body)
        else:
            content = self.stub.answer(body["query"], body.get("variables") or {})
        self._reply(json.dumps(content).encode())

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reply(self, body: bytes, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests look at the state."""


@contextmanager
def running_stub() -> Iterator[WandbStub]:
    """A server on a free port of this machine."""
    stub = WandbStub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
