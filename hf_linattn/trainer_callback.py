"""The schedule of the dropout substitute for `transformers.Trainer` and those built on it, e.g. TRL's SFTTrainer."""

from transformers import TrainerCallback

from hf_linattn.layers import set_attention_dropout


class AttentionDropoutSchedule(TrainerCallback):
    """Anneals p linearly to 0 over training, so that training ends on the function evaluation uses (dropout.py).

    Args:
        p (`float`): variance of the noise at the first step, in [0, 1); 0.1 in the paper's experiments.
    """

    def __init__(self, p: float):
        if not 0 <= p < 1:
            raise ValueError(f"p: expected a number in [0, 1), got {p!r}")
        self.p = p

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Set p for the step that begins; Transformers' callback contract."""
        set_attention_dropout(model, self.p * (1 - state.global_step / state.max_steps))
