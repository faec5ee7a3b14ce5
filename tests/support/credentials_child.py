"""A process with credentials of its own, a server of tokens and a guarded bucket: plays situations, prints what came.

    python tests/support/credentials_child.py EMULATOR_URL FOLDER

One line of JSON for each situation: `{"row": NAME, ...}`. google-auth takes the metadata server's name when it is
imported, so this cannot be done in the process of the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.environ import environ
from tests.support.token_server import Tokens, service_account

BUCKET = "guarded-bucket"
EMULATOR, FOLDER = sys.argv[1], Path(sys.argv[2])
TOKENS = Tokens(FOLDER)
for name in ("STORAGE_EMULATOR_HOST", "NO_GCE_CHECK", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
    os.environ.pop(name, None)
os.environ.update(
    # Nothing may leave this machine, nor find its own credentials.
    **{
        "https_proxy": "http://127.0.0.1:1",
        "no_proxy": "127.0.0.1",
        "CLOUDSDK_CONFIG": str(FOLDER),
        "HOME": str(FOLDER),
    },
    **{"GCE_METADATA_HOST": TOKENS.host, "GCE_METADATA_ROOT": TOKENS.host, "GCE_METADATA_IP": TOKENS.host},
    **{"TENSORSTORE_GCS_HTTP_URL": EMULATOR, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},
)

import urllib.request  # noqa: E402

from absl import logging  # noqa: E402
from fsspec import config  # noqa: E402

from orchestrator.observe.events import CredentialsRejected, Retried, subscribe  # noqa: E402
from orchestrator.storage.gcs import GcsStorage  # noqa: E402
from orchestrator.storage.gcs_http import Budget, Client  # noqa: E402

config.conf["gcs"] = config.conf["gs"] = {"endpoint_url": EMULATOR}
RETRIED: list[Retried] = []
subscribe(lambda event: RETRIED.append(event) if isinstance(event, Retried) else None)
REJECTED: list[CredentialsRejected] = []
subscribe(lambda event: REJECTED.append(event) if isinstance(event, CredentialsRejected) else None)


def control(path: str, value: Any) -> None:
    request = urllib.request.Request(f"{EMULATOR}/_emulator/{path}", json.dumps(value).encode(), method="PUT")
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30).read()


def _key_files() -> dict[str, str]:
    """What each kind of credentials is called -> a file of it, all of which lead to the token server."""
    account = service_account(TOKENS.host)
    (FOLDER / "subject").write_text("a token of another provider")
    external = {
        **{"type": "external_account", "subject_token_type": "urn:ietf:params:oauth:token-type:jwt"},
        "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/x",
        **{"token_url": f"http://{TOKENS.host}/sts", "credential_source": {"file": str(FOLDER / "subject")}},
    }
    iam = "v1/projects/-/serviceAccounts/i@p.iam.gserviceaccount.com:generateAccessToken"
    files = {
        "service_account": account,
        "broken_key": {**account, "private_key": "no key"},
        "external": external,
        "external_impersonating": {**external, "service_account_impersonation_url": f"http://{TOKENS.host}/{iam}"},
        "impersonated": {
            **{"type": "impersonated_service_account", "source_credentials": account, "delegates": []},
            "service_account_impersonation_url": f"https://iamcredentials.googleapis.com/{iam}",
        },
        "list": [],
        "unknown_type": {"type": "of_tomorrow"},
    }
    for name, content in files.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(content))
    (FOLDER / "garbage.json").write_text("hello")
    return {name: str(FOLDER / f"{name}.json") for name in (*files, "garbage", "missing")}


KEYS = _key_files()
ROWS: dict[str, Callable[[], dict[str, Any]]] = {}


def row(call: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    ROWS[call.__name__] = call
    return call


def _key_of(name: str) -> dict[str, str]:
    return {"GOOGLE_APPLICATION_CREDENTIALS": KEYS[name]} if name else {}


def store(deadline_s: float = 10.0) -> GcsStorage:
    """A run that nobody else has, by a client that has no token yet."""
    return GcsStorage(f"gs://{BUCKET}/{time.time_ns()}/run", Client(deadline_s, Budget(1000), first_wait_s=0.05))


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    RETRIED.clear()
    REJECTED.clear()
    asked, started = TOKENS.asked, time.monotonic()
    told: dict[str, Any] = {}
    try:
        told["value"] = repr(call())
    except Exception as error:
        told |= {"kinds": [kind.__name__ for kind in type(error).__mro__], "text": str(error)}
    told["seconds"] = time.monotonic() - started
    told["asked"] = TOKENS.asked - asked
    told["rejected"] = len(REJECTED)
    told["retried"] = [f"{event.operation} {event.reason}" for event in RETRIED]
    return told


def later(seconds: float, mode: str) -> None:
    def change() -> None:
        TOKENS.mode = mode

    timer = threading.Timer(seconds, change)
    timer.daemon = True
    timer.start()


@row
def metadata_server() -> dict[str, Any]:
    made = store()
    return outcome(lambda: (made.create("a", b"1"), made.get("a")))


@row
def late_start() -> dict[str, Any]:
    TOKENS.mode = "reset"
    later(1.5, "ok")
    made = store()
    return outcome(lambda: (made.create("a", b"1"), made.get("a")))


@row
def never_starts() -> dict[str, Any]:
    TOKENS.mode = "reset"
    made = store(1.5)
    return outcome(lambda: made.get("a"))


@row
def hangs() -> dict[str, Any]:
    TOKENS.mode = "hang"
    made = store(1.5)
    with ThreadPoolExecutor(8) as pool:  # nobody waits in line behind another
        return outcome(lambda: list(pool.map(lambda _: outcome(lambda: made.get("a"))["kinds"][0], range(8))))


@row
def unavailable_for_a_while() -> dict[str, Any]:
    TOKENS.expires = 11.0  # 10 s before its end it is not used any more
    made = store()
    made.create("a", b"1")
    time.sleep(1.2)
    TOKENS.mode = "503"
    later(1.5, "ok")
    return outcome(lambda: made.get("a"))


@row
def forbidden_by_the_metadata_server() -> dict[str, Any]:
    TOKENS.mode = "403"
    made = store()
    return outcome(lambda: made.get("a"))


def with_key(name: str, deadline_s: float = 10.0) -> dict[str, Any]:
    with environ({"GOOGLE_APPLICATION_CREDENTIALS": KEYS[name]}):
        made = store(deadline_s)
        return outcome(lambda: (made.create("a", b"1"), made.get("a")))


@row
def impersonating() -> dict[str, Any]:
    names = "subjectAltName=DNS:iamcredentials.googleapis.com"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=x",
        "-addext",
        names,
    ]
    made = [*command, "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(made, cwd=FOLDER, check=True, capture_output=True, timeout=60)
    with environ({"https_proxy": TOKENS.proxy, "REQUESTS_CA_BUNDLE": str(FOLDER / "cert.pem")}):
        return with_key("impersonated")


@row
def revoked() -> dict[str, Any]:
    TOKENS.mode = "invalid_grant"
    return with_key("service_account")


for _name in ("service_account", "external", "external_impersonating", "broken_key", "list", "unknown_type", "garbage"):
    ROWS[_name] = lambda name=_name: with_key(name)  # type: ignore[misc]
ROWS["missing"] = lambda: with_key("missing")
ROWS["impersonated"] = lambda: with_key("impersonated", 1.5)


@row
def anonymous_as_asked() -> dict[str, Any]:
    with environ({"ORCHESTRATOR_GCS_ANONYMOUS": "1"}):
        made = store()
        return outcome(lambda: made.get("a"))


@row
def rejected_once() -> dict[str, Any]:
    made = store()
    made.create("a", b"1")
    group = made.url.split("/")[3]
    control(f"rules/{group}", [{"name": group, "value": 401, "times": 1}])
    return outcome(lambda: made.get("a"))


@row
def rejected_always() -> dict[str, Any]:
    TOKENS.word = "stale"
    made = store()
    return outcome(lambda: made.get("a"))


def _everything(made: GcsStorage) -> list[Any]:
    from orchestrator.arrays.format import buckets
    from orchestrator.arrays.format.tensorstore_specs import context, files_spec

    made.create("b", b"2")
    buckets.write(made.url + "/state", "d/x", b"elements", context())
    read = buckets.ts.KvStore.open(files_spec(made.url + "/state"), context=context()).result(timeout=30)
    return [
        bytes(read.read("d/x").result(timeout=30).value),
        [entry.key for entry in made.list("")],
        made.make_durable(["b"])[0].bytes,
        [str(error) for _, error in made.delete_many(["b", "state/d/x"])],
        made.delete("gone"),
    ]


for _name, _key in (("arrays", ""), ("arrays_external", "external")):
    ROWS[_name] = lambda key=_key: _arrays(key)  # type: ignore[misc]


def _arrays(key: str) -> dict[str, Any]:
    with environ(_key_of(key)):
        if key:  # TensorStore's own is the machine's by now
            control(f"guards/{BUCKET}", {"tokens": ["good-sts-"]})
        made = store()
        return outcome(lambda: _everything(made))


@row
def requester_pays() -> dict[str, Any]:
    control(f"guards/{BUCKET}", {"tokens": ["good-"], "payer": "payer-1"})
    made = store()
    told = outcome(lambda: made.get("a"))
    with environ({"ORCHESTRATOR_GCS_USER_PROJECT": "payer-1"}):
        made = store()
        return {"without": told["text"], **outcome(lambda: _everything(made))}


# Of a job, whose arrays TensorStore reads and writes.


def _job(key: str, meanwhile: Callable[..., dict[str, Callable[[], Any]]]) -> dict[str, Any]:
    """Two saves with these credentials, then `meanwhile`, then a restore when all is well again; and what was
    journalled."""
    import jax.numpy as jnp
    import numpy as np

    import orchestrator as oc
    from orchestrator.run.journal_store import JournalStore
    from orchestrator.storage import gcs_http

    def state(step: int) -> dict[str, Any]:
        return {"w": jnp.full((512, 8), step, jnp.float32), "b": jnp.arange(3.0) + step}

    gcs_http._client.cache_clear()
    with environ({"ORCHESTRATOR_STORE_DEADLINE_S": "3"} | _key_of(key)):
        root = f"gs://{BUCKET}/{time.time_ns()}/run"
        with oc.Agent(root, save=oc.every(1), options=oc.Options(async_save=False)) as agent:
            for step in (1, 2):
                agent.save(step, state(step))
            told: dict[str, Any] = {"failed_before": agent.failures}
            told |= {name: outcome(call) for name, call in meanwhile(agent, root, state).items()}
            TOKENS.mode, TOKENS.word = "ok", "good"
            agent.save(9, state(9))
            told["failed"] = agent.failures
        run = oc.open_run(root)
        told["steps"] = run.all_steps()
        told["right"] = bool(np.array_equal(run.restore().state["w"], np.asarray(state(9)["w"])))
        heads = list(JournalStore(GcsStorage(root), "test").entries())
    told["events"] = sorted({head.event.kind for head in heads})
    return told


def _revoked_meanwhile(agent: Any, root: str, state: Any) -> dict[str, Callable[[], Any]]:
    def end() -> None:
        from orchestrator.storage import gcs_http

        gcs_http.client().credentials._token = None  # as when its hour is over
        TOKENS.mode = "invalid_grant"

    def save() -> bool:
        end()
        return bool(agent.save(3, state(3)))

    return {"save": save, "restore": lambda: agent.restore(state(0)), "list": lambda: agent.all_steps()}


def _rejected_while_read(agent: Any, root: str, state: Any) -> dict[str, Callable[[], Any]]:
    group = root.split("/")[3]

    def restore() -> int:
        control(
            f"rules/{group}", [{"name": rf"{group}.*/state/.*d/", "value": 401, "times": 1, "operations": ["media"]}]
        )
        return int(agent.restore(state(0)).step)

    return {"restore": restore}


def _write_answered(agent: Any, root: str, state: Any, **rule: Any) -> dict[str, Callable[[], Any]]:
    """The data file of a save is answered so where TensorStore sends it, which is by name in the URL."""
    from orchestrator.arrays.format import buckets

    group = root.split("/")[3]

    def save() -> str:
        name = rf"{group}.*/state/.*d/"
        control(f"rules/{group}", [{"name": name, "operations": ["insert"], **rule}])
        saved = agent.save(3, state(3)) and agent.latest_step()
        control(f"rules/{group}", [])
        return f"{saved} {buckets._client_writes}"

    return {"save": save}


def _read_for_longer_than_a_token(agent: Any, root: str, state: Any) -> dict[str, Callable[[], Any]]:
    """A reader is in the middle when the token is replaced, and the bucket accepts no older one."""
    from orchestrator.run.journal_store import JournalStore
    from orchestrator.run.stored_arrays import slabs
    from orchestrator.storage import gcs_http

    def read() -> int:
        journal_store = JournalStore(GcsStorage(root), "test")
        step = journal_store.step(journal_store.durable_head().live[-1])
        leaves = [leaf for leaf in step.intent.tree.leaves if leaf.name == "w"]
        pieces = slabs(step, leaves, 512)
        found = [next(pieces)]
        TOKENS.word = "good-new"
        gcs_http.client().credentials.reject(gcs_http.client().token())
        control(f"guards/{BUCKET}", {"tokens": ["good-new"]})
        try:
            return len([*found, *pieces])
        finally:
            control(f"guards/{BUCKET}", {"tokens": ["good-"]})

    return {"read": read}


ROWS["job_long_read"] = lambda: _job("", _read_for_longer_than_a_token)
ROWS["job_write_limited"] = lambda: _job(
    "", partial(_write_answered, value=403, reason="rateLimitExceeded", message="slow down", times=1)
)
ROWS["job_write_forbidden"] = lambda: _job(
    "", partial(_write_answered, value=403, message="pod@p does not have storage.objects.create access. " * 40)
)
ROWS["job_write_rejected"] = lambda: _job("", partial(_write_answered, value=401, times=1))
ROWS["job_revoked"] = lambda: _job("service_account", _revoked_meanwhile)
ROWS["job_rejected_while_read"] = lambda: _job("", _rejected_while_read)
ROWS["job_external"] = lambda: _job("external", _rejected_while_read)


def main() -> None:
    logging.use_absl_handler()
    for name, call in ROWS.items():
        TOKENS.mode, TOKENS.word, TOKENS.expires = "ok", "good", 3600.0
        control(f"guards/{BUCKET}", {"tokens": [""] if name == "anonymous_as_asked" else ["good-"]})
        try:
            told = call()
        except Exception as error:  # the other rows are to be judged, too
            told = {"text": f"the row itself failed: {error!r}", "kinds": [""], "asked": 0, "retried": []}
        print(json.dumps({"row": name, **told}), flush=True)


if __name__ == "__main__":
    main()
