"""The engine: same result on every number of workers, a state that any of them can load, guarded steps."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from workers import run_workers

from iaml import NetworkSettings, TeacherStudent

STEPS, BATCH = 10, 8


def train(
    zero_stage, accumulation, start, stop, state=None, poison=None, precision="float32", clip=0.5, channels_last=False,
    side=32,
):  # fmt: skip
    """Steps of a small net on fixed samples; returns weights, optimizer state, what each step did, and layouts."""
    import torch.distributed as dist

    from pipeline.training.engine import Engine, OptimizerSettings

    torch.manual_seed(0)
    task = TeacherStudent(NetworkSettings(width=1 / 16))
    if state is not None:
        task.load_state_dict(state["weights"])
        task.updates = state["updates"]
    rank, workers = dist.get_rank(), dist.get_world_size()
    options = {"zero_stage": zero_stage, "precision": precision, "channels_last": channels_last}
    settings = OptimizerSettings(learning_rate=1e-3, clip=clip, **options)
    layouts = layouts_of_maps(task)
    micro = BATCH // workers // accumulation
    engine = Engine(task, settings, micro, accumulation)
    if state is not None:
        engine.load_optimizer_state(state["optimizer"], state["updates"])
    samples = np.random.default_rng(1).integers(
        0, 256, (2, STEPS, accumulation, workers, micro, 3, side, side), np.uint8
    )
    results = []
    for step in range(start, stop):
        low, clean = (torch.from_numpy(images[step, :, rank].copy()) for images in samples)
        if poison == step and rank == workers - 1:
            task.objective.weights["reconstruction"] = math.nan
        result = engine.step(list(zip(low // 8, clean, strict=True)), settings.rate_at(step, STEPS))
        results.append((float(result.losses["loss"]), float(result.grad_norm), bool(result.applied)))
    return {
        "weights": {name: value.clone() for name, value in task.state_dict().items()},
        "optimizer": engine.optimizer_state(),
        "updates": task.updates,
        "steps": results,
        "layouts": layouts,
    }


def layouts_of_maps(task):
    """Counts, while ``task`` runs, of the images and feature maps in each layout, where the two differ."""
    from collections import Counter

    found = Counter()

    def note(module, inputs, output):
        for value in (*(inputs if module is task else ()), output):
            if isinstance(value, torch.Tensor) and value.dim() == 4:
                last, first = value.is_contiguous(memory_format=torch.channels_last), value.is_contiguous()
                if last != first:
                    found["channels last" if last else "channels first"] += 1

    for module in task.modules():
        module.register_forward_hook(note)
    return found


def largest_difference(a, b):
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_two_workers_by_four_equal_one_worker_by_eight(zero_stage):
    one = run_workers(1, train, zero_stage, 1, 0, STEPS)[0]
    two = run_workers(2, train, zero_stage, 1, 0, STEPS)
    assert largest_difference(two[0]["weights"], two[1]["weights"]) == 0
    assert largest_difference(one["weights"], two[0]["weights"]) < 1e-4
    assert largest_difference(one["optimizer"], two[0]["optimizer"]) < 1e-4
    assert np.allclose([norm for _, norm, _ in one["steps"]], [norm for _, norm, _ in two[0]["steps"]], rtol=1e-3)


def step_by_batches(options, batches):
    """A step of a small net, each worker on one of ``batches``: its loss, the weights, and its number of exchanges."""
    import torch.distributed as dist

    from pipeline.training.engine import Engine, OptimizerSettings

    torch.manual_seed(0)
    task = TeacherStudent(NetworkSettings(width=1 / 16))
    settings = OptimizerSettings(learning_rate=1e-3, precision="float32")
    engine = Engine(task, settings, 4, 1, **options)
    batch, exchanges = batches[dist.get_rank()], []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather"):
            exchange = getattr(dist, name)
            patch.setattr(dist, name, lambda *args, _to=exchange, **named: exchanges.append(_to) or _to(*args, **named))
        result = engine.step([batch], 1e-3)
    return float(result.losses["loss"]), {name: value.clone() for name, value in task.state_dict().items()}, exchanges


def test_each_worker_may_normalise_by_its_own_batch():
    numbers = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 256, (2, 2, 4, 3, 64, 64), dtype=torch.uint8, generator=numbers)
    batches[1] //= 3
    alone = [run_workers(1, step_by_batches, {}, batches[[worker]])[0] for worker in range(2)]
    own = run_workers(2, step_by_batches, {"batch_norm": "worker"}, batches)
    shared = run_workers(2, step_by_batches, {"batch_norm": "global"}, batches)
    assert [loss for loss, *_ in own] == pytest.approx([loss for loss, *_ in alone], rel=1e-6)
    assert [loss for loss, *_ in shared] != pytest.approx([loss for loss, *_ in alone], rel=1e-3)
    (_, first, _), (_, second, _) = own
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, value in first.items():
        if name.startswith("student.") and "running" in name:
            expected = (alone[0][1][name].double() + alone[1][1][name].double()) / 2
            assert torch.allclose(value.double(), expected, rtol=1e-5, atol=1e-6)
    layers = sum(name.startswith("student.") and name.endswith("running_mean") for name in first)
    spared = [len(of_shared) - len(of_own) for (*_, of_shared), (*_, of_own) in zip(shared, own, strict=True)]
    assert spared == [2 * layers - 1] * 2  # forward and backward, but for the mean of the running statistics


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_continues_on_another_number_of_workers(zero_stage):
    """Two workers, stopped half way, continued by one and by two: as if never stopped."""
    whole = run_workers(2, train, zero_stage, 1, 0, STEPS)[0]
    half = run_workers(2, train, zero_stage, 1, 0, STEPS // 2)[0]
    same = run_workers(2, train, zero_stage, 1, STEPS // 2, STEPS, half)[0]
    assert largest_difference(whole["weights"], same["weights"]) == 0
    assert largest_difference(whole["optimizer"], same["optimizer"]) == 0
    one = run_workers(1, train, zero_stage, 1, STEPS // 2, STEPS, half)[0]
    assert largest_difference(whole["weights"], one["weights"]) < 1e-4


def test_an_upgrade_of_deepspeed_that_compiles_its_shared_memory_operator_in_spite_of_its_table():
    from deepspeed.comm.torch import build_shm_op

    from pipeline.training.engine import disable_shared_memory_operator

    disable_shared_memory_operator()
    assert build_shm_op() is None


def test_an_upgrade_of_deepspeed_that_links_moments_otherwise():
    """Moments load on every ZeRO stage, to the last bit."""
    for before in (0, 1, 2):
        half = run_workers(2, train, before, 1, 0, 2)[0]
        for after in (0, 1, 2):
            for found in run_workers(2, train, after, 1, 2, 2, half):
                assert largest_difference(half["optimizer"], found["optimizer"]) == 0, (before, after)
        # and training goes on from them, not from copies that the stage leaves alone
        steps = [run_workers(2, train, after, 1, 2, 4, half)[0] for after in (0, 1, 2)]
        for other in steps[1:]:
            assert largest_difference(steps[0]["weights"], other["weights"]) < 1e-5, before
            assert largest_difference(steps[0]["optimizer"], other["optimizer"]) < 1e-5, before


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_accumulation_takes_one_step_over_its_rounds(zero_stage):
    found = run_workers(2, train, zero_stage, 2, 0, 4)[0]
    assert found["updates"] == 4
    assert all(applied for _, _, applied in found["steps"])


def test_an_upgrade_of_deepspeed_that_asks_an_optimizer_otherwise_how_its_step_went():
    steps = run_workers(1, train, 0, 1, 0, 2, None, 1)[0]["steps"]
    assert [applied for _, _, applied in steps] == [True, False]
    assert steps[0][1] > 0 and not math.isfinite(steps[1][1])


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_step_that_is_not_finite_changes_nothing_anywhere(zero_stage):
    """One worker's loss becomes NaN in step 3; neither worker moves weights, moments, statistics or teacher."""
    before = run_workers(2, train, zero_stage, 1, 0, 3)
    after = run_workers(2, train, zero_stage, 1, 0, 4, None, 3)
    for rank in (0, 1):
        assert [applied for _, _, applied in after[rank]["steps"]] == [True, True, True, False]
        assert after[rank]["updates"] == 3
        assert largest_difference(before[rank]["optimizer"], after[rank]["optimizer"]) == 0
    assert largest_difference(before[0]["weights"], after[0]["weights"]) == 0
    assert math.isnan(after[1]["steps"][3][0])


