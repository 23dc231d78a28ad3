"""Files and batches in OpenAI's words: what is asked, what is replied, and what is kept of both. Knows no disk."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from buddymoe_ray.serve.calls import ENDPOINTS
from buddymoe_ray.serve.wire_parts import Metadata, WireBody

__all__ = [
    "FINISHED",
    "LONGEST_LIST",
    "WINDOW_SECONDS",
    "BatchErrors",
    "BatchList",
    "BatchObject",
    "BatchProblem",
    "BatchRequest",
    "ExpiresAfter",
    "FileDeleted",
    "FileList",
    "FileObject",
    "Moment",
    "RequestCounts",
    "UploadForm",
]

WINDOW_SECONDS = 24 * 3600
LONGEST_LIST = 10_000
Moment = Literal["in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"]
FINISHED: tuple[Moment, ...] = ("completed", "failed", "expired", "cancelled")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ExpiresAfter(WireBody):
    """Until when a file is kept: for so many seconds from when it was made."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=30 * 24 * 3600)]


class UploadForm(WireBody):
    """Fields of POST /v1/files: `file` holds JSON lines, as OpenAI's Batch API reads them. `expires_after` is written
    as `expires_after[anchor]` and `expires_after[seconds]`; without it a file is kept until it is deleted."""

    purpose: Literal["batch"]
    file: Annotated[Any, Field(json_schema_extra={"type": "string", "format": "binary"})]
    expires_after: ExpiresAfter | None = None


class FileObject(_Record):
    """A file that is kept, until `expires_at` if there is one; moments are in seconds since 1970."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileDeleted(_Record):
    """A file that is kept no more."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileList(_Record):
    """Some files, and whether there are more."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchRequest(WireBody):
    """Body of POST /v1/batches."""

    takes_notes: ClassVar[bool] = False

    input_file_id: str
    endpoint: str = Field(json_schema_extra={"enum": list(ENDPOINTS)})
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchProblem(_Record):
    """Why a batch failed, with the number of the line in its file, from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(_Record):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[BatchProblem]


class RequestCounts(_Record):
    """Lines; `completed` were answered with status 200, `failed` with another or not at all."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchObject(_Record):
    """A batch; moments are in seconds since 1970, null until they came. Its output and its error file are kept as
    `output_expires_after` says, each from when it was made."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Literal["validating"] | Moment = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing will become of it any more."""
        return self.status in FINISHED

    def at(self, moment: Moment, seconds: float, **more: Any) -> BatchObject:
        """The same, come to a moment."""
        return self.model_copy(update={"status": moment, f"{moment}_at": int(seconds), **more})


class BatchList(_Record):
    """Some batches, and whether there are more."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
