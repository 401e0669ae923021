"""What worker processes do for tests, through public doors; arguments and results are JSON."""

import errno
import gc
import io
import itertools
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import serialization
from torch.distributed.checkpoint import FileSystemWriter

from cpt_mega.checkpoint import background
from cpt_mega.checkpoint.saving import CheckpointSave, weights_name
from cpt_mega.checkpoint.trainer_state import TrainerState
from cpt_mega.config import load_config
from cpt_mega.config.load import build_config
from cpt_mega.config.schema import ParallelOptions
from cpt_mega.data.stream import MixedStream
from cpt_mega.engine import step as engine_step
from cpt_mega.engine.context import filled_lengths, gathered_order, rank_positions
from cpt_mega.engine.fast_paths import environment
from cpt_mega.engine.memory import explained
from cpt_mega.engine.mesh import start_mesh, stop_mesh
from cpt_mega.engine.platform import check_layout
from cpt_mega.engine.precision import precision_fields
from cpt_mega.engine.reach import exchange
from cpt_mega.engine.replicas import differing_replicas
from cpt_mega.engine.state import EngineSave, filesystem_async, load_everything, load_weights
from cpt_mega.engine.step import Engine
from cpt_mega.errors import FaultError, InputError
from cpt_mega.hf.locate import locate_checkpoint
from cpt_mega.hf.model_info import read_model_info
from cpt_mega.hf.shape import ModelShape
from cpt_mega.hf.weights import ModelNames
from cpt_mega.loop import evaluation, hangs, lease
from cpt_mega.loop.housekeeping import collected_together
from cpt_mega.loop.prefetch import Prefetcher
from cpt_mega.loop.run_folder import METRICS, read_lines
from cpt_mega.loop.scoring import score_file
from cpt_mega.loop.session import run_session
from cpt_mega.train import main


def train(config: str, overrides: list[str]) -> list[str]:
    """A whole run, as ``python -m cpt_mega.train`` has it; returns ``[state, reason]``."""
    return list(run_session(load_config(config, overrides), "the same command"))


def reach(world: int, wait_s: float) -> float:
    """An exchange between processes as if each were a machine."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return exchange(address, int(os.environ["RANK"]), world, wait_s)


def command(words: list[str]) -> list:
    """``python -m cpt_mega.train`` with these words; returns its exit code and what it printed."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(words)
    return [code, out.getvalue(), err.getvalue()]


def train_and_lose_the_folder(config: str, overrides: list[str]) -> list[str]:
    """A run whose folder is taken by ``pid 7 on elsewhere`` after its first steps; the error that it ends with."""
    options, lease_s = load_config(config, overrides), lease.BEAT_S
    folder = Path(options.run.dir)

    def lose() -> None:
        while not (folder / METRICS).is_file() or len(read_lines(folder / METRICS)) < 2:
            time.sleep(0.01)
        other = replace(lease.Owner.here(), host="elsewhere", pid=7)
        (folder / "new").write_bytes(other.document(0))
        os.replace(folder / "new", folder / lease.LEASE)

    lease.BEAT_S = 0.02
    if os.environ["RANK"] == "0":
        threading.Thread(target=lose, daemon=True).start()
    try:
        run_session(options, "the same command")
    except FaultError as error:
        return [type(error).__name__, str(error)]
    finally:
        lease.BEAT_S = lease_s
    return []


def score(checkpoint: str, source: str, target: str, overrides: list[str]) -> int:
    """The public scorer."""
    return int(score_file(checkpoint, source, target, overrides))


def transformers_logits(folder: str, ids: list[int]) -> list:
    """Logits of the reference, computed in a process that has the host's stand-ins and a process group."""
    from transformers import AutoModelForCausalLM

    start_mesh(ParallelOptions(), seed=1)
    try:
        model = AutoModelForCausalLM.from_pretrained(Path(folder), dtype=torch.float32).eval()
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].tolist()
    finally:
        stop_mesh()


def refusal(shape: dict, world: int, overrides: list[str]) -> str | None:
    """What a layout is refused for, or None."""
    values = {"run": {"dir": "."}, "model": {"checkpoint": "."}, "train": {"tokens": 0}}
    try:
        check_layout(build_config(values, overrides), ModelShape.from_json(shape), world)
    except InputError as error:
        return str(error)
    return None


