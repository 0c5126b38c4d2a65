"""Figures and the run report. Reads what runs wrote; matplotlib is optional and loaded only when something is drawn."""

from jmm_fast.viz.clips import MaskedClip, masked_clip_of_run
from jmm_fast.viz.dataset import contact_sheet, write_dataset_page
from jmm_fast.viz.figures import class_accuracy, confusion_matrix, loss_curve, masked_clip
from jmm_fast.viz.report import write_report
from jmm_fast.viz.style import save

__all__ = [
    "MaskedClip",
    "class_accuracy",
    "confusion_matrix",
    "contact_sheet",
    "loss_curve",
    "masked_clip",
    "masked_clip_of_run",
    "save",
    "write_dataset_page",
    "write_report",
]
