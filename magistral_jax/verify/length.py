"""The length part of the reward (report §2.2.3, Eq. 1)."""


def length_reward(num_tokens: int, *, max_length: int, length_cache: int, penalty: float) -> float:
    """Soft penalty for completions that come close to the length limit.

        0                                        where |y| ≤ l_max − l_cache
        −penalty · (|y| − l_max + l_cache)/l_cache   up to l_max
        −penalty                                 beyond

    Args:
      num_tokens: |y|, completion tokens with the stop token.
      max_length: l_max in tokens.
      length_cache: l_cache in tokens; 0 switches the penalty off.
      penalty: Largest penalty, as a positive number.

    Returns:
      A number in [−penalty, 0].

    Source: Magistral (arXiv:2506.10910), section 2.2.3, Eq. 1.
    Differs: the penalty's size is a parameter (0.1 in the report).
    """
    excess = num_tokens - (max_length - length_cache)
    if length_cache == 0 or excess <= 0:
        return 0.0
    return -penalty * min(1.0, excess / length_cache)
