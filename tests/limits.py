"""A model whose memory ends at some number of samples."""

from __future__ import annotations

import torch

_ASKED = (
    "per_sample_loss",
    "sampled_loss",
    "score",
    "activations",
    "features",
    "embedding",
    "head_inputs",
    "target_log_probability",
)


def limited(adapter, largest, asked=None):
    """Return ``adapter``, changed: it runs out of memory once it has read more than ``largest``.

    That is after the pass over the batch, so that statistics and random states have moved. What
    was asked of it, with how many samples, is noted in the list ``asked``. A fork has it too.
    """
    kind = type(adapter)

    def method(name):
        def limited_method(self, batch, *more):
            answer = getattr(kind, name)(self, batch, *more)
            if asked is not None:
                asked.append((name, len(batch)))
            if len(batch) > largest:
                raise torch.OutOfMemoryError("out of memory")
            return answer

        return limited_method

    methods = {name: method(name) for name in _ASKED if hasattr(kind, name)}
    adapter.__class__ = type(f"Limited{kind.__name__}", (kind,), methods)
    return adapter
