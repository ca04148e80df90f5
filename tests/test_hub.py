"""The Hugging Face Hub: what is pushed is loaded by name, with its card, from a server and then from the cache without one."""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from conftest import ROOT, small_settings
from test_pipeline import make_pipe

import jitjax
from jitjax import cli, hub
from jitjax.errors import UserError
from jitjax.train import train

NAME = "hf://me/shapes"


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub as a commit and a download need. `repos`: {"owner/name": {revision: {path: bytes}}}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.large, self.commits, self.tokens = {}, {}, [], set()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def files(self, repo, revision):
        if repo not in self.server.repos:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif revision not in (known := self.server.repos[repo]) and revision not in map(commit_of, known.values()):
            self.answer({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        else:
            return known[revision] if revision in known else next(f for f in known.values() if commit_of(f) == revision)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/(\w+/\w+)/(revision|tree)/(\w+)", path):
            files = self.files(match[1], match[3])
            if files is None:
                return
            if match[2] == "tree":
                self.answer([{"type": "file", "path": p, "size": len(c), "oid": oid(c)} for p, c in files.items()])
            else:
                siblings = [{"rfilename": name} for name in files]
                self.answer({"id": match[1], "sha": commit_of(files), "siblings": siblings, "tags": [], "downloads": 0})
        elif match := re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", path):
            files = self.files(match[1], match[2])
            if files is None:
                return
            if match[3] not in files:
                self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit_of(files))
            else:
                content = files[match[3]]
                self.answer(content, ETag=f'"{oid(content)}"', X_Repo_Commit=commit_of(files))
        else:
            self.answer({}, 404)

    do_HEAD = do_GET

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self.body()
        self.answer()

    def do_POST(self):
        path, body, repos = self.path, self.body(), self.server.repos
        self.server.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            repo = "/".join([json.loads(body)["organization"], json.loads(body)["name"]])
            if repo in repos:
                self.answer({"error": "exists", "url": f"{self.server.address}/{repo}"}, 409)
            else:
                repos[repo] = {"main": {}}
                self.answer({"url": f"{self.server.address}/{repo}", "id": repo, "name": repo})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)/branch/(\w+)", path):
            repos[match[1]].setdefault(match[2], dict(repos[match[1]]["main"]))
            self.answer({})
        elif re.fullmatch(r"/api/models/\w+/\w+/preupload/\w+", path):
            modes = {True: "lfs", False: "regular"}
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": modes[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
            self.answer({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}}} for o in objects]
            self.answer({"transfer": "basic", "objects": upload}, Content_Type="application/vnd.git-lfs+json")
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)/commit/(\w+)", path):
            files = dict(repos[match[1]][match[2]])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.server.commits.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                else:
                    files[value["path"]] = self.server.large[value["oid"]]
            repos[match[1]][match[2]] = files
            url = f"{self.server.address}/{match[1]}/commit/{commit_of(files)}"
            self.answer({"success": True, "commitOid": commit_of(files), "commitUrl": url, "hookOutput": ""})
        else:
            self.answer({}, 404)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))


def oid(content):
    return hashlib.sha1(content).hexdigest()


def commit_of(files):
    return oid(json.dumps({name: oid(content) for name, content in files.items()}).encode())


@pytest.fixture
def server():
    pytest.importorskip("huggingface_hub", reason="needs the huggingface_hub package")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def python(server, tmp_path):
    """Runs a script in a process of its own, since huggingface_hub reads its settings when it is imported."""

    def run(script, **env):
        own = {
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_secret",
        }
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", textwrap.dedent(script)]
        return subprocess.run(command, env=os.environ | own | env, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    return run


def test_a_run_is_pushed_and_loaded_by_name_with_and_without_the_server(server, python, tmp_path):
    workdir = tmp_path / "run"
    assert train(small_settings(total_steps=4, preview__every_steps=4, preview__cfg_scale=2.0), workdir) == 0
    pushed = python(f"from jitjax import cli; cli.main(['convert', '--from', {str(workdir)!r}, '--to', {NAME!r}])")
    assert pushed.stdout == f"{workdir} -> {server.address}/me/shapes: model, 0.9, 0.5\n", pushed.stderr
    assert server.commits == ["Weights of step 4"] and server.tokens >= {"Bearer hf_secret"}
    files = server.repos["me/shapes"]["main"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert files["samples.png"] == (workdir / "samples/step_00000004.png").read_bytes()
    # The card: a header that the hub's own package reads, the run's facts, and code that runs as it stands.
    card = files["README.md"].decode()
    import huggingface_hub

    header = huggingface_hub.ModelCard(card).data
    assert header.library_name == "jitjax" and header.pipeline_tag == "unconditional-image-generation"
    assert "class-conditional" in header.tags
    for fact in (
        "trained for | 4 steps, 64 images",
        "predicts | x, noise scale 1",
        "512 images",
        "EMA 0.9, EMA 0.5",
        "step 4](samples",
    ):
        assert fact in card
    assert str(tmp_path) not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert f'jitjax.load("{NAME}")' in code
    want = jitjax.load(workdir).sample([0, 1], seed=0, steps=2, cfg_scale=2.0, interval=(0.1, 1.0))
    for offline in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):  # then from the cache
        ran = python(code + "import numpy; numpy.save('images.npy', images); print(pipe.which)", **offline)
        assert ran.stdout == "0.9\n", ran.stderr
        np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), want)
        (tmp_path / "images.npy").unlink()


