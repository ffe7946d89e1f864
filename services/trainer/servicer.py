"""The door of TrainerService: translates, calls one method of the core, translates back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from qlorad.v1 import trainer_pb2, trainer_pb2_grpc
from services.trainer.core import Trainer


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Every RPC of the service."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    async def CreateJob(self, request: trainer_pb2.CreateJobRequest, context: Any) -> trainer_pb2.CreateJobResponse:
        return await self._trainer.create(request)

    async def EstimateJob(
        self, request: trainer_pb2.EstimateJobRequest, context: Any
    ) -> trainer_pb2.EstimateJobResponse:
        return await self._trainer.estimate(request)

    async def GetJob(self, request: trainer_pb2.GetJobRequest, context: Any) -> trainer_pb2.GetJobResponse:
        return trainer_pb2.GetJobResponse(job=await self._trainer.get(request.name))

    async def ListJobs(self, request: trainer_pb2.ListJobsRequest, context: Any) -> trainer_pb2.ListJobsResponse:
        return await self._trainer.list(request)

    async def WatchJob(
        self, request: trainer_pb2.WatchJobRequest, context: Any
    ) -> AsyncIterator[trainer_pb2.WatchJobResponse]:
        async for update in self._trainer.watch(request):
            yield update

    async def CancelJob(self, request: trainer_pb2.CancelJobRequest, context: Any) -> trainer_pb2.CancelJobResponse:
        return await self._trainer.cancel(request)

    async def PauseJob(self, request: trainer_pb2.PauseJobRequest, context: Any) -> trainer_pb2.PauseJobResponse:
        return await self._trainer.pause(request)

    async def ResumeJob(self, request: trainer_pb2.ResumeJobRequest, context: Any) -> trainer_pb2.ResumeJobResponse:
        return await self._trainer.resume(request)

    async def DeleteJob(self, request: trainer_pb2.DeleteJobRequest, context: Any) -> trainer_pb2.DeleteJobResponse:
        return await self._trainer.delete(request)

    async def WatchLog(
        self, request: trainer_pb2.WatchLogRequest, context: Any
    ) -> AsyncIterator[trainer_pb2.WatchLogResponse]:
        async for piece in self._trainer.watch_log(request):
            yield piece

    async def ListCheckpoints(
        self, request: trainer_pb2.ListCheckpointsRequest, context: Any
    ) -> trainer_pb2.ListCheckpointsResponse:
        return trainer_pb2.ListCheckpointsResponse(checkpoints=await self._trainer.checkpoints(request.name))

    async def PublishCheckpoint(
        self, request: trainer_pb2.PublishCheckpointRequest, context: Any
    ) -> trainer_pb2.PublishCheckpointResponse:
        return await self._trainer.publish(request)

    async def ListTemplates(
        self, request: trainer_pb2.ListTemplatesRequest, context: Any
    ) -> trainer_pb2.ListTemplatesResponse:
        return trainer_pb2.ListTemplatesResponse(templates=self._trainer.templates())

    async def ListObjectives(
        self, request: trainer_pb2.ListObjectivesRequest, context: Any
    ) -> trainer_pb2.ListObjectivesResponse:
        return trainer_pb2.ListObjectivesResponse(objectives=await self._trainer.objectives())
