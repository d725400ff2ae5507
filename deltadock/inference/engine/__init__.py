"""The step loop: scheduler, passes, prefixes, sampler. Of a delta it knows slot and digest."""
