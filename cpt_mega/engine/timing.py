"""Seconds of the phases of a step: by CUDA events on a GPU, so that asking waits for nothing, by the clock elsewhere."""

import time

import torch

from cpt_mega.engine.host import has_gpu


class PhaseClock:
    """Marks between phases; ``seconds`` once the device has passed the last one."""

    def __init__(self):
        self._marks = [_mark()]

    def mark(self) -> None:
        """One phase ends here and the next begins."""
        self._marks.append(_mark())

    def seconds(self) -> list[float]:
        """Length of each phase. On a GPU this waits for the last mark."""
        if not has_gpu():
            return [end - start for start, end in zip(self._marks, self._marks[1:], strict=False)]
        self._marks[-1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in zip(self._marks, self._marks[1:], strict=False)]


def _mark():
    if not has_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
