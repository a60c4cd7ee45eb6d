"""RUN.toml as typed, frozen values: what a researcher may ask for, checked before anything heavy is imported.

One file describes one experiment, in simulation and on real hospitals. The sections are
`fedscan_core.config_sections`; `fedscan_core.config_file` reads the file and words the errors. Importing this module
loads neither torch nor flwr.

>>> RunConfig.model_validate({"name": "demo", "task": {"labels": ["normal", "pneumonia"]}}).privacy.target_epsilon
8.0
"""

import difflib
import hashlib
import json

import tomli_w
from pydantic import Field, ValidationError, model_validator

from fedscan_core.config_sections import (
    MODEL_NAMES,
    NAME_PATTERN,
    Aggregation,
    Data,
    Evaluation,
    Federation,
    Model,
    Privacy,
    Section,
    Simulation,
    SiteRule,
    Study,
    Task,
    Train,
)
from fedscan_core.errors import ConfigError

__all__ = [
    "MODEL_NAMES",
    "NAME_PATTERN",
    "Aggregation",
    "Data",
    "Evaluation",
    "Federation",
    "Model",
    "Privacy",
    "RunConfig",
    "Section",
    "Simulation",
    "SiteRule",
    "Study",
    "Task",
    "Train",
    "for_sites",
    "from_server",
    "sha256",
    "to_toml",
]

# Below this the answer would be almost pure noise; above, a calibrated run is beyond use.
MIN_EPSILON = 0.01
MAX_NOISE_MULTIPLIER = 100.0
MAX_STEPS = 100_000  # of one run at a site: pricing more would take a site minutes


class RunConfig(Section):
    """One experiment."""

    name: str = Field(
        "run", pattern=NAME_PATTERN, description="Name of the run: letters, digits, dot, dash, underscore."
    )
    task: Task = Task()
    model: Model = Model()
    privacy: Privacy = Privacy()
    train: Train = Train()
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation = Evaluation()
    study: Study = Study()
    federation: Federation = Federation()
    data: Data = Data()
    simulation: Simulation = Simulation()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.model.name not in MODEL_NAMES:
            near = difflib.get_close_matches(self.model.name, MODEL_NAMES, n=1, cutoff=0.0)[0]
            raise ValueError(f"model.name: there is no model '{self.model.name}'; did you mean '{near}'?")
        if self.model.name in ("unet2d", "unet3d"):
            raise ValueError(
                "model.name: unet models segment, and the tasks of this version classify; choose another model"
            )
        if len(self.task.image_size) == 3:
            raise ValueError("task.image_size: 3-D images need a segmentation task, which this version does not train")
        if self.model.name == "scatter" and self.train.augmentation != "none":
            raise ValueError(
                "train.augmentation: scatter computes fixed features once per image; use 'none' or another model"
            )
        if self.train.rounds * self.train.local_steps > MAX_STEPS:
            raise ValueError(f"train.rounds times train.local_steps: more than {MAX_STEPS:,} steps cannot be priced")
        if self.train.augmentation == "none" and self.train.multiplicity > 1:
            raise ValueError("train.multiplicity: several identical views teach nothing; set train.augmentation")
        target, noise = self.privacy.target_epsilon, self.privacy.noise_multiplier
        if self.privacy.enabled and target is not None and target < MIN_EPSILON:
            raise ValueError(f"privacy.target_epsilon: {target} is below {MIN_EPSILON}: only noise would be left")
        if noise is not None and noise > MAX_NOISE_MULTIPLIER:
            raise ValueError(
                f"privacy.noise_multiplier: {noise} is above {MAX_NOISE_MULTIPLIER:g}: only noise would be left"
            )
        names = [rule.name for rule in self.data.sites]
        if len(set(names)) != len(names):
            raise ValueError("data.sites: two sites have the same name")
        if self.data.sites and all(rule.role == "evaluate" for rule in self.data.sites):
            raise ValueError("data.sites: every site only evaluates; at least one must train")
        return self


def to_toml(run: RunConfig) -> str:
    """The resolved run as TOML, every key written out; `parse` of it gives the same run."""
    return tomli_w.dumps(run.model_dump(mode="json", exclude_none=True))


def sha256(run: RunConfig) -> str:
    """Fingerprint of the resolved run (canonical JSON)."""
    text = json.dumps(run.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def for_sites(run: RunConfig) -> str:
    """What a site is told of the run, as JSON: everything but where pretend data lie and whom the server waits for."""
    return run.model_dump_json(exclude={"data", "simulation", "federation"})


def from_server(text: str) -> RunConfig:
    """Reads `for_sites` at a site, with the same checks."""
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError:
        raise ConfigError(
            "The server's run configuration does not fit this version.", remedy="Compare versions."
        ) from None
