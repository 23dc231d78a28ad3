"""Every error a user can see, as one tree.

    BuddyMoEError
    ├── ConfigError (ValueError)        an option, YAML field or request field is not usable
    │   └── RequestError                one request is not usable (HTTP 400)
    │       └── ModelNotFound           the request names a model that is not served (HTTP 404)
    ├── CheckpointError                 the checkpoint cannot be served: missing, truncated, unmapped, NaN
    │   └── UnsupportedModel            a family or storage format that has no path here
    ├── ProfileError                    a calibration is missing, damaged, of another model, or not enough
    ├── BudgetError                     the memory budget cannot hold the minimum
    ├── CapacityError                   the service is full now; retry later (HTTP 503)
    ├── CacheError                      bytes could not be brought to a tier (disk error, closed cache)
    └── LinkError                       another worker did not answer, or not as it must; the experts come another way

Messages read `X is A, must be B. hint: do C`. Programmer errors are `assert`s with a message, not this tree.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "BuddyMoEError",
    "CacheError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "LinkError",
    "ModelNotFound",
    "ProfileError",
    "RequestError",
    "UnsupportedModel",
]


class BuddyMoEError(Exception):
    """Base of every error this package raises for a user."""


class ConfigError(BuddyMoEError, ValueError):
    """An option, YAML field or argument is not usable."""


class RequestError(ConfigError):
    """One request is not usable; the service goes on (HTTP 400)."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(RequestError):
    """The request names a model that is not served (HTTP 404)."""


class CheckpointError(BuddyMoEError):
    """The checkpoint cannot be served; the message names file and key."""


class UnsupportedModel(CheckpointError):
    """The model family or its storage format has no path here."""


class ProfileError(BuddyMoEError):
    """A calibration cannot be made or used: missing, damaged, of another model, or without what is asked of it."""


class BudgetError(BuddyMoEError):
    """The memory budget cannot hold the minimum; the message names the minimum."""


class CapacityError(BuddyMoEError):
    """The service is full now; the client may retry (HTTP 503)."""


class CacheError(BuddyMoEError):
    """Expert bytes could not be brought to a tier. `expert` is the number within its layer, where one is to blame."""

    expert: int | None = None


class LinkError(BuddyMoEError):
    """Another worker did not answer in time, or not as it must; nothing of its answer is used."""
