"""Replies to `/generate`, with typed arrays of tokens. Rank 0 parses the replies of all servers in one thread."""

from __future__ import annotations

import base64
import json
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from etr_megatron.rollout.engine import Place
from etr_megatron.types import FinishReason

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}

_LONG = 2**15
"""Bytes of a reply, about 800 tokens, from which on its arrays are not parsed as JSON. For a shorter one the other parser is no
faster, as each call takes 0.15 ms."""

_ROWS = bytes.maketrans(b"]", b"\n")


class OtherTokensError(ValueError):
    """A reply has log-probs of other tokens than its response."""


@dataclass(frozen=True)
class Generated:
    """What a server generated for one request.

    ids: response token ids. logprobs: log-prob of each, under the tempered distribution. version: weight version at the last
    token, as the server reports it. given_up: why the request was given up, if it was; there are no tokens then. routing: if
    requested, the experts, in all layers, of all tokens of prompt and response but the last; see `of_expert_layers`. place:
    the server that was asked, and its group.
    """

    ids: array[int]
    logprobs: array[float]
    finish_reason: FinishReason
    version: str
    given_up: str = ""
    routing: array[int] = field(default_factory=lambda: array("B"))
    place: Place | None = None

    def without_tokens(self) -> Generated:
        """The reply as if nothing had been generated, with its reason."""
        return Generated(array("i"), array("d"), self.finish_reason, self.version, self.given_up)


def read_generated(reply: bytes, *, routing: bool) -> Generated:
    """Parse the JSON of a reply. routing: whether it must have the chosen experts, unless the request was aborted.

    Raises OtherTokensError, and KeyError, TypeError, ValueError, IndexError or OverflowError for anything else that is
    unexpected.
    """
    ids_text = pairs_text = experts_text = b""
    if len(reply) >= _LONG:
        reply, experts_text = _cut(reply, b"routed_experts", b'"', b'"')
        reply, pairs_text = _cut(reply, b"output_token_logprobs", b"[[", b"]]")
        reply, ids_text = _cut(reply, b"output_ids", b"[", b"]")
    found = json.loads(reply)
    meta = found["meta_info"]
    finish_reason = _FINISH[meta["finish_reason"]["type"]]
    ids = _numbers(ids_text) if ids_text else array("i", found["output_ids"] or [])
    if pairs_text:
        logprobs, of = _columns(pairs_text)
    else:  # a request that was aborted before it began has no log-probs
        pairs = meta["output_token_logprobs"] if ids or finish_reason != "abort" else []
        logprobs, of = array("d", [pair[0] for pair in pairs]), array("i", [pair[1] for pair in pairs])
    if of != ids:
        raise OtherTokensError("log-probs of other tokens")
    experts = array("B")
    if routing and finish_reason != "abort":
        experts = _experts(experts_text or meta["routed_experts"])
    return Generated(ids, logprobs, finish_reason, str(meta.get("weight_version")), routing=experts)


def _cut(reply: bytes, key: bytes, begin: bytes, end: bytes) -> tuple[bytes, bytes]:
    """The reply with null for the value of `key`, and the text of this value between `begin` and `end`.

    SGLang writes no spaces. If the JSON has some, this returns the whole reply and b"". Generated text in the reply cannot be
    mistaken for the key, because JSON escapes its quotes.
    """
    name = b'"%b":' % key
    start = reply.find(name + begin) + len(name)
    stop = reply.find(end, start + len(begin))
    if start < len(name) or stop < 0:
        return reply, b""
    return reply[:start] + b"null" + reply[stop + len(end) :], reply[start + len(begin) : stop]


def _numbers(text: bytes) -> array[int]:
    """Whole numbers between commas."""
    return array("i", np.fromstring(text, np.int32, sep=",").tobytes())


def _columns(text: bytes) -> tuple[array[float], array[int]]:
    """Log-probs and token ids of `log-prob,id,null],[log-prob,id,null],...`: the same numbers as those of `json.loads`.

    Arrow (pyarrow comes with datasets) parses numbers several times as fast as Python, creates no objects for them and does not
    hold the GIL. It gets a table with an empty field at the beginning of each row: all rows but the first begin with a comma.
    """
    from pyarrow import csv, float64, int32, py_buffer

    table = b"," + text.translate(_ROWS, b"[ ")
    types = {"logprob": float64(), "id": int32()}
    rows = csv.open_csv(
        py_buffer(table),
        read_options=csv.ReadOptions(use_threads=False, block_size=len(table) + 1, column_names=["", "logprob", "id", "text"]),
        parse_options=csv.ParseOptions(quote_char=False),
        convert_options=csv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[]),
    )
    batch = rows.read_next_batch()
    logprobs, ids = (batch[name].to_numpy().tobytes() for name in types)
    return array("d", logprobs), array("i", ids)


def _experts(text: bytes | str) -> array[int]:
    """Decode SGLang's base64 of int32 [tokens, layers, experts per token] (`state_capturer/routed_experts.py`, 0.5.21)."""
    encoded = text.encode() if isinstance(text, str) else text
    # Strict decoding (`validate`) takes twice as long. This skips foreign characters, so that bytes are missing then.
    found = base64.b64decode(encoded)
    if len(found) != len(encoded) // 4 * 3 - encoded.count(b"=", -2):
        raise ValueError("the experts are not base64")
    return array("B", np.frombuffer(found, np.int32).astype(np.uint8).tobytes())


def of_expert_layers(routing: array[int], model: Architecture) -> array[int]:
    """Convert `Generated.routing` to that of `Sample`: without the dense layers, for which SGLang (0.5.21) returns zeros.
    Unchanged if the reply does not include dense layers."""
    experts = model.experts
    if experts is None or not experts.dense_layers or len(routing) % (model.layers * experts.per_token):
        return routing
    chosen = np.frombuffer(routing, np.uint8).reshape(-1, model.layers, experts.per_token)
    if chosen[:, sorted(experts.dense_layers)].any():  # it has only expert layers, and its size fits by chance
        return routing
    return array("B", chosen[:, model.expert_layers].tobytes())