def context_parts(lengths: list[int], size: int) -> dict:
    """How documents are shared over context-parallel ranks."""
    filled = filled_lengths(lengths, size)
    return {
        "filled": filled,
        "positions": [rank_positions(lengths, size, rank).tolist() for rank in range(size)],
        "order": gathered_order(filled, size).tolist(),
    }


def cuda_environment(parallel: dict, deterministic: bool, capability: list[int]) -> dict:
    """The variables that would be set for CUDA, without their reasons."""
    chosen = environment(ParallelOptions(**parallel), deterministic, tuple(capability))
    return {name: value for name, (value, _) in chosen.items()}


def recipe_in_core(precision: str) -> dict:
    """What core's configuration holds of a precision."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    core = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, **precision_fields(precision))
    return {"bf16": core.bf16, "fp8": core.fp8, "fp8_recipe": str(getattr(core.fp8_recipe, "value", core.fp8_recipe))}


def differing_replicas_after_a_flip(config: str, overrides: list[str], rank: int | None, name: str) -> list[str]:
    """What the replica check says of a model in which one rank has one bit of one parameter flipped."""
    options = load_config(config, overrides)
    mesh = start_mesh(options.parallel, options.train.seed)
    try:
        folder = locate_checkpoint(options.model.checkpoint)
        engine = Engine(options, read_model_info(folder).shape, mesh)
        load_weights(engine, folder)
        if mesh.rank == rank:
            values = dict(engine.core_chunks[0].named_parameters())[name].detach()
            words = values.view({2: torch.int16, 4: torch.int32}[values.element_size()]).view(-1)
            words[len(words) // 2] ^= 1
        return differing_replicas(engine)
    finally:
        stop_mesh()


def memory_sentence(config: str, overrides: list[str]) -> str:
    """What is said when a training step runs out of memory."""
    options = load_config(config, overrides)
    mesh = start_mesh(options.parallel, options.train.seed)
    try:
        engine = Engine(options, read_model_info(locate_checkpoint(options.model.checkpoint)).shape, mesh)
        with explained(options, engine):
            raise torch.OutOfMemoryError("CUDA out of memory")
    except FaultError as error:
        return str(error)
    finally:
        stop_mesh()


def swiglu_as_autograd_has_it() -> dict[str, bool]:
    """Whether core's SwiGLU on the host gives the bits of the plain formula: output, gradient."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    torch.manual_seed(1)
    values, grad = torch.randn(7, 1, 22), torch.randn(7, 1, 11)
    plain, fused = (values.clone().requires_grad_() for _ in range(2))
    gate, up = plain.chunk(2, dim=-1)
    expected, found = torch.nn.functional.silu(gate) * up, bias_swiglu_impl(fused, None)
    expected.backward(grad)
    found.backward(grad)
    return {"output": torch.equal(expected, found), "gradient": torch.equal(plain.grad, fused.grad)}


def adam_beside_torchs(steps: int) -> float:
    """How far HostAdam gets from torch's AdamW in some steps, at most (absolute)."""
    from cpt_mega.engine.host_kernels import HostAdam

    torch.manual_seed(1)
    start, options = torch.randn(50), {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pairs = [(ours, HostAdam([ours], **options)), (theirs, torch.optim.AdamW([theirs], **options))]
    for _ in range(steps):
        grad = torch.randn(50)
        for parameter, optimizer in pairs:
            parameter.grad = grad.clone()
            optimizer.step()
    return (ours - theirs).abs().max().item()


def collector_states(interval: int) -> list[bool]:
    """Whether Python's garbage collector is on before, during and after a run's part."""
    states = [gc.isenabled()]
    with collected_together(interval):
        states.append(gc.isenabled())
    return [*states, gc.isenabled()]


def wait_for_a_process_that_does_not_come(limit_s: float, absent_s: float) -> float | None:
    """Seconds until rank 0 gave up a collective that rank 1 does not join; None on rank 1."""
    mesh = start_mesh(ParallelOptions(tp=2), seed=1, timeout_s=600)
    mesh.set_timeout(limit_s)
    begin = time.monotonic()
    try:
        if mesh.rank:
            time.sleep(absent_s)
            return None
        dist.all_reduce(torch.ones(1), group=mesh.groups.tp)
        raise AssertionError("the other process came")
    except RuntimeError:
        return time.monotonic() - begin
    finally:
        stop_mesh()


def load_folder(config: str, folder: str) -> None:
    """Loads the weights of a folder, without looking at its seal."""
    options = load_config(config)
    mesh = start_mesh(options.parallel, options.train.seed)
    try:
        shape = read_model_info(locate_checkpoint(options.model.checkpoint)).shape
        load_weights(Engine(options, shape, mesh), Path(folder))
    finally:
        stop_mesh()


@contextmanager
def _saver(config: str, overrides: list[str]):
    """An engine with a checkpoint's weights, and what begins a save of it at a step."""
    options = load_config(config, overrides)
    mesh = start_mesh(options.parallel, options.train.seed)
    try:
        start = locate_checkpoint(options.model.checkpoint)
        info = read_model_info(start)
        engine, names = Engine(options, info.shape, mesh), ModelNames.of(info.shape)
        load_weights(engine, start)

        def begin(step: int) -> CheckpointSave:
            state = TrainerState("run", "parent", step=step)
            return CheckpointSave(
                Path(options.run.dir), engine, state, start, names, waits=not options.checkpoint.asynchronous
            )

        yield engine, begin
    finally:
        stop_mesh()


def _spoil(engine: Engine, value: float) -> None:
    """Every weight and every moment overwritten, in place."""
    with torch.no_grad():
        for chunk in engine.core_chunks:
            for parameter in chunk.parameters():
                parameter.fill_(value)
        for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
            for state in part.optimizer.state.values():
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment].fill_(value)


