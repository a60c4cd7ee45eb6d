"""Gradient inversion as a picture: what a malicious server reads out of one update, without and with privacy.

The attack is the imprint layer of Fowl et al. 2021 ("Robbing the Fed", arXiv 2110.13057): a first layer whose units
all measure an image's brightness and switch on at rising thresholds. Two neighbouring units differ by the images
between their thresholds; where that is one image, the difference of their gradients is this image, times a number that
the biases' gradients tell. A server of fedscan cannot send such a network (it sends configuration, no code): this is
the worst case, an attacker who chose the network, its weights and every public setting.

The update is that of the real `train_round`: engine, clip and noise with the sigma of the run's plan. Phantom patients
only. It shows one attack that fails; that every attack must fail is what the guarantee says, not this picture.

Shapes: N images of side S; J units of the imprint layer; A attempts of the attacker.
"""

import dataclasses
import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fedscan import phantom
from fedscan_client.cohort import Patients
from fedscan_client.train import train_round
from fedscan_core import accounting
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError

SIDE = 64
UNITS = 256
PATIENTS = 12
_SHOWN = 4
RECOVERED_DB = 30.0  # above it, anybody recognises the picture
_PERFECT_DB = 60.0
_BEST_DB = 99.0  # what float32 allows is no news beyond this

Images = NDArray[np.float64]


@dataclass(frozen=True)
class Inversion:
    """The images of one update and the attacker's best attempt at each, [N, S, S] in [0, 1], with PSNR in dB, [N]."""

    plan: SitePlan
    original: Images
    without: Images
    private: Images
    db_without: NDArray[np.float64]
    db_private: NDArray[np.float64]
    db_grey: NDArray[np.float64]  # of a picture of nothing but each image's mean: what knowing nothing gives
    first_of: tuple[int, ...]  # index of each patient's first image

    def as_json(self) -> dict[str, Any]:
        """The numbers, for --json."""
        return {
            "patients": len(self.first_of),
            "images": len(self.original),
            "noise_multiplier": self.plan.noise_multiplier,
            "epsilon": self.plan.epsilon,
            "delta": self.plan.delta,
            "recovered_from_db": RECOVERED_DB,
            "recovered_without": int((self.db_without > RECOVERED_DB).sum()),
            "recovered_private": int((self.db_private > RECOVERED_DB).sum()),
            "psnr_without_median": round(float(np.median(self.db_without)), 2),
            "psnr_private_median": round(float(np.median(self.db_private)), 2),
            "psnr_grey_median": round(float(np.median(self.db_grey)), 2),
        }


def invert(run: RunConfig, *, patients_declared: int | None = None, seed: int = 0) -> Inversion:
    """Attacks one step in which all of PATIENTS phantom patients take part, without privacy and with the run's.

    Args:
        run: its privacy section and its plan's sigma are used.
        patients_declared: declared cohort, default simulation.patients; decides the plan.
        seed: of the phantoms.

    Raises:
        ConfigError: a run without privacy.
        PrivacyError: as `accounting.plan_for`.
    """
    if not run.privacy.enabled:
        raise ConfigError("This run has no privacy to show.", remedy="Set privacy.enabled = true.")
    plan = accounting.plan_for(run, run.simulation.patients if patients_declared is None else patients_declared)
    patients, original = _phantoms(seed)
    thresholds = _thresholds()
    always = dataclasses.replace(plan, sampling_rate=1.0)
    found = []
    for enabled in (False, True):
        attempts = _attempts(*_update(_Imprint(thresholds), patients, run, always, enabled))
        found.append(_closest(original, attempts))
    (without, db_without), (private, db_private) = found
    grey = np.broadcast_to(original.mean((1, 2), keepdims=True), original.shape)
    firsts = tuple(int(first) for first in patients.offsets[:-1])
    return Inversion(plan, original, without, private, db_without, db_private, _psnr(original, grey), firsts)


