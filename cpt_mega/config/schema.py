"""Every option of a run: its name, type, unit, default and one line of help.

Units stand in the names (``_tokens``, ``_steps``, ``_s``); sizes of batches are in packed rows. A field's constraint is
declared here; what depends on the platform, the model or the files is checked by the room that owns it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Precision = Literal["fp32", "bf16", "fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen group of options; unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# A value of one of megatron-core's own fields, as a file can hold it.
CoreValue = bool | int | float | str | None | tuple[bool | int | float | str, ...]


class RunOptions(Section):
    dir: str = Field(description="folder of the run: status, metrics, checkpoints, exports")
    start_timeout_s: PositiveInt = Field(
        1800, description="longest wait for another process until the first step is done"
    )
    timeout_s: PositiveInt = Field(600, description="longest wait for another process after that; longer is a fault")


class ModelOptions(Section):
    checkpoint: str = Field(description="starting weights: an import, a run folder or an iter_* folder")


class TokenizerOptions(Section):
    path: str | None = Field(None, description="folder or .model file; none: the one stored with model.checkpoint")


class RestoreOptions(Section):
    mode: Literal["weights", "weights+moments", "full", "auto"] = Field(
        "auto",
        description="weights: new run from model.checkpoint; weights+moments: with its Adam moments too; full: continue "
        "exactly; auto: continue run.dir when it holds a checkpoint, else weights",
    )
    accept: tuple[str, ...] = Field(
        (), description="options that may differ from the checkpoint's on a full restore; --accept NAME adds one"
    )

    @property
    def is_new_run(self) -> bool:
        """Whether the mode asks for a run that has not begun yet."""
        return self.mode in ("weights", "weights+moments")


class ParallelOptions(Section):
    tp: PositiveInt = Field(1, description="tensor-parallel size")
    pp: PositiveInt = Field(1, description="pipeline-parallel size")
    vpp: PositiveInt = Field(1, description="model chunks per pipeline rank (interleaved schedule)")
    sp: bool = Field(False, description="sequence parallelism over the tensor-parallel ranks")
    cp: PositiveInt = Field(1, description="context-parallel size")
    ep: PositiveInt = Field(1, description="expert-parallel size")

    @property
    def model_size(self) -> int:
        """Processes that hold one replica of the model."""
        return self.tp * self.pp * self.cp


class TrainOptions(Section):
    tokens: NonNegativeInt = Field(
        description="budget of the run, in tokens of packed documents; 0 evaluates and stops"
    )
    seq_length: PositiveInt = Field(2048, description="tokens of a packed row")
    global_batch_size: PositiveInt = Field(8, description="packed rows per optimizer step")
    micro_batch_size: PositiveInt = Field(1, description="packed rows per forward pass and data-parallel rank")
    seed: NonNegativeInt = Field(1234, description="seed of data order, dropout and anything else that is drawn")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations recomputed in the backward pass"
    )
    deterministic: bool = Field(False, description="only kernels that give the same bits on every run")
    gc_interval_steps: NonNegativeInt = Field(
        100, description="steps between garbage collections, made by all processes together; 0: Python's own"
    )
    replica_check_steps: PositiveInt | None = Field(
        1000, description="steps between checks that replicated parameters are bit-equal; null: never"
    )
    distributed_optimizer: bool = Field(True, description="shard optimizer state over data-parallel ranks")
    dropout: Share = Field(0.0, description="hidden and attention dropout; zero keeps the base model's own function")


class OptimizerOptions(Section):
    lr: float = Field(2e-5, ge=0, description="peak learning rate; 0 changes no weight")
    min_lr: float | None = Field(None, ge=0, description="learning rate at the end; none: 10 % of the peak")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay; none on norms and biases")
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm above which gradients are scaled; 0: never")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second decay")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")


class ScheduleOptions(Section):
    kind: Literal["cosine", "constant", "wsd"] = Field("cosine", description="shape after the warm-up")
    warmup_tokens: NonNegativeInt | None = Field(
        None, description="re-warm from zero over these; none: 1 % of train.tokens"
    )
    decay_tokens: PositiveInt | None = Field(None, description="length of wsd's decay; none: 10 % of train.tokens")


class SourceOptions(Section):
    name: str = Field(min_length=1, description="name in logs and ledgers")
    path: str = Field(description="prefix of the .bin and .idx files")
    role: Literal["domain", "replay", "instruct"] = Field(description="the part this source plays in the mixture")
    weight: float | None = Field(
        None, gt=0, description="share of tokens, relative to the others; none anywhere: replay 20 %"
    )


class CurriculumPoint(Section):
    tokens: NonNegativeInt = Field(description="tokens of the run at which sources have these weights")
    weights: dict[str, float] = Field(description="share of tokens of each source, relative to the others; 0: none")


class AdaptiveOptions(Section):
    interval_tokens: PositiveInt | None = Field(None, description="tokens between decisions; none: weights stay")
    strength: float = Field(1.0, ge=0, description="of a difference of one nat between sources of a role, as exponent")
    bound: float = Field(2.0, ge=1, description="most that a share is multiplied or divided by within its role")


class RowCheckOptions(Section):
    action: Literal["off", "log", "mask", "skip"] = Field(
        "off",
        description="what is done about odd rows: nothing is looked at, written down, no loss, the next row instead",
    )
    max_run: PositiveInt = Field(256, description="equal tokens one behind the other, above which a row is odd")
    max_periodic_share: float = Field(0.75, gt=0, le=1, description="share of tokens that repeat with one period")
    min_unique_share: float = Field(0.02, ge=0, le=1, description="share of different tokens, below which a row is odd")


class DataOptions(Section):
    sources: tuple[SourceOptions, ...] = Field((), description="corpora of the mixture")
    curriculum: tuple[CurriculumPoint, ...] = Field(
        (), description="weights that change with the tokens of the run, linearly between points; instead of fixed ones"
    )
    adaptive: AdaptiveOptions = Field(AdaptiveOptions(), description="weights that follow the losses of sources")
    packing: Literal["best_fit", "concat"] = Field("best_fit", description="how documents fill rows")
    max_epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="passes over any source at most; none: any number"
    )
    at_max_epochs: Literal["stop", "drop"] = Field(
        "stop", description="what a source that is read out does: end the run, or leave its share to the others"
    )
    row_checks: RowCheckOptions = Field(RowCheckOptions(), description="looks at each row before it is trained on")
    exclude: dict[str, tuple[NonNegativeInt, ...]] = Field(
        {}, description="rows of a source, by number in its plan, that are stepped past from here on"
    )


class CheckpointOptions(Section):
    interval_tokens: PositiveInt | None = Field(
        None, description="tokens between permanent checkpoints, each with an evaluation; none: only at the end"
    )
    rolling_interval_tokens: PositiveInt | None = Field(
        None, description="tokens between checkpoints that are only for going on after a stop"
    )
    rolling_interval_minutes: float | None = Field(None, gt=0, description="the same by the clock")
    keep_rolling: PositiveInt = Field(2, description="rolling checkpoints that stay")
    keep_permanent: PositiveInt | None = Field(None, description="permanent checkpoints that stay; none: all")
    asynchronous: bool = Field(
        True, description="write and prove checkpoints beside the training; the last of a run is always waited for"
    )
    export_hf: Literal["none", "final", "best"] = Field(
        "none",
        description="write run.dir/export as an HF checkpoint at the end: the last one, or the best by the gates",
    )


class EvalSetOptions(Section):
    path: str = Field(description="prefix of the held-out .bin and .idx files")
    bucket: Literal["domain", "general", "behaviour", "safety"] = Field(
        description="the bucket its perplexity counts for"
    )


class EvalOptions(Section):
    interval_tokens: PositiveInt | None = Field(
        None, description="tokens between evaluations; none: at step 0 and at the end"
    )
    dense_start: bool = Field(
        True, description="also evaluate at 1/2, 1/4, ... of the first interval, down to 0.5 % of the run"
    )
    sets: tuple[EvalSetOptions, ...] = Field((), description="held-out corpora; one per bucket and probe")
    max_tokens: PositiveInt = Field(262_144, description="tokens of each set that are scored, from its start")


class GateOptions(Section):
    suite: str | None = Field(
        None, description="YAML file of probes that are looked at with eval.sets; see cpt_mega/gates"
    )
    general_perplexity_limit: float | None = Field(
        0.15,
        gt=0,
        description="harm when general perplexity is above its step-0 value by more than this share; null: never",
    )
    action: Literal["warn", "stop", "roll_back", "anneal"] = Field(
        "stop",
        description="what is done about harm: said, end with 80, go back to the last checkpoint that no gate objected to, "
        "end soon with the rate going to zero",
    )
    lr_factor: float = Field(0.5, gt=0, le=1, description="what a rollback by a gate multiplies the learning rate by")
    replay_step: Share = Field(0.1, description="what it adds to the share of replay sources")
    most_rollbacks: NonNegativeInt = Field(2, description="rollbacks by gates after which the run is stopped instead")
    anneal_tokens: PositiveInt | None = Field(
        None, description="tokens in which an annealed run ends; none: schedule.decay_tokens"
    )
    look_share: float | None = Field(
        0.02,
        gt=0,
        le=1,
        description="share of the run's computing that looks with gates.suite may take, by asking fewer items; null: any",
    )
    max_overlap: Share | None = Field(
        0.05,
        description="share of a probe's items found in data.sources above which a run is refused; null: not looked for",
    )


class AnomalyOptions(Section):
    action: Literal["off", "log", "act"] = Field(
        "act",
        description="what is done about steps whose loss or gradient stands out: nothing, written down, the ladder; what is "
        "not finite never comes into the weights",
    )
    window_steps: int = Field(128, ge=16, description="steps whose scatter a step is measured by")
    loss_z: float = Field(8.0, gt=0, description="robust z-score of the loss above which an update is refused")
    clip_z: float = Field(6.0, gt=0, description="that of the gradient norm above which it is scaled down to it")
    skip_z: float = Field(40.0, gt=0, description="that of the gradient norm above which an update is refused")
    lower_lr_after: PositiveInt = Field(
        3, description="refused updates, within the cool-down, from which on the rate is lowered"
    )
    lr_factor: float = Field(0.5, gt=0, le=1, description="what the learning rate is then multiplied by")
    roll_back_after: PositiveInt = Field(
        6, description="refused updates, within the cool-down, after which the run rolls back"
    )
    cool_down_steps: PositiveInt = Field(100, description="steps after the last refused update until all is as before")
    most_rollbacks: NonNegativeInt = Field(3, description="rollbacks after which the run is stopped instead")
    replay: str | None = Field(
        None, description="ledger.jsonl of a run whose decisions are taken, in place of any of this run's own"
    )


class LoggingOptions(Section):
    interval_steps: PositiveInt = Field(10, description="steps between console lines")
    rank_interval_steps: PositiveInt | None = Field(
        100,
        description="steps between comparisons of the processes' own times, by which slow ones are named; null: never",
    )
    tensorboard: bool = Field(True, description="write TensorBoard events to run.dir/tensorboard")
    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases; offline needs no account")
    wandb_project: str = Field("cpt_mega", description="W&B project")


class ProfileOptions(Section):
    start: PositiveInt | None = Field(None, description="first step that is profiled; null: none")
    end: PositiveInt | None = Field(None, description="last step that is profiled; none: the third from the start")
    ranks: tuple[NonNegativeInt, ...] = Field((0,), description="processes that write run.dir/profile")
    memory: bool = Field(False, description="also a snapshot of the CUDA allocator (torch.cuda.memory)")


class Config(Section):
    """The whole configuration of a run. ``model_dump()`` gives plain values for YAML and checkpoints."""

    run: RunOptions
    model: ModelOptions
    tokenizer: TokenizerOptions = TokenizerOptions()
    restore: RestoreOptions = RestoreOptions()
    parallel: ParallelOptions = ParallelOptions()
    precision: Precision = Field(
        "bf16", description="arithmetic of the model; bf16 and FP8 keep fp32 master weights, FP8 needs a GPU"
    )
    train: TrainOptions
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    data: DataOptions = DataOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    eval: EvalOptions = EvalOptions()
    gates: GateOptions = GateOptions()
    anomaly: AnomalyOptions = AnomalyOptions()
    logging: LoggingOptions = LoggingOptions()
    profile: ProfileOptions = ProfileOptions()
    core: dict[str, CoreValue] = Field(
        {}, description="megatron-core's own switches under core's names, e.g. decoupled_lr, overlap_param_gather"
    )

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        problems = {
            "train.global_batch_size: must be a multiple of train.micro_batch_size": (
                self.train.global_batch_size % self.train.micro_batch_size != 0
            ),
            "optimizer.min_lr: must not exceed optimizer.lr": (self.optimizer.min_lr or 0) > self.optimizer.lr,
            "schedule.warmup_tokens: must not exceed train.tokens": (
                (self.schedule.warmup_tokens or 0) > self.train.tokens > 0
            ),
            "checkpoint.export_hf: best is by evaluations; name held-out corpora in eval.sets, or a gates.suite": (
                self.checkpoint.export_hf == "best" and not self.eval.sets and self.gates.suite is None
            ),
            "data.sources: name at least one corpus to train on": self.train.tokens > 0 and not self.data.sources,
            "parallel.sp: needs parallel.tp above 1; set parallel.tp or drop parallel.sp": (
                self.parallel.sp and self.parallel.tp == 1
            ),
            "anomaly.clip_z: must not exceed anomaly.skip_z": self.anomaly.clip_z > self.anomaly.skip_z,
            "anomaly.lower_lr_after: must not exceed anomaly.roll_back_after": (
                self.anomaly.lower_lr_after > self.anomaly.roll_back_after
            ),
            "profile.end: must not come before profile.start": (
                self.profile.start is not None and (self.profile.end or self.profile.start) < self.profile.start
            ),
            "profile.start: is needed where profile.end is set": (
                self.profile.end is not None and self.profile.start is None
            ),
        }
        for sentence, wrong in problems.items():
            if wrong:
                raise ValueError(sentence)
        return self

    @property
    def min_lr(self) -> float:
        """Learning rate at the end of the schedule."""
        return 0.1 * self.optimizer.lr if self.optimizer.min_lr is None else self.optimizer.min_lr
