"""The configuration: one typed dataclass a room, every field read by exactly that room.

A file in configs/ returns a `Config` from `get_config()`; flags such as `--config.grpo.beta=0.02`
override single fields. The dataclasses are mutable only because ml_collections' config_flags sets
attributes; nothing writes to them after start-up. `validate` lists every error at once.

Paths (`model.path`, `encoder.path`, `data.train`, ...) are a local folder or file, a Hugging Face
hub id, or `asset:NAME`, which `grpo_jax.assets` fetches or builds once into the user's cache.

Annotations are real types here, not strings, and optional ones are written Optional[...]:
config_flags looks at them.
"""
# ruff: noqa: UP045

from dataclasses import dataclass, field
from typing import Any, Optional


@dataclass
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on linear layers; rank 0 trains the whole model."""

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)  # or q_proj, ...; all-linear: but the output matrix
    path: str = ""  # a PEFT adapter that the first training stage starts from; '': a fresh one


@dataclass
class Model:
    """The policy."""

    path: str = ""
    dtype: str = "float32"  # of activations and matrix products: float32 or bfloat16
    param_dtype: str = "float32"  # of trained parameters; float32 under bfloat16 = master weights
    remat: bool = True  # recompute each layer in the backward pass
    remat_policy: str = "full"  # what is recomputed: full (all), dots (all but the products)
    padding_free: bool = True  # train on the tokens that count, attention apart
    lora: Lora = field(default_factory=Lora)


@dataclass
class Encoder:
    """The frozen sentence encoder behind the semantic reward, and the judge beside it."""

    path: str = ""
    dtype: str = "float32"
    max_length: Optional[int] = None  # tokens; None: as the encoder's folder says
    batch_size: int = 64  # texts at a time; they are sorted into length buckets
    # What goes before every text: the name of a prompt in the encoder's folder ('' takes the
    # folder's default, if it has one), or the text itself, such as "query: " ('' takes none).
    prompt_name: str = ""
    prompt: Optional[str] = None
    # Of folders without modules.json. '' means mean, or lasttoken for a causal language model.
    pooling: str = ""  # mean, cls, max, weightedmean, lasttoken or mean_sqrt_len_tokens
    normalize: Optional[bool] = None  # None: only if modules.json says so
    judge: tuple[str, ...] = ()  # other encoders, used by evaluation only


@dataclass
class Data:
    """Parallel text and how it becomes prompts."""

    # PATH:SPLIT picks a data set's split. What dev and test do not name is cut from `train`, by
    # group, and then needs a fraction above 0.
    train: str = ""
    dev: str = ""
    test: str = ""
    hub_config: str = ""  # the configuration name of a Hugging Face dataset
    source_field: str = "source"
    target_field: str = "target"
    group_field: str = ""  # '' means that every row is its own group
    target_optional: bool = False  # monolingual rows are welcome (source-anchored reward)
    on_bad_row: str = "error"  # or "skip"
    dev_fraction: float = 0.05
    test_fraction: float = 0.05
    max_rows: int = 0  # 0 means all; taken after the split, in a seeded order
    cold_start_rows: int = 0  # rows that only SFT sees; 0: SFT and GRPO both use all rows
    prompt: str = "Translate to English: {source}"
    system: str = ""  # a system message; needs chat = True
    chat: bool = True  # wrap the prompt in the tokenizer's chat template
    max_prompt_length: int = 128  # tokens, template included; longer rows are dropped and counted
    max_completion_length: int = 64  # tokens, EOS included; training targets longer are dropped
    seed: int = 0  # of the split and of the row order


@dataclass
class Optimizer:
    """AdamW with clipping and a schedule (optax)."""

    learning_rate: float = 1e-5
    schedule: str = "constant"  # constant, linear or cosine, after the warm-up
    warmup_ratio: float = 0.0  # share of the steps
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # 0 means no clipping
    moment_dtype: str = "float32"  # of the first moment: float32 or bfloat16


@dataclass
class SFT:
    """Cold start: completion-only cross-entropy on the reference texts."""

    batch_size: int = 32
    epochs: float = 1.0
    max_steps: int = 0  # 0: as many as `epochs` says
    gradient_accumulation_steps: int = 1
    eval_every: int = 0  # steps between dev evaluations; 0: only at the end
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(learning_rate=2e-5, schedule="cosine")
    )


@dataclass
class Sampling:
    """How completions are drawn. Truncations apply in the order top_k, top_p, min_p."""

    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0 means off
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass
class GRPO:
    """Group relative policy optimisation (arXiv 2402.03300) and its relatives, in TRL's words."""

    prompts_per_step: int = 16
    num_generations: int = 8
    lanes: int = 0  # completions of a prompt sampled at one time, one after another; 0: all
    epochs: float = 1.0
    max_steps: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    beta: float = 0.01
    kl_estimator: str = "k3"  # k1, k2 or k3
    kl_bias_correction: bool = True  # multiply the estimate by the importance ratio
    loss_type: str = "dapo"  # grpo, bnpo, dr_grpo or dapo
    importance_sampling_level: str = "token"  # or "sequence" (GSPO)
    epsilon: float = 0.2
    epsilon_high: Optional[float] = None  # None: epsilon
    delta: Optional[float] = None  # two-sided clipping's upper bound
    # In bfloat16 the sampler's log-probs differ from the update's. A token then counts
    # min(policy / sampler, cap) times (truncated importance sampling); None: once. Of rollouts
    # that are used once: in further passes the ratio is to the sampler anyway.
    importance_sampling_cap: Optional[float] = None
    advantage: str = "group"  # group, rloo (leave-one-out) or gdpo (each term by itself)
    scale_rewards: str = "group"  # group, batch or none
    num_iterations: int = 1  # passes over each rollout
    num_minibatches: int = 1  # optimizer steps a pass
    gradient_accumulation_steps: int = 1
    mask_truncated_completions: bool = False
    eval_every: int = 0
    # Nats a token of KL(base || policy) on general text that the stage may end with (Forgetting
    # measures it): beta adapts to stay inside. None: no limit.
    forgetting_budget: Optional[float] = None
    stop_on: tuple[str, ...] = ()  # kinds of trouble (stages/health.py) that end the stage early
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=5e-7))


