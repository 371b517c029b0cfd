"""The configurations of adapters and of regrouping.

ExpertConfig is the base class of all methods with experts, BaditConfig is BADIT's.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_type_hints

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME
from pydantic import Field, Strict
from torch import Tensor

from badit.method.decomposition import (
    SvdMethod,
    expert_directions,
    expert_factors,
    top_singular_triples,
)
from badit.method.grouping import Solver
from badit.method.routing import GateKind, RouterInput
from badit.presets import (
    CLUSTER_GATES,
    RELEASED,
    RELEASED_REGROUPING,
    Options,
    filled,
    saved_section,
)
from badit.support.environment import how_to_install
from badit.support.errors import BaditError, check
from badit.support.steps import PositiveSteps

# The version of an adapter's files. Increase it with a change that other releases would read
# wrongly. tests/tuner/formats has an adapter of each version that is read. In version 2, BADIT has
# no options ``gated`` to ``codes``.
FORMAT = 3
OLDEST_FORMAT = 2
FORMAT_FIELD = "format_version"

# Strict, because pydantic would otherwise accept "8" and True as numbers.
Count = Annotated[int, Strict(), Field(ge=1)]
CountOrZero = Annotated[int, Strict(), Field(ge=0)]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Dropout = Annotated[float, Strict(), Field(ge=0, lt=1)]
Fraction = Annotated[float, Strict(), Field(ge=0, le=1)]
Share = Annotated[float, Strict(), Field(gt=0, le=1)]


def option(default: Any, help: str) -> Any:
    """Returns a dataclass field with a help text, whose type :func:`check_options` checks."""
    return field(default=default, metadata={"help": help})


def described(kind: Any) -> list[tuple[str, Any, str]]:
    """Returns name, default and help text of each option of a configuration, also of PEFT's."""
    options = []
    for entry in dataclasses.fields(kind):
        if not entry.init or "help" not in entry.metadata:
            continue
        default = entry.default
        if callable(entry.default_factory):
            default = entry.default_factory()
        options.append((entry.name, default, entry.metadata["help"]))
    return options


def check_options(config: Any, prefix: str = "") -> None:
    """Raises BaditError if an option of a dataclass is not of its type.

    ``prefix`` precedes the option's name in the message.
    """
    # With extras, because Annotated has the options' limits.
    kinds = get_type_hints(type(config), include_extras=True)
    for name, _, _ in described(type(config)):
        check(f"{prefix}{name}", getattr(config, name), kinds[name])


def peft_type(name: str) -> PeftType:
    """Returns ``PeftType.<name>``. The first call adds it: PEFT has no function for this."""
    if name not in PeftType.__members__:
        member: Any = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        # EnumType.__setattr__ rejects the names of members; type.__setattr__ does not.
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


def _refuse_other_format(version: Any) -> None:
    check(FORMAT_FIELD, version, Count)
    if version > FORMAT:
        raise BaditError(
            f"{FORMAT_FIELD}: the adapter has format {version}, this badit reads formats up to "
            f"{FORMAT}; install a later version of badit"
        )
    if version < OLDEST_FORMAT:
        raise BaditError(
            f"{FORMAT_FIELD}: the adapter has format {version}, an older format that this version "
            "does not read; train it again"
        )


