"""The recipe: what a run's YAML file may hold, typed and checked in full before anything is loaded."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipeline.errors import ConfigError


def _no_truth_value(value: Any) -> Any:
    """YAML reads `no` and `on` as truth values, which pydantic would take for 0 and 1."""
    if isinstance(value, bool):
        raise ValueError(f"a number is wanted, got the truth value {value} (YAML reads yes, no, on and off as such)")
    return value


Fraction = Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[float, BeforeValidator(_no_truth_value), Field(gt=0.0, le=1.0)]
NonNegative = Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0.0)]
Number = Annotated[float, BeforeValidator(_no_truth_value)]
Range = tuple[Number, Number]
PositiveFloat = Annotated[float, BeforeValidator(_no_truth_value), Field(gt=0.0)]
Positive = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_no_truth_value)]


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class RunConfig(Section):
    """Where the run lives and what every stage shares."""

    dir: Path
    """Folder that receives every file of the run."""
    seed: Seed = 0
    """Seed of initialisation, sampling and drawing."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision; `medium` lets CPUs with AMX and GPUs multiply in bf16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the stages that run without DeepSpeed."""


class ScenesConfig(Section):
    """The embedded data set: how many scenes are drawn, and how."""

    train: Positive = 1500
    """Images of the Train split."""
    val: Positive = 100
    """Images of the val split."""
    test: Positive = 200
    """Images of the Test split."""
    seed: Seed = 0
    """Seed of the scenes; the same seed draws the same bytes."""
    width: Positive = 320
    """Image width in pixels."""
    height: Positive = 192
    """Image height in pixels."""
    corner_share: Fraction = 0.15
    """Share of corner cases among Train and val images."""
    test_corner_share: Fraction = 0.5
    """Share of corner cases among Test images, so that both slices are measured equally well."""
    workers: Positive = 2
    """Drawing processes."""


class DataConfig(Section):
    """The data set that is read."""

    format: Literal["coda_lm", "chat"] = "coda_lm"
    """Layout on disk: CODA-LM's published folders, or chat JSONL files named `<split>.jsonl`."""
    root: Path | None = None
    """Data root; images outside it are refused, links inside it are followed. None: the embedded scenes in
    `<run.dir>/data`."""
    image_roots: tuple[Path, ...] = ()
    """Other folders that records may name images in, as in `../nuscenes/samples/...`."""
    bad_samples: Literal["refuse", "skip"] = "refuse"
    """Broken records: name them all and end, or leave them out; `<index>/<split>/problems.jsonl` lists them."""
    index: Path | None = None
    """Folder of the index, a folder a split; runs on the same data may share it. None: `<run.dir>/index`."""
    train_split: str = "Train"
    """Split for training and soft targets."""
    val_split: str = "val"
    """Split for choosing settings."""
    test_split: str = "Test"
    """Split for the final table; touched by `evaluate` only."""
    min_pixels: Positive = 32 * 32
    """Smallest image area the vision tower sees."""
    max_pixels: Positive = 320 * 192
    """Largest image area the vision tower sees; larger images are scaled down."""
    max_length: Positive = 512
    """Longest sequence in tokens, image tokens included."""
    long_answers: Literal["refuse", "cut"] = "refuse"
    """Name a longer sample and end, or cut its answer; the teacher pass counts the tokens cut."""
    workers: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0)] = 0
    """DataLoader workers per rank."""


class TokenizerConfig(Section):
    """The tokenizer. Either trained on the corpus or taken from a checkpoint folder."""

    path: str | None = None
    """Folder with an existing tokenizer (and processor); None trains sentencepiece on the corpus."""
    vocab_size: Positive = 640
    """Upper bound of the trained vocabulary, special tokens included."""


class TextSize(Section):
    """Decoder sizes, named as in Qwen3-VL's text_config."""

    hidden_size: Positive = 128
    """Width of the residual stream."""
    intermediate_size: Positive = 384
    """Width of the MLP."""
    num_hidden_layers: Positive = 4
    """Decoder layers."""
    num_attention_heads: Positive = 4
    """Query heads."""
    num_key_value_heads: Positive = 2
    """Key and value heads; a divisor of the query heads."""
    head_dim: Positive = 32
    """Width of a head."""


class VisionSize(Section):
    """Vision tower sizes, named as in Qwen3-VL's vision_config."""

    hidden_size: Positive = 96
    """Width of the tower."""
    intermediate_size: Positive = 256
    """Width of its MLP."""
    depth: Positive = 3
    """Tower layers."""
    num_heads: Positive = 4
    """Attention heads."""
    patch_size: Positive = 16
    """Side of a patch in pixels."""
    spatial_merge_size: Positive = 2
    """Side of the square of patches that becomes one image token."""
    deepstack_visual_indexes: tuple[int, ...] = (0,)
    """Tower layers whose features also enter the first decoder layers."""


