"""Who a request is from, and whether they may ask now: what its headers say, as a tenant or a refusal.

Knows requests and tenants, not routes. Keys are taken from headers alone: what is in a URL ends in logs.
"""

from __future__ import annotations

from starlette.requests import Request

from buddymoe_ray.serve.refusals import unavailable
from buddymoe_ray.serve.tenants import STOPPING, Tenants
from buddymoe_ray.serve.work import Refusal

__all__ = ["admit"]


def admit(request: Request, tenants: Tenants, *, retry_after_seconds: int) -> Refusal | None:
    """None for who may ask, who is `request.state.tenant` from now on. A POST asks for work, and counts."""
    tenant = tenants.find(_keys(request))
    if tenant is None:
        message = "the API key is missing or wrong. hint: send Authorization: Bearer <key>, or x-api-key: <key>"
        return Refusal(status=401, message=message, code="invalid_api_key")
    request.state.tenant = tenant
    if request.method != "POST":
        return None
    if tenants.closed:
        return unavailable(STOPPING, retry_after_seconds=retry_after_seconds)
    return tenant.ask()


def _keys(request: Request) -> list[bytes]:
    """The keys a request brings. Schemes are case-insensitive, and one or more spaces follow (RFC 9110, 11.4)."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    bearer = [token.strip(" ")] if scheme.lower() == "bearer" else []
    return [key.encode("latin-1") for key in (*bearer, *request.headers.getlist("x-api-key"))]