@dataclass
class SelfSFT:
    """SFT on the start model's own completions, the best of each group (rejection sampling).

    Completions are drawn as grpo.sampling says and scored by the run's reward.
    """

    prompts: int = 0  # training rows to sample for; 0: all
    prompts_per_step: int = 32
    num_generations: int = 8
    keep: int = 1  # at most so many different completions of a prompt
    min_reward: float = 0.0  # those that score this or less are not learned from
    sft: SFT = field(default_factory=SFT)


@dataclass
class Interpolate:
    """Weights between two arms: (1 - weight) start + weight toward."""

    toward: str = ""  # an arm
    weight: float = 0.5


@dataclass
class Forgetting:
    """The live gauge of training stages: KL(base || policy) and NLL on general text.

    Its passages are those of evaluation.retention that follow the ones evaluation takes.
    """

    every: int = 0  # steps between measurements; 0: none
    rows: int = 64  # passages


@dataclass
class Reward:
    """R = semantic_weight R_sim + language_weight R_lang - penalties (arXiv 2605.14366)."""

    # What completions are compared with: target, source (no references needed, SG-SRL), or
    # shuffled, the target of another row: a control, from which nothing can be learned.
    anchor: str = "target"
    metric: str = "cosine"  # of the semantic term: cosine under the encoder, chrf or bleu
    semantic_weight: float = 1.5
    language_weight: float = 1.0
    length_weight: float = 0.0
    repetition_weight: float = 0.0
    hard_gate: bool = False  # the wrong language zeroes the whole reward
    tau: Optional[float] = None  # cosine below which R_sim = 0; None: calibrated on dev
    tau_quantile: float = 0.25  # of the cold-start model's dev cosines
    language: str = "en"  # ISO 639-1/3 code of the language that completions should be in
    max_length_ratio: float = 1.5  # completion / reference; the penalty grows from here
    min_length_ratio: float = 0.0  # and from here down; 0: short texts cost nothing
    max_repetition: float = 0.15  # share of repeated 4-grams; the penalty starts here


@dataclass
class Recover:
    """Optional short SFT after GRPO (SG-SRL, arXiv 2605.29502)."""

    sft: SFT = field(default_factory=SFT)


@dataclass
class Preference:
    """Pairwise judging by a language model; off while base_url is empty."""

    base_url: str = ""  # of an OpenAI-compatible endpoint, such as http://localhost:8000/v1
    model: str = ""  # the judge's name at the endpoint
    api_key_env: str = ""  # NAME of the environment variable that holds the key; '': no key
    pairs: tuple[str, ...] = ()  # arms to compare, FIRST:SECOND
    max_rows: int = 100  # held-out rows of each pair; 0: all
    # Names in braces are replaced: {source}, {reference}, {first} and {second}.
    prompt: str = (
        "Two systems answered the same task. Judge which answer says more faithfully and fluently "
        "what the reference says. Do not let the order or the length of the answers sway you.\n\n"
        "[Task]\n{source}\n\n[Reference]\n{reference}\n\n"
        "[Answer A]\n{first}\n\n[Answer B]\n{second}\n\n"
        "Explain in one or two sentences, then end with your verdict: [[A]] if A is better, [[B]] "
        "if B is better, [[C]] if they are equally good or bad."
    )
    temperature: float = 0.0
    max_tokens: int = 512  # of the judge's answer
    timeout: float = 60.0  # seconds without a word from the server
    retries: int = 4  # further tries of a request that met passing trouble
    concurrency: int = 8  # requests at one time