def save_and_overwrite(config: str, overrides: list[str]) -> str:
    """Everything is overwritten as soon as a save has begun; returns the folder."""
    with _saver(config, overrides) as (engine, begin):
        save = begin(1)
        _spoil(engine, 777.0)
        return str(save.to_its_end())


def load_and_save(config: str, overrides: list[str], source: str) -> str:
    """A checkpoint's whole state, taken up at this layout and saved again; returns the folder."""
    with _saver(config, overrides) as (engine, begin):
        load_everything(engine, Path(source), same_layout=False)
        return str(begin(1).to_its_end())


def save_twice_with_moved_storage(config: str, overrides: list[str]) -> list[str]:
    """A save, then all weights in other memory with other values, then a save; returns both folders."""
    with _saver(config, overrides) as (engine, begin):
        folders = [begin(1).to_its_end()]
        for chunk in engine.core_chunks:
            for parameter in chunk.parameters():
                parameter.data = parameter.data.clone() + 1
        folders.append(begin(2).to_its_end())
        return [str(folder) for folder in folders]


def save_torn(config: str, overrides: list[str], how: str) -> None:
    """A save of which something else than the run's tensors comes to disk."""
    write, write_item = EngineSave.write, filesystem_async._write_item
    if how == "writer killed":
        filesystem_async._write_item = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
    with _saver(config, overrides) as (engine, begin):

        def torn(save: EngineSave) -> dict:
            if how == "stale":
                for _, _, (_, tensors) in save._buckets:
                    tensors[-1][1].view(-1)[-1] += 1
            found = write(save)
            if how == "flipped" and engine.mesh.is_main:
                building = next(Path(load_config(config, overrides).run.dir).glob("checkpoints/.building*"))
                file = building / "__0_0.distcp"
                content = bytearray(file.read_bytes())
                values = [p.detach().flatten()[:8].numpy().tobytes() for p in engine.core_chunks[0].parameters()]
                places = [content.find(value) for value in values]
                content[max(places)] ^= 1
                file.write_bytes(content)
            if how == "killed" and engine.mesh.is_main:
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "failed" and engine.mesh.is_main:
                raise OSError("the disk is gone")
            return found

        EngineSave.write = torn
        try:
            save = begin(1)
            while not save.is_ready() or save.proceed() is None:
                time.sleep(0.01)
        finally:
            EngineSave.write, filesystem_async._write_item = write, write_item


def save_without_room_for_what_one_writes(config: str, overrides: list[str], what: str) -> str:
    """What each rank is told when core's index, or the file that names its format, cannot be written by the main process."""
    owner, name = {"index": (FileSystemWriter, "finish"), "format": (serialization, "save_config")}[what]
    plain = getattr(owner, name)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with _saver(config, overrides) as (_, begin):
        setattr(owner, name, full)
        try:
            begin(1).to_its_end()
        except FaultError as error:
            return str(error)
        finally:
            setattr(owner, name, plain)
    return "it was written"


