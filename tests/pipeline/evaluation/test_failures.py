"""What an error of an image is due to, by the exceptions that torch 2.13, its libraries and storage raise."""

import pytest
import torch

from pipeline.evaluation.failures import FAILURES, MachineError, cause_of


def from_storage(error: OSError) -> ValueError:
    """As an image is reported that storage does not give."""
    try:
        raise ValueError(f"train-000001.tar: {error}") from error
    except ValueError as found:
        return found


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "memory"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously", 2), "memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
        (MemoryError(), "memory"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700), "machine"),
        (RuntimeError("CUDA error: device-side assert triggered"), "machine"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "machine"),
        (RuntimeError("No CUDA GPUs are available"), "machine"),
        (RuntimeError("Found no NVIDIA driver on your system."), "machine"),
        (ConnectionError("s3://bucket/train-000001.tar: S3 cannot be reached"), "machine"),
        (from_storage(TimeoutError("s3://bucket/train-000001.tar: S3 cannot be reached")), "machine"),
        (from_storage(FileNotFoundError("/data/train-000001.tar")), "machine"),
        (MachineError("the device was lost"), "machine"),
        (ValueError("LPIPS with alex needs images of at least 31x31, not 24x72"), "image"),
        (ValueError("train-1.low.png: differs from the image that was packed, out of memory.png"), "image"),
        (RuntimeError("Sizes of tensors must match except in dimension 1"), "image"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_cause_of_an_error(error: Exception, cause: str) -> None:
    assert isinstance(error, FAILURES) and cause_of(error) == cause


def test_the_error_that_torch_raises_where_memory_is_short() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert cause_of(caught.value) == "memory"
