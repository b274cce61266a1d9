"""The paths that list sessions and drop them; their turns come with bodies (`SharingFields`)."""

from __future__ import annotations

from fastapi import FastAPI, Request

from cascade_llm.server.answer_schema import Deleted, Sessions
from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.engine_client import EngineClient
from cascade_llm.server.guard import RequestRecord
from cascade_llm.server.published import error_answers

__all__ = ["add_session_paths"]


def add_session_paths(app: FastAPI, engine: EngineClient, timeout_s: float) -> None:
    """Add them to an application. The engine answers between two steps, for which `timeout_s` is waited."""

    @app.get("/v1/sessions", responses=error_answers(503))
    async def sessions(request: Request) -> Sessions:
        """The tenant's sessions that hold pages, the least recently used first."""
        return Sessions.model_validate(await engine.ask("sessions", timeout_s, tenant=_tenant(request)))

    @app.delete("/v1/sessions/{session_id}", responses=error_answers(404, 503))
    async def drop_session(session_id: str, request: Request) -> Deleted:
        """Give up a session's pages, and keep none of its turns that run."""
        answer = await engine.ask("drop_session", timeout_s, tenant=_tenant(request), session_id=session_id)
        if answer["dropped"]:
            return Deleted(id=session_id)
        raise ApiError(404, f"there is no session {session_id!r:.80}", code="session_not_found", param="session_id")


def _tenant(request: Request) -> str:
    record: RequestRecord = request.scope["state"]["record"]
    return record.visitor.client.tenant
