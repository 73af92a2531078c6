"""Cut, merge and stream: from a supernet and a plan to the weights of a dense model, one module at a time."""

from amoeba_export.materialize.stream import materialize_subnet, stream_subnets

__all__ = ["materialize_subnet", "stream_subnets"]