@dataclass
class Evaluation:
    """What every arm is measured on."""

    max_rows: int = 256  # held-out rows
    batch_size: int = 32
    bootstrap: int = 1000  # resamples behind each confidence interval
    retention: str = ""  # plain text, one passage a line: what the model should not forget
    max_retention_rows: int = 128
    max_retention_length: int = 128  # tokens a passage
    # What a model can still do: multiple_choice:FILE, reading:FILE, format (evals/tasks.py).
    tasks: tuple[str, ...] = ()
    out_of_domain: tuple[str, ...] = ()  # further test sets, in the form of data.test
    max_task_rows: int = 256  # questions a task; 0: all
    max_task_length: int = 1024  # tokens of question and answer; longer ones lose the start
    max_answer_length: int = 128  # tokens of a generated answer
    choice_prompt: str = "Question: {question}\nAnswer:"
    reading_prompt: str = (
        "Read the text and answer the question with a few words taken from it.\n\n"
        "Text: {context}\n\nQuestion: {question}"
    )
    preference: Preference = field(default_factory=Preference)


@dataclass
class Mesh:
    """Devices along each axis. 0: plan/choose.py decides; -1: what is left (a 0 beside it is 1)."""

    data: int = 0  # replicas, each with rows of its own
    fsdp: int = 0  # devices that share a replica's weights, and split its rows too
    tensor: int = 0  # devices that share each layer's heads, and see the same rows


@dataclass
class Checkpoint:
    """Orbax checkpoints of each training stage."""

    every: int = 100  # steps
    keep: int = 2  # newest ones; the best on dev is kept besides
    load_best_at_end: bool = False  # a stage's result is its best on dev, not its last


@dataclass
class Export:
    """Hugging Face folders of finished arms."""

    arms: tuple[str, ...] = ()  # (): the last trained one
    dtype: str = "bfloat16"  # of whole models: float32, bfloat16 or float16
    adapter: bool = True  # with LoRA, ARM-adapter/ too: the adapter alone, in PEFT's form, float32


@dataclass
class Log:
    every: int = 1  # steps between metric rows
    samples_every: int = 10  # steps between entries of samples.jsonl
    samples: int = 4  # prompts an entry
    profile_steps: int = 0  # of each training stage, traced into WORKDIR/profile/ARM


@dataclass
class Arm:
    """One row of an experiment: what is done to the weights of which arm, with which settings."""

    name: str = ""
    method: str = ""  # sft, self_sft, grpo or interpolate
    start: str = "base"  # the arm whose weights it begins from
    # Arms of one group are measured on the same held-out rows and compared. Another group, with
    # `data` overrides of its own, is another task, such as few-shot transfer.
    group: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)  # {"grpo.beta": 0.0, ...}


@dataclass
class Config:
    """A run: the stages, in order, and what each needs; or an experiment of many arms."""

    stages: tuple[str, ...] = ("sft", "grpo", "evaluate", "export")
    # An experiment: a tree of arms instead of training stages, which `stages` then leaves out.
    arms: tuple[Arm, ...] = ()
    only: tuple[str, ...] = ()  # arms to work on now, here; (): all. For several machines, one run
    seed: Optional[int] = None  # None: a fresh one, recorded in config.json
    on_nonfinite: str = "stop"  # where a loss or gradient is not finite; or "skip": leave it out
    model: Model = field(default_factory=Model)
    encoder: Encoder = field(default_factory=Encoder)
    data: Data = field(default_factory=Data)
    sft: SFT = field(default_factory=SFT)
    self_sft: SelfSFT = field(default_factory=SelfSFT)
    grpo: GRPO = field(default_factory=GRPO)
    recover: Recover = field(default_factory=Recover)
    interpolate: Interpolate = field(default_factory=Interpolate)
    reward: Reward = field(default_factory=Reward)
    forgetting: Forgetting = field(default_factory=Forgetting)
    evaluation: Evaluation = field(default_factory=Evaluation)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    export: Export = field(default_factory=Export)
    log: Log = field(default_factory=Log)


TRAINING = ("sft", "grpo", "recover")  # the stages that make an arm
STAGES = (*TRAINING, "evaluate", "export")  # all there are, in their order
# Kinds of trouble that a GRPO stage is watched for (stages/health.py).
TROUBLE = (
    "reward_collapse", "length_explosion", "length_collapse", "repetition", "language_drift",
    "kl_blowup",
)  # fmt: skip
METHODS = ("sft", "self_sft", "grpo", "interpolate")  # of the rows of `arms`
