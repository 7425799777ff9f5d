"""Other people's pictures and captions: folders are read, checked and downloaded here. Without torch."""

from .check import CheckReport, check_folder
from .download import download_coco
from .layouts import KINDS, Fault, Records, read_folder
from .pictures import examine, open_image, to_rgb

__all__ = ["Records", "read_folder", "Fault", "KINDS", "CheckReport", "check_folder", "open_image", "to_rgb", "examine",
           "download_coco"]  # fmt: skip