class UpcycleConfig(Section):
    """How a dense checkpoint becomes a Mixture-of-Experts one."""

    source: str
    """Model reference of the dense checkpoint: `models.NAME`, `jobs.NAME` or a folder."""
    experts: Positive = 4
    """Experts per MoE layer."""
    top_k: Positive = 2
    """Experts per token. 1 is refused: with renormalised weights it gives the router no task gradient."""
    every: Positive = 2
    """Every n-th decoder layer becomes an MoE layer (the 2nd, 4th, ... for 2)."""
    layers: tuple[Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0)], ...] | None = None
    """The decoder layers, from 0, that become MoE layers; in place of `every`."""
    expert_width: PositiveFraction = 1.0
    """Width of an expert as a share of the dense MLP's: 1, 1/2, 1/3, ... Below 1 the MLP is cut into that many
    fine-grained experts, and `experts` and `top_k` are multiples of their number."""
    shared_expert: PositiveFraction | None = None
    """Share of the dense MLP that every token passes, where the architecture has a shared expert (qwen2_moe: None means
    0.5); the routed experts are made from the rest."""
    router_noise: NonNegative = 0.02
    """Standard deviation of the router's initial weights."""
    expert_noise: NonNegative = 0.02
    """Relative noise on each expert copy: identical copies leave the router without gradient."""


class ModelConfig(Section):
    """One model. Exactly one of: `path` (a checkpoint), `text` + `vision` (random weights), `upcycle`."""

    path: str | None = None
    """Checkpoint folder in Hugging Face format."""
    text: TextSize | None = None
    """Decoder of a model with random weights."""
    vision: VisionSize | None = None
    """Vision tower of a model with random weights."""
    upcycle: UpcycleConfig | None = None
    """A Mixture-of-Experts model made from a dense one."""

    @model_validator(mode="after")
    def _exactly_one_origin(self) -> Self:
        origins = [
            self.path is not None,
            self.text is not None or self.vision is not None,
            self.upcycle is not None,
        ]
        if sum(origins) != 1:
            raise ValueError("give exactly one of `path`, `text` and `vision` together, or `upcycle`")
        if origins[1] and (self.text is None or self.vision is None):
            raise ValueError("a model with random weights needs both `text` and `vision`")
        return self


class SketchConfig(Section):
    """Sketches of a teacher's hidden states at image cells and answer tokens (METHOD section 1)."""

    layer: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0)]
    """Hidden states that this decoder layer reads, from 0; the number of layers means those that the LM head reads."""
    dim: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=64, le=1024, multiple_of=64)] = 128
    """Values a sketch has; bytes = 1.03 times that."""
    seed: int = 0
    """Of the random projection."""


class TargetsConfig(Section):
    """The teacher pass and its store."""

    teacher: str = "jobs.teacher"
    """Model reference of the teacher."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision that the teacher computes in; log-probabilities are always taken in float32."""
    device_map: str | dict[str, int | str] | None = None
    """Spread a teacher that one device cannot hold: as in transformers, `auto` or module names and their devices."""
    store: str | None = None
    """Folder or fsspec URL (`s3://bucket/store`) of the store; None: `<run.dir>/store`."""
    codec: Literal["packed", "compact", "sampled"] = "packed"
    """What is kept of a token's distribution. `packed`: the `top_k` most probable tokens, codec error below 1e-5 nats;
    `compact`: the same in a quarter less room, below 1e-3 nats; `sampled`: `draws` random tokens, unbiased."""
    top_k: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1, le=256)] = 32
    """Teacher entries kept per answer token."""
    bits: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=4, le=8)] | None = None
    """Bits of a stored log-probability; None: 7 for `packed`, 5 for `compact`. One less: 4 times the codec error."""
    draws: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1, le=255)] = 64
    """Draws per answer token (`sampled`)."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature the targets are made at; it cannot be changed afterwards."""
    sketches: SketchConfig | None = None
    """Also keep feature sketches; None: soft targets alone."""
    shard_samples: Positive = 512
    """Samples per shard, of shards that are planned from now on."""
    batch_size: Positive = 16
    """Samples per teacher forward."""


