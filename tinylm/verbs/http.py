"""The verb that serves finished runs over HTTP."""

import re
import socket
from pathlib import Path

from tyro.conf import Positional

from tinylm.config import BadInput, require
from tinylm.look import progress
from tinylm.train import checkpoint
from tinylm.verbs import folders, models


def serve(runs: Positional[tuple[Path, ...]], host: str = "127.0.0.1", port: int = 8000,
          names: tuple[str, ...] = (), rankings: Path | None = None,
          text: Path | None = None) -> None:
    """Serve finished runs: a page to look into them and talk, and an OpenAI-compatible endpoint.

    Args:
        runs: folders of runs; each answers by its folder's name
        host: address to listen on; loopback only unless another is given
        port: of the server; 0: a free one
        names: further host names that the server answers to
        rankings: .jsonl file to which a person's rankings are appended, for tinylm reward --data
        text: the prepared folder of the runs, where it has moved
    """
    require("port", port, 0, 65535)
    if rankings and rankings.exists() and not rankings.is_file():
        raise BadInput(f"--rankings {rankings} is no file; name a .jsonl file to append to")
    try:
        from tinylm.serve.app import application, server
        from tinylm.serve.engine import Engine
    except ImportError as missing:
        raise BadInput(f"{missing.name} is not installed; pip install 'tinylm[serve]'") from None
    served = _opened(runs, text)
    with _listening(host, port) as bound, Engine(served) as engine:
        app = application(engine, {host, *names}, rankings)
        engine.warm()
        at = bound.getsockname()[1]
        print(f"http://{'[' + host + ']' if ':' in host else host}:{at}/ and /v1: "
              + ", ".join(served), flush=True)
        engine.prepare()
        server(app).run(sockets=[bound])


def _opened(runs: tuple[Path, ...], text: Path | None) -> dict:
    from tinylm.serve.engine import Model

    if not runs:
        raise BadInput("no run is named; give the folder of one or more finished runs")
    found: dict[str, Model] = {}
    for folder in runs:
        config, data, learnt = models.opened(folder, text)
        if config.kind != "transformer":
            raise BadInput(f"{folder} is a {config.kind} model and keeps no cache to answer with; "
                           "give a transformer")
        name = re.sub(r"[^\w.-]", "-", folder.resolve().name)
        if name in found:
            name = f"{name}-{folders.finished(folder)['id'][:6]}"
        tuned = models.tuned(folder)
        found[name] = Model(name, folder, config, checkpoint.final_params(folder, config), learnt,
                            tuned, data.folder)
        progress.say(f"{name}: {folder}, {'tuned' if tuned else 'base'}, context {config.T}")
    return found


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=512, reuse_port=False, family=(
            socket.AF_INET6 if ":" in host else socket.AF_INET))
    except OSError as fault:
        raise BadInput(f"--host {host} --port {port} cannot be listened on ({fault.strerror}); "
                       "choose another port, or 0 for a free one") from None