def train_while_a_corpus_changes(config: str, overrides: list[str], prefix: str, rows: int, how: str) -> None:
    """A run, one of whose corpora is replaced, written to or cut when the main process has read some rows."""

    def change(count: int) -> None:
        if count == rows and os.environ.get("RANK", "0") == "0":
            path = Path(f"{prefix}.bin")
            if how == "cut":
                os.truncate(path, 0)
            else:
                beside = path.with_name("beside")
                beside.write_bytes(bytes(path.stat().st_size))
                os.replace(beside, path)

    with _each_row_read(change):
        run_session(load_config(config, overrides), "the same command")


def train_on_a_full_disk(config: str, overrides: list[str]) -> None:
    """A run whose disk has a kilobyte left."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=1024)
    try:
        run_session(load_config(config, overrides), "the same command")
    finally:
        shutil.disk_usage = usage


def save_through_a_signal_to_all(config: str, overrides: list[str]) -> str:
    """A save, and SIGTERM to every process of it while it is written, as a scheduler sends it; returns its folder."""
    with _saver(config, overrides) as (_, begin):
        before = psutil.Process().children(recursive=True)
        save = begin(1)
        (writer,) = set(psutil.Process().children(recursive=True)) - set(before)
        writer.send_signal(signal.SIGTERM)
        return str(save.to_its_end())


def train_with_a_writer_that_stands_still(config: str, overrides: list[str]) -> list[str]:
    """A run in which every forked process waits for a lock that nobody has any more, where it should write."""
    write, parent = EngineSave.write, os.getpid()
    limits = background.STILL_S, background._LOOK_S
    background.STILL_S, background._LOOK_S = 0.5, 0.1

    def standing_still(save: EngineSave):
        while os.getpid() != parent and dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(1000)
        return write(save)

    EngineSave.write = standing_still
    try:
        return train(config, overrides)
    finally:
        EngineSave.write = write
        background.STILL_S, background._LOOK_S = limits


def memory_of_saves(config: str, overrides: list[str], saves: int) -> list[int]:
    """Resident bytes of this process after each of some saves."""
    sizes = []
    with _saver(config, overrides) as (_, begin):
        for step in range(1, saves + 1):
            shutil.rmtree(begin(step).to_its_end())
            sizes.append(psutil.Process().memory_info().rss)
    return sizes


def name_of_weights(config: str, overrides: list[str]) -> str:
    """The name of the model that an engine holds."""
    with _saver(config, overrides) as (engine, _):
        return weights_name(engine, ModelNames.of(engine.shape))


@contextmanager
def _each_row_read(first: Callable[[int], None]) -> Iterator[None]:
    """Calls ``first(number)`` before this process reads its so many-th row."""
    read, numbers = MixedStream.read, itertools.count()

    def reading(stream, ref):
        first(next(numbers))
        return read(stream, ref)

    MixedStream.read = reading
    try:
        yield
    finally:
        MixedStream.read = read


@contextmanager
def _spoiled(first: Callable[[Engine], None], before_update: Callable[[Engine], None], factor: float, steps: list[int]):
    """Does something before some of a process' steps and before their updates, and multiplies their learning rate."""
    step, norm, rated = Engine.train_step, engine_step.gradient_norm, engine_step.set_learning_rate
    numbers, now = itertools.count(1), [None, 0]

    def stepping(engine, *args, **options):
        now[:] = [engine, next(numbers)]
        if now[1] in steps:
            first(engine)
        return step(engine, *args, **options)

    def measured(optimizer):
        if now[1] in steps:
            before_update(now[0])
        return norm(optimizer)

    def rating(optimizer, options, rate):
        times = factor if now[1] in steps else 1.0
        return rated(optimizer, options, lambda peak, floor: times * rate(peak, floor))

    Engine.train_step, engine_step.gradient_norm, engine_step.set_learning_rate = stepping, measured, rating
    try:
        yield
    finally:
        Engine.train_step, engine_step.gradient_norm, engine_step.set_learning_rate = step, norm, rated


def _spoil_weights(engine: Engine) -> None:
    """As from a spoilt collective: on every process. In fp32 what is updated are views of these."""
    with torch.no_grad():
        for parameter in engine.core_chunks[0].parameters():
            parameter.mul_(-1e3)


def _spoil_gradient(engine: Engine, how: str) -> None:
    """One element, on the last process."""
    if dist.get_rank() != dist.get_world_size() - 1:
        return
    gradient = max((p.main_grad for p in engine.core_chunks[0].parameters()), key=lambda grad: grad.abs().max())
    place = int(gradient.abs().argmax())
    gradient.view(-1)[place] = math.nan if how == "nan" else gradient.view(-1)[place] * 2.0**64  # a bit of its exponent


