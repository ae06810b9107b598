"""Pictures of a distillation, with matplotlib (``pip install 'detr-kd-losses[plot]'``).

Each function draws on one Axes and returns it: give yours as `ax`, or get a new figure of pyplot. Colours are those of
Okabe and Ito, which people see apart whatever their colour vision, and nothing is told by colour alone.
"""

try:
    import matplotlib as _  # noqa: F401
except ModuleNotFoundError as error:
    msg = "detr_kd_losses.plotting needs matplotlib: pip install 'detr-kd-losses[plot]'"
    raise ModuleNotFoundError(msg, name=error.name) from error

from detr_kd_losses.plotting.curves import plot_instability, plot_magnitudes, plot_terms
from detr_kd_losses.plotting.images import plot_mask, plot_matching

__all__ = ["plot_instability", "plot_magnitudes", "plot_mask", "plot_matching", "plot_terms"]
