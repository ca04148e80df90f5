"""Numbers and names that several kernels share."""

import math

EPS = 1e-6  # added to the mean square in every RMSNorm, as published
LOG2E = math.log2(math.e)  # softmax is computed in powers of 2, which is what the hardware's exponential does

# The parts of a step in a profile. Everything that an operation computes is under the `jax.named_scope` of its part, and the
# kernels' own names begin with it; `jitjax.benchmarks.profile` sorts a trace by them.
ATTENTION = "attention"
NORM = "norm"
ROPE = "rope"
SWIGLU = "swiglu"
MLP = "mlp"  # matmuls with SwiGLU inside
DROPOUT = "dropout"
SCOPES = ATTENTION, NORM, ROPE, SWIGLU, MLP, DROPOUT
