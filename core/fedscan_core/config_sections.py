"""The sections of RUN.toml, one frozen class each; `fedscan_core.config` puts them together.

Every key's meaning is its `description`, which `fedscan config --explain` prints.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MODEL_NAMES = ("scatter", "cnn", "resnet18", "densenet121", "unet2d", "unet3d")
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"


class Section(BaseModel):
    """A table of RUN.toml: immutable, strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class Task(Section):
    """What the model learns to say about an image."""

    kind: Literal["classification"] = Field(
        "classification", description="Kind of task. Two labels: one logit; more: softmax."
    )
    labels: tuple[str, ...] = Field(
        ("0", "1"),
        min_length=2,
        description="The classes in order, negative first. The label column holds these names or their 0-based number.",
    )
    image_size: tuple[int, ...] = Field(
        (64, 64),
        min_length=2,
        max_length=3,
        description="Pixels the model sees: [height, width]; one number is a square.",
    )
    channels: Literal[1, 3] = Field(1, description="1 = grey, 3 = colour. Images are converted.")
    modality: str = Field("", description='DICOM modality the task is meant for: DX, CT, ...; "" = whatever there is.')
    window: Literal["header", "full"] | tuple[float, float] = Field(
        "header",
        description='Grey values shown, DICOM only: "header" = the image\'s own window; "full" = its smallest to its '
        "largest value; [center, width] in its units, such as [-600, 1500] HU for lungs.",
    )

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value

    @field_validator("image_size")
    @classmethod
    def _size_range(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 16 <= side <= 4096 for side in value):
            raise ValueError("each side must lie between 16 and 4096 pixels")
        return value

    @field_validator("window")
    @classmethod
    def _wide(cls, value: str | tuple[float, float]) -> str | tuple[float, float]:
        if not isinstance(value, str) and not value[1] >= 1:
            raise ValueError("a window is at least 1 wide")
        return value

    @field_validator("labels")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("labels must differ from each other")
        return value


class Model(Section):
    """Which network is trained, and from where it starts."""

    name: str = Field("scatter", description=f"One of {', '.join(MODEL_NAMES)}; see models/README.md.")
    init: str = Field(
        "random", description='"random" or the path of a local .safetensors file with the same names and shapes.'
    )
    trainable: Literal["all", "head", "norm"] = Field(
        "all", description="What is trained: all parameters, the head, or the norm layers and the head."
    )