def train_spoiled(config: str, overrides: list[str], how: str, steps: list[int]) -> list[str]:
    """A run in which something goes wrong at some of the steps that a process makes: nan, bit, weight or rate."""
    first = _spoil_weights if how == "weight" else lambda engine: None
    before = partial(_spoil_gradient, how=how) if how in ("nan", "bit") else lambda engine: None
    with _spoiled(first, before, 100.0 if how == "rate" else 1.0, steps):
        return train(config, overrides)


def train_with_a_process_that_hangs(config: str, overrides: list[str], rows: int, hangs_s: float) -> None:
    """A run in which the last process waits for its corpus, after some rows, for longer than the others wait for it."""

    def hanging(number):
        if number == rows and dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(hangs_s)

    with _each_row_read(hanging):
        train(config, overrides)


def train_with_a_slow_process(config: str, overrides: list[str], slow_s: float) -> None:
    """A run whose last process takes longer than the others in every forward and backward pass."""
    losses = Engine._losses

    def slowly(engine, *args, **options):
        if dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(slow_s)
        return losses(engine, *args, **options)

    Engine._losses = slowly
    try:
        train(config, overrides)
    finally:
        Engine._losses = losses


def train_slowly_and_fail(config: str, overrides: list[str], rows: int, slow_s: float) -> None:
    """A run with one row that takes longer than a watchdog waits that is set too short, and one later that cannot be read."""

    def slow(number):
        if number == rows:
            time.sleep(slow_s)
        if number == rows + 15:
            raise OSError("the disk is gone")

    share, hangs._SHARE = hangs._SHARE, 0.05
    try:
        with _each_row_read(slow):
            train(config, overrides)
    finally:
        hangs._SHARE = share


def train_with_a_reader_that_fails(config: str, overrides: list[str], rows: int) -> None:
    """A run whose corpus can no longer be read after some rows of this process."""

    def failing(number):
        if number >= rows:
            raise OSError("the disk is gone")

    with _each_row_read(failing):
        train(config, overrides)


def train_and_signal(config: str, overrides: list[str], moment: str) -> list:
    """A run whose last process alone gets SIGTERM, once; ``[state, reason]``.

    In its ``start-up``, in its first ``evaluation`` or ``last evaluation``, in its ``loader``, or within a slow ``save``.
    """
    me, sent = os.getpid(), itertools.count()

    def send() -> None:
        if dist.get_rank() == dist.get_world_size() - 1 and not next(sent):
            os.kill(me, signal.SIGTERM)

    look, write, init, judge = evaluation.take_look, EngineSave.write, Engine.__init__, evaluation.Evaluation._judge

    def looking(*arguments):
        if moment == "evaluation":
            send()
        return look(*arguments)

    def judging(evaluating, trainer):
        if moment == "last evaluation" and trainer.ends_here:
            send()
        judge(evaluating, trainer)

    def writing(save):
        if moment == "save":
            send()
            time.sleep(1)
        return write(save)

    def building(engine, *args, **options):
        if moment == "start-up":
            send()
        init(engine, *args, **options)

    evaluation.take_look, EngineSave.write, Engine.__init__ = looking, writing, building
    evaluation.Evaluation._judge = judging
    try:
        with _each_row_read(lambda number: send() if moment == "loader" and number == 9 else None):
            return train(config, overrides)
    finally:
        evaluation.take_look, EngineSave.write, Engine.__init__ = look, write, init
        evaluation.Evaluation._judge = judge


def interrupt_twice_in_the_loader(config: str, overrides: list[str]) -> list:
    """``[exit code, seconds]`` of a run that waits for a row that does not come, from the first of two SIGINTs on."""
    comes, begin = threading.Event(), []

    def stuck(number):
        if number == 9:
            while not _is_in(threading.main_thread(), Prefetcher.next):
                time.sleep(0.01)
            time.sleep(0.1)
            begin.append(time.monotonic())
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.3)
            comes.wait(60)

    with _each_row_read(stuck):
        code = main(["--config", config, *overrides])
        took = time.monotonic() - begin[0]
        comes.set()
        for thread in threading.enumerate():  # the one that reads ahead still holds the engine
            if thread.name.startswith("prefetch"):
                thread.join()
        return [code, took]


def _is_in(thread: threading.Thread, function: Callable) -> bool:
    frame = sys._current_frames()[thread.ident]
    return any(found.f_code is function.__code__ for found, _ in traceback.walk_stack(frame))
