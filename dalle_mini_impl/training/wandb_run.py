"""Weights & Biases: whether it can go online, the start of a run, the end of a failed one.

wandb itself asks for keys and waits for networks; here nothing waits longer than a second.
"""

import logging
import netrc
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

logger = logging.getLogger(__name__)

GLOBAL_STEP = "trainer/global_step"
CONNECT_SECONDS = 1.0
INIT_SECONDS = 30.0
FINISH_SECONDS = 300.0


def choose_mode() -> str:
    """Resolve `auto`, without ever waiting longer than `CONNECT_SECONDS`."""
    requested = os.environ.get("WANDB_MODE")
    if requested in ("online", "offline", "disabled"):
        return requested
    # wandb is slow to import, and without a run of it nobody should wait for that.
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if settings.mode in ("offline", "dryrun", "disabled"):  # `wandb offline` was called here
        return "disabled" if settings.mode == "disabled" else "offline"
    if not _has_credentials(settings):
        reason = "no API key (`wandb login` saves one)"
    elif not _is_reachable(settings.base_url):
        reason = f"no connection to {settings.base_url} within {CONNECT_SECONDS:g} s"
    else:
        return "online"
    logger.info("W&B: %s; recording offline, to be sent later by `wandb sync`", reason)
    return "offline"


def _has_credentials(settings: Any) -> bool:
    """Look for an API key where wandb does, without its prompt and its network calls."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if settings.api_key:
        return True
    default = "~/_netrc" if os.name == "nt" else "~/.netrc"
    try:
        entries = netrc.netrc(os.path.expanduser(os.environ.get("NETRC") or default))
    except (OSError, netrc.NetrcParseError):
        return False
    host = urlsplit(settings.base_url).netloc
    # The public service has several names; keys were saved under the oldest.
    hosts = [host, "api.wandb.ai"] if host.endswith((".wandb.ai", ".coreweave.com")) else [host]
    return any(entries.authenticators(name) for name in hosts)


def _is_reachable(base_url: str) -> bool:
    """Try to connect to the server, or to the proxy before it."""
    url = urlsplit(base_url)
    proxy = getproxies().get(url.scheme)
    if proxy and url.hostname and not proxy_bypass(url.hostname):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connected = threading.Event()

    def connect() -> None:
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            with socket.create_connection((url.hostname, port), CONNECT_SECONDS):
                connected.set()
        except (OSError, ValueError):  # no such host, no such port, no answer
            pass

    # In a thread, as the time-out of a socket does not cover the look-up of the host's name.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return connected.is_set()


def init_wandb(
    mode: str,
    folder: Path,
    run_config: Mapping[str, Any],
    *,
    project: str,
    entity: str | None,
    run_name: str | None,
    run_id: str | None,
) -> Any:
    """Start a W&B run, or continue the one of ``run_id``; its files go below ``folder``."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))  # for the lines that are not about one run
    settings = wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS)
    if hasattr(settings, "finish_timeout"):  # older wandb waits for uploads forever
        settings.finish_timeout = FINISH_SECONDS
    run = wandb.init(
        project=project,
        entity=entity,
        name=run_name,
        dir=str(folder),
        config=dict(run_config),
        mode="online" if mode == "online" else "offline",
        id=run_id,
        resume="allow" if run_id else None,
        reinit="create_new",  # leave a run that the caller's own code has open alone
        settings=settings,
    )
    # The x-axis is our step, which (unlike wandb's own) may go back on resume.
    run.define_metric(GLOBAL_STEP)
    run.define_metric("*", step_metric=GLOBAL_STEP)
    return run


def take_down_wandb(run: Any) -> None:
    """Finish a failed wandb now, so that its exit hook raises nothing."""
    import wandb

    for call in (run.finish, wandb.teardown):
        try:
            call()
        # It has failed once and is expected to again; teardown may even raise SystemExit.
        except (Exception, SystemExit) as error:
            logger.debug("W&B: %s", one_line(error))


def one_line(error: BaseException) -> str:
    """Write an error and its type as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
