"""The step loop: scheduling, the model runner, sampling."""