class AdaptiveConfig(Section):
    """How `release: adaptive` measures the gap between the student's and the teacher's cross-entropy."""

    samples: Positive = 64
    """Training samples that are held out for it: the job never trains on them. Which ones is drawn by `run.seed`."""
    every: PositiveFraction = 0.05
    """Share of training between two measurements; a measurement is a forward of all held-out samples."""
    ema: Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0.0, lt=1.0)] = 0.5
    """Weight of the past in the gap's running mean."""


class FeatureConfig(Section):
    """Distillation of hidden states against the store's sketches (METHOD sections 3, 6 and 7)."""

    student_layer: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0)]
    """Hidden states that this decoder layer of the student reads, from 0; the number of layers means those that the LM
    head reads. The teacher's layer is `targets.sketches.layer`."""
    weight: NonNegative = 10.0
    """l_f: weight of the feature term; 0 is the same as no `features`."""
    tilt: Range = (1.0, 1.0)
    """beta on feature rows at the start and once all samples are eligible: above 0 hard ones count more, below 0 easy
    ones, `[0, 0]` all alike."""
    release_to: Fraction | None = None
    """t1 of features: share of training at which their release ends; None: that of the KL term."""


class DistillConfig(Section):
    """What the teacher adds to the loss (METHOD section 7). Absent: plain SFT."""

    alpha_start: Fraction = 0.9
    """a0: share of the KL term before release."""
    alpha_end: Fraction = 0.5
    """a1: share of the KL term after release. At 0 the store is no longer read for a released sample."""
    release: Literal["cosine", "linear", "step", "constant", "adaptive"] = "cosine"
    """Shape of the release; `step` falls in four equal steps, `constant` keeps alpha_start (vanilla KD), `adaptive`
    follows the share of the gap to the teacher that is still open on held-out samples."""
    adaptive: AdaptiveConfig = AdaptiveConfig()
    """Settings of `release: adaptive`."""
    release_from: Fraction = 0.5
    """t0: share of training at which release begins."""
    release_to: Fraction = 1.0
    """t1: share of training at which release ends."""
    hardness_delay: NonNegative = 0.15
    """eta: how much later the hardest sample is released, as a share of t1 - t0."""
    gate: bool = True
    """rho: do not chase tokens that the teacher itself gets wrong."""
    gate_scale: PositiveFloat = 1.0
    """s in nats: softness of the gate."""
    token_tilt: Range = (0.0, 0.0)
    """beta on tokens at the start and once all samples are eligible: above 0 hard ones count more, below 0 easy ones,
    `[0, 0]` all alike."""
    features: FeatureConfig | None = None
    """Also distil hidden states; needs `targets.sketches`. Absent: logits alone."""

    @model_validator(mode="after")
    def _release_runs_forwards(self) -> Self:
        if self.release_to < self.release_from:
            raise ValueError(f"release_to {self.release_to} lies before release_from {self.release_from}")
        features_to = self.feature_release.release_to
        if features_to < self.release_from:
            raise ValueError(f"features.release_to {features_to} lies before release_from {self.release_from}")
        return self

    @model_validator(mode="after")
    def _adaptive_settings_are_used(self) -> Self:
        if self.release != "adaptive" and self.adaptive != AdaptiveConfig():
            raise ValueError(
                f"adaptive is set, but release is {self.release!r}; say `release: adaptive`, or leave it out"
            )
        return self

    @property
    def active_features(self) -> FeatureConfig | None:
        """`features`, unless their weight is 0."""
        return self.features if self.features is not None and self.features.weight > 0 else None

    @property
    def feature_release(self) -> "DistillConfig":
        """The release of features: as that of the KL term, but until their own `release_to` if they have one."""
        if self.features is None or self.features.release_to is None:
            return self
        return self.model_copy(update={"release_to": self.features.release_to})


class CurriculumConfig(Section):
    """The hardness-ordered sampler (METHOD section 5). Absent: a seeded uniform shuffle."""

    competence_start: PositiveFraction = 0.9
    """c0: share of samples eligible at the start, easiest first."""
    competence_until: PositiveFraction = 0.2
    """tau_g: share of training at which all samples are eligible."""
    tilt: Range = (0.0, 0.5)
    """beta on samples at the start and once all are eligible: above 0 hard ones are preferred, below 0 easy ones;
    `[0, 0]` draws the eligible uniformly."""
    window_steps: Positive = 50
    """R: optimizer steps per planned window."""
    stratum_floor: Fraction = 0.5
    """Each stratum keeps at least this share of its proportional part of a window."""


