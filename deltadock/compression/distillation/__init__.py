"""The scales trained end to end, the codes frozen."""
