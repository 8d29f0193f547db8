"""Verifiable rewards: graders in killable worker processes.

with GraderPool(config.reward) as pool:
    grades = pool.grade([GradeRequest(prompt, response, answer)])
"""

from __future__ import annotations

from etr_megatron.reward.functions import load_grader
from etr_megatron.reward.grade import Grade, GradeRequest
from etr_megatron.reward.pool import GraderPool

__all__ = ["Grade", "GradeRequest", "GraderPool", "load_grader"]
