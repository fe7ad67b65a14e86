"""Run a script as accelerate runs it on GPUs (FSDP2, DeepSpeed), with CPUs that talk gloo in their place.

accelerate keeps its engines from CPUs, whatever torch can do there. Usage: `as_on_gpus.py SCRIPT [ARGUMENT ...]`.
"""

import runpy
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import training_args


def prepare_backend(self, cpu, sagemaker_dp=False, backend=None):
    return "gloo", DistributedType.MULTI_GPU


def set_device(self):
    self.device = torch.device("cpu")


if __name__ == "__main__":
    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device
    PartialState.default_device = property(lambda self: torch.device("cpu"))
    training_args.is_torch_bf16_gpu_available = lambda: True
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
