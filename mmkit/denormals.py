"""Denormal numbers count as zero, in every thread that torch starts after this import.

Late in training they make a CPU many times slower. A worker thread takes the setting when it starts, so each module
at the root of our torch code imports this one, before the first parallel operation.
"""

import torch

FLUSHED: bool = torch.set_flush_denormal(True)  # False where the processor cannot
