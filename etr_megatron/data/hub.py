"""The hub that datasets are named on: whether it can be reached at all.

Its clients ask six times and wait 23 seconds in between, for every dataset, whether there is a network or not; what is in the
cache comes after that, and so does the sentence about a name that is misspelled.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import httpx
from huggingface_hub import constants, get_session

PATIENCE_S = 15.0
"""After which a hub that has not answered counts as out of reach; its clients give a request 10 seconds."""

_PAUSES_S = (1.0, 2.0)
"""Between tries: a network may just be coming up, or have lost a packet."""


@contextmanager
def hub_or_cache(name: str) -> Iterator[str | None]:
    """Within the block the dataset `name` comes from the cache alone where it is one of a hub that is out of reach.

    Yields why that is so; None where it is not, or where offline is what was asked for.
    """
    import datasets

    is_offline = datasets.config.HF_HUB_OFFLINE or constants.is_offline_mode()
    why = None if is_offline or not _is_of_the_hub(name) else why_unreachable(constants.ENDPOINT)
    if why is None:
        yield None
        return
    # What HF_HUB_OFFLINE=1 does, which both read when they are imported.
    with mock.patch.object(constants, "HF_HUB_OFFLINE", True), mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True):
        yield f"{constants.ENDPOINT} cannot be reached: {why}"


def _is_of_the_hub(name: str) -> bool:
    """As `datasets` tells: `name` or `owner/name`, and no directory here."""
    return name.count("/") <= 1 and not Path(name).is_absolute() and not Path(name).exists()


@functools.cache
def why_unreachable(endpoint: str) -> str | None:
    """None where something answers, whatever it says; asked once in a process."""
    answers: list[str | None] = []
    # In a thread, as no timeout holds for a name server that is silent, nor for one address after the other.
    asking = threading.Thread(target=lambda: answers.append(_ask(endpoint)), name="hub", daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return answers[0] if answers else f"no answer in {PATIENCE_S:g} s"


def _ask(endpoint: str) -> str | None:
    why = None
    for pause_s in (*_PAUSES_S, None):
        try:
            get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            why = str(error) or type(error).__name__
        except httpx.HTTPError:  # there is somebody: his clients know better what to make of him
            return None
        else:
            return None
        if pause_s is not None:
            time.sleep(pause_s)
    return why
