"""What a result file must say about where its figures come from: the package's own, under the scripts' name for it."""

from pipeline.machine import machine

__all__ = ["machine"]