# -------------------------------------------------------------------------------------------------------------- attack


class _Imprint(nn.Module):
    """Units that measure mean brightness, each from its own threshold on; only they are trained."""

    def __init__(self, thresholds_J: Tensor) -> None:
        super().__init__()
        self.imprint = nn.Linear(SIDE * SIDE, len(thresholds_J))
        with torch.no_grad():
            self.imprint.weight.fill_(1 / SIDE**2)
            self.imprint.bias.copy_(-thresholds_J)

    def forward(self, x_B1SS: Tensor) -> Tensor:
        """[B, 1, S, S] -> [B, 1]."""
        return torch.relu(self.imprint(x_B1SS.flatten(1))).mean(1, keepdim=True)


@functools.cache
def _thresholds() -> Tensor:
    """Brightness quantiles of other phantoms: the attacker knows what radiographs look like, not these patients'."""
    rng = np.random.default_rng(10_001)
    means = [phantom.draw_image(p, rng, SIDE).mean() for p in phantom.draw_patients(rng, 400, 0.5, 2)]
    quantiles = np.quantile(means, (np.arange(UNITS) + 0.5) / UNITS)
    return torch.from_numpy(np.unique(quantiles)).float()


def _update(
    network: nn.Module, patients: Patients, run: RunConfig, plan: SitePlan, private: bool
) -> tuple[Images, Images]:
    """One real step; the change of the imprint layer's weights [J, S * S] and biases [J]."""
    train = {"local_steps": 1, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1e4}
    views = {"augmentation": "none", "multiplicity": 1}  # views would blur the recovered picture, not protect it
    run = run.model_copy(
        update={
            "privacy": run.privacy.model_copy(update={"enabled": private}),
            "train": run.train.model_copy(update={**train, **views}),
            "aggregation": run.aggregation.model_copy(update={"strategy": "fedavg"}),
        }
    )
    delta = train_round(network, patients, run, plan, round_=1, site="inversion")
    return delta["imprint.weight"].astype(np.float64), delta["imprint.bias"].astype(np.float64)


def _attempts(weight_JP: Images, bias_J: Images) -> Images:
    """Every picture the attacker can make of the update: [A, S, S] in [0, 1]."""
    last = np.zeros((1, weight_JP.shape[1]))
    apart_JP = weight_JP - np.concatenate([weight_JP[1:], last])
    apart_J = bias_J - np.concatenate([bias_J[1:], [0.0]])
    live = np.abs(apart_J) > 1e-6 * np.abs(apart_J).max()
    ratio = np.clip(apart_JP[live] / apart_J[live, None], 0.0, 1.0)
    # A second way, for noise that spoils the number from the biases: stretch the difference itself, in both signs.
    low, high = np.quantile(apart_JP[live], (0.01, 0.99), axis=1, keepdims=True)
    stretched = np.clip((apart_JP[live] - low) / np.maximum(high - low, 1e-300), 0.0, 1.0)
    attempts: Images = np.concatenate([ratio, stretched, 1 - stretched]).reshape(-1, SIDE, SIDE)
    return attempts


def _closest(original_NSS: Images, attempts_ASS: Images) -> tuple[Images, NDArray[np.float64]]:
    """The attempt nearest to each image: the attacker is even told which of its pictures to keep."""
    best = [int(np.argmin(((attempts_ASS - image) ** 2).mean((1, 2)))) for image in original_NSS]
    return attempts_ASS[best], _psnr(original_NSS, attempts_ASS[best])