class Privacy(Section):
    """The guarantee: (epsilon, delta)-DP per site for adding or removing one patient."""

    enabled: bool = Field(
        True,
        strict=True,
        description="false = no privacy at all: baselines in simulation only; said on every line of output.",
    )
    unit: Literal["patient", "image"] = Field(
        "patient", description='Whom the guarantee protects. "image" exists for comparison, in simulation only.'
    )
    target_epsilon: float | None = Field(
        None,
        gt=0,
        description="Each site's total epsilon for this run, training and evaluation together. 8 if nothing is said.",
    )
    noise_multiplier: float | None = Field(
        None, gt=0, description="Instead of target_epsilon: sigma of training and evaluation directly; epsilon follows."
    )
    delta: float | Literal["auto"] = Field(
        "auto", description='Probability that the bound fails. "auto" = min(1e-5, 1/(10 n)) for a site of n patients.'
    )
    clip: float | Literal["auto"] = Field(
        0.1,
        description='Clipping norm C of one patient\'s gradient; "auto" scales each to norm 1 (Bu et al. 2022).',
    )
    max_images_per_patient: int = Field(
        32,
        ge=1,
        le=4096,
        description="At most K images of a chosen patient enter a step, drawn afresh; bounds work, not privacy.",
    )
    engine: Literal["bookkeeping", "loop", "opacus"] = Field(
        "bookkeeping",
        description='Per-patient gradients: "bookkeeping" = one pass for all; "loop" = one pass per patient; '
        '"opacus" = its hooks. Hospitals refuse opacus: weights made to blow up rounding break its bound.',
    )

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("noise_multiplier") is not None:
            if isinstance(values, Mapping) and values.get("target_epsilon") is not None:
                raise ValueError("target_epsilon and noise_multiplier: give one; the other follows from it")
            return values
        return {**values, "target_epsilon": values.get("target_epsilon", 8.0)}

    @field_validator("delta")
    @classmethod
    def _delta(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 1e-12 <= value < 1e-2:
            raise ValueError("delta must lie between 1e-12 and 0.01")
        return value

    @field_validator("clip")
    @classmethod
    def _clip(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 1e-6 <= value <= 1e6:
            raise ValueError("the clipping norm must lie between 1e-6 and 1e6")
        return value


class Train(Section):
    """Local training. Everything here is public."""

    rounds: int = Field(100, ge=1, le=100_000, description="Rounds of the federation.")
    local_steps: int = Field(1, ge=1, le=10_000, description="DP-SGD steps at a site in each round.")
    patients_per_step: int | Literal["all"] = Field(
        "all",
        description='Expected patients in a step: the sampling rate is this over the declared cohort. "all" = rate 1.',
    )
    optimizer: Literal["sgd", "adam"] = Field(
        "sgd", description="The site's optimizer; its state starts anew every round."
    )
    learning_rate: float = Field(
        10.0,
        gt=0,
        description="The site's learning rate. The default suits scatter with clip 0.1; deep networks want less.",
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="The site's momentum within a round (sgd).")
    weight_decay: float = Field(
        0.0, ge=0, description="L2 shrinkage per step, applied after the noise (costs no privacy)."
    )
    augmentation: Literal["none", "flip", "shift"] = Field(
        "none", description='Random views: "flip" mirrors, "shift" moves by up to 1/16 of the side and mirrors.'
    )
    multiplicity: int = Field(
        1, ge=1, le=64, description="Views of each image inside one patient's gradient (De et al. 2022)."
    )
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of the running average of the global model that is released; 0 = off."
    )
    tail_average: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Release the mean of the global models of this last share of the rounds; 0 = off. Not with ema.",
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="For partition, start weights and everything but noise and sampling."
    )

    @field_validator("patients_per_step")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if not isinstance(value, str) and value < 1:
            raise ValueError("patients_per_step must be at least 1")
        return value


class Aggregation(Section):
    """How the server turns updates into the next global model. All post-processing: costs no privacy."""

    strategy: Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi"] = Field(
        "fedavgm", description="fedavg, fedprox (local pull), fedavgm (server momentum), fedadam, fedyogi."
    )
    server_learning_rate: float = Field(1.0, gt=0, description="Step along the mean update.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Server momentum (fedavgm); beta_1 (fedadam, fedyogi).")
    beta_2: float = Field(0.99, ge=0, lt=1, description="Second-moment decay (fedadam, fedyogi).")
    tau: float = Field(1e-3, gt=0, description="Adaptivity floor (fedadam, fedyogi).")
    proximal_mu: float = Field(0.01, ge=0, description="Pull towards the round's global model (fedprox).")
    weights: Literal["declared", "uniform"] = Field(
        "declared", description="Public weights of the sites: their declared cohort sizes, or all equal."
    )
    min_sites: int = Field(
        3,
        ge=1,
        description="Quorum: with fewer usable updates a round is void. In simulation capped by the sites there are.",
    )


