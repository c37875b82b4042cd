"""Scores responses of concurrent requests together: one thread, one forward pass at a time."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)
# Maximum wait at the end of the server for a thread that is still in a forward pass.
_JOIN_SECONDS = 5.0


class _Job(NamedTuple):
    given: Any
    result: Future[Any]


class Batcher:
    """Collects responses until a batch is full or the first has waited long enough, then scores them in a thread.

    A batch that fails as a whole is scored one by one: a bad response costs its neighbours time, not their results. A
    response whose future is cancelled before its turn costs nothing.

    Args:
        score: Scores responses: one result for each, in order.
        batch_size: Maximum responses per call of `score`.
        wait: Seconds that the first one of a batch waits for others.
        max_queued: Maximum number of waiting responses.

    Example:
        >>> batcher = Batcher(lambda given: [2 * one for one in given], batch_size=8, wait=0.0, max_queued=100)
        >>> [future.result() for future in batcher.submit([1, 2, 3])]
        [2, 4, 6]
        >>> batcher.close()
    """

    def __init__(
        self, score: Callable[[list[Any]], Sequence[Any]], *, batch_size: int, wait: float, max_queued: int
    ) -> None:
        self._score, self._batch_size, self._wait, self._max_queued = score, batch_size, wait, max_queued
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, given: Sequence[Any]) -> list[Future[Any]]:
        """Queue all responses of a request, or none.

        Returns:
            A future for each.

        Raises:
            queue.Full: If they would not fit, or the batcher is closed.
        """
        jobs = [_Job(one, Future()) for one in given]
        with self._lock:
            if self._closed or self._jobs.qsize() + len(jobs) > self._max_queued:
                raise queue.Full
            for job in jobs:
                self._jobs.put(job)
        return [job.result for job in jobs]

    def close(self) -> None:
        """Score what is queued, then end the thread; later requests are refused."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        open_ = True
        while open_:
            batch, open_ = self._collect()
            jobs = [job for job in batch if job.result.set_running_or_notify_cancel()]
            if jobs:
                self._finish(jobs)

    def _collect(self) -> tuple[list[_Job], bool]:
        """The next batch, and whether there may be another."""
        batch: list[_Job] = []
        job = self._jobs.get()
        deadline = time.monotonic() + self._wait
        while job is not None:
            batch.append(job)
            if len(batch) == self._batch_size:
                return batch, True
            try:
                job = self._jobs.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                return batch, True
        return batch, False

    def _finish(self, jobs: list[_Job]) -> None:
        try:
            results = self._score([job.given for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].result.set_exception(error)
                return
            logger.info("A batch of %d failed (%r): its responses are scored one by one.", len(jobs), error)
            for job in jobs:
                self._finish([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.result.set_result(result)
