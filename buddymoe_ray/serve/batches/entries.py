"""How the lines of a batch are opened and answered: the same calls, ids and output lines, whoever computes them.

Knows neither engines nor workers.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace

from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.batches.journal import JournalEntry
from buddymoe_ray.serve.batches.lines import BatchInput, BatchLine, LineError
from buddymoe_ray.serve.calls import MAX_BODY_BYTES, Call, ModelNames, open_call, too_long
from buddymoe_ray.serve.prompts import usable
from buddymoe_ray.serve.refusals import envelope, refusal_of
from buddymoe_ray.serve.work import Refusal

__all__ = ["LineAnswers"]


class LineAnswers:
    """Of the lines of `source`, whose bodies may call the model by `names`."""

    def __init__(self, source: BatchInput, names: ModelNames) -> None:
        self._source, self._names = source, names

    def open(self, at: int, line: BatchLine) -> Call | Refusal:
        """The call that a line asks for, or why there is none."""
        if len(line.body) > MAX_BODY_BYTES:
            return too_long()
        try:
            call = open_call(line.endpoint, line.body, self._names, unique=self._unique(at), created=int(time.time()))
            if call.body.stream:
                raise RequestError("stream is true, must be false in a batch. hint: leave it out", param="stream")
            if call.work.timeout is not None:
                raise RequestError(
                    "buddymoe.timeout is given, must not be in a batch. hint: leave it out", param="buddymoe.timeout"
                )
            return replace(call, work=usable(call.work))
        except RequestError as error:
            return refusal_of(error)

    def replied(self, at: int, line: BatchLine, body: bytes | Refusal) -> JournalEntry:
        """A reply or refusal, as HTTP would send it."""
        status = body.status if isinstance(body, Refusal) else 200
        data = envelope(body) if isinstance(body, Refusal) else body
        head = f'{{"status_code": {status}, "request_id": "req_{self._unique(at)}", "body": '
        return JournalEntry(at, status, self._line(at, line.custom_id, head.encode() + data + b"}", "null"))

    def failed(self, at: int, error: LineError) -> JournalEntry:
        """Why a line is no request, or was not answered."""
        said = json.dumps({"code": error.code, "message": error.message})
        return JournalEntry(at, 0, self._line(at, error.custom_id, b"null", said))

    def _line(self, at: int, custom_id: str | None, response: bytes, error: str) -> bytes:
        """A line of OpenAI's batch output. Bodies stay the bytes that HTTP would send."""
        head = f'{{"id": "batch_req_{self._unique(at)}", "custom_id": {json.dumps(custom_id)}, "response": '
        return head.encode() + response + f', "error": {error}}}'.encode()

    def _unique(self, at: int) -> str:
        """What the ids of a line's answer hold: the same in every run over the same input, so that a request without
        seed draws the same numbers when it is computed again."""
        named = f"{self._source.digest}/{self._source.number(at)}"
        return hashlib.sha256(named.encode()).hexdigest()[:32]
