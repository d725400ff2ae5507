"""Many deltas in one engine, chosen per request (`vllm serve BASE --enable-lora`).

hooks     what is replaced or added in vLLM's classes, and whether it is there
names     the front: a request's `model` to `name@digest`, checked and loaded before it is queued
manager   each rank: deltas in host memory, in slots of the device, and the rows of each step
modules   the sites of a model: its modules, and which part of each tensor a rank has
sites     what rows of a slot add to a module's outputs
sharding  a rank's part of a packed delta
memory    a delta as one block of memory, that one copy places
"""
