"""The batches of a service: begun when they are made, gone on with where a process that ran them was killed.

Knows neither HTTP nor ray. `job` is what becomes of one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from buddymoe_ray.errors import BuddyMoEError
from buddymoe_ray.serve.batches.job import BatchJob, LineService
from buddymoe_ray.serve.batches.records import BatchObject
from buddymoe_ray.serve.batches.store import FileStore

__all__ = ["BatchRunner"]

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""So often the places of all workers are counted, and batches looked for that no process runs any more."""


class BatchRunner:
    """Runs the batches of `store` while a service lives, all side by side: each has every n-th place."""

    def __init__(self, store: FileStore, service: LineService) -> None:
        self.store, self._service = store, service
        self._jobs: dict[str, BatchJob] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._look: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncGenerator[None, None]:
        """While the service runs. What is answered at its end is kept."""
        self.start()
        try:
            yield
        finally:
            tasks = [*self._tasks, *([self._look] if self._look else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def start(self) -> None:
        """Look for batches from now on."""
        if self._look is None and not self.store.problem:
            self._look = asyncio.create_task(self._looking())

    def now(self, batch: BatchObject) -> BatchObject:
        """A batch as of now."""
        return self._jobs[batch.id].batch if batch.id in self._jobs else batch

    def job(self, batch: BatchObject, owner: str) -> BatchJob:
        """What runs a batch that is not finished; begun if there is none."""
        if batch.id not in self._jobs:
            self.start()
            job = self._jobs[batch.id] = BatchJob(batch, owner, self.store, self._service)
            task = asyncio.create_task(self._run(batch.id, job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return self._jobs[batch.id]

    async def _run(self, name: str, job: BatchJob) -> None:
        try:
            await job.run()
        except BuddyMoEError as error:
            log.warning("%s waits: %s", name, error)
        except Exception:
            log.exception("%s waits", name)
        finally:
            del self._jobs[name]

    async def _looking(self) -> None:
        while True:
            try:
                with suppress(BuddyMoEError):
                    info, health = await self._service.workers.info(), await self._service.workers.health()
                    self._service.places.resize(max(1, info.max_running * sum(problem is None for problem in health)))
                for batch in await asyncio.to_thread(self.store.records, BatchObject, None):
                    if not batch.finished:
                        self.job(batch, await asyncio.to_thread(self.store.owner, batch.id))
                await asyncio.to_thread(self.store.expire)
            except Exception:  # the disk's or ray's, which may have gone by the next time
                log.exception("batches were not looked for")
            await asyncio.sleep(LOOK_SECONDS)
