"""The whole loop with nothing but the generated stubs: python examples/loop.py FILE.jsonl (after `qlorad up`)."""

import hashlib
import os
import pathlib
import sys
import uuid

import grpc

import qlorad.v1.datasets_pb2 as d
import qlorad.v1.inference_pb2 as i
import qlorad.v1.messages_pb2 as m
import qlorad.v1.registry_pb2 as r
import qlorad.v1.trainer_pb2 as t
from qlorad.v1 import datasets_pb2_grpc, inference_pb2_grpc, registry_pb2_grpc, trainer_pb2_grpc


def channel(service: str, port: int) -> grpc.Channel:
    return grpc.insecure_channel(os.environ.get(f"QLORAD_{service}_ADDRESS", f"127.0.0.1:{port}"))


datasets = datasets_pb2_grpc.DatasetServiceStub(channel("DATASETS", 50051))
models = registry_pb2_grpc.ModelServiceStub(channel("REGISTRY", 50052))
trainer = trainer_pb2_grpc.TrainerServiceStub(channel("TRAINER", 50053))
inference = inference_pb2_grpc.InferenceServiceStub(channel("INFERENCE", 50054))
run, data = uuid.uuid4().hex[:12], pathlib.Path(sys.argv[1]).read_bytes()

sha256 = hashlib.sha256(data).hexdigest()
opened = d.StartUploadRequest(request_id=run, filename="rows.jsonl", size_bytes=len(data), sha256=sha256)
upload = datasets.StartUpload(opened).upload.name
pieces = [d.WriteUploadRequest(data=data[n : n + 65536]) for n in range(0, len(data), 65536)]
datasets.WriteUpload(iter([d.WriteUploadRequest(upload=upload), *pieces]))
wanted = d.CreateDatasetRequest(request_id=run, dataset_id=f"loop-{run}", uploads=[upload])
wanted.split.validation_fraction = 0.1
made = list(datasets.CreateDataset(wanted))[-1]
print("dataset", made.dataset.digest, dict(made.dataset.stats.rows))
starter = list(models.MakeStarterModel(r.MakeStarterModelRequest(request_id=run, size=r.STARTER_SIZE_TEST)))[-1]
train = t.TrainSpec(model=starter.model.name, dataset=made.dataset.name, adapter=f"adapters/loop-{run}")
train.schedule.max_steps, train.optimizer.learning_rate = int(os.environ.get("STEPS", "30")), 5e-3
job = trainer.CreateJob(t.CreateJobRequest(request_id=run, template="all-linear", spec=t.JobSpec(train=train))).job
for update in trainer.WatchJob(t.WatchJobRequest(name=job.name)):
    if update.event.WhichOneof("fact") == "step":
        print(f"step {update.event.step.step}/{update.event.step.total_steps} loss {update.event.step.loss:.3f}")
job = trainer.GetJob(t.GetJobRequest(name=job.name)).job
print(job.name, t.JobState.Name(job.state), job.error.message, job.result.adapter_digest)
inference.LoadModel(i.LoadModelRequest(model=starter.model.name, request_id=run))
inference.LoadAdapter(i.LoadAdapterRequest(adapter=job.result.adapter, request_id=run))
question = m.Message(role=m.ROLE_USER, parts=[m.Part(text="Write a Python function that adds two numbers.")])
for reply in inference.Chat(
    i.ChatRequest(adapter=job.result.adapter, conversation=m.Conversation(messages=[question]))
):
    print(reply.delta.text, end="", flush=True)
print()
