"""Fusers that go to the hub and come back, through its own client and a server that answers as the hub does."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from test_training import learnable, small_mlp

import mmkit

TOKEN, COMMIT = "hf_right", "0123456789abcdef0123456789abcdef01234567"
CHECKPOINT = {"README.md", "config.json", "model.safetensors", "training.json"}


class Hub(ThreadingHTTPServer):
    """Repositories of models, each with one commit: what is pushed can be fetched, as far as `TOKEN` goes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256, as in git LFS
        self.unknown: list[str] = []


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def send(self, code: int, body: bytes | dict | list = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, text in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_request(self) -> None:
        hub, path = self.server, self.path.partition("?")[0].strip("/")
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path.startswith("large/"):  # a place of its own, which no token is sent to
            assert hashlib.sha256(content).hexdigest() == path.removeprefix("large/")
            hub.large[path.removeprefix("large/")] = content
            return self.send(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid username or password."})
        match self.command, path.split("/"):
            case "POST", ["api", "repos", "create"]:
                asked = json.loads(content)
                name = f"{asked['organization']}/{asked['name']}"
                hub.repositories.setdefault(name, {})
                self.send(200, {"url": f"{hub.address}/{name}"})
            case "POST", ["api", "validate-yaml"]:
                _, front, _ = json.loads(content)["content"].split("---\n", 2)
                found = isinstance(yaml.safe_load(front).get("license"), str)
                self.send(200 if found else 400, {"errors": [] if found else [{"message": "no license"}]})
            case "POST", ["api", "models", *_, "preupload", "main"]:
                paths = [file["path"] for file in json.loads(content)["files"]]
                modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
                files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
                self.send(200, {"files": files})
            case "POST", [*_, "info", "lfs", "objects", "batch"]:
                objects = json.loads(content)["objects"]
                for one in objects:
                    one["actions"] = {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}
                self.send(200, {"transfer": "basic", "objects": objects})
            case "POST", ["api", "models", owner, name, "commit", "main"]:
                files = hub.repositories[f"{owner}/{name}"]
                for line in map(json.loads, content.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = hub.large[value["oid"]]
                self.send(200, {"commitUrl": f"{hub.address}/{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
            case "GET", ["api", "models", owner, name, "revision", _] if f"{owner}/{name}" in hub.repositories:
                files = [{"rfilename": path} for path in hub.repositories[f"{owner}/{name}"]]
                self.send(200, {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": files})
            case "GET", ["api", "models", owner, name, "tree", _]:
                files = hub.repositories[f"{owner}/{name}"]
                sizes = {
                    path: {"size": len(body), "oid": hashlib.sha1(body).hexdigest()} for path, body in files.items()
                }
                self.send(200, [{"type": "file", "path": path} | size for path, size in sizes.items()])
            case "GET" | "HEAD", [owner, name, "resolve", _, file] if file in hub.repositories.get(
                f"{owner}/{name}", {}
            ):
                body = hub.repositories[f"{owner}/{name}"][file]
                tag = f'"{hashlib.sha256(body).hexdigest()}"'
                self.send(200, body, ETag=tag, X_Repo_Commit=COMMIT)
            case _:
                hub.unknown.append(f"{self.command} {self.path}")
                self.send(404, {"error": "Not found"}, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request


# --- what the processes do -----------------------------------------------------------------------


def push(folder: Path) -> None:
    """A fuser by itself, and a whole checkpoint; a wrong token; what a fresh process has to find."""
    fuser, features = small_mlp(), learnable(10, 0)
    fuser.observe(features)
    history, profile = mmkit.History([{"validation_loss": 2.5}]), mmkit.profile("mini")
    by = mmkit.training_recipe("mlp", profile, {})
    mmkit.save_checkpoint(folder / "run", fuser.eval(), by, {"random": 0.25}, history, features)
    fuser.push_to_hub("me/mlp")
    HfApi().create_repo("me/run")
    HfApi().upload_folder(repo_id="me/run", folder_path=folder / "run")
    try:
        fuser.push_to_hub("me/none", token="hf_wrong")
    except HfHubHTTPError as error:
        print(error)
    with torch.inference_mode():
        torch.save(fuser.score(features.images(), features.captions()), folder / "scores.pt")


def pull(folder: Path) -> None:
    features, expected = learnable(10, 0), torch.load(folder / "scores.pt")
    checkpoint = Path(snapshot_download("me/run"))
    restored, training = mmkit.load_checkpoint(checkpoint)
    assert training["thresholds"] == {"random": 0.25} and {path.name for path in checkpoint.iterdir()} == CHECKPOINT
    for fuser in (mmkit.MultimodalFeatureFuser.from_pretrained("me/mlp"), restored):
        with torch.inference_mode():
            scores = fuser.score(features.images(), features.captions())
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    ModelCard.load("me/run").save(folder / "fetched.md")


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("hub")
    return folder, in_a_process("push", folder, hub)


def in_a_process(step: str, folder: Path, hub: Hub) -> str:
    """What a step prints; the client reads the hub's address and the cache's when it is imported."""
    home = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / step), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    command = [sys.executable, __file__, step, str(folder)]
    done = subprocess.run(command, env=own | home | quiet, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fuser_comes_back_by_the_name_of_its_repository(hub, pushed):
    folder, _ = pushed
    in_a_process("pull", folder, hub)
    assert {*hub.repositories} == {"me/mlp", "me/run"} and len(hub.large) == 1
    assert {*hub.repositories["me/mlp"]} == {"README.md", "config.json", "model.safetensors"}
    assert not hub.unknown
    assert (folder / "fetched.md").read_bytes() == (folder / "run" / "README.md").read_bytes()


def test_a_checkpoint_arrives_whole_and_byte_by_byte(hub, pushed):
    folder, _ = pushed
    files = {name: (folder / "run" / name).read_bytes() for name in CHECKPOINT}
    assert {name: hub.repositories["me/run"].get(name) for name in CHECKPOINT} == files


def test_a_wrong_token_is_one_clear_error(hub, pushed):
    _, said = pushed
    assert "401" in said and "Invalid username or password" in said and "me/none" not in hub.repositories


if __name__ == "__main__":
    {"push": push, "pull": pull}[sys.argv[1]](Path(sys.argv[2]))
