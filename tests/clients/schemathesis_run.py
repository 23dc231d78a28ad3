"""schemathesis against our own /openapi.json, with all its checks, over a small engine without a model or a service.

Run by hand, with schemathesis 4 in an environment of its own:
`python tests/clients/schemathesis_run.py PATH/TO/schemathesis [--url http://127.0.0.1:8000] [its own options]`.
Its exit status is schemathesis's. Requests that the schema allows and a model, template or grammar cannot do are 400 by
design (the schema says so): `positive_data_acceptance` takes that too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", 400, 401, 404, 409, 413, 429, 503]
"""


KEY = "sesame"


def main() -> int:
    """Serve, unless there is a URL, and run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemathesis")
    parser.add_argument("--url")
    parser.add_argument("--examples", default="50")
    args, rest = parser.parse_known_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        url = args.url or serve(folder / "files")
        (folder / "schemathesis.toml").write_text(CONFIG)
        schema = folder / "openapi.json"
        schema.write_text(json.dumps(named(httpx.get(f"{url}/openapi.json").json(), url)))
        command = [str(Path(args.schemathesis).absolute()), "--config-file", "schemathesis.toml", "run", schema.name]
        command += f"--url {url} --checks all --max-examples {args.examples} --seed 1 --continue-on-failure".split()
        command += ["-H", f"Authorization: Bearer {KEY}"]
        return subprocess.run([*command, *rest], cwd=folder, check=False).returncode


def named(schema: Any, url: str) -> Any:
    """The schema with the one name of a model that is served, and a file of lines: it says text and bytes, and hardly
    any would be accepted."""
    [model] = httpx.get(f"{url}/v1/models", headers={"x-api-key": KEY}).json()["data"]
    for form in schema["components"]["schemas"].values():
        if "model" in form.get("properties", {}) and form["description"].startswith("Body of"):
            names = [model["id"]] if "model" in form.get("required", ()) else [model["id"], None]
            form["properties"]["model"] = {"enum": names}
    body = {"model": model["id"], "prompt": "hello", "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    schema["components"]["schemas"]["UploadForm"]["properties"]["file"]["enum"] = [json.dumps(line)]
    options = schema["components"]["schemas"]["BuddyOptions"]["properties"]
    options.pop("timeout", None)  # a deadline that its caller sets is a 504 by design where it is too short
    return schema


def serve(files: Path) -> str:
    """The routes over an engine that makes letters, in a thread of this process."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import uvicorn
    from fakes import FakeEngine, LocalWorkers

    from buddymoe_ray.serve.http import HttpSettings, http_app
    from buddymoe_ray.serve.worker import Worker
    from buddymoe_ray.types import GenerationRequest

    class Letters(FakeEngine):
        """Without the fake's troubles: bytes that fail or kill it."""

        def _trouble(self, request: GenerationRequest, position: int) -> None:
            pass

    settings = HttpSettings(model="builtin:tiny", files_folder=files, dashboard_seconds=0.01, api_key=KEY)
    app = http_app(LocalWorkers(Worker(Letters(model_id="builtin:tiny"))), settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    return f"http://127.0.0.1:{port}"


if __name__ == "__main__":
    sys.exit(main())