def test_bf16_trains_with_float32_weights():
    plain = run_workers(1, train, 1, 1, 0, 5)[0]
    half = run_workers(1, train, 1, 1, 0, 5, None, None, "bf16")[0]
    assert all(value.dtype == torch.float32 for value in half["weights"].values() if value.is_floating_point())
    assert [loss for loss, _, _ in half["steps"]] == pytest.approx([loss for loss, _, _ in plain["steps"]], rel=0.05)
    assert half["steps"][0][0] != plain["steps"][0][0]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_channels_last_lays_out_every_map_and_changes_nothing_else(zero_stage):
    plain, last = (
        run_workers(2, train, zero_stage, 1, 0, 5, None, None, "float32", 0.5, channels_last, 64)
        for channels_last in (False, True)
    )
    assert largest_difference(last[0]["weights"], last[1]["weights"]) == 0
    assert largest_difference(plain[0]["weights"], last[0]["weights"]) < 1e-4
    assert largest_difference(plain[0]["optimizer"], last[0]["optimizer"]) < 1e-4
    for one, other in zip(plain, last, strict=True):
        assert "channels first" in one["layouts"] and other["layouts"].keys() == {"channels last"}


def test_stage_3_is_refused_with_the_reason():
    from pipeline.settings.optimizer import OptimizerSettings

    with pytest.raises(ValidationError, match="stage 3 shards the weights, which the teacher's average"):
        OptimizerSettings(zero_stage=3)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_checkpoint_may_come_before_the_first_step_that_is_applied(zero_stage):
    found = run_workers(1, train, zero_stage, 1, 0, 1, None, 0)[0]
    assert found["steps"][0][2] is False
    assert all(not moment.any() for moment in found["optimizer"].values())


