"""What routes declare: the role that their callers need, and the service that answers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase

from megapd.scheduler.service import CanonicalJSON, Service
from megapd.scheduler.store import ROLES


class Role(SecurityBase):
    """Dependency of a route: the caller's name, if its role is high enough, else 403. The guard has looked at the token."""

    model = HTTPBearer(description="of the role that the operation names, or a higher one")
    scheme_name = "HTTPBearer"

    def __init__(self, role: str) -> None:
        self._least = ROLES.index(role)
        self._text = f"authorization: this needs a token of role {role}"

    async def __call__(self, request: Request) -> str:
        found: tuple[str, str] = request.scope["caller"]
        name, role = found
        if ROLES.index(role) < self._least:
            raise HTTPException(403, f"{self._text}; yours is of role {role}")
        return name


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


needs_admin = Role("admin")
READ, RUN, ADMIN = Depends(Role("read")), Depends(Role("run")), Depends(needs_admin)
Serving = Annotated[Service, Depends(_service)]


def made(found: Any, new: bool) -> CanonicalJSON:
    """201: it is new; 200: it was there."""
    return CanonicalJSON(found, 201 if new else 200)