def _psnr(original_NSS: Images, other_NSS: Images) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB, for values in [0, 1]: [N]."""
    error_N = ((original_NSS - other_NSS) ** 2).mean((1, 2))
    decibel: NDArray[np.float64] = np.minimum(_BEST_DB, -10 * np.log10(np.maximum(error_N, 1e-300)))
    return decibel


def _phantoms(seed: int) -> tuple[Patients, Images]:
    rng = np.random.default_rng([seed, SIDE])
    images, labels, offsets = [], [], [0]
    for patient in list(phantom.draw_patients(rng, PATIENTS, 0.5, 2)):
        own = [phantom.draw_image(patient, rng, SIDE).astype(np.float32) for _ in range(sum(patient.visits))]
        images += own
        labels += [int(patient.sick)] * len(own)
        offsets.append(len(images))
    x_N1SS = torch.from_numpy(np.stack(images))[:, None]
    names = tuple(f"phantom-{number}" for number in range(PATIENTS))
    patients = Patients(x_N1SS, torch.tensor(labels), np.array(offsets, dtype=np.int64), names)
    return patients, np.stack(images).astype(np.float64)


# -------------------------------------------------------------------------------------------------------------- picture

_CELL, _GAP, _LEFT, _INK, _SOFT = 224, 24, 36, (25, 30, 38), (105, 112, 122)
_GOOD, _BAD = (20, 110, 70), (170, 40, 40)


def png(attack: Inversion) -> bytes:
    """`picture` as a PNG file's content."""
    content = io.BytesIO()
    picture(attack).save(content, "PNG", optimize=True)
    return content.getvalue()


def picture(attack: Inversion) -> Image.Image:
    """Four patients as rows; the original, and what the attacker made of it without and with privacy, as columns."""
    shown = attack.first_of[:_SHOWN]
    head, foot, row = 152, 112, _CELL + 46
    width = 2 * _LEFT + 3 * _CELL + 2 * _GAP
    canvas = Image.new("RGB", (width, head + row * len(shown) + foot), "white")
    draw = ImageDraw.Draw(canvas)

    def text(x: float, y: float, words: str, size: int, ink: tuple[int, int, int] = _INK) -> None:
        draw.text((x, y), words, fill=ink, font=ImageFont.load_default(size))

    text(_LEFT, 24, "What one training update gives away", 28)
    text(_LEFT, 62, "A malicious server attacks the update of a site with 12 phantom patients.", 17, _SOFT)
    columns = ("The patient's image", "Recovered without DP", f"With DP, epsilon {attack.plan.epsilon:.3g}")
    for column, words in enumerate(columns):
        text(_LEFT + column * (_CELL + _GAP), head - 36, words, 19)
    for line, number in enumerate(shown):
        top = head + line * row
        results = ((attack.without, attack.db_without), (attack.private, attack.db_private))
        cells = [(attack.original[number], f"patient {line + 1}", _SOFT)]
        for images, db in results:
            seen = db[number] > RECOVERED_DB
            value = f"over {_PERFECT_DB:.0f}" if db[number] > _PERFECT_DB else f"{db[number]:.0f}"
            words = f"{'recovered' if seen else 'not recovered'}, PSNR {value} dB"
            cells.append((images[number], words, _BAD if seen else _GOOD))
        for column, (image_SS, words, ink) in enumerate(cells):
            x = _LEFT + column * (_CELL + _GAP)
            pixels = Image.fromarray((np.clip(image_SS, 0, 1) * 255).round().astype(np.uint8))
            canvas.paste(pixels.resize((_CELL, _CELL), Image.Resampling.NEAREST).convert("RGB"), (x, top))
            text(x, top + _CELL + 8, words, 17, ink)
    numbers = attack.as_json()
    y = head + row * len(shown) + 8
    for words in (
        f"Recovered of all {numbers['images']} images: {numbers['recovered_without']} without DP, "
        f"{numbers['recovered_private']} with DP. Plain grey would score {numbers['psnr_grey_median']:.0f} dB.",
        "Imprint attack (Fowl et al. 2021) on one step; the best of the attacker's attempts is shown.",
        "The epsilon is that of the whole run. Synthetic patients only; a demonstration, not a proof.",
    ):
        text(_LEFT, y, words, 15, _SOFT)
        y += 26
    return canvas
