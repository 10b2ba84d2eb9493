"""The artifacts of the stand-in for W&B's server: what is uploaded, committed, named as an input, and read again."""

from __future__ import annotations

import base64
import json
from typing import Any

from tests.wandb_stub_state import Artifact, Run

ENTITY = "tester"
LONG_AGO = "2026-01-01T00:00:00Z"


class ArtifactStore:
    """Artifacts and the blobs behind them, and the answers to the client's operations on them: one method each.

    Attributes:
        url: Of the server.
        runs: Which make and use artifacts.
        artifacts: By the server's id, in the order in which they came.
        blobs: Key -> content of what was uploaded.
    """

    def __init__(self) -> None:
        self.url = ""
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.blobs: dict[str, bytes] = {}

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
                "createdAt": LONG_AGO,
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
        "createdAt": LONG_AGO,
        "updatedAt": None,
    }


def _identifier(kind: str, number: int) -> str:
    """W&B's ids are base64 of KIND:NUMBER, and the client looks inside."""
    return base64.b64encode(f"{kind}:{number}".encode()).decode()


def _hex(identifier: str) -> str:
    return base64.b64decode(identifier).hex()