@pytest.mark.slow
def test_a_card_that_was_edited_stays_and_branches_and_folders_have_names(server, python, tmp_path):
    make_pipe().save(tmp_path / "one", samples=4)
    assert "Drawn from EMA 0.9999: heun, 50 steps" in (tmp_path / "one/README.md").read_text()
    weights, edited = (tmp_path / "one/model.safetensors").read_bytes(), b"---\nlicense: mit\n---\nmine"
    server.repos["me/shapes"] = {"main": {"README.md": edited, "sub/model.safetensors": weights, "x.pth": b"", "y.txt": b""}}
    server.repos["me/shapes"]["main"]["sub/config.json"] = (tmp_path / "one/config.json").read_bytes()
    ran = python(
        f"""
        import jitjax
        print(jitjax.load("{NAME}/sub").class_names[1])
        pipe = jitjax.load("{NAME}@main/sub/model.safetensors")
        print(pipe.push("{NAME}"))
        print(pipe.push("{NAME}@next", message="a second try"))
        print(jitjax.load("{NAME}@next").diffusion.noise_scale)
        for name in ("{NAME}/y.txt", "{NAME}@nosuch", "hf://me/nosuch", "hf://me", "{NAME}/x.pth"):
            try:
                jitjax.load(name)
            except jitjax.errors.UserError as error:
                print("error:", error)
        """
    )
    lines = ran.stdout.splitlines()
    assert lines[:3] == ["dog", f"{server.address}/me/shapes", f"{server.address}/me/shapes/tree/next"], ran.stderr
    assert lines[3] == "1.5" and server.commits == ["Weights", "a second try"]
    for files in server.repos["me/shapes"].values():
        assert files["README.md"] == edited and "samples.png" not in files and "model.safetensors" in files
    assert ran.stderr.count("README.md and samples.png of me/shapes stay as they are") == 2
    errors = lines[4:]
    assert len(errors) == 5 and all(line.startswith("error: hf://me") for line in errors[:4]), errors
    assert "x.pth: expected a zip archive" in errors[4]
    assert "FILE.pth" in errors[0] and "nosuch" in errors[1] and "404" in errors[2] and "hf://OWNER/NAME" in errors[3]


def test_without_a_network_or_the_package_one_line_says_so(python, monkeypatch, capsys):
    ran = python(
        f"from jitjax import cli; raise SystemExit(cli.main(['sample', {NAME!r}, '--out', 'a.png']))", HF_HUB_OFFLINE="1"
    )
    assert ran.returncode == 2 and ran.stderr.startswith(f"error: {NAME}: ") and ran.stderr.count("\n") == 1
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for argv in (["sample", NAME, "--out", "a.png"], ["evaluate", NAME, "--reference", str(ROOT)]):
        assert cli.main(argv) == 2
        assert "pip install -e '.[hub]'" in capsys.readouterr().err
    with pytest.raises(UserError, match="sub"):
        hub.push(ROOT, f"{NAME}/sub", private=None, message="")


def test_a_saved_card_is_not_written_over(tmp_path, caplog):
    pipe = make_pipe(names=())
    pipe.save(tmp_path / "a", samples=0)
    card = tmp_path / "a" / "README.md"
    assert "without classes" in card.read_text() and "samples.png" not in card.read_text()
    assert "num=2" in card.read_text() and not (tmp_path / "a/samples.png").exists()
    card.write_text("mine")
    pipe.save(tmp_path / "a")
    assert card.read_text() == "mine" and "stays as it is" in caplog.text
