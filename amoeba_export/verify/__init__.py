"""Verify: the bytes just written against the masked supernet, which shares no code with what wrote them."""

from amoeba_export.verify.artifact import FormatReport, VerifyReport, check_numbers, verify_artifact
from amoeba_export.verify.masked import masked_logits
from amoeba_export.verify.sidecars import sidecar_problems

__all__ = ["FormatReport", "VerifyReport", "check_numbers", "masked_logits", "sidecar_problems", "verify_artifact"]
