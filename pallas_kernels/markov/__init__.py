"""Tokens of a block drawn one after another from base logits and the Markov head's bias."""
