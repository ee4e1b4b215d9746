"""TensorBoard: scalars of a watched job, and a heat map of its experts' loads.

L layers · E experts

profiler.sinks["tensorboard"] = TensorBoard("runs/moe")
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.profile import Profile
from ..runtime.profiler import Update

CELL = 8
STOPS = np.array([0.0, 1.0, 2.0, 4.0])
COLOURS = np.array([[20, 30, 70], [40, 120, 150], [240, 190, 60], [200, 40, 30]], dtype=float)
NO_EXPERT = 235


def heat_map(profile: Profile) -> NDArray[np.uint8]:
    """The smoothed loads over their layer's mean as an image (L * 8, E * 8, 3): dark cold, red hot.

    Red is four times the mean and above; a layer with fewer experts than others ends in grey.
    """
    width = max((layer.num_experts for layer in profile.layers), default=1)
    image = np.full((max(1, len(profile.layers)), width, 3), NO_EXPERT, dtype=np.uint8)
    for row, layer in enumerate(profile.layers):
        relative_E = np.array(layer.share_E) * layer.num_experts
        for channel in range(3):
            colour_E = np.interp(relative_E, STOPS, COLOURS[:, channel])
            image[row, : layer.num_experts, channel] = colour_E.round()
    return image.repeat(CELL, axis=0).repeat(CELL, axis=1)


class TensorBoard:
    """A sink that writes scalars at every poll, the heat map at every `image_every`-th.

    Raises:
        ImportError: the tensorboard package is missing.
    """

    def __init__(self, folder: str | os.PathLike[str], *, image_every: int = 10) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard needs its package; pip install 'moesaic[monitoring]'"
            ) from error
        self.writer: Any = SummaryWriter(str(folder))
        self.image_every = image_every
        self._updates = 0

    def __call__(self, update: Update) -> None:
        profile, add = update.profile, self.writer.add_scalar
        add("moe/tokens_per_second", profile.tokens_per_s, profile.step)
        add("moe/balancedness", profile.balancedness, profile.step)
        for layer in profile.layers:
            add(f"balancedness/{layer.name}", layer.balancedness, profile.step)
            add(f"hot_experts/{layer.name}", len(layer.hot), profile.step)
            add(f"cold_experts/{layer.name}", len(layer.cold), profile.step)
            add(f"drift/{layer.name}", int(layer.drifted), profile.step)
        if self._updates % self.image_every == 0:
            image = heat_map(profile)
            self.writer.add_image("experts/load", image, profile.step, dataformats="HWC")
        self._updates += 1

    def close(self) -> None:
        """Write what is held and close the files."""
        self.writer.close()