@dataclass
class ExpertConfig(PeftConfig):
    """LoRA experts of rank ``r`` in the target modules. Subclasses set ``method``, add fields."""

    method: ClassVar[str]  # the method's name in PEFT's registry, in capitals
    needs_tasks: ClassVar[bool] = False  # the task of every row must be set with Hooks.rows_of
    needs_whole_weights: ClassVar[bool] = False  # not for sharded weights (FSDP, DeepSpeed)
    shares_A: ClassVar[bool] = False  # all experts share one A of r rows
    extensions = ()  # tasks that were added later; of BADIT, which overrides it with a field
    top_k = None  # methods with gates of only the top_k experts override it with an option

    num_experts: Count = option(8, "Number of experts, K.")
    r: Count = option(4, "Rank of each expert; the adapter's total rank is num_experts × r.")
    lora_alpha: Positive = option(32, "LoRA's alpha; the scaling is lora_alpha / r.")
    lora_dropout: Dropout = option(
        0.05,
        "Dropout probability of the adapter's input, in training only. It acts on the change of "
        "the initial factors.",
    )
    target_modules: list[str] | str | None = option(
        None,
        "Names of the modules to adapt, a regex, or 'all-linear'. Default: the MLP's gate "
        "projection (as in the paper), or its first projection if it has no gate; q_proj and "
        "v_proj if all MLPs are fused MoE experts.",
    )
    exclude_modules: list[str] | str | None = option(
        None, "Names of the modules not to adapt, or a regex."
    )
    modules_to_save: list[str] | None = option(
        None, "Additional modules to train in full and save with the adapter."
    )
    layers_to_transform: list[int] | Annotated[int, Strict()] | None = option(
        None, "Indices of the layers to adapt (default: all)."
    )
    layers_pattern: list[str] | str | None = option(
        None, "Name of the layer list that layers_to_transform indexes."
    )
    format_version: int = option(
        FORMAT, "Version of the adapter's files, set by badit; unknown versions are refused."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_other_format(self.format_version)
        # Adapters of an earlier version are saved in this one.
        self.format_version = FORMAT
        self.peft_type = peft_type(self.method)
        # Sets, as in PEFT's configurations, which save them as lists; a string is a regex.
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if isinstance(names, (list, tuple)):
                setattr(self, name, set(names))
        check_options(self)
        # After check_options, because the limit must be an integer.
        if self.top_k is not None:
            check("top_k", self.top_k, Annotated[int, Strict(), Field(ge=1, le=self.num_experts)])
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise BaditError(
                "layers_pattern: needs layers_to_transform, the layers' indices; "
                "set both or neither"
            )
        # PEFT applies layers_to_transform to names only.
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise BaditError(
                "layers_to_transform: needs a list of names in target_modules, "
                "or a regex without it"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Reads a saved configuration; the messages of its errors begin with its file."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except BaditError as error:
            file = Path(pretrained_model_name_or_path, CONFIG_NAME)
            raise BaditError(f"{file}: {error}") from None

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuses saved settings of another format; called by PEFT."""
        # A file without the type is no adapter's; PEFT says so.
        if "peft_type" in kwargs:
            _refuse_other_format(kwargs.get(FORMAT_FIELD, 1))  # the first adapters did not save it
        return super().check_kwargs(**kwargs)

    @property
    def scaling(self) -> float:
        """LoRA's scaling s = lora_alpha / r."""
        return self.lora_alpha / self.r

    @property
    def num_components(self) -> int:
        """The adapter's total rank N = K·r: the number of columns of B."""
        return self.num_experts * self.r

    @property
    def num_gates(self) -> int:
        """The number of gates of a prompt: one per expert, also of each extension."""
        return self.num_experts + len(self.extensions)

    @property
    def has_fixed_gates(self) -> bool:
        """Whether no gate depends on the input, so the adapter equals a plain LoRA."""
        return self.num_experts == 1 and not self.needs_tasks and not self.extensions

    @property
    def subtracted_share(self) -> float:
        """The share of the initial product s·B0 A0 that the forward pass subtracts.

        Above 0, A0 and B0 are stored.
        """
        return 0.0

    @property
    def gates_change(self) -> bool:
        """Whether the gates scale the change of the initial factors instead of the factors."""
        return False

    def initial_factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns A (N, I) and B (O, N) at step 0 for this base weight.

        None: LoRA's random A and zero B.
        """
        return None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves the configuration, and adds to PEFT's README.md how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        # badit.tuner or badit.baselines: importing it registers the method with PEFT.
        package = ".".join(type(self).__module__.split(".")[:2])
        note = (
            f"Loading this adapter with PEFT requires {how_to_install()} "
            f"and `import {package}` in your script."
        )
        path = Path(save_directory, "README.md")
        # PEFT writes it only if it saves a whole PeftModel.
        if not path.is_file():
            return
        text = path.read_text("utf-8")
        # An adapter may be saved to the same folder again.
        if note not in text:
            path.write_text(f"{text.rstrip()}\n\n{note}\n", "utf-8")


@dataclass(frozen=True)
class Extension:
    """Tasks that were added later to an adapter (:mod:`badit.tuner.extension`)."""

    tasks: list[str]
    rank: int  # of its expert
    clusters: int  # 0 for an expert that only later tasks still use
    used: int  # number of earlier abilities that it uses

    def __post_init__(self) -> None:
        check("extensions.tasks", self.tasks, list[Annotated[str, Strict()]])
        check("extensions.rank", self.rank, Count)
        check("extensions.clusters", self.clusters, CountOrZero)
        check("extensions.used", self.used, CountOrZero)

    @classmethod
    def of(cls, entry: Any) -> Self:
        """Returns an extension, or a saved one as a mapping; BaditError if it is not valid."""
        if isinstance(entry, cls):
            return entry
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(entry, dict) or entry.keys() != names:
            raise BaditError(f"extensions: each must have {', '.join(sorted(names))}")
        return cls(**entry)


@dataclass
class BaditConfig(ExpertConfig):
    """BADIT: ``num_experts`` LoRA experts of rank ``r`` in every target module, weighted by gates.

    Pass it to ``get_peft_model`` like any PEFT configuration, call ``badit.prepare(trainer)`` (in
    your own loop, ``hooks_of(model).start_task``), and train with a learning rate of 2e-3.

    The defaults are the paper's system (arXiv 2605.05676): experts from singular triples, groups
    of their components by spherical clustering of gradients, and a combination of experts for
    every prompt. The sizes are the paper's too (K 8, r 4, alpha 32, dropout 0.05, gate_proj).
    docs/paper-index.md says in what it differs: gates scale the change of the experts, they belong
    to clusters of prompts, and components are grouped before training.

    Options that are None are set to what they stand for (:func:`badit.presets.filled`).
    :meth:`cluster_gates` and :meth:`released` return the presets of :mod:`badit.presets`.
    """

    method: ClassVar[str] = "BADIT"
    #: The options of :meth:`cluster_gates` and of :meth:`released`.
    CLUSTER_GATES: ClassVar[Options] = CLUSTER_GATES
    RELEASED: ClassVar[Options] = RELEASED

    routing: Literal["prompt", "token"] = option(
        "prompt",
        "'prompt': one set of gates per sequence, computed from its prompt and kept for the whole "
        "generation. 'token': one set of gates per position.",
    )
    router_input: RouterInput | None = option(
        None,
        "Input of the gates with routing='prompt'. 'mean': the mean of the layer's input over the "
        "prompt, as in the paper. 'standardised' (default): this mean, standardised with its "
        "moments over training prompts.",
    )
    gates: GateKind | None = option(
        None,
        "'clusters': no router; in every layer, a prompt gets the fixed gates of the nearest of "
        "num_clusters centroids (see codes), which badit.prepare(trainer) or "
        "hooks_of(model).start_task(batches) finds before training. 'mean_one': K·softmax of a "
        "router; all gates are 1 at step 0. 'softmax': sum 1, as in the released code; with "
        "gated='factors', gates with sum 1 change the model at step 0. Default: 'clusters'; "
        "'mean_one' with routing='token', router_input='mean', top_k, target_parameters, a single "
        "expert, or init_weights='bad' and gated='factors'.",
    )
    gated: Literal["factors", "change"] | None = option(
        None,
        "What the gates scale with init_weights='bad'. 'change' (default): the change of the "
        "factors since step 0, so that step 0 is the base model with any gates. 'factors': the "
        "factors, as in the released code.",
    )
    key: Literal["layer", "embedding"] | None = option(
        None,
        "What clusters of prompts are found from. 'layer': each layer's input (default). "
        "'embedding': the prompt's mean token embedding, so that a prompt has the same cluster in "
        "all layers (default with codes='matched').",
    )
    codes: Literal["random", "matched", "grouped", "grouped-random"] | None = option(
        None,
        "The gates of clusters. 'grouped-random' (default): components are grouped by spherical "
        "clustering of their gradients before training, and a cluster has random gates with sum 1. "
        "'grouped': the same groups; a cluster has large gates for those in which its gradients "
        "are large. 'matched' (needs key='embedding'): clusters whose gradients agree share "
        "experts, and components join the experts that use them. 'random': random gates, no "
        "groups by gradients.",
    )
    permute_codes: bool = option(
        False, "Give the codes to other clusters: a placebo for experiments with codes."
    )
    num_clusters: Count = option(
        16, "Clusters of prompts per layer; in recipes of up to 8 mixed tasks, their number."
    )
    top_k: int | None = option(
        None,
        "Use only the k largest gates (default: all). With k = 1 the gate is constant, so the "
        "router does not learn. With gated='factors' and init_weights='bad', the unused experts' "
        "part of the base weight is missing at step 0.",
    )
    init_weights: Literal["lora", "directions", "bad"] | None = option(
        None,
        "'bad' (default): the paper's BAD, the top singular triples with their magnitudes in A "
        "and B. 'directions': A has the weight's top right singular vectors, scaled like LoRA's "
        "A; B is zero. 'lora': random A and zero B.",
    )
    svd_method: SvdMethod = option(
        "auto", "'exact', 'randomized', or 'auto' (randomized for large weights)."
    )
    svd_tolerance: Positive = option(
        1e-3, "Largest relative residual ‖Wv − σu‖/σ of a triple of the randomized SVD."
    )
    target_parameters: list[str] | None = option(
        None,
        "Names of fused weights of MoE experts to adapt, such as 'experts.gate_up_proj'. Each "
        "matrix has its own experts and gates. If target_modules is not set, nothing else is "
        "adapted.",
    )
    bias: Literal["none", "all", "badit_only"] = option(
        "none", "Biases to train: 'none', 'all' or 'badit_only'."
    )
    tasks: list[str] | None = option(
        None, "Names of the tasks, set by badit, to say what a later task would be confused with."
    )
    stores_clusters: bool = option(
        True,
        "Whether the adapter has the clusters that later tasks need, set by badit; False for "
        "earlier versions.",
    )
    extensions: list[Any] = field(default_factory=list)  # of Extension, set by badit
    mixing: NotNegative = option(
        0.0,
        "Temperature with which a prompt mixes the experts of its two nearest tasks, if tasks were "
        "added later (extend.mixing); 0: only the nearest task. Set by badit.",
    )

    @classmethod
    def cluster_gates(cls, **options: Any) -> Self:
        """Returns fixed random gates for clusters of prompts, with ``options``.

        In a recipe: ``method: cluster-gates``.
        """
        return cls(**{**cls.CLUSTER_GATES, **options})

    @classmethod
    def released(cls, **options: Any) -> Self:
        """Returns the form of the paper's released code (``preset: released``), with ``options``.

        It is trained with :class:`badit.RegroupCallback` (DOG). docs/method.md lists what differs.
        """
        return cls(**{**cls.RELEASED, **options})

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Completes settings of an earlier format; called by PEFT for a saved adapter."""
        kwargs.setdefault("stores_clusters", False)
        return saved_section(super().check_kwargs(**kwargs))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in filled(vars(self)).items():
            setattr(self, name, value)
        self._refuse_conflicts()
        check("extensions", self.extensions, list[Any])
        self.extensions = [Extension.of(entry) for entry in self.extensions]

    @property
    def added_tasks(self) -> list[str]:
        """The tasks that were added later."""
        return [task for extension in self.extensions for task in extension.tasks]

    @property
    def all_tasks(self) -> list[str]:
        """The tasks of the joint training, and those that were added or merged later."""
        # A merged task may be in several extensions.
        return list(dict.fromkeys([*(self.tasks or ()), *self.added_tasks]))

    @property
    def is_released_form(self) -> bool:
        """Whether initialisation and gates are those of the paper's released code."""
        names = ("routing", "router_input", "gates", "init_weights")
        is_released = all(getattr(self, name) == self.RELEASED[name] for name in names)
        return is_released and not self.gates_change

    def _refuse_conflicts(self) -> None:
        if self.router_input == "standardised" and self.routing != "prompt":
            raise BaditError(
                "router_input: 'standardised' needs routing='prompt'; use router_input='mean'"
            )
        can_cluster = self.router_input == "standardised" and self.top_k is None
        if self.gates == "clusters" and not can_cluster:
            raise BaditError(
                "gates: 'clusters' needs routing='prompt', router_input='standardised' and no top_k"
            )
        if self.codes != "random" and self.gates != "clusters":
            raise BaditError(f"codes: {self.codes!r} needs gates='clusters'")
        if self.key == "embedding" and self.gates != "clusters":
            raise BaditError("key: 'embedding' needs gates='clusters'")
        if self.codes == "matched" and self.key != "embedding":
            raise BaditError("codes: 'matched' needs key='embedding'; use codes='grouped'")
        if self.permute_codes and self.codes in ("random", "grouped-random"):
            raise BaditError("permute_codes: needs codes='matched' or 'grouped'")
        # PEFT does not apply layers_to_transform to target_parameters.
        can_be_fused = self.routing == "prompt" and self.layers_to_transform is None
        if self.target_parameters and not can_be_fused:
            raise BaditError(
                "target_parameters: needs routing='prompt', and full names instead of "
                "layers_to_transform"
            )
        # Older versions of PEFT save biases only for the methods that they know by name.
        if self.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise BaditError(
                "bias must be 'none' with PEFT before 0.21, which saves no trained biases; "
                "upgrade PEFT"
            )

    @property
    def subtracted_share(self) -> float:
        return 1.0 if self.init_weights == "bad" else 0.0

    @property
    def gates_change(self) -> bool:
        return self.gated == "change" and self.init_weights == "bad"

    def initial_factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.init_weights == "lora":
            return None
        triples = top_singular_triples(
            weight_OI, self.num_components, method=self.svd_method, tolerance=self.svd_tolerance
        )
        if self.init_weights == "bad":
            return expert_factors(triples, self.scaling)
        return expert_directions(triples)


TOP_K_REFUSED = (
    "regrouping would move components into experts that top_k switches off; remove top_k, or do "
    "not regroup"
)


@dataclass(frozen=True)
class RegroupOptions:
    """When and how to regroup components during training (DOG).

    Each regrouping uses the mean Gram matrix of the steps since the previous one.
    """

    every: PositiveSteps = option(
        20, "Optimizer steps between regroupings; below 1, a fraction of the run."
    )
    stop: Fraction = option(0.9, "Fraction of the run after which regrouping stops.")
    solver: Solver = option(
        "swap", "'swap': balanced k-means, then exact swaps; 'paper': the paper's iteration."
    )
    restarts: CountOrZero = option(10, "Number of starts of the solver from k-means.")
    rescale: bool | None = option(
        None,
        "Multiply moved components by the ratio of their old and new experts' mean gates. Default: "
        "true, except with gated='change'.",
    )
    reset_smallest: Share | None = option(
        None,
        "With gated='change': the share of components that may move, those whose factors have "
        "changed the least. A moved component starts again from its initial factors. Default: any "
        "component may move, and keeps its factors.",
    )

    RELEASED: ClassVar[Options] = RELEASED_REGROUPING

    def __post_init__(self) -> None:
        check_options(self, "regroup.")
        defaults = (type(self).solver, type(self).restarts)
        if self.reset_smallest is not None and (self.solver, self.restarts) != defaults:
            raise BaditError(
                "regroup.reset_smallest: exchanges components without a solver; leave out solver "
                "and restarts"
            )

    def fitted_to(self, config: "BaditConfig") -> Self:
        """Returns the options with their defaults for an adapter; BaditError if they conflict."""
        if self.rescale and config.gates_change:
            raise BaditError(
                "regroup.rescale: with gated='change', it would also multiply the initial factors, "
                "which are a part of the base model; leave it out"
            )
        if self.reset_smallest is not None and not config.gates_change:
            raise BaditError(
                "regroup.reset_smallest: needs gated='change' and init_weights='bad', whose "
                "initial factors are stored"
            )
        components = config.num_experts * config.r
        if self.reset_smallest is not None and round(self.reset_smallest * components) < 2:
            least = math.ceil(200 / components) / 100
            raise BaditError(
                f"regroup.reset_smallest: {self.reset_smallest} of {components} components is less "
                f"than two, so none can move; set at least {least}"
            )
        rescale = not config.gates_change if self.rescale is None else self.rescale
        return dataclasses.replace(self, rescale=rescale)

    def due(self, total_steps: int) -> range:
        """Returns the steps of a run after which it regroups."""
        every = int(self.every)
        if self.every < 1:
            every = max(1, round(self.every * total_steps))
        # Rounded first, because 0.29 · 100 is 28.999999999999996.
        last = math.floor(round(self.stop * total_steps, 6))
        # Steps are counted from 1, so `last` is included.
        return range(every, last + 1, every)