class HardnessConfig(Section):
    """Instance hardness (METHOD section 4)."""

    table: Path | None = None
    """Table to start from, as `clkd hardness --student` writes it; None: `<run.dir>/hardness.parquet`."""
    dynamic: bool = True
    """Update the table from the losses of every visit; False keeps the prior."""
    ema: Fraction = 0.7
    """mu: weight of the past in D_i."""
    gate: bool = True
    """Count a token little where the teacher itself is wrong by more than 2 `gate_scale`. Needs `distill.gate`."""
    tail_weight: Fraction = 0.5
    """k: weight of the hardest tokens' mean against the plain mean."""
    tail_share: PositiveFraction = 0.2
    """Share of a sample's tokens that counts as its hardest."""
    half_life_epochs: PositiveFloat = 1.0
    """Epochs after which an unvisited entry has relaxed half-way to its stratum's mean."""


class RouterConfig(Section):
    """Router losses, per MoE layer, padding excluded."""

    balance: NonNegative = 0.01
    """l_b: weight of the load-balance loss."""
    z: NonNegative = 1e-3
    """l_z: weight of the router z-loss."""


class NativeMoeConfig(Section):
    """DeepSpeed's own MoE layer, for jobs with `moe_layer: native`. As it stands it drops nothing, like AutoEP."""

    drop_tokens: bool = False
    """Let an expert take at most its capacity of each rank's tokens; the least probable routes go first."""
    capacity_factor: PositiveFloat = 1.25
    """Capacity in training, as a multiple of an expert's even share: tokens x experts per token / experts."""
    eval_capacity_factor: PositiveFloat = 2.0
    """The same in evaluation."""
    min_capacity: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0)] = 0
    """Smallest capacity in tokens; 0 suits decoding, where a rank brings one token per sample."""
    use_rts: bool = False
    """Random token selection: drop routes at random in training, instead of the least probable ones."""
    use_residual: bool = False
    """Residual MoE (PR-MoE): an MLP beside the experts. No Hugging Face layout holds it: such a job is not exported."""

    @model_validator(mode="after")
    def _selection_needs_dropping(self) -> Self:
        if self.use_rts and not self.drop_tokens:
            raise ValueError("use_rts chooses the tokens that are dropped; it needs drop_tokens: true")
        return self