class Evaluation(Section):
    """How the model is judged."""

    split: Literal["val", "test"] = Field("test", description="Held-out patients: tune on val, report test once.")
    every: int = Field(
        10, ge=0, description="Simulation: evaluate every so many rounds and at the end; 0 = at the end only."
    )
    private: bool = Field(
        True,
        strict=True,
        description="Sites answer one noisy score histogram at the end, charged to their ledgers: works in deployment. "
        "Without privacy.enabled there is none.",
    )
    budget_share: float = Field(
        0.2, gt=0, lt=1, description="Share of the target epsilon that fixes the private evaluation's noise."
    )
    bins: int = Field(10, ge=10, le=20, description="Score bins of the private histogram: fewer bins, less noise.")
    threshold: float = Field(
        0.5, gt=0, lt=1, description="Score from which an image counts as positive; it must be an edge of the bins."
    )
    groups: tuple[Literal["sex", "age"], ...] = Field(
        (), description="Private metrics also by these; each shares the same budget, so every figure gets noisier."
    )
    age_edges: tuple[int, ...] = Field(
        (40, 65), min_length=1, max_length=8, description="Where one age group ends and the next begins, in years."
    )

    @field_validator("groups")
    @classmethod
    def _different(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("each attribute once")
        return value

    @field_validator("age_edges")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted({edge for edge in value if 1 <= edge <= 90}):
            raise ValueError("ages must rise and lie between 1 and 90 (older people are cached as 90)")
        return value

    @model_validator(mode="after")
    def _threshold_on_an_edge(self) -> "Evaluation":
        edge = round(self.threshold * self.bins)
        if not 0 < edge < self.bins or abs(self.threshold * self.bins - edge) > 1e-9:
            below = min(max(int(self.threshold * self.bins), 1), self.bins - 1)
            near = sorted({below / self.bins, min(below + 1, self.bins - 1) / self.bins})
            raise ValueError(
                f"threshold {self.threshold:g} is not an edge of {self.bins} bins; the next ones are "
                f"{' and '.join(f'{value:.4g}' for value in near)}, or change evaluation.bins"
            )
        return self


class SiteRule(Section):
    """One or several pretend sites made of the rows of a research table."""

    name: str = Field(pattern=NAME_PATTERN, description="The site's name in this run.")
    members: tuple[str, ...] = Field(
        (), description="Values of the site column that belong to it; empty = its own name."
    )
    parts: int = Field(1, ge=1, le=4096, description="Split it by patient into this many sites NAME-1, NAME-2, ...")
    role: Literal["train", "evaluate"] = Field("train", description='"evaluate": never trains, only measures.')


class Data(Section):
    """Where pretend sites get their images. A deployed site ignores this section: its own site.toml decides."""

    source: Literal["table", "phantom", "hospitals"] = Field(
        "table",
        description='"table": images and a CSV; "phantom": synthetic hospitals as DICOM; "hospitals": a folder for '
        "each site with dicom/, labels.csv and consent.csv, taken in through the hospital's door.",
    )
    dir: str | None = Field(None, description="Folder of the images; --data overrides it.")
    table: str = Field(
        "metadata.csv",
        description="CSV in that folder with the columns file, patient_id, label [, index, site, split, ...].",
    )
    label_column: str = Field("label", description="Column that holds the label.")
    sites: tuple[SiteRule, ...] = Field(
        (), description="Which rows make which site; empty = one site per value of the site column."
    )


class Simulation(Section):
    """Pretend hospitals on one machine."""

    backend: Literal["inline", "ray"] = Field(
        "inline", description='"inline": this process; "ray": Flower\'s simulation runtime.'
    )
    sites: int = Field(4, ge=1, le=4096, description="How many sites (phantom source, or partition).")
    partition: Literal["none", "iid", "dirichlet", "quantity"] = Field(
        "none", description="Ignore the site column and deal patients out: evenly, by label skew, or by size skew."
    )
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration of the skew; smaller is more unequal.")
    patients: int = Field(120, ge=8, le=100_000, description="Patients of each phantom hospital.")
    cpus_per_site: float = Field(1.0, gt=0, description="Ray: processors per site process.")
    gpus_per_site: float = Field(0.0, ge=0, description="Ray: share of a GPU per site process.")


class Study(Section):
    """Why the run is made and on whose word: what a hospital's policy and the people who approve runs look at."""

    purpose: str = Field(
        "", max_length=200, description="What for, in the words of the sites' policies (policy.purposes)."
    )
    question: str = Field("", max_length=2000, description="Plain words for the people who approve the run.")
    ethics_approval: str = Field("", max_length=200, description="Reference of the ethics approval the sites know.")
    data_use_agreement: str = Field("", max_length=200, description="Reference of the agreement with the sites.")
    contact: str = Field("", max_length=200, description="Whom a site's questions go to.")


class Federation(Section):
    """Real hospitals: which of them, and how long they are waited for. Simulation ignores this section."""

    sites: tuple[str, ...] = Field((), description="Sites asked to take part; empty = every enrolled site.")
    round_minutes: float = Field(
        60.0, gt=0, le=7 * 24 * 60, description="A site that has not answered by then is missing in that round."
    )
    approval_hours: float = Field(
        72.0, gt=0, le=90 * 24, description="How long sites may take to approve; then the run starts with who did."
    )
