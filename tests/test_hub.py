"""Datasets by name: the error when the hub is unreachable, and how soon it comes; a slow hub is waited for."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import httpx
import pytest
from huggingface_hub import constants

from etr_megatron.config import DataConfig, Source
from etr_megatron.data import hub
from etr_megatron.data.rows import Rows, read_rows
from etr_megatron.errors import UserError

NOBODY = "http://127.0.0.1:1"


@pytest.fixture
def endpoint(monkeypatch):
    """Turns offline mode off, and returns a function that sets the hub's address."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    hub.why_unreachable.cache_clear()
    yield lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)
    hub.why_unreachable.cache_clear()


SET = Source("data.train", "owner/set", "train", "train")


def read(source: Source) -> Rows:
    return read_rows(source, DataConfig())


@pytest.fixture
def asked(monkeypatch):
    """What `datasets` is asked for, and whether it may use the network."""
    found = []

    def load_dataset(name, subset, *, split):
        found.append((name, constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict({"question": ["1+1?"], "answer": ["2"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return found


@contextmanager
def server(status: int = 200, delay_s: float = 0.0):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            time.sleep(delay_s)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_without_a_network_a_name_that_is_not_in_the_cache_is_one_sentence_within_seconds(endpoint):
    endpoint(NOBODY)
    start = time.monotonic()
    for key in ("data.train", "data.eval"):
        with pytest.raises(UserError) as caught:
            read(Source(key, "owner/no-such-set", "train", "train"))
        assert str(caught.value).startswith(
            f"{key}: dataset 'owner/no-such-set' (split 'train') could not be loaded (it is not in the cache, and {NOBODY} "
            "cannot be reached: "
        )
        assert str(caught.value).partition("Connection refused); check name and split")[1]
    assert time.monotonic() - start < 30  # the hub's clients alone take 46 s


def test_without_a_network_what_is_in_the_cache_is_taken_from_there(endpoint, asked):
    endpoint(NOBODY)
    assert len(read(SET).good) == 1
    assert asked == [("owner/set", True, True)]
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


@pytest.mark.parametrize(("status", "delay_s"), [(200, 3.0), (404, 0.0), (503, 0.0)], ids=["slow", "refuses", "busy"])
def test_a_hub_that_answers_is_left_to_its_clients_however_slow_it_is(endpoint, asked, status, delay_s):
    with server(status, delay_s) as address:
        endpoint(address)
        read(SET)
    assert asked == [("owner/set", False, False)]


def test_a_network_that_comes_up_while_it_is_asked_for_is_used(endpoint, asked, monkeypatch):
    with server() as address:
        endpoint(NOBODY)
        monkeypatch.setattr(hub, "_PAUSES_S", (0.0,))
        session, addresses = hub.get_session(), iter([NOBODY, address])

        class Session:
            def head(self, _, **options):
                return session.head(next(addresses), **options)

        monkeypatch.setattr(hub, "get_session", Session)
        read(SET)
    assert asked == [("owner/set", False, False)]


def test_a_network_that_swallows_everything_is_not_waited_for_long(endpoint, monkeypatch):
    monkeypatch.setattr(hub, "_ask", lambda _: time.sleep(5))
    monkeypatch.setattr(hub, "PATIENCE_S", 0.2)
    assert hub.why_unreachable(NOBODY) == "no answer in 0.2 s"


def test_a_name_that_can_be_none_of_the_hub_is_not_asked_for_there(endpoint, monkeypatch, tmp_path):
    addresses = []
    endpoint(NOBODY)
    monkeypatch.setattr(hub, "_ask", lambda address: addresses.append(address))
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("folder", "/nowhere", "/nowhere/problems", "a/b/c", str(tmp_path / "folder")):
        with pytest.raises(UserError, match="could not be loaded"):
            read(replace(SET, location=source))
    assert not addresses
    with hub.hub_or_cache("owner/set"):
        assert addresses == [NOBODY]


@pytest.mark.parametrize("module", [constants, datasets.config], ids=["huggingface_hub", "datasets"])
def test_a_job_that_is_told_to_be_offline_does_not_ask(endpoint, asked, monkeypatch, module):
    endpoint(NOBODY)
    monkeypatch.setattr(hub, "_ask", lambda _: asked.append("the hub"))
    monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    read(SET)
    assert len(asked) == 1


def test_a_dataset_of_the_cache_that_has_no_such_split_is_told_so(endpoint, monkeypatch):
    def load_dataset(*_, **__):
        raise ValueError('Unknown split "train".\nShould be one of: test')

    endpoint(NOBODY)
    monkeypatch.setattr(hub, "_PAUSES_S", ())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r'could not be loaded \(ValueError: Unknown split "train"\.\); check name and split'):
        read(SET)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (httpx.ConnectTimeout(""), "ConnectTimeout"),
        (httpx.ProxyError("no such proxy"), "no such proxy"),
        (httpx.ReadTimeout(""), None),
        (httpx.RemoteProtocolError(""), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nobody_is_there_where_no_connection_is_made_three_times_and_somebody_where_it_is(monkeypatch, error, why):
    asked, waited = [], []

    class Session:
        def head(self, address, *, timeout):
            asked.append((address, timeout))
            raise error

    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr(time, "sleep", waited.append)
    assert hub._ask(NOBODY) == why
    assert asked == [(NOBODY, constants.HF_HUB_ETAG_TIMEOUT)] * (3 if why else 1)
    assert waited == ([1.0, 2.0] if why else [])