class JobConfig(Section):
    """One training job. The loop is the same for SFT, vanilla KD and CLKD: only these values differ."""

    init: str
    """Model reference of the starting weights: `models.NAME`, `jobs.NAME` or a folder."""
    steps: Positive
    """Optimizer steps."""
    global_batch_size: Positive = 32
    """Samples per optimizer step over all ranks and accumulation steps."""
    micro_batch_size: Positive = 16
    """Samples per forward on one rank."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    min_lr_share: Fraction = 0.05
    """Learning rate at the end, as a share of the peak (cosine)."""
    warmup_share: Fraction = 0.05
    """Share of steps with linear warm-up."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or plain SGD without momentum."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's two moments."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of AdamW; SGD takes it as an L2 term."""
    grad_clip: NonNegative = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    trainable: Literal["all", "mlp_and_router", "language"] = "all"
    """Which parameters train."""
    vision_words: NonNegative = 0.0
    """Weight of the word alignment of image tokens (`pipeline.benchmark.word_alignment`): for random weights."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    distill: DistillConfig | None = None
    """The teacher's part; absent: plain SFT."""
    curriculum: CurriculumConfig | None = None
    """Hardness-ordered sampling; absent: a uniform shuffle."""
    hardness: HardnessConfig = HardnessConfig()
    """How the hardness table follows training."""
    router: RouterConfig = RouterConfig()
    """Losses of the MoE routers."""
    moe_layer: Literal["autoep", "native"] = "autoep"
    """DeepSpeed's layer for experts: AutoEP, or `deepspeed.moe.layer.MoE` (drops tokens, has no ZeRO-3). How many ranks
    share a layer's experts is `expert_parallel.autoep_size` of the DeepSpeed JSON for both."""
    native_moe: NativeMoeConfig = NativeMoeConfig()
    """Settings of `moe_layer: native`."""
    checkpoint_every: Positive = 100
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept."""
    log_every: Positive = 5
    """Steps between metric lines."""

    @model_validator(mode="after")
    def _native_settings_are_used(self) -> Self:
        if self.moe_layer != "native" and self.native_moe != NativeMoeConfig():
            raise ValueError("native_moe is set, but moe_layer is not native; say `moe_layer: native`, or leave it out")
        return self


class EvaluationRow(Section):
    """One row of the result table."""

    name: str
    """Label in table and report."""
    model: str
    """Model reference."""
    blind: bool = False
    """Blank the image: what the text alone gives away."""


class EvaluationConfig(Section):
    """The result table."""

    rows: tuple[EvaluationRow, ...] = ()
    """Rows in order. The first is the teacher that ratios refer to."""
    limit: Positive | None = None
    """Samples per task and slice; None: all of the test split."""
    batch_size: Positive = 32
    """Questions answered at once; latency is always timed at batch 1."""
    max_new_tokens: Positive = 96
    """Longest answer in tokens."""
    latency_samples: Positive = 8
    """Samples timed at batch 1."""
    latency_repeats: Positive = 3
    """Timings of each sample, models interleaved; medians are reported."""


class Recipe(Section):
    """A whole run."""

    run: RunConfig
    scenes: ScenesConfig = ScenesConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    models: dict[str, ModelConfig] = {}
    targets: TargetsConfig = TargetsConfig()
    jobs: dict[str, JobConfig] = {}
    job: str | None = None
    """The job that `train.py` runs: a key of `jobs`. Usually given on the command line as `job=NAME`."""
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _references_exist(self) -> Self:
        problems = [p for where, ref in self._references() if (p := self._reference_problem(where, ref))]
        if self.job is not None and self.job not in self.jobs:
            problems.append(f"job: no such job {self.job!r}; jobs: {sorted(self.jobs)}")
        for name, job in self.jobs.items():
            if job.global_batch_size % job.micro_batch_size:
                problems.append(
                    f"jobs.{name}: global_batch_size {job.global_batch_size} is not a multiple of "
                    f"micro_batch_size {job.micro_batch_size}"
                )
            if job.distill and job.distill.active_features and self.targets.sketches is None:
                problems.append(
                    f"jobs.{name}.distill.features: the store keeps no feature sketches. Set targets.sketches, as in "
                    "`targets.sketches: {layer: 6}`, and run the teacher pass again; or leave `features` out"
                )
        for name, model in self.models.items():
            if model.upcycle and not 2 <= model.upcycle.top_k <= model.upcycle.experts:
                problems.append(
                    f"models.{name}.upcycle: top_k {model.upcycle.top_k} is not between 2 and "
                    f"experts {model.upcycle.experts}"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _references(self) -> list[tuple[str, str]]:
        refs = [(f"jobs.{name}.init", job.init) for name, job in self.jobs.items()]
        refs += [(f"models.{n}.upcycle.source", m.upcycle.source) for n, m in self.models.items() if m.upcycle]
        refs += [(f"evaluation.rows[{i}].model", row.model) for i, row in enumerate(self.evaluation.rows)]
        if any(job.distill or job.curriculum for job in self.jobs.values()):
            refs.append(("targets.teacher", self.targets.teacher))
        return refs

    def _reference_problem(self, where: str, ref: str) -> str | None:
        for kind, table in (("models.", self.models), ("jobs.", self.jobs)):
            if ref.startswith(kind) and ref.removeprefix(kind) not in table:
                return f"{where}: no such entry {ref!r}; {kind[:-1]}: {sorted(table)}"
        return None

    @property
    def data_root(self) -> Path:
        """Root of the data set that is read."""
        return self.data.root or self.run.dir / "data"

    @property
    def index_dir(self) -> Path:
        """Folder of the index, one folder in it for each split."""
        return self.data.index or self.run.dir / "index"

    @property
    def processor_dir(self) -> Path:
        """Folder of the tokenizer and image processor."""
        return Path(self.tokenizer.path) if self.tokenizer.path else self.run.dir / "processor"

    @property
    def store_url(self) -> str:
        """Folder or URL of the soft-target store."""
        return self.targets.store or str(self.run.dir / "store")

    def model_dir(self, ref: str) -> Path:
        """Folder of the Hugging Face checkpoint that a model reference names."""
        if ref.startswith("jobs."):
            return self.job_dir(ref.removeprefix("jobs.")) / "model"
        if ref.startswith("models."):
            name = ref.removeprefix("models.")
            path = self.models[name].path
            return Path(path) if path else self.run.dir / "models" / name
        return Path(ref)

    def job_dir(self, name: str) -> Path:
        """Folder of one training job: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `model/`."""
        return self.run.dir / "jobs" / name

    def selected_job(self) -> tuple[str, JobConfig]:
        """The job named by `job`; a ConfigError names the choices when there is none."""
        if self.job is None:
            raise ConfigError(f"job: say which job to train, as in `job=NAME`; jobs: {sorted(self.jobs)}")
        return self.job, self.jobs[self.job]
