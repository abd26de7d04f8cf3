"""Metrics of peers: an import path for users; the code is in `codistill.evaluation.metrics`."""

from codistill.evaluation.metrics import NUM_BINS, PeerMetrics

__all__ = ["NUM_BINS", "PeerMetrics"]
