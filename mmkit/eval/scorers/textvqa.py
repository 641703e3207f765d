"""TextVQA accuracy (Singh et al. 2019) by the M4C evaluator that mmf, LLaVA and lmms-eval share."""

from __future__ import annotations

from collections.abc import Sequence

from mmkit.eval.scorers.vqa import leave_one_out, rule_m4c


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of one TextVQA answer: M4C processing on both sides, each human answer left out once.

    Args:
        prediction: The model's answer, raw.
        answers: The ten human answers, raw.

    Returns:
        0, 0.3, 0.6, 0.9 or 1.
    """
    # By position, not by equality as VQA's code has it: TextVQA's answers are bare texts, and equal ones keep their votes.
    return leave_one_out(*rule_m4c(prediction, answers))
