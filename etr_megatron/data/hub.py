"""Checks whether the dataset hub can be reached at all.

Without a network, hub clients try six times over 23 seconds for every dataset, before they use the cache or report a
misspelled name.
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
"""Seconds after which a silent hub counts as unreachable; its clients allow 10 seconds per request."""

_PAUSES_S = (1.0, 2.0)
"""Seconds between attempts: a network may be just coming up, or have lost a packet."""


@contextmanager
def hub_or_cache(name: str) -> Iterator[str | None]:
    """Inside the block, load the dataset `name` only from the cache if it is on the hub and the hub is unreachable.

    Yields the reason, or None if the hub is reachable, not needed, or offline mode was requested.
    """
    import datasets

    is_offline = datasets.config.HF_HUB_OFFLINE or constants.is_offline_mode()
    why = None if is_offline or not _is_of_the_hub(name) else why_unreachable(constants.ENDPOINT)
    if why is None:
        yield None
        return
    # The effect of HF_HUB_OFFLINE=1, which both libraries read only at import.
    with mock.patch.object(constants, "HF_HUB_OFFLINE", True), mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True):
        yield f"{constants.ENDPOINT} cannot be reached: {why}"


def _is_of_the_hub(name: str) -> bool:
    """Whether `datasets` would load it from the hub: `name` or `owner/name`, and no local directory."""
    return name.count("/") <= 1 and not Path(name).is_absolute() and not Path(name).exists()


@functools.cache
def why_unreachable(endpoint: str) -> str | None:
    """Why the endpoint is unreachable, or None if it answers at all; asked once per process."""
    answers: list[str | None] = []
    # In a thread, because request timeouts cover neither a silent name server nor several addresses in sequence.
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
        except httpx.HTTPError:  # the hub is reachable; its clients will report this error better
            return None
        else:
            return None
        if pause_s is not None:
            time.sleep(pause_s)
    return why