def device_of_deepspeed(device):
    """The GPU that DeepSpeed makes the current one and trains on, where LOCAL_RANK is 0."""
    from types import SimpleNamespace
    from unittest.mock import Mock, patch

    import deepspeed.runtime.engine as deepspeed_engine

    from pipeline.training.engine import arguments_for

    accelerator = Mock(device_name=lambda index: f"cuda:{index}")
    engine = SimpleNamespace(local_rank=0)
    with (
        patch.object(deepspeed_engine, "get_accelerator", return_value=accelerator),
        patch.object(deepspeed_engine, "dist"),
    ):
        deepspeed_engine.DeepSpeedEngine._set_distributed_vars(engine, arguments_for(torch.device(device)))
    return accelerator.set_device.call_args.args, str(engine.device)


def test_deepspeed_trains_on_the_gpu_of_the_networks_whatever_the_local_rank():
    assert run_workers(1, device_of_deepspeed, "cuda:3") == [((3,), "cuda:3")]


def build_on_another_device():
    """What the engine says, and what it told DeepSpeed, when DeepSpeed takes another device all the same."""
    from types import SimpleNamespace
    from unittest.mock import patch

    import deepspeed

    from pipeline.training import engine

    elsewhere = SimpleNamespace(device=torch.device("cuda:1"))
    with (
        patch.object(deepspeed, "initialize", return_value=[elsewhere]) as initialize,
        patch.object(engine, "arguments_for", side_effect=lambda device: f"train on {device}"),
    ):
        try:
            engine.Engine(TeacherStudent(NetworkSettings(width=1 / 16)), engine.OptimizerSettings(), 1, 1)
        except RuntimeError as error:
            return str(error), initialize.call_args.kwargs["args"]


def test_an_engine_on_another_device_than_the_networks_is_refused():
    ((refusal, told),) = run_workers(1, build_on_another_device)
    assert refusal == "DeepSpeed would train on cuda:1, the networks lie on cpu"
    assert told == "train on cpu"
