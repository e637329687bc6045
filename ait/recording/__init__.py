"""Recordings of what the workspaces of a model do."""

from ait.recording.history import MemoryHistory
from ait.recording.loggers import WorkspaceLogger
from ait.recording.recorder import Recorder, record
from ait.recording.scalars import scalars
from ait.recording.trace import AttentionRecord, LayerRecord, Pass, Trace, WriteRecord

__all__ = [
    "AttentionRecord",
    "LayerRecord",
    "MemoryHistory",
    "Pass",
    "Recorder",
    "Trace",
    "WorkspaceLogger",
    "WriteRecord",
    "record",
    "scalars",
]
